"""The shapes data set, and the small base model trained on it.

`scenes` draws scenes and their questions; `files` and `table` write them to disk. The room `base` trains the
model.
"""
