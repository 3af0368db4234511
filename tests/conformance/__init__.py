"""Runs files of conformance vectors, inputs with the outputs of the reference system, against the real engine."""
