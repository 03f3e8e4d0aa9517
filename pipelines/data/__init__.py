"""Rows and images of every format that users have."""
