"""The small base model trained on the shapes data set.

`model` trains it: `parts` builds it, `examples` makes training examples, `training` runs the two stages,
`config` has the settings, and `card` evaluates the result.
"""
