"""Where to skip: skip_layers and drop_after, found greedily by the divergence from full tokens.

Reading order: `strategy`, `prompts` (the rows), `moves` (the next configs), `search` (the greedy path),
`divergence` (the measurement of a worker), `report`.
"""
