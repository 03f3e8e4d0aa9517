"""Tiny random models of every family and inputs for them, built in process: for tests.

Reading order: `llava` (the model of most tests), `configs` and `families` (any other family), `prompts` (the
marks around images), `survey` (which families of the installed transformers are supported).
"""

from skipvision.testing.llava import IMAGE_TOKEN, tiny_inputs, tiny_llava

__all__ = ["IMAGE_TOKEN", "tiny_inputs", "tiny_llava"]
