"""Every public behaviour and error is the same embedded, on one PS and on three."""
