"""The calibration job: the SkipConfig that meets a budget, found by successive halving.

Reading order: `config`, `job`, `space` (candidates and questions), `search` (rungs and verification),
`halving` (which candidates survive), `workers` (engines that evaluate), `report`.
"""
