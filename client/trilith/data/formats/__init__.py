"""Files and streams of records: found, read, decompressed, cut into records, and written."""
