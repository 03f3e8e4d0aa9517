"""The calibration job: the SkipConfig that meets a budget, found by successive halving."""
