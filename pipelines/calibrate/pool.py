"""Worker processes that each hold a model, and run the tasks of a calibration in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from skipvision.errors import SkipVisionError

RunTasks = Callable[[Sequence[Any]], Iterator[tuple[Any, Any]]]
"""Runs tasks in parallel, and yields each task with its result as soon as it has finished."""


@contextmanager
def actor_pool(
    kind: type, *arguments: Any, workers: int, resources: Mapping[str, float]
) -> Iterator[RunTasks]:
    """Start the worker processes and yield a function that runs tasks on them.

    A process that dies is started again, and its task with it.

    Args:
        kind: the class of a worker; its ``do(number, task)`` returns ``(number, result)``.
        arguments: of the class.
        workers: processes.
        resources: CPUs and GPUs of each.
    """
    import ray
    from ray.util import ActorPool

    remote: Any = ray.remote(kind).options(
        num_cpus=resources["CPU"],
        num_gpus=resources["GPU"],
        max_restarts=2,
        max_task_retries=2,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(max(1, int(resources["CPU"])))}},
    )
    actors: list[Any] = [remote.remote(*arguments) for _ in range(workers)]
    pool = ActorPool(actors)

    def run_tasks(tasks: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        try:
            finished = pool.map_unordered(lambda actor, one: actor.do.remote(*one), list(enumerate(tasks)))
            for number, result in finished:
                yield tasks[number], result
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, SkipVisionError):  # without Ray's traceback around it
                raise error.cause from None
            raise

    try:
        yield run_tasks
    finally:
        for actor in actors:
            ray.kill(actor)
