"""Forward and backward of one attention module in its forms, with the mask of a training row."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from benchmarks._measure import Spread, table

SDPA, EAGER, FLOAT32 = "sdpa", "eager", "sdpa_float32"
FORMS = (SDPA, EAGER, FLOAT32)
"""Forms of attention. The last casts queries, keys and values of the fused one to float32."""


@dataclass(frozen=True)
class Case:
    """The sizes of a module, and of a batch."""

    name: str
    hidden: int
    heads: int
    key_heads: int
    rows: int
    tokens: int


CASES = (
    Case("demo, pruned", 192, 3, 1, 16, 160),
    Case("demo, full", 192, 3, 1, 16, 290),
    Case("this page, pruned", 1024, 16, 4, 8, 320),
    Case("this page, full", 1024, 16, 4, 8, 640),
    Case("Llama-3-8B's width, pruned", 4096, 32, 8, 2, 320),
    Case("Llama-3-8B's width, full", 4096, 32, 8, 2, 640),
)


def _in_float32(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), *args, **kwargs)
    return output.to(query.dtype), None


def attention_table(dtype: torch.dtype, repeats: int) -> str:
    """Measure all cases; the forms take turns."""
    AttentionInterface.register(FLOAT32, _in_float32)
    rows = []
    for case in CASES:
        steps = {form: _step(case, form, dtype) for form in FORMS}
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for turn in range(-1, repeats):  # the first turn warms up
            for form, step in steps.items():
                begin = time.process_time()
                step()
                if turn >= 0:
                    times[form].append(1000 * (time.process_time() - begin))
        cells = [Spread.of(times[form]).text(digits=1) for form in FORMS]
        for form in FORMS[1:]:
            ratios = [other / fused for fused, other in zip(times[SDPA], times[form], strict=True)]
            cells.append(Spread.of(ratios).text(digits=2))
        rows.append([case.name, f"{case.rows} × {case.tokens}", *cells])
    head = ["attention module", "rows × tokens", *(f"{form}, CPU ms" for form in FORMS)]
    head += [f"{form} ÷ {SDPA}" for form in FORMS[1:]]
    return table(head, rows)


def _step(case: Case, form: str, dtype: torch.dtype) -> Callable[[], None]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=case.hidden,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_heads,
        attn_implementation=form,
    )
    module = LlamaAttention(config, layer_idx=0).to(dtype).requires_grad_(False)
    hidden = torch.randn(case.rows, case.tokens, case.hidden, dtype=dtype, requires_grad=True)
    positions = torch.arange(case.tokens)[None]
    rotary = LlamaRotaryEmbedding(config)(hidden, positions)
    seen = torch.ones(case.tokens, case.tokens, dtype=torch.bool).tril().expand(case.rows, 1, -1, -1)
    blocked = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return partial(_run, module, hidden, rotary, blocked if form == EAGER else seen)


def _run(
    module: LlamaAttention,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
) -> None:
    output, _ = module(hidden, position_embeddings=rotary, attention_mask=mask)
    output.sum().backward()
    hidden.grad = None
