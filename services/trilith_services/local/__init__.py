"""Processes on this machine: started, watched, ended."""
