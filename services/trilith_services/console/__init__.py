"""The console: a cluster over HTTP, for people and scripts. Debugging routes, a JSON API and one page."""
