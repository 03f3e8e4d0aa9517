"""The jobs on Ray and MLflow, one room per job, and rooms for what jobs share.

Reading order: `shared` (settings, folders), `tracking` (MLflow), `data` (rows), `cluster` (Ray), `engines`
(models that answer), `evaluation` (scores and statistics), then one job: `caption` is the basis of `score`,
and `finetune` trains. `demo` runs several jobs.
"""
