"""The engine replica: one engine in a thread, its adapters, grammars and load."""
