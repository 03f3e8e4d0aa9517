"""Continuous batching over pruned KV caches. Batch jobs and the endpoint drive the same engine.

    Request
      └ prepare         chat template, tokenizer and image processor: on the CPU, in any process
         └ Intake          checks the request, and chooses its SkipConfig and adapter
            └ Scheduler       admits it when its pruned prompt and its answer fit into the KV budget
               └ PrefillStage    vision tower and prompt, in batches; known prefixes come from PrefixCache
                  └ Slots           one row of the KV cache per answer; skipped tokens never get there
                     └ DecodeStage     one token per step for all rows, each with its own settings
                        └ Finisher        frees the row; chunks of text, and a completion at the end

Read in this order: `requests`, `prompts`, `intake`, `prefiller`, `prefixes`, `slots`, `states` (of recurrent
layers), `sequences`, `scheduler`, `running`, `prefill_stage`, `decoding`, `sampling`, `streams` (text from
tokens), `finishing`, `statistics`, `engine`. `model` has the facts about the model, `generation` the settings
that come with it; `adapters` and `adapter_kinds` handle PEFT, `packing` the layout of weights. Torch only:
threads, asyncio, Ray and HTTP stay outside.
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
