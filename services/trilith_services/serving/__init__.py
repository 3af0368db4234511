"""The serving entry: parses records, looks their rows up, runs the exported model."""
