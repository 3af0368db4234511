"""Names and forms of the reference system that its users know, over `trilith.data` and `trilith.discovery`."""
