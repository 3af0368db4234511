"""The processes of a Trilith cluster: PS, workers, and the command line that starts them."""
