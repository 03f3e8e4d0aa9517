"""The calibration job: the SkipConfig that meets a budget, found by accuracy or by divergence.

Reading order: `config`, `job`, `strategy` (the interface of both strategies), `pricing` (predicted costs),
`pool` (worker processes). By accuracy: `accuracy`, `space` (candidates and questions), `search` (rungs and
verification), `halving` (which candidates survive), `workers` (engines that evaluate), `report`. By
divergence: `layers`.
"""
