"""What only users of other systems need; nothing else in Trilith imports it."""
