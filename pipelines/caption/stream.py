"""A stream of blocks through Ray Data: readers yield them, actors transform several at a time.

The job that takes the results holds the blocks in progress. It keeps nothing of those before, so its memory
does not depend on their number.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines._compat import keep_no_block_statistics
from pipelines.caption.config import ScalingSection
from skipvision.errors import SkipVisionError

_MAX_TASKS = 1000
"""Max reader tasks, because Ray Data keeps a record of each. With more shards, a task reads several."""


def streamed(
    shards: Sequence[int],
    reader: Callable[[pa.Table], Iterator[pa.Table]],
    actor: tuple[type[Callable[[pa.Table], pa.Table]], Any],
    scaling: ScalingSection,
    resources: Mapping[str, float],
    blocks_at_once: int,
) -> Iterator[Any]:
    """Yield the values that actors return for the blocks of all shards. Ray must run.

    Args:
        shards: numbers, each of which a reader gets as a table with the column ``shard``.
        reader: yields blocks for a shard.
        actor: class and argument of the actors, which map a block to another.
        scaling: number of readers and actors.
        resources: CPUs and GPUs of an actor.
        blocks_at_once: blocks that an actor works on at a time.

    Raises:
        SkipVisionError: a block holds this error.
        ray.exceptions.RayError: a bug.
    """
    import ray.data
    from ray.data import ActorPoolStrategy

    pieces = np.array_split(np.asarray(shards, np.int64), min(len(shards), _MAX_TASKS))
    rows = ray.data.from_arrow([pa.table({"shard": piece}) for piece in pieces])
    keep_no_block_statistics(rows.context)
    # Ray Data splits and merges blocks by size. Ours are single binary values, which cannot be split, and
    # this size is too small for two.
    rows.context.target_max_block_size = 1
    rows.context.enable_progress_bars = False
    rows.context.print_on_execution_start = False
    prepared = rows.map_batches(
        reader,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=scaling.cpus_per_reader,
        compute=ray.data.TaskPoolStrategy(size=min(scaling.readers, len(shards))),
    )
    written = prepared.map_batches(
        actor[0],
        fn_constructor_args=(actor[1],),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=scaling.workers,
            enable_true_multi_threading=True,
            max_concurrent_calls_per_actor=blocks_at_once,
            max_tasks_in_flight_per_actor=blocks_at_once + 2,
        ),
        num_cpus=resources["CPU"],
        num_gpus=resources["GPU"],
    )
    for batch in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from unpacked(batch)


def packed(value: Any) -> pa.Table:
    """Return a block with one value."""
    return pa.table({"value": pa.array([pickle.dumps(value)], pa.large_binary())})


def unpacked(table: pa.Table) -> Iterator[Any]:
    """Yield the values packed by `packed` in another process of the job; raise those that are errors."""
    for value in table["value"]:
        value = pickle.loads(value.as_buffer())  # noqa: S301
        if isinstance(value, SkipVisionError):
            raise value
        yield value
