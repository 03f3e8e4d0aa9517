"""Plug-ins for other projects' tools: `lmms_eval` evaluates, `vllm` serves.

Those tools find them by entry point; nothing here imports them.
"""
