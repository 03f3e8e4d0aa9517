"""Models that answer: used by captioning, scoring, calibration, comparisons and the endpoint.

`config` holds the settings, `loading` loads base models, `model` finds, checks and loads a model with its
adapter as an engine, and `thread` shares one engine between threads.
"""
