"""Requests to a tiny LLaVA, and what `generate` answers to each alone."""

import functools

import torch

from skipvision import Request, Sampling, SkipConfig, attach
from skipvision.testing.llava import tiny_inputs, tiny_llava

F64 = torch.float64

ROWS = [
    [3, "image", 4],
    [5],
    [2, "image", 1, "image", 2],
    ["image", 3],
    [7, "image", 2],
    [1, "image", "image", 1],
]

CONFIGS = {
    "counts": SkipConfig(retained=4, skipped=6),
    "full": SkipConfig.full(),
    "fractions": SkipConfig(retained=0.5, skipped=0.25, summary_tokens=0),
    "dropped": SkipConfig(retained=5, skipped=0, merge="drop"),
    "contiguous": SkipConfig(retained=4, skipped=6, positions="contiguous"),
    "grouped": SkipConfig(retained=4, skipped=6, layout="grouped", select="diversity"),
    "cached": SkipConfig(retained=4, skipped=6, skip_kv=False),
    "ffn-ratio": SkipConfig(retained=4, skipped=6, select="ffn_ratio"),
    "attention": SkipConfig(retained=4, skipped=0, merge="drop", select="attention", probe_layer=1),
    "vision-attention": SkipConfig(retained=4, skipped=6, select="vision_attention", merge="tome"),
    "grid": SkipConfig(retained=0, skipped=6, merge="grid", skip_ffn=False, skip_kv=False),
    "pooled": SkipConfig(retained=4, skipped=6, merge="pool"),
    "everything": SkipConfig(retained=16, skipped=0),
}


def inputs_of(row, seed=0):
    return tiny_inputs([ROWS[row]], dtype=F64, seed=seed)


@functools.cache
def words(text="llama", dtype=F64, **options):
    """A model that says all sorts of things, and never stops by itself."""
    model = tiny_llava(text=text, dtype=dtype, seed=3 if text == "llama" else 15, **options)
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def alone(row, name="counts", tokens=8, seed=0, text="llama"):
    """Ids that `generate` writes to one row by itself."""
    model, inputs = words(text), inputs_of(row, seed)
    with attach(model, CONFIGS[name]):
        written = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tuple(written[0, inputs["input_ids"].shape[1] :].tolist())


def request(row, name=None, tokens=8, seed=0, **options):
    sampling = options.pop("sampling", None) or Sampling(max_new_tokens=tokens)
    return Request(
        inputs=inputs_of(row, seed),
        sampling=sampling,
        skip=None if name is None else CONFIGS[name],
        key=options.pop("key", (row, name or "counts", tokens, seed)),
        **options,
    )


def ids_of(completion):
    if completion.error is not None:
        raise completion.error
    return completion.choices[0].token_ids


def drain(engine):
    """All chunks until nothing is left."""
    chunks = []
    while engine.busy:
        chunks += engine.step()
    return chunks
