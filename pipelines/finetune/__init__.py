"""The fine-tuning job on Ray Train."""
