"""What every HTTP server needs to run well."""
