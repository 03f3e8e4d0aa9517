"""The comparison job: two runs on the same test rows."""
