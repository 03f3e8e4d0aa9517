"""Requests to a tiny LLaVA, and the answer of `generate` to each alone."""

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
    "relevance": SkipConfig(retained=4, skipped=6, select="relevance"),
    "vision-attention": SkipConfig(retained=4, skipped=6, select="vision_attention", merge="tome"),
    "drop-after": SkipConfig(retained=4, skipped=6, drop_after=0),
    "drop-later": SkipConfig(retained=5, skipped=3, drop_after=1, layout="grouped", skip_kv=False),
    "sized": SkipConfig(retained=6, skipped=0, size_bias=True),
    "sized-drop-later": SkipConfig(retained=4, skipped=6, skip_kv=False, drop_after=1, size_bias=True),
    "grid": SkipConfig(retained=0, skipped=6, merge="grid", skip_ffn=False, skip_kv=False),
    "pooled": SkipConfig(retained=4, skipped=6, merge="pool"),
    "everything": SkipConfig(retained=16, skipped=0),
}


def inputs_of(row, seed=0):
    return tiny_inputs([ROWS[row]], dtype=F64, seed=seed)


@functools.cache
def words(text="llama", dtype=F64, **options):
    """A model that generates varied tokens and has no EOS."""
    model = tiny_llava(text=text, dtype=dtype, seed=3 if text == "llama" else 15, **options)
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def alone(row, name="counts", tokens=8, seed=0, text="llama"):
    """Ids that `generate` returns for one row alone."""
    model, inputs = words(text), inputs_of(row, seed)
    with attach(model, CONFIGS[name]):
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tuple(output[0, inputs["input_ids"].shape[1] :].tolist())


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
    """Step until the engine is idle; returns all chunks."""
    chunks = []
    while engine.busy:
        chunks += engine.step()
    return chunks


class Letters:
    """A processor that only decodes: every id is a letter."""

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(97 + token % 26) for token in ids)


def one(engine, request):
    """The completion of a single request; raises its error."""
    (completion,) = engine.run([request])
    if completion.error is not None:
        raise completion.error
    return completion


def text_of(ids):
    """The text that `Letters` decodes."""
    return Letters().decode(ids, True)
