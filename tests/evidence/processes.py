"""One function over many tasks, in processes that each load torch once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_processes(function: Callable[[Task], Result], work: Sequence[Task], jobs: int) -> Iterator[Result]:
    """Every task's result as it comes, from ``jobs`` processes; from this one where that is 1."""
    if jobs == 1:
        yield from map(function, work)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(function, task) for task in work]):
            yield future.result()
