"""Shared by the benchmarks: models with random weights, device clocks, samples."""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

import peft
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

import skipvision as sv
from benchmarks._record import table, today, write_part  # noqa: F401 (benchmarks use them from here)
from benchmarks._run import native_bfloat16, parser, processor, versions  # noqa: F401
from skipvision.anatomy.families import dissect
from skipvision.loading import build_model

FULL = "full"
"""Name of the setting without Skip-Vision: the model has no hooks."""


# ------------------------------------------------------------------------------------------ models


@dataclass(frozen=True)
class Geometry:
    """Sizes of a LLaVA: a CLIP tower, a two-layer projector, a Llama decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    tower_hidden: int
    tower_intermediate: int
    tower_layers: int
    tower_heads: int
    image: int = 336
    patch: int = 14

    @classmethod
    def scaled(cls, hidden: int, layers: int, *, tower: int, tower_layers: int, image: int = 336) -> Self:
        """Return the proportions of Llama-3-8B at another width; ``tower`` is the tower's width."""
        heads = max(1, hidden // (64 if hidden < 2048 else 128))
        return cls(
            hidden=hidden,
            intermediate=hidden * 7 // 2,
            layers=layers,
            heads=heads,
            key_heads=max(1, heads // 4),
            vocabulary=32_000,
            tower_hidden=tower,
            tower_intermediate=4 * tower,
            tower_layers=tower_layers,
            tower_heads=tower // 64,
            image=image,
        )

    def config(self) -> LlavaConfig:
        """Return the model's config; the last token of the vocabulary is the image placeholder."""
        vision = CLIPVisionConfig(
            hidden_size=self.tower_hidden,
            intermediate_size=self.tower_intermediate,
            num_hidden_layers=self.tower_layers,
            num_attention_heads=self.tower_heads,
            image_size=self.image,
            patch_size=self.patch,
            projection_dim=self.tower_hidden,
        )
        text = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            max_position_embeddings=8192,
        )
        return LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=self.vocabulary - 1,
            image_seq_length=(self.image // self.patch) ** 2,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )


def build(geometry: Geometry, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Build a LLaVA with random weights directly on the device and in the dtype, without copies."""
    torch.manual_seed(0)
    with torch.device(device):
        model = build_model(geometry.config(), dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def inputs_for(model: nn.Module, batch: int, text: int) -> dict[str, torch.Tensor]:
    """Build prompts of ``text`` random words and one random image each, after the first four words."""
    weight = next(model.parameters())
    config = model.config
    generator = torch.Generator().manual_seed(0)
    vision = config.vision_config
    words = torch.randint(3, config.text_config.vocab_size - 1, (batch, text), generator=generator)
    image = torch.full((batch, (vision.image_size // vision.patch_size) ** 2), config.image_token_id)
    before = min(4, text)
    ids = torch.cat([words[:, :before], image, words[:, before:]], dim=1)
    pixels = torch.randn(batch, 3, vision.image_size, vision.image_size, generator=generator)
    return {
        "input_ids": ids.to(weight.device),
        "attention_mask": torch.ones_like(ids, device=weight.device),
        "pixel_values": pixels.to(weight.device, weight.dtype),
    }


def add_lora(model: nn.Module, rank: int) -> nn.Module:
    """Add LoRA to every linear layer of the decoder's layers; everything else is frozen."""
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config).train()


def setting(name: str) -> sv.SkipConfig | None:
    """Parse ``"100+156"`` to a `SkipConfig`, and ``"full"`` to None."""
    if name == FULL:
        return None
    match = re.fullmatch(r"(\d+)\+(\d+)", name)
    if match is None:
        raise SystemExit(f"setting {name!r}: expected RETAINED+SKIPPED, for example 100+156")
    return sv.SkipConfig(retained=int(match[1]), skipped=int(match[2]), select="similarity")


def answer_lengths(count: int, seed: int) -> list[int]:
    """Draw lengths of answers: most are short, a few long."""
    generator = random.Random(seed)
    return [min(max(round(generator.lognormvariate(3.2, 0.8)), 4), 160) for _ in range(count)]


# -------------------------------------------------------------------------------------------- work


def prefill(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Any:
    """Run one prefill as `generate` does: with a cache, and the LM head at the last position only."""
    with torch.no_grad():
        return model(**inputs, use_cache=True, logits_to_keep=1)


class LoraStep:
    """One training step: forward, backward, and AdamW on LoRA and summary layer. The loss covers the answers.

    With bfloat16 weights LoRA stays in float32 under autocast, as in PEFT and in this project's fine-tuning.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, torch.Tensor], answer: int) -> None:
        self.model, self.inputs = model, inputs
        ids = inputs["input_ids"]
        # Position t predicts token t + 1.
        self.positions = torch.arange(ids.shape[1] - answer - 1, ids.shape[1] - 1, device=ids.device)
        self.targets = ids[:, -answer:].reshape(-1)
        self.answers = (torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - answer).expand_as(ids)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def __call__(self, attachment: sv.Attachment | None) -> None:
        """Run the step; it also trains the summary layer of this attachment."""
        optimizers = [self.optimizer]
        if attachment is not None and attachment.summary is not None:
            optimizers.append(torch.optim.AdamW(attachment.summary.parameters(), fused=True))
        device = self.targets.device.type
        half = next(self.model.parameters()).dtype == torch.bfloat16
        inputs = dict(self.inputs)
        if attachment is not None:
            # As in decoding, answers do not see tokens that leave the cache before them.
            inputs[sv.DECODED_KEYWORD] = self.answers
        with torch.autocast(device, torch.bfloat16, enabled=half):
            logits = self.model(**inputs, use_cache=False, logits_to_keep=self.positions).logits
        F.cross_entropy(logits.float().flatten(0, 1), self.targets).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


# -------------------------------------------------------------------------------------------- time


class Clock:
    """A device's own clock, in seconds."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        """Mark the current point in the device's queue of work."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        """Wait until the device has finished its work."""
        if self.cuda:
            torch.cuda.synchronize()

    def between(self, begin: Any, end: Any) -> float:
        """Return the seconds between two marks, after `settle`."""
        return float(begin.elapsed_time(end)) / 1000 if self.cuda else float(end - begin)


@dataclass
class Sample:
    """Seconds of one measured call: in total, for planning, and for restoring.

    Planning is select, merge and summary. Restoring expands hidden states to the caller's length and compacts
    the cache.
    """

    total: float
    planning: float = 0.0
    restoring: float = 0.0


def timed(
    model: nn.Module,
    config: sv.SkipConfig | None,
    clock: Clock,
    call: Callable[[sv.Attachment | None], Any],
) -> Sample:
    """Measure one call with Skip-Vision attached."""
    with _attached(model, config, clock) as (attachment, marks):
        clock.settle()
        begin = clock.mark()
        result = call(attachment)
        end = clock.mark()
        clock.settle()
        del result
    sample = Sample(clock.between(begin, end))
    if "planned" in marks:
        sample.planning = clock.between(marks["arrived"], marks["planned"])
        sample.restoring = clock.between(marks["decoded"], marks["restored"])
    return sample


@contextmanager
def _attached(
    model: nn.Module, config: sv.SkipConfig | None, clock: Clock
) -> Iterator[tuple[sv.Attachment | None, dict[str, Any]]]:
    """Attach Skip-Vision, with a mark before and after each of its hooks on the decoder."""
    marks: dict[str, Any] = {}
    if config is None:
        yield None, marks
        return
    decoder = dissect(model).decoder

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            marks[name] = clock.mark()

        return hook

    # Hooks run in the order of their registration.
    handles = [
        decoder.register_forward_pre_hook(note("arrived")),
        decoder.register_forward_hook(note("decoded")),
    ]
    with sv.attach(model, config) as attachment:
        handles += [
            decoder.register_forward_pre_hook(note("planned")),
            decoder.register_forward_hook(note("restored")),
        ]
        try:
            yield attachment, marks
        finally:
            for handle in handles:
                handle.remove()


def interleaved(
    cases: Mapping[str, Callable[[], Sample]], repeats: int, warm_up: int = 1, seconds: float = math.inf
) -> dict[str, list[Sample]]:
    """Measure all cases in turn, several rounds, each starting with another case.

    No round starts that would probably end later than ``seconds`` from now, except the first.
    """
    begin = time.perf_counter()
    for _ in range(warm_up):
        for measure in cases.values():
            measure()
    samples: dict[str, list[Sample]] = {name: [] for name in cases}
    names = list(cases)
    rounds_begin = time.perf_counter()
    for turn in range(repeats):
        now = time.perf_counter()
        if turn and now - begin + (now - rounds_begin) / turn > seconds:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(cases[name]())
    return samples


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of several values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Compute the spread of a non-empty sequence."""
        return cls(median(values), min(values), max(values))

    def text(self, scale: float = 1.0, digits: int = 0) -> str:
        """Format as ``median (low – high)``, scaled."""
        middle, low, high = (f"{scale * value:,.{digits}f}" for value in (self.median, self.low, self.high))
        return f"{middle} ({low} – {high})"
