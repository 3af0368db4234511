"""From chunks of records to batches of arrays: feature specs and the parsers made of them."""
