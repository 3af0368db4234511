"""The tests, by tier: a folder each; beside them what several tiers share."""
