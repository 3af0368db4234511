"""Real processes and real ZooKeeper servers: they are found, killed, started again and kept in step.

Flat: a file is what one kind of process goes through.
"""
