"""OpenAI's chat completions: schemas, and the translation of requests and responses to the engine's terms."""
