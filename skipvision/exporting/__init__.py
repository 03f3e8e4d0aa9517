"""Export a tuned model as one folder that transformers, this library and vLLM load.

::

    write ──> merging, names, card ──> read <── load

`read` describes the folder. `write` creates it from a base model and an adapter: `merging` merges LoRA,
`names` renames weights for vLLM, `card` writes the model card, and `atomic_folder` makes the folder appear
complete or not at all. `load` loads it with Skip-Vision attached.
"""
