"""MLflow. No other package imports it.

::

    tracked ──> run, config, registry ──> client

`tracked` starts, resumes and ends the MLflow runs of a job, `run` records values in one of them, `registry`
finds and moves model versions, `client` connects. `config` is the section of the settings, and `names` checks
names before any work. When MLflow does not answer,

- a job that starts fails at once, before any work is done;
- a job that runs keeps its metrics in memory and prints a warning;
- a job that ends fails with advice on how to upload the missing values; its results are safe.

MLflow is imported inside functions, because that takes seconds.
"""
