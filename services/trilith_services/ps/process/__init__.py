"""The process of a parameter server: its service, metrics, place in a directory, and start and end."""
