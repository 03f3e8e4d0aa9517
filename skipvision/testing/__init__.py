"""Tiny random models of every family and inputs for them, built in process: for tests."""

from skipvision.testing.llava import IMAGE_TOKEN, tiny_inputs, tiny_llava

__all__ = ["IMAGE_TOKEN", "tiny_inputs", "tiny_llava"]
