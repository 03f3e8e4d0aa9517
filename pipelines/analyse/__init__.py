"""The analysis job: FFN ratios, and the error of skipping with its bounds."""
