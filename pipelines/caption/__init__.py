"""The captioning job on Ray Data: inputs, stages, output shards, resume and report.

Reading order: `config`, `job`, `rows` and `manifest` (the list of inputs, with `keys`), `stages` and `stream`
(the work on Ray), `folder` (shards of captions), `attempts` (failures), `resources`, `progress`,
`report`.
"""
