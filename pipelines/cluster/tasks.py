"""Functions that run in parallel as Ray tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import skipvision as sv

Task = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its arguments; a Ray object reference among them arrives as the object."""


def in_parallel(tasks: Sequence[Task], cpus: float) -> Iterator[tuple[int, Any]]:
    """Run each task in a Ray worker with ``cpus`` CPUs and yield (index, result) as the tasks finish.

    Raises:
        SkipVisionError: a task raised it; the error is the task's own, without Ray's wrapper.
    """
    import ray

    threads = {"env_vars": {"OMP_NUM_THREADS": str(max(1, int(cpus)))}}
    refs = {
        ray.remote(function).options(num_cpus=cpus, runtime_env=threads).remote(*arguments): number
        for number, (function, arguments) in enumerate(tasks)
    }
    waiting = list(refs)
    while waiting:
        [done], waiting = ray.wait(waiting, num_returns=1)
        try:
            result = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, sv.SkipVisionError):
                raise error.cause from None
            raise
        yield refs[done], result
