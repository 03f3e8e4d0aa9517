"""Where to skip: skip_layers and drop_after, found greedily by the divergence from full tokens.

Reading order: `strategy`, `prompts` (the rows), `moves` (the next configs), `search` (the greedy path),
`divergence` (what a worker measures), `report`.
"""
