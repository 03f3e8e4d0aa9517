"""OpenAI's chat completions: schemas, requests, responses."""
