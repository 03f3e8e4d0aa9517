"""Differences between Hugging Face model families: where images, masks, positions and layers are.

Reading order: `families` (the parts that are hooked), `images` (images among a batch's tokens), `positions`
and `masks` (of a reduced sequence), `cache_layers` and `pruned_layers` (what is pruned, and what is left),
`encoding` (images encoded ahead), `deepstack` (features that layers add), `attention`, `probe` and `tower`
(what criteria read), `checks` (models and calls that are not supported), `pictures` (synthetic images to
measure a family).
"""
