"""The engine side of the endpoint."""
