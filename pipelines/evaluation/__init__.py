"""Scored items, paired statistics, the promotion gate, and tables and figures of results."""
