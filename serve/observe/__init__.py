"""Metrics and traces of the endpoint.

Reading order: `journeys` (the stages of a request), `tracing` (spans), `metrics_page` (``GET /metrics``).
"""
