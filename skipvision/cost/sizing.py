"""GPUs, memory, storage and money for a number of images a day, from predicted cost and data sheets.

A GPU's time per image is a prefill at a share of its peak arithmetic, and the image's share of the decode
steps. A decode step of a full batch takes as long as reading weights and caches, or as its arithmetic if that
is longer. This is an estimate to plan with: measure a sample before buying.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PretrainedConfig

from skipvision.config import SkipConfig
from skipvision.cost.predict import Cost, predict_cost
from skipvision.errors import ConfigError

CAPTION_BYTES, CAPTION_BYTES_PER_TOKEN, MANIFEST_BYTES = 200, 3, 225
"""Bytes in the files of a captioning job per row, and per token of its answer (measured on 800 rows)."""

_TEXT_STEP = 64
_DAY, _HOUR = 86_400.0, 3_600.0


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet and its price.

    Attributes:
        memory: bytes.
        bandwidth: bytes per second from memory.
        flops: dense bfloat16 FLOPs per second.
        price: dollars per hour.
        source: data sheet, machine that the price is for, and where and when both were read.
    """

    memory: float
    bandwidth: float
    flops: float
    price: float
    source: str


PRICES = "Amazon EC2 on demand, us-east-1, per GPU, 2026"
"""Default prices. Each GPU names the source and date of its own. Spot prices and other clouds differ by a
factor of two or more."""

GPUS = {
    "l4": Gpu(
        *(24e9, 300e9, 121e12, 0.9776),
        "L4 data sheet (242 TFLOPS with sparsity, half without); g6.2xlarge, price lists in public "
        "repositories, read 2026-11-29",
    ),
    "l40s": Gpu(
        *(48e9, 864e9, 362e12, 2.24208),
        "L40S data sheet (362 TFLOPS, 733 with sparsity); g6e.2xlarge, price lists in public repositories, "
        "read 2026-11-29",
    ),
    "a100": Gpu(
        *(80e9, 2039e9, 312e12, 3.4309),
        "A100 80GB SXM data sheet, nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf; p4de.24xlarge at "
        "27.44705 $/h for 8, github.com/datareceipts/data-receipts, 2026-11-09",
    ),
    "h100": Gpu(
        *(80e9, 3350e9, 989e12, 6.88),
        "H100 SXM data sheet (1,979 TFLOPS with sparsity, half without); p5.48xlarge at 55.04 $/h for 8, "
        "github.com/datareceipts/data-receipts, 2026-11-09",
    ),
    "h200": Gpu(
        *(141e9, 4800e9, 989e12, 7.912),
        "H200 SXM data sheet; p5en.48xlarge at 63.296 $/h for 8, github.com/dstackai/dstack/pull/4110, "
        "2026-08-06",
    ),
}
"""Data sheets of NVIDIA, as quoted by dealers' and reference pages that were read on 2026-11-29."""


@dataclass(frozen=True)
class Workload:
    """A workload, and the utilisation of the hardware.

    Attributes:
        images_per_day: requests with one image each.
        text_tokens: prompt tokens that are not visual.
        new_tokens: tokens of each answer.
        visual_tokens: of each image; None = as the model's image processor cuts an image.
        peak: busiest hour relative to the mean; 1 for jobs that may run day and night.
        compute_share: share of the peak FLOPs that prefill and decode reach.
        bandwidth_share: share of the memory bandwidth that decode reaches.
        memory_share: share of the memory for weights and caches; activations need the rest.
        max_sequences: answers generated at once, if memory allows.
    """

    images_per_day: int
    text_tokens: int = 64
    new_tokens: int = 64
    visual_tokens: int | None = None
    peak: float = 1.0
    compute_share: float = 0.4
    bandwidth_share: float = 0.6
    memory_share: float = 0.9
    max_sequences: int = 64

    def __post_init__(self) -> None:
        for name in ("images_per_day", "new_tokens", "max_sequences"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 1 or more")
        for name, least in (("text_tokens", 0), ("visual_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}={value}: expected {least} or more")
        for name in ("compute_share", "bandwidth_share", "memory_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a number above 0 and at most 1")
        if not 1 <= self.peak < math.inf:
            raise ConfigError(f"peak={self.peak}: the busiest hour has at least the mean load, so 1 or more")


@dataclass(frozen=True)
class Size:
    """The number of GPUs of one kind that a workload needs, and their cost.

    Attributes:
        sequences: answers that fit at once.
        images_per_second: of one GPU.
        gpus: for the busiest hour.
        gpu_hours: per day, if idle GPUs are given back.
        dollars_per_day: for these hours.
        dollars_per_million: for a million images.
    """

    sequences: int
    images_per_second: float
    gpus: int
    gpu_hours: float
    dollars_per_day: float
    dollars_per_million: float


@dataclass(frozen=True)
class Demand:
    """The cost of one image, with Skip-Vision or without.

    Attributes:
        cost: predicted cost.
        kv_bytes: keys and values of a finished answer.
    """

    cost: Cost
    kv_bytes: int

    @property
    def memory(self) -> int:
        """Bytes of an answer: keys and values, and the states of recurrent layers with a step's copy."""
        return self.kv_bytes + 2 * self.cost.state_bytes


def demand(model_config: PretrainedConfig, config: SkipConfig | None, work: Workload) -> Demand:
    """Predict what an image takes.

    Raises:
        UnsupportedModelError: Skip-Vision does not support the family.
    """

    def cost(text_tokens: int) -> Cost:
        return predict_cost(
            model_config,
            config,
            text_tokens=text_tokens,
            new_tokens=work.new_tokens,
            visual_tokens=work.visual_tokens,
            training=False,
        )

    one, longer = cost(work.text_tokens), cost(work.text_tokens + _TEXT_STEP)
    per_token = (longer.kv_bytes - one.kv_bytes) / _TEXT_STEP
    return Demand(one, round(one.kv_bytes + per_token * work.new_tokens))


def size(needed: Demand, gpu: Gpu, work: Workload) -> Size | None:
    """Return what the workload needs of one kind of GPU; None if the model does not fit into its memory."""
    free = gpu.memory * work.memory_share - needed.cost.weight_bytes
    sequences = min(work.max_sequences, int(free / max(needed.memory, 1))) if free > 0 else 0
    if sequences < 1:
        return None
    flops = gpu.flops * work.compute_share
    steps = work.new_tokens - 1
    # The mean over the steps of an answer; states are also written.
    cached = (needed.cost.kv_bytes + needed.kv_bytes) / 2 + 2 * needed.cost.state_bytes
    read = (needed.cost.weight_bytes + sequences * cached) / (gpu.bandwidth * work.bandwidth_share)
    compute = sequences * needed.cost.decode_flops / max(steps, 1) / flops
    seconds = needed.cost.prefill_flops / flops + steps * max(read, compute) / sequences
    hours = work.images_per_day * seconds / _HOUR
    return Size(
        sequences=sequences,
        images_per_second=1 / seconds,
        gpus=math.ceil(work.images_per_day * work.peak * seconds / _DAY),
        gpu_hours=hours,
        dollars_per_day=hours * gpu.price,
        dollars_per_million=1e6 * seconds / _HOUR * gpu.price,
    )


def storage_per_day(work: Workload) -> int:
    """Return the bytes that a captioning job writes for a day's images."""
    row = CAPTION_BYTES + CAPTION_BYTES_PER_TOKEN * work.new_tokens + MANIFEST_BYTES
    return work.images_per_day * row
