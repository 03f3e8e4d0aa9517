"""The export job: base model and adapter become one folder, which MLflow and the hub can take.

Reading order: `config`, `job`, `folder`, `numbers` (results for the model card), `hub`.
"""
