"""Models that answer: used by captioning, scoring, calibration, comparisons and the endpoint.

Reading order: `config` (settings), `loading` (base models), `model` (the model of an engine, with its
adapter), `thread` (one engine for many threads), `backend` (the library's engine or vLLM's), `templates` and
`template_child` (chat templates in a process of their own).

For vLLM: `vllm_settings` (its arguments), `vllm_engine` and `vllm_async` (the engine of a job, and of the
endpoint), `vllm_prompts`, `vllm_answers`, `vllm_meter` (statistics).
"""
