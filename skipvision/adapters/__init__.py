"""Save and load adapters: LoRA weights, summary layer and SkipConfig in one folder."""
