"""An adapter's files: LoRA weights, summary layer and SkipConfig, saved and loaded together."""
