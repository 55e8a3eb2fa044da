"""Workers forked from the process that has imported everything: they start in milliseconds, where fresh ones import
torch, the rules and the implementation again.

Only a process of one thread may be forked, and a GPU's driver does not survive it: elsewhere pytest-xdist starts the
workers.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

import pytest
from _pytest.runner import runtestprotocol


def may_fork(device: str) -> bool:
    """Whether this process can be forked: a CPU run, Linux, no second thread that might hold a lock."""
    return device == "cpu" and sys.platform == "linux" and len(os.listdir("/proc/self/task")) == 1


@dataclass
class ForkedWorker:
    """A process, the pipe to it, the item it is at, and those that it is to judge after that."""

    process: ForkProcess
    pipe: Connection[Any, Any]
    at: pytest.Item
    batch: deque[pytest.Item]


def judge_in_forks(
    session: pytest.Session, batches: Iterable[Sequence[pytest.Item]], workers: int, begin: Callable[[], None]
) -> None:
    """Run every item and report it to pytest. The items of a batch share one process, which ``begin`` prepares; where
    it dies, its item is reported as failed and another process goes on with the rest."""
    queue = deque(deque(batch) for batch in batches)
    running: list[ForkedWorker] = []
    gc.freeze()  # a collection in a worker would walk, and copy, all of torch's objects
    try:
        while queue or running:
            while queue and len(running) < workers:
                running.append(start(queue.popleft(), running, begin))
            for pipe in wait([worker.pipe for worker in running]):
                worker = next(one for one in running if one.pipe is pipe)
                try:
                    reports = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    running.remove(worker)
                    worker.process.join()
                    if worker.batch:
                        queue.appendleft(worker.batch)
                    publish(session, [died(worker)])
                    continue
                publish(session, [from_data(session.config, data) for data in reports])
                if not worker.batch and queue:
                    worker.batch = queue.popleft()
                if worker.batch:
                    worker.at = worker.batch.popleft()
                    worker.pipe.send(session.items.index(worker.at))
                else:
                    worker.pipe.send(None)
                    worker.process.join()
                    running.remove(worker)
    finally:
        for worker in running:
            worker.process.terminate()


def start(batch: deque[pytest.Item], others: Sequence[ForkedWorker], begin: Callable[[], None]) -> ForkedWorker:
    """Fork a worker and hand it the first item."""
    here, there = multiprocessing.Pipe()
    item = batch.popleft()

    def work() -> None:
        here.close()
        for other in others:
            other.pipe.close()  # or it would not notice that this process is gone
        begin()
        serve(there, item.session)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    there.close()
    here.send(item.session.items.index(item))
    return ForkedWorker(process, here, item, batch)


def serve(pipe: Connection[Any, Any], session: pytest.Session) -> None:
    """In a worker: judge the items whose numbers arrive, until None does or the parent is gone."""
    hook = session.config.hook
    while (number := pipe.recv()) is not None:
        reports = runtestprotocol(session.items[number], log=False)
        pipe.send([hook.pytest_report_to_serializable(config=session.config, report=report) for report in reports])


def from_data(config: pytest.Config, data: dict[str, Any]) -> pytest.TestReport:
    """A report that a worker sent."""
    report: pytest.TestReport = config.hook.pytest_report_from_serializable(config=config, data=data)
    return report


def died(worker: ForkedWorker) -> pytest.TestReport:
    """What pytest is told of an item whose process did not survive it."""
    words = f"the worker process died (exit status {worker.process.exitcode})"
    return pytest.TestReport(worker.at.nodeid, worker.at.location, {}, "failed", words, "call")


def publish(session: pytest.Session, reports: Iterable[pytest.TestReport]) -> None:
    """Tell pytest's plugins, the one that counts failures among them."""
    for report in reports:
        session.config.hook.pytest_runtest_logreport(report=report)
