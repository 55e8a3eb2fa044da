"""Work of the suite's own, shared out among forked processes."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def may_fork(device: str) -> bool:
    """Whether this process can be forked: a CPU run, Linux, no second thread that might hold a lock."""
    return device == "cpu" and sys.platform == "linux" and len(os.listdir("/proc/self/task")) == 1


@dataclass
class Sharing:
    """Among how many processes work is shared out; alone unless the plugin says otherwise."""

    processes: int = 1


SHARING = Sharing()


def shared_out(work: Callable[[Sequence[Item]], Result], items: Sequence[Item]) -> list[Result]:
    """``work`` on parts of the items, each part in a process of its own, one of them this. Results are sent: they must
    pickle. A part whose process dies, or raises, is worked on here."""
    count = min(SHARING.processes, len(items)) if may_fork("cpu") else 1
    parts = [items[index::count] for index in range(1, count)]
    started = [begun(work, part) for part in parts]
    results = [work(items[:: max(1, count)])]
    for part, (process, pipe) in zip(parts, started, strict=True):
        try:
            results.append(pipe.recv())
        except EOFError:
            results.append(work(part))
        process.join()
    return results


def begun(
    work: Callable[[Sequence[Item]], Result], part: Sequence[Item]
) -> tuple[multiprocessing.context.ForkProcess, Connection[Any, Any]]:
    """A process that works on a part, and the pipe on which its result comes."""
    here, there = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        there.send(work(part))

    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    there.close()
    return process, here
