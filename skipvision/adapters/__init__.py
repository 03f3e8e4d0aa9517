"""Save and load adapters: LoRA weights, summary layer and SkipConfig in one folder.

Reading order: `files` (the folder), `save_load`, `fitting` and `patterns` (checks before weights are loaded),
`checkpoints` (adapters from the checkpoints of ``Trainer`` and TRL).
"""
