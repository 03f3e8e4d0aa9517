"""The shapes data set, and the small base model trained on it.

`scenes` draws scenes and their questions; `files` and `table` write them to disk. `base_model` trains the
model: `base_parts` builds it, `base_examples` makes training examples, `base_training` runs the two stages,
`base_config` has the settings, and `base_card` evaluates the result.
"""
