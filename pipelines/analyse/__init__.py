"""The analysis job: FFN ratios, and the error of skipping with its bounds.

Reading order: `config`, `job`, `folder`, `report`, `figures`.
"""
