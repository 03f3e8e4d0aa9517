"""Plug-ins for other projects' tools. Those tools find them by entry point; nothing here imports them."""
