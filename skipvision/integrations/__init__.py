"""Skip-Vision inside other projects' tools. Each is found by an entry point; nothing imports it."""
