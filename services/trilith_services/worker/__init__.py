"""The training process: it reads data, computes with torch, and keeps rows and variables on the PS."""
