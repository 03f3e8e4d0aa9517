"""Scored items, paired statistics, the promotion gate, and tables and figures of results.

Reading order: `items`, `paired` (differences and intervals), `gate`, `answering` and `exact_match` (items
from an engine), `calibration`, `measures` (others besides the score) with `objects` and `places`,
`second_turn` (follow-up questions), `fingerprints` (of their inputs), `tables`, `figures`.
"""
