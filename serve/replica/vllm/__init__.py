"""vLLM as the engine of a replica.

`engine` runs requests, `adapters` loads LoRA, and `settings` translates a model's settings.
"""
