"""The HTTP side of the endpoint."""
