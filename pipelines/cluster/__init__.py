"""Ray: join or start a cluster, measure its nodes, run tasks in parallel.

Reading order: `session` (a connection to Ray), `address` (``$RAY_ADDRESS``, and the folder of a Ray that is
started), `resources` (how many workers fit), `tasks` (functions in parallel), `local` (a separate Ray for the
demo), `metrics` (gauges for Prometheus), `cpus` (what a container may use).
"""
