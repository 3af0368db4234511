"""Names and forms of the reference system that its users know, over `trilith.data`, `trilith.ops` and discovery.

Nothing else in Trilith imports this: a contract of import-linter holds it. The reference's guesses about arguments, of
which `datasets.PBDataset` makes the most, are here only.
"""
