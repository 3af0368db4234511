"""One module per command of `trilith`; each adds itself with `register(app)`.

Flat: as the command line is.
"""
