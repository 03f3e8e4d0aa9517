"""Continuous batching over pruned KV caches; batch jobs and the endpoint drive the same engine.

    request
      └ prepare      template, tokenizer, image processor: on the CPU, in any process
         └ Scheduler    first come first served, by the KV bytes that the pruned prompt and the answer take
            └ Prefiller    together: vision tower, Skip-FFN; what was seen before comes from PrefixCache
               └ Slots        what stays of each prompt in a row; skipped tokens never get there
                  └ Running      one token for all rows a step, each by its own settings
                     └ chunks of text, and a completion at the end

Read in this order: `requests`, `prompts`, `prefill`, `prefixes`, `slots`, `scheduler`, `sequences`,
`running`, `engine`. Torch only: threads, asyncio, Ray and HTTP stay outside.
"""

from skipvision.engine.adapters import BASE
from skipvision.engine.engine import Engine
from skipvision.engine.prompts import prepare
from skipvision.engine.requests import (
    Choice,
    Chunk,
    Completion,
    Request,
    Sampling,
    Timing,
    TokenLogprob,
    Usage,
)
from skipvision.engine.statistics import Statistics

__all__ = [
    "BASE",
    "Choice",
    "Chunk",
    "Completion",
    "Engine",
    "Request",
    "Sampling",
    "Statistics",
    "Timing",
    "TokenLogprob",
    "Usage",
    "prepare",
]
