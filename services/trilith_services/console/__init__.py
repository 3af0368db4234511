"""The console: a cluster over HTTP, for people and scripts, as one page, a JSON API and debugging routes."""
