"""OpenAI's chat completions: schemas, and the translation of requests and responses to the engine's terms.

Reading order: `schemas`, `request`, `response`, `logprobs`, `vocabulary` (tokens as bytes, and special tokens
as text), `openapi`.
"""
