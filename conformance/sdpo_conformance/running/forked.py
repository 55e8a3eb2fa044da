"""Workers forked from the process that has imported everything: they start in milliseconds, where fresh ones import
torch, the rules and the implementation again.

Only a process of one thread may be forked, and a GPU's driver does not survive it: elsewhere pytest-xdist starts the
workers.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, Protocol

import pytest
from _pytest.runner import runtestprotocol


class Agenda(Protocol):
    """What is to be judged: batches of items, each batch for one worker."""

    def take(self, idle: bool) -> deque[pytest.Item] | None:
        """The next batch, or None where there is none now; ``idle``: nothing is being judged."""

    def put_back(self, batch: deque[pytest.Item]) -> None:
        """The rest of a batch whose worker died: to be taken next."""

    def judged(self, item: pytest.Item) -> None:
        """The item's record is written, or its worker died."""


class Everything:
    """Every batch, in order."""

    def __init__(self, batches: Iterable[Sequence[pytest.Item]]) -> None:
        self.queue = deque(deque(batch) for batch in batches)

    def take(self, idle: bool) -> deque[pytest.Item] | None:
        return self.queue.popleft() if self.queue else None

    def put_back(self, batch: deque[pytest.Item]) -> None:
        self.queue.appendleft(batch)

    def judged(self, item: pytest.Item) -> None:
        """Nothing follows from it."""


@dataclass
class ForkedWorker:
    """A process, the pipe to it, the item it is at, and those that it is to judge after that."""

    process: ForkProcess
    pipe: Connection[Any, Any]
    at: pytest.Item | None = None
    batch: deque[pytest.Item] = field(default_factory=deque)

    def begin_next(self) -> None:
        """Send the next item of the batch, if there is one."""
        self.at = self.batch.popleft() if self.batch else None
        if self.at is not None:
            with suppress(BrokenPipeError, ConnectionResetError):  # that it is dead shows where its answer is read
                self.pipe.send(self.at.session.items.index(self.at))


def judge_in_forks(session: pytest.Session, agenda: Agenda, workers: int, begin: Callable[[], None]) -> None:
    """Run what the agenda asks for and report it to pytest. The items of a batch share one process, which ``begin``
    prepares; where it dies, its item is reported as failed and another process goes on with the rest."""
    running: list[ForkedWorker] = []
    gc.freeze()  # a collection in a worker would walk, and copy, all of torch's objects
    try:
        while True:
            busy = hand_out(session, agenda, running, workers, begin)
            if not busy:
                break
            for pipe in wait([worker.pipe for worker in busy]):
                worker = next(one for one in busy if one.pipe is pipe)
                item = worker.at
                assert item is not None
                try:
                    reports = [from_data(session.config, data) for data in worker.pipe.recv()]
                except (EOFError, ConnectionResetError, BrokenPipeError):
                    running.remove(worker)
                    worker.process.join()
                    reports = [died(item, worker.process.exitcode)]
                    if worker.batch:
                        agenda.put_back(worker.batch)
                publish(session, reports)
                agenda.judged(item)
                if worker in running:
                    worker.begin_next()
        for worker in running:
            worker.pipe.send(None)
            worker.process.join()
    finally:
        for worker in running:
            worker.process.terminate()


def hand_out(
    session: pytest.Session, agenda: Agenda, running: list[ForkedWorker], workers: int, begin: Callable[[], None]
) -> list[ForkedWorker]:
    """Give every worker without an item a batch, starting workers as needed; those that have one."""
    while True:
        busy = [worker for worker in running if worker.at is not None]
        if len(busy) == workers or (batch := agenda.take(idle=not busy)) is None:
            return busy
        free = next((worker for worker in running if worker.at is None), None)
        if free is None:
            free = start(session, running, begin)
            running.append(free)
        free.batch = batch
        free.begin_next()


def start(session: pytest.Session, others: Sequence[ForkedWorker], begin: Callable[[], None]) -> ForkedWorker:
    """Fork a worker."""
    here, there = multiprocessing.Pipe()

    def work() -> None:
        here.close()
        for other in others:
            other.pipe.close()  # or it would not notice that this process is gone
        begin()
        serve(there, session)
        os._exit(0)  # a thread that the implementation started would keep the process

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    there.close()
    return ForkedWorker(process, here)


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


def died(item: pytest.Item, status: int | None) -> pytest.TestReport:
    """What pytest is told of an item whose process did not survive it."""
    words = f"the worker process died (exit status {status})"
    return pytest.TestReport(item.nodeid, item.location, {}, "failed", words, "call")


def publish(session: pytest.Session, reports: Iterable[pytest.TestReport]) -> None:
    """Tell pytest's plugins, the one that counts failures among them."""
    for report in reports:
        session.config.hook.pytest_runtest_logreport(report=report)
