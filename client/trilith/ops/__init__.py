"""Compiled operations of the worker and what all kernels are made with."""
