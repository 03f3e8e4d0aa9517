"""The comparison job: two runs on the same test rows.

Reading order: `config`, `job`, `costs` (FLOPs and KV bytes), `report`, `folder`.
"""
