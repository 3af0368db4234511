"""Datasets: steps from files to batches, their positions, their threads and their division among workers."""
