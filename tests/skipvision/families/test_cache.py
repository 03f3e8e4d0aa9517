"""After prefill, the cache of every layer has the planned length and no byte more."""

import torch

from skipvision import attach
from skipvision.anatomy.cache_layers import entries_of
from skipvision.testing.families import tiny_batch
from tests.skipvision.families.matrix import DROPPING, MERGING, ROWS, combinations, model_of
from tests.skipvision.families.running import new_cache


@torch.no_grad()
def layers_of(model, batch):
    """Return the entries that a prefill caches, by layer and field."""
    cache = model(**batch, use_cache=True, past_key_values=new_cache(model)).past_key_values
    return [states for layer in cache.layers for states in entries_of(layer).values()]


@combinations(turn=2, halved=True)
def test_length_and_bytes_are_as_planned(family, attention, dtype):
    model = model_of(family, attention, dtype)
    batch = tiny_batch(model, ROWS)
    remembering = MERGING.model_copy(update={"skip_kv": False})
    full = layers_of(model, batch)
    for config in (MERGING, DROPPING, remembering):
        with attach(model, config) as skip:
            layers = layers_of(model, batch)
        plan = skip.plan
        stays = plan.cache_mask if config.skip_kv else plan.attention_mask
        entries = int(stays.sum(dim=1).max())
        assert entries < plan.roles.shape[1] or not config.skip_kv
        assert len(layers) == len(full)
        for states, whole in zip(layers, full, strict=True):
            rows, heads, _, width = whole.shape
            assert states.shape == (rows, heads, entries, width)
            assert states.dtype == whole.dtype
            storage = states.untyped_storage().nbytes()
            assert storage == rows * heads * entries * width * states.element_size()
