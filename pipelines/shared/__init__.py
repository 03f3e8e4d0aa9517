"""Parts of several jobs: settings, paths, job folders, files and signals.

Reading order: `config` (settings and the life of a job) with `yaml_loader`, `arguments`, `settings` and
`fields`; `sections` (common settings), `paths`, `folder` (claim, compare, remember), `files` (atomic writes),
`stopping`, `console` and `proxies`.
"""
