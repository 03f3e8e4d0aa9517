"""vLLM's engine, awaited: requests of this library in, chunks and completions out.

vLLM's engine runs in processes of its own. One event loop prepares the requests and collects the answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from itertools import count
from pathlib import Path
from typing import Any

from pipelines.engines.config import BackendSection
from pipelines.engines.loading import arithmetic, load_config, load_processor, usable_device
from pipelines.engines.model import EngineModel
from pipelines.engines.vllm.answers import Answers
from pipelines.engines.vllm.meter import Meter, meter_factory
from pipelines.engines.vllm.prompts import Prompts, Rendered
from pipelines.engines.vllm.settings import VllmError, configure_vllm, engine_arguments, refusal
from skipvision.config import SkipConfig
from skipvision.cost import units
from skipvision.cost.running import Design
from skipvision.engine import Chunk, Completion, Request, Sampling, Statistics
from skipvision.errors import GenerationError, InputError, SkipVisionError

_STOP_SECONDS = 5.0
"""How long vLLM's processes may take to end themselves (s)."""

_AGAIN_SECONDS = 0.1
"""A request past its deadline is aborted again after this time: vLLM may not have known it yet (s)."""


class AsyncVllm:
    """vLLM's engine in the event loop that awaits `start`.

    Args:
        model: as `settings.vllm_model` returned it.
        settings: of the engine.
        died: called in the event loop when vLLM's processes have died, before waiting requests get the error.
        further: arguments of vLLM that ``engine_kwargs`` may replace.

    Attributes:
        processor: the model's Hugging Face processor.
        vocabulary: number of logits.
    """

    processor: Any
    vocabulary: int

    def __init__(
        self,
        model: EngineModel,
        settings: BackendSection,
        died: Callable[[BaseException], None],
        further: Mapping[str, Any] | None = None,
    ) -> None:
        configure_vllm()
        self._model, self._settings, self._died, self._further = model, settings, died, further
        self._numbers, self._meter = count(), Meter()
        self._engine: Any = None

    async def start(self) -> None:
        """Start vLLM's processes and load the model, which blocks the event loop.

        Raises:
            ConfigError: vLLM refuses the settings.
            VllmError: its processes cannot start.
        """
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        device = usable_device()
        dtype = str(arithmetic(self._model.dtype, device)).removeprefix("torch.")
        arguments = engine_arguments(self._model, self._settings, dtype, self._further)
        try:
            self.processor = load_processor(self._model.base)
            self._engine = AsyncLLM.from_engine_args(
                AsyncEngineArgs(**arguments), stat_loggers=[meter_factory(self._meter)]
            )
        except SkipVisionError:
            raise
        except RuntimeError as error:  # one of its processes failed, and has printed why
            raise VllmError(f"vLLM cannot start with {self._model.base}: {error}") from error
        except Exception as error:
            raise refusal(error) from error
        # It reports dead processes with a traceback, also when Ray ends this one; `died` reports them.
        logging.getLogger("vllm.v1.engine.async_llm").setLevel(logging.CRITICAL)
        self._prompts = Prompts(self._engine, self.processor)
        text = load_config(self._model.base).get_text_config()
        multiaxial = "mrope_section" in (getattr(text, "rope_parameters", None) or {})
        self._positions = None if multiaxial else getattr(text, "max_position_embeddings", None)
        self.vocabulary = self._engine.model_config.get_vocab_size()
        self._entry_bytes = self._bytes_of_an_entry()

    def _bytes_of_an_entry(self) -> int:
        values = sum(layer.values for layer in units.cache(Design.of(load_config(self._model.base))))
        kind = self._engine.vllm_config.cache_config.cache_dtype
        each = 1 if kind.startswith("fp8") else self._engine.model_config.dtype.itemsize
        return int(values * each)

    # ------------------------------------------------------------------------------------- requests

    async def render(self, request: Request, skip: object = None) -> Rendered:
        """Return a request's prompt as vLLM runs it; see `Prompts.render`."""
        return await self._prompts.render(request, skip)

    def room(self, rendered: Rendered, config: SkipConfig) -> int:
        """Return the tokens that a prompt leaves for its answer; 0 or less = it is too long itself."""
        room: int = self._engine.model_config.max_model_len - len(rendered)
        if self._positions is None or config.positions == "contiguous":
            return room
        # The tokens that images lost still take their positions.
        return min(room, self._positions - len(rendered) + rendered.visual_kept - rendered.visual_total)

    async def stream(
        self,
        request: Request,
        rendered: Rendered,
        config: SkipConfig,
        *,
        lora: Any = None,
        schema: str | None = None,
        whole: bool = False,
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the chunks of one request. Leaving the iteration, or cancellation, aborts it in vLLM.

        At the request's deadline vLLM aborts it, and the chunks end with what it has generated.

        Args:
            request: with the text of its prompt.
            rendered: its prompt.
            config: SkipConfig that the prompt was rendered under.
            lora: vLLM's request of an adapter.
            schema: JSON schema that the answer must follow.
            whole: yield everything at once at the end.

        Raises:
            InputError: vLLM refuses the request.
            GenerationError: vLLM could not answer it.
            VllmError: its processes have died.
        """
        number, until, room = next(self._numbers), _until(request), self.room(rendered, config)
        if room < 1:
            raise InputError(
                f"{len(rendered)} tokens of prompt leave no position of this model for an answer: shorten it"
            )
        try:
            parameters = sampling_parameters(request.sampling, schema, whole=whole)
            parameters.max_tokens = min(parameters.max_tokens, room)
        except ValueError as error:
            raise InputError(f"vLLM refuses this request: {error}") from error
        for last_try in (False, True):
            answers = Answers(number, request, rendered, config, self._decode, self._entry_bytes)
            async with aclosing(self._chunks(answers, parameters, lora, until)) as chunks:
                async for chunk in chunks:
                    yield chunk
            if answers.ended:
                return
            if answers.begun or last_try:
                raise GenerationError("vLLM could not answer this request: it reports an error of its own")
            # Its engine lacks an image that this process believes to have sent: process it again.
            rendered = await self._prompts.render(request, rendered.skip)

    async def _chunks(
        self, answers: Answers, parameters: Any, lora: Any, until: float | None
    ) -> AsyncGenerator[Chunk, None]:
        """Yield chunks until the end of the request, or until vLLM reports an error of its own."""
        try:
            with self._meter.open(parameters.n):
                async with aclosing(self._outputs(answers, parameters, lora, until)) as outputs:
                    async for output in outputs:
                        if any(one.finish_reason == "error" for one in output.outputs):
                            return
                        for chunk in answers.add(output):
                            if chunk.completion is not None:
                                self._meter.count(chunk.completion)
                            yield chunk
        except (asyncio.CancelledError, GeneratorExit):
            if not answers.ended:
                self._meter.count_cancelled()
            raise

    async def answer(self, request: Request) -> Completion | SkipVisionError:
        """Return a whole answer, or the error for which vLLM refused the request.

        Raises:
            VllmError: vLLM's processes have died.
        """
        try:
            rendered = await self.render(request)
            config = self._model.skip
            async with aclosing(self.stream(request, rendered, config, whole=True)) as chunks:
                async for chunk in chunks:
                    if chunk.completion is not None:
                        return chunk.completion
        except VllmError:
            raise
        except SkipVisionError as error:
            return error
        return GenerationError("vLLM gave no answer to this request")

    async def _outputs(
        self, answers: Answers, parameters: Any, lora: Any, until: float | None
    ) -> AsyncGenerator[Any, None]:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        name, loop = f"{id(self)}-{next(self._numbers)}", asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None
        aborting: asyncio.Task[None] | None = None

        def expire() -> None:
            nonlocal timer, aborting
            answers.expired = True
            aborting = loop.create_task(self._engine.abort(name))
            timer = loop.call_later(_AGAIN_SECONDS, expire)

        if until is not None:
            timer = loop.call_later(max(until - time.monotonic(), 0), expire)
        try:
            outputs = self._engine.generate(answers.inputs, parameters, name, lora_request=lora)
            async with aclosing(outputs):
                async for output in outputs:
                    yield output
        except EngineDeadError as error:
            self._died(error)
            raise VllmError(f"vLLM's processes have died: {error}") from error
        except EngineGenerateError as error:
            reason = error.__cause__ or error
            raise GenerationError(f"vLLM failed ({type(reason).__name__}): {reason}") from error
        except ValueError as error:  # of its checks of a request
            raise InputError(f"vLLM refuses this request ({type(error).__name__}): {error}") from error
        finally:
            if timer is not None:
                timer.cancel()
            if aborting is not None:
                await aborting

    def _decode(self, ids: Any) -> str:
        return str(self.processor.decode(list(ids), skip_special_tokens=True))

    # ------------------------------------------------------------------------------- engine as such

    def statistics(self) -> Statistics:
        """Return the counters since the engine started."""
        return self._meter.statistics(self._settings.max_sequences, self._settings.kv_budget_bytes)

    async def ping(self) -> None:
        """Wait until vLLM's engine has replied between two steps. Raise `VllmError` if it has died."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._engine.is_paused()
        except EngineDeadError as error:
            self._died(error)
            raise VllmError(f"vLLM's processes have died: {error}") from error

    async def add_lora(self, name: str, number: int, folder: Path) -> Any:
        """Load an adapter, and return what requests name it by.

        Args:
            name: of the adapter.
            number: another one for each adapter, from 1 up.
            folder: PEFT's files; they must stay as long as the adapter is loaded.

        Raises:
            ConfigError: vLLM cannot load it.
        """
        from vllm.lora.request import LoRARequest

        lora = LoRARequest(name, number, str(folder))
        try:
            await self._engine.add_lora(lora)
        except Exception as error:  # of its worker, as text
            raise refusal(error) from error
        return lora

    async def remove_lora(self, number: int) -> None:
        """Remove the adapter with this number from vLLM."""
        await self._engine.remove_lora(number)

    def shutdown(self) -> None:
        """End vLLM's processes and drop running requests."""
        if self._engine is not None:
            self._engine.shutdown(timeout=_STOP_SECONDS)
            self._engine = None  # it would shut down again when the interpreter ends


def _until(request: Request) -> float | None:
    return None if request.deadline is None else time.monotonic() + request.deadline


def sampling_parameters(sampling: Sampling, schema: str | None = None, *, whole: bool = True) -> Any:
    """Return vLLM's form of the settings of a request's decoding.

    Args:
        sampling: the settings.
        schema: JSON schema that the answer must follow.
        whole: everything at the end instead of what each step adds.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    # vLLM refuses temperature 0 for several answers; drawing from one token is the same.
    several = sampling.n > 1 and not sampling.temperature
    return SamplingParams(
        n=sampling.n,
        max_tokens=sampling.max_new_tokens,
        temperature=1.0 if several else sampling.temperature,
        # vLLM wants more than 0, which also leaves one token.
        top_p=1.0 if sampling.top_p is None else max(sampling.top_p, 1e-9),
        top_k=1 if several else sampling.top_k or 0,
        repetition_penalty=1.0 if sampling.repetition_penalty is None else sampling.repetition_penalty,
        seed=sampling.seed,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        logprobs=sampling.logprobs,
        # `Answers` decodes the tokens. vLLM needs texts only to find stop texts.
        detokenize=bool(sampling.stop),
        structured_outputs=None if schema is None else StructuredOutputsParams(json=schema),
        output_kind=RequestOutputKind.FINAL_ONLY if whole else RequestOutputKind.DELTA,
    )
