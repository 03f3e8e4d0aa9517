"""Ray: join or start a cluster, measure its nodes, run tasks in parallel.

Reading order: `session` (a connection to Ray), `resources` (how many workers fit), `tasks` (functions in
parallel), `local` (a separate Ray for the demo), `metrics` (gauges for Prometheus), `cpus` (what a container
may use).
"""
