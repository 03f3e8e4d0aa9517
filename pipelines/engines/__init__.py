"""Models that answer: loaded once, used by captioning, scoring, calibration and the endpoint."""
