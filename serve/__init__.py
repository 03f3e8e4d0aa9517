"""The REST endpoint on Ray Serve."""
