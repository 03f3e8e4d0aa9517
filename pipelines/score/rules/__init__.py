"""The rules by which benchmarks give points.

Reading order: `registry` (all rules by name), `multiple_choice`, `short_answer`, `open_ended`, `mathvista`;
`judge` and `judge_endpoint` (a language model that reads free answers).
"""
