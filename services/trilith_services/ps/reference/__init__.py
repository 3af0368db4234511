"""Tables, groups of tables and files as the reference system has them, over the engine."""
