"""Metrics and traces of the endpoint."""
