"""Checkpoints: one PS's part of one as files, and when the PS of a cluster write them."""
