"""Serving replicas: what a training PS pushes to them, and the processes that take it."""
