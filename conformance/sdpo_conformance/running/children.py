"""Processes that a command starts: a group of their own, ended together when the command is.

``ending_on_signals`` makes TERM, INT and HUP an exception, so that every ``with`` and ``finally`` on the way out runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO, Any, NoReturn

PATIENCE_SECONDS = 0.7
"""Between asking a group to end and ending it: a command is gone within two seconds of its signal."""

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


class Interrupted(BaseException):
    """A signal asked the command to end; the exit status is 128 and the signal's number, as a shell has it.

    A BaseException, as KeyboardInterrupt is: nothing that handles errors may swallow it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.exit_status = 128 + number
        self.records: list[dict[str, Any]] = []
        self.planned = 0
        self.rest = "No verdict, and earlier results stay."

    def judged_so_far(self, records: list[dict[str, Any]], planned: int) -> None:
        """What there is to tell of the run that is ended."""
        self.records, self.planned = records, planned


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Within, TERM, INT and HUP raise ``Interrupted``; those that were ignored (nohup) stay ignored. Only the main
    thread can do this; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> NoReturn:
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        raise Interrupted(number)

    before = {one: signal.getsignal(one) for one in SIGNALS if signal.getsignal(one) is not signal.SIG_IGN}
    for one in before:
        signal.signal(one, end)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextmanager
def started(command: Sequence[str], log: IO[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, its output into ``log``; the group is ended on the way out."""
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=dict(environment),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and what is left of its group, whether or not it ended by itself."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None or alive(process.pid):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
        until = time.monotonic() + PATIENCE_SECONDS
        while (process.poll() is None or alive(process.pid)) and time.monotonic() < until:
            time.sleep(0.02)
    process.wait()


def alive(group: int) -> bool:
    """Whether a process group has members."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
