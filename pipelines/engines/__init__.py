"""Models that answer: used by captioning, scoring, calibration, comparisons and the endpoint.

Reading order: `config` (settings), `loading` (base models), `model` (the model of an engine, with its
adapter), `thread` (one engine for many threads), `backend` (the library's engine or vLLM's), `templates` and
`template_child` (chat templates in a process of their own). `vllm` runs vLLM as the engine.
"""
