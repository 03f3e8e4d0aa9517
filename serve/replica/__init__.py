"""The engine replica: one engine, its adapters, grammars and load.

Reading order: `replica` (the deployment), `messages` (from and to ingresses), `engine` (the interface),
`native` (the library's engine in a thread) with `stream`, `adapters` (versions from the registry), `grammar`
(JSON schemas), `autoscaling`, `liveness`. `vllm` has the same interface on vLLM.
"""
