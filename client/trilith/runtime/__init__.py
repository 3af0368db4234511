"""What a client has of its process and machine: cores and memory, forks, optional packages, timers, waiting."""
