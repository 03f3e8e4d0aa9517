"""The promotion job: an MLflow alias moves only if the evidence allows it.

Reading order: `config`, `job`, `items` (the scored items of both models).
"""
