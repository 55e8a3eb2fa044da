"""The ranks of a run, kept warm: started once, called with one part each, watched, and replaced when one is lost.

torch.distributed does the rest: a gloo group on CPUs, NCCL where every rank has a GPU of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.sharded.mesh import MeshShape
from sdpo_conformance.sharded.rank import Answer, Fault, Ready, Request, Setting, is_collective, main
from sdpo_conformance.specs import DEFAULT

STARTING_SECONDS = 300.0
"""Importing torch and the implementation, and meeting the other ranks."""

COLLECTIVE_SECONDS = 15.0
AFTER_A_HANG_SECONDS = 4.0
"""How long a collective may wait for the other ranks; less once the implementation has hung."""

GRACE_SECONDS = 1.0
"""How long the others get to fail as well, once one rank has."""


class PoolError(Exception):
    """The ranks could not be started; one line for the user."""


@dataclass
class Member:
    """One rank as the judge sees it."""

    process: Any
    connection: Connection
    log: Path


@dataclass
class Pool:
    """``call`` starts the ranks when they are needed. ``starts`` counts how often that was."""

    target: str
    mesh: MeshShape
    device: str = "cpu"
    call_seconds: float = 120.0
    spec: str = DEFAULT
    starts: int = 0
    ready: Ready = field(default_factory=Ready)
    hung: bool = False
    _members: list[Member] = field(default_factory=list)
    _folder: Path | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def backend(self) -> str:
        """gloo, or NCCL where every rank has its own GPU."""
        if not self.device.startswith("cuda"):
            return "gloo"
        import torch

        return "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= self.mesh.ranks else "gloo"

    @property
    def collective_seconds(self) -> float:
        limit = AFTER_A_HANG_SECONDS if self.hung else COLLECTIVE_SECONDS
        return limit * 4 if self.device.startswith("cuda") else limit

    # --- life ---

    def start(self) -> Ready:
        """Start the ranks if none runs; raises PoolError where the implementation cannot be loaded."""
        if self._members:
            return self.ready
        self.starts += 1
        self._folder = Path(tempfile.mkdtemp(prefix="sdpo-ranks-"))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["sdpo_conformance.sharded.rank"])
        search_path = tuple(dict.fromkeys([os.getcwd(), *(entry or os.getcwd() for entry in sys.path)]))
        for rank in range(self.mesh.ranks):
            ours, theirs = context.Pipe()
            log = self._folder / f"rank-{rank}.log"
            setting = Setting(
                self.target, self.mesh, self.device, self.backend, str(self._folder / "rendezvous"),
                self.collective_seconds, str(log), search_path, self.spec,
            )  # fmt: skip
            process = context.Process(target=main, args=(theirs, setting, rank), daemon=True)
            process.start()
            theirs.close()
            self._members.append(Member(process, ours, log))
        try:
            found = self._replies(STARTING_SECONDS)
        except ImplementationError as error:
            raise PoolError(f"{self.target}: a rank ended while it was started: {error.summary}") from None
        self.ready = found[0]
        if error_text := next((reply.error for reply in found if reply.error), ""):
            self.close()
            raise PoolError(error_text)
        return self.ready

    def close(self) -> None:
        """End every rank, whatever it is doing."""
        for member in self._members:
            member.connection.close()
            if member.process.is_alive():
                member.process.kill()
        for member in self._members:
            member.process.join(10)
        self._members = []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    # --- calls ---

    def call(self, requests: Sequence[Request]) -> list[Answer]:
        """One request per rank; every rank's answer. Raises ImplementationError naming rank, collective and stack
        where one raises, hangs or dies; the ranks are then replaced, unless all of them raised alike."""
        self.start()
        for member, request in zip(self._members, requests, strict=True):
            try:
                member.connection.send_bytes(pickle.dumps(request))
            except (BrokenPipeError, ConnectionResetError):
                continue
        found = self._replies(self.call_seconds)
        faults = {rank: reply for rank, reply in enumerate(found) if isinstance(reply, Fault)}
        if not faults:
            return found
        rank, fault = min(faults.items(), key=lambda item: (timed_out(item[1]), item[0]))
        alike = len(faults) == len(found) and len({(f.kind, f.collective) for f in faults.values()}) == 1
        if timed_out(fault) or not alike:
            self.close()
        if timed_out(fault):
            self.hung = True
            waiting = ", ".join(f"rank {r} in {f.collective or 'a collective'}" for r, f in faults.items())
            raise ImplementationError(
                f"{requests[0].entry} hangs: {waiting} waited for ranks that never came", self._stacks(faults)
            )
        where = "on every rank" if alike else f"on rank {rank}"
        inside = f" in {fault.collective}" if fault.collective else ""
        verb = "called sys.exit" if fault.kind == "sys.exit" else f"raised {fault.kind}"
        raise ImplementationError(
            f"{requests[0].entry} {verb} {where}{inside}: {fault.text}", fault.stack, fault.device_lost, fault.where
        )

    def _replies(self, seconds: float) -> list[Any]:
        """What every rank sends; raises ImplementationError where one dies or stays silent."""
        deadline = time.monotonic() + seconds
        replies: dict[int, Any] = {}
        while len(replies) < len(self._members):
            pending = {rank: member for rank, member in enumerate(self._members) if rank not in replies}
            ready = wait(
                [member.connection for member in pending.values()], timeout=max(0.0, deadline - time.monotonic())
            )
            for rank, member in pending.items():
                if member.connection not in ready:
                    continue
                try:
                    replies[rank] = pickle.loads(member.connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._died(rank, replies)
            if not ready and time.monotonic() >= deadline:
                self._silent(sorted(set(range(len(self._members))) - set(replies)), replies, seconds)
            if any(isinstance(reply, Fault) and not timed_out(reply) for reply in replies.values()):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            elif replies and seconds != STARTING_SECONDS:
                deadline = min(deadline, time.monotonic() + self.collective_seconds + 1)
        return [replies[rank] for rank in range(len(self._members))]

    def _died(self, rank: int, replies: dict[int, Any]) -> None:
        member = self._members[rank]
        member.process.join(5)
        others = self._waiting([r for r in range(len(self._members)) if r != rank and r not in replies])
        others += "".join(
            f"; rank {r} waited in {reply.collective}"
            for r, reply in sorted(replies.items())
            if isinstance(reply, Fault) and reply.collective
        )
        text = member.log.read_text(encoding="utf-8", errors="replace") if member.log.exists() else ""
        code = member.process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"
        self.close()
        raise ImplementationError(f"rank {rank} died ({how}){others}", tail(text))

    def _silent(self, ranks: list[int], replies: dict[int, Any], seconds: float) -> None:
        """Some ranks did not answer in time: say what they wait in, and what the others did."""
        stacks = {rank: self._stack(rank) for rank in ranks}
        faults = {rank: reply for rank, reply in replies.items() if isinstance(reply, Fault)}
        raised = {rank: fault for rank, fault in faults.items() if not timed_out(fault)}
        self.close()
        where = ", ".join(f"rank {rank} waits in {collective_in(stack)}" for rank, stack in stacks.items())
        details = "\n".join(f"rank {rank}:\n{innermost(stack)}" for rank, stack in stacks.items())
        if raised:
            rank, fault = next(iter(raised.items()))
            raise ImplementationError(
                f"raised {fault.kind} on rank {rank} alone: {fault.text}; meanwhile {where}",
                f"{fault.stack}\n{details}",
                where=fault.where,
            )
        self.hung = True
        gave_up = "".join(f"; rank {r} gave up waiting in {f.collective or 'a collective'}" for r, f in faults.items())
        returned = ", ".join(f"rank {rank}" for rank in replies if rank not in faults)
        done = gave_up + (f"; {returned} had returned" if returned else "")
        raise ImplementationError(f"hangs: {where}{done} (after {seconds:g} s at most)", details)

    def _waiting(self, ranks: list[int]) -> str:
        """Where ranks stand once another has died: the collective that lost it, or else the stack as it is."""
        found = []
        for rank in ranks:
            reply = self._reply_now(rank)
            collective = reply.collective if isinstance(reply, Fault) else ""
            found.append(f"; rank {rank} waited in {collective or collective_in(self._stack(rank))}")
        return "".join(found)

    def _reply_now(self, rank: int) -> Any:
        """What a rank sends within the grace, or None."""
        connection = self._members[rank].connection
        with suppress(EOFError, ConnectionResetError):
            if connection.poll(GRACE_SECONDS):
                return pickle.loads(connection.recv_bytes())
        return None

    def _stack(self, rank: int) -> str:
        """The rank's Python stack now, from its log."""
        member = self._members[rank]
        before = member.log.stat().st_size if member.log.exists() else 0
        if member.process.pid is None or not member.process.is_alive():
            return ""
        os.kill(member.process.pid, signal.SIGUSR1)
        for _ in range(20):
            time.sleep(0.05)
            if member.log.stat().st_size > before:
                time.sleep(0.05)
                break
        return member.log.read_text(encoding="utf-8", errors="replace")[before:]

    @staticmethod
    def _stacks(faults: dict[int, Fault]) -> str:
        return "\n".join(f"rank {rank}:\n{fault.stack}" for rank, fault in faults.items())


def timed_out(fault: Fault) -> bool:
    """Whether a collective gave up waiting, or lost the rank that had given up."""
    text = fault.text.lower()
    return any(
        words in text
        for words in ("timed out", "timeout", "connection closed by peer", "connection reset", "application timeout")
    )


HARNESS = ("sdpo_conformance/sharded/rank.py", "threading.py", "multiprocessing/", "selectors.py", "runpy.py")
"""Frames of a rank that say nothing about the implementation."""

FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>\S+)')


def collective_in(stack: str) -> str:
    """The collective that a dumped stack stands in, as its caller names it."""
    found = [m["name"] for m in FRAME.finditer(stack) if is_collective(m["file"], m["name"])]
    if found:
        return found[-1] if found[-1] != "wait" or len(found) == 1 else found[-2]
    frames = [m for m in FRAME.finditer(stack) if not any(part in m["file"] for part in HARNESS)]
    return f"{Path(frames[0]['file']).name}:{frames[0]['line']}" if frames else "no Python code"


def innermost(stack: str) -> str:
    """The frames that say where a rank stands: the implementation's own and the collective it called."""
    lines = [line for line in stack.splitlines() if FRAME.search(line)]
    return "\n".join([line for line in lines if not any(part in line for part in HARNESS)][:8])


def tail(text: str) -> str:
    """The last lines of a log."""
    return "\n".join(text.strip().splitlines()[-12:])
