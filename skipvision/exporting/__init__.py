"""Export a tuned model as one folder that transformers, this library and vLLM load.

::

    write ──> merging, names, card ──> read <── load

`read` describes the folder. `write` creates it from a base model and an adapter, `load` loads it with
Skip-Vision attached.
"""
