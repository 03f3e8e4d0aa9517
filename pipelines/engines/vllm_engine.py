"""vLLM as the engine of a job: requests of this library in, completions out.

vLLM's engine runs in processes of its own. This process has an event loop in a thread, which prepares the
requests and collects the answers of many threads.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any, TypeVar

import torch

from pipelines._compat import visual_token_counter
from pipelines.engines.config import BackendSection
from pipelines.engines.loading import arithmetic, load_processor
from pipelines.engines.model import EngineModel
from pipelines.engines.thread import Outcome
from pipelines.engines.vllm_settings import VllmError, configure_vllm, engine_arguments, refusal
from skipvision.engine import Choice, Completion, Request, Sampling, Statistics, Timing, Usage, prepare
from skipvision.engine.requests import FinishReason
from skipvision.engine.statistics import Counters
from skipvision.errors import ConfigError, InputError, SkipVisionError

T = TypeVar("T")

_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "cancelled"}
"""vLLM's finish reasons, and the library's."""


class VllmEngine:
    """vLLM's engine for many threads, whose requests share its batches.

    Args:
        model: as `vllm_settings.vllm_model` returned it.
        settings: of the engine.
        died: called in the event loop's thread when vLLM's processes have died, before waiting threads get
            the error.
    """

    def __init__(
        self, model: EngineModel, settings: BackendSection, died: Callable[[BaseException], None]
    ) -> None:
        configure_vllm()
        self._model, self._settings, self._died = model, settings, died
        self._numbers, self._counters = count(), Counters()
        self._open, self._since, self._answer_seconds = 0, 0.0, 0.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        self._ready = self._submit(self._start())

    def wait_until_ready(self) -> None:
        """Wait until vLLM can answer.

        Raises:
            ConfigError: it refuses the settings.
            VllmError: its processes cannot start.
        """
        self._ready.result()

    def answer(self, requests: Sequence[Request]) -> list[Outcome]:
        """Run requests and wait until all have ended; results come in the order of the requests."""
        return [future.result() for future in [self._submit(self._answer(one)) for one in requests]]

    def statistics(self) -> Statistics:
        """Return the counters since the engine started.

        What only vLLM's processes know, such as the bytes in use, is 0. The number of decode steps follows
        from how many answers were generated at once on average.
        """
        now, limit = self._counters, self._settings.max_sequences
        waiting = max(self._open - limit, 0)
        at_once = self._answer_seconds / now.decode_seconds if now.decode_seconds else 0.0
        return Statistics(
            running=self._open - waiting,
            waiting=waiting,
            waiting_answers=waiting,
            max_sequences=limit,
            kv_bytes_used=0,
            kv_bytes_reserved=0,
            kv_bytes_budget=self._settings.kv_budget_bytes,
            prefix_bytes=0,
            prefix_hits=0,
            prefix_misses=0,
            requests=dict(now.requests),
            prefill_tokens=now.prefill_tokens,
            prefill_seconds=0.0,
            decode_tokens=now.decode_tokens,
            decode_seconds=now.decode_seconds,
            decode_steps=round(now.decode_tokens / at_once) if at_once else 0,
            visual_total=now.visual_total,
            visual_retained=now.visual_retained,
            visual_skipped=now.visual_skipped,
            visual_cached=now.visual_cached,
            time_to_first_token=None,
            time_per_output_token=None,
        )

    def stop(self) -> None:
        """End vLLM's processes and drop the running requests."""
        if self._ready.exception() is None:
            self._engine.shutdown()
            del self._engine  # it would shut down again when the interpreter ends
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    # ------------------------------------------------------------------------- in the event loop

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _start(self) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        # It reports dead processes with a traceback, also when Ray ends this one; `died` reports them.
        logging.getLogger("vllm.v1.engine.async_llm").setLevel(logging.CRITICAL)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = str(arithmetic(self._model.dtype, device)).removeprefix("torch.")
        arguments = engine_arguments(self._model, self._settings, dtype)
        try:
            self._processor: Any = load_processor(self._model.base)
            self._count = visual_token_counter(self._processor)
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except SkipVisionError:
            raise
        except RuntimeError as error:  # one of its processes failed, and has printed why
            raise VllmError(f"vLLM cannot start with {self._model.base}: {error}") from error
        except Exception as error:
            raise refusal(error) from error
        self._image_token = self._engine.model_config.hf_config.image_token_id

    async def _answer(self, request: Request) -> Outcome:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            prompt, sizes = await asyncio.to_thread(self._prompt, request)
            return await self._generate(request, prompt, sizes)
        except SkipVisionError as error:
            return error
        except EngineDeadError as error:
            self._died(error)
            raise VllmError(f"vLLM's processes have died: {error}") from error
        except Exception as error:  # of processors and of vLLM; other requests continue
            reason = error.__cause__ or error if isinstance(error, EngineGenerateError) else error
            return InputError(f"vLLM refuses this request ({type(reason).__name__}): {reason}")

    def _prompt(self, request: Request) -> tuple[dict[str, Any], list[int]]:
        """Return vLLM's form of a request, and the visual tokens of each image without pruning."""
        _check(request)
        images = list(request.images)
        placeholder = getattr(self._processor, "image_token", None)
        if placeholder and (found := str(request.prompt).count(placeholder)) != len(images):
            raise InputError(
                f"the prompt has {found} placeholders {placeholder} for {len(images)} images: "
                "give one for each"
            )
        if not images:
            return {"prompt": request.prompt}, []
        prompt = {"prompt": request.prompt, "multi_modal_data": {"image": images}}
        if self._count is not None:
            return prompt, self._count([(image.height, image.width) for image in images])
        ids = (prepare(self._processor, request).inputs or {})["input_ids"]
        total = int((ids == self._image_token).sum())
        return prompt, [total // len(images)] * len(images)

    async def _generate(self, request: Request, prompt: dict[str, Any], sizes: list[int]) -> Completion:
        number, submitted, final = next(self._numbers), time.monotonic(), None
        begin: str | None = getattr(getattr(self._processor, "tokenizer", None), "bos_token", None)
        with_begin = begin is not None and str(request.prompt).startswith(begin)
        self._enter()
        try:
            async for output in self._engine.generate(
                prompt,
                sampling_parameters(request.sampling),
                str(number),
                tokenization_kwargs={"add_special_tokens": not with_begin},
            ):
                final = output
        finally:
            self._leave()
        if final is None:
            raise InputError("vLLM gave no answer to this request")
        completion = self._completion(request, number, final, sizes, time.monotonic() - submitted)
        self._count_completion(completion)
        return completion

    def _enter(self) -> None:
        if self._open == 0:
            self._since = time.monotonic()
        self._open += 1

    def _leave(self) -> None:
        self._open -= 1
        now = time.monotonic()
        self._counters.decode_seconds += now - self._since
        self._since = now

    def _completion(
        self, request: Request, number: int, output: Any, sizes: list[int], seconds: float
    ) -> Completion:
        choices = tuple(
            Choice(one.index, one.text, tuple(one.token_ids), _REASONS.get(one.finish_reason, "error"))
            for one in output.outputs
        )
        times = output.metrics  # by the clock of another process
        queued, first = 0.0, None
        if times is not None:
            queued = max(seconds - (times.last_token_ts - times.scheduled_ts), 0.0)
            first = queued + times.first_token_ts - times.scheduled_ts
        return Completion(
            request=request,
            id=number,
            choices=choices,
            usage=self._usage(output, sizes),
            timing=Timing(queued, first, seconds),
        )

    def _usage(self, output: Any, sizes: list[int]) -> Usage:
        """Count tokens as callers do: prompts as long as without pruning."""
        config, total = self._model.skip, sum(sizes)
        kept = sum(token == self._image_token for token in output.prompt_token_ids)
        return Usage(
            prompt_tokens=len(output.prompt_token_ids) - kept + total,
            completion_tokens=sum(len(one.token_ids) for one in output.outputs),
            visual_total=total,
            visual_retained=sum(config.counts(size).retained for size in sizes),
            visual_cached=kept,
            prefix_hit=bool(output.num_cached_tokens),
        )

    def _count_completion(self, completion: Completion) -> None:
        usage, counters = completion.usage, self._counters
        counters.count_completion(completion)
        counters.prefill_tokens += usage.prompt_tokens
        counters.decode_tokens += usage.completion_tokens
        counters.visual_total += usage.visual_total
        counters.visual_retained += usage.visual_retained
        counters.visual_cached += usage.visual_cached
        self._answer_seconds += completion.timing.total - completion.timing.queued


def sampling_parameters(sampling: Sampling) -> Any:
    """Return vLLM's form of the settings of a request's decoding."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=sampling.n,
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=max(sampling.top_p, 1e-9),  # vLLM wants more than 0, which also leaves one token
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _check(request: Request) -> None:
    """Raise `ConfigError` for what only the native engine does."""
    unsupported = {
        "prompt": request.inputs is not None or not isinstance(request.prompt, str),
        "skip": request.skip is not None,
        "adapter": request.adapter is not None,
        "deadline": request.deadline is not None,
        "adjust": request.adjust is not None,
        "sampling.logprobs": request.sampling.logprobs is not None,
    }
    found = [name for name, given in unsupported.items() if given]
    if found:
        raise ConfigError(f"the jobs' vLLM engine takes rendered prompts with images, without {found[0]}")
