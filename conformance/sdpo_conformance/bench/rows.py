"""Measuring one cell inside a worker: what goes wrong costs this row and is said in one line."""

from __future__ import annotations

import gc
import re
import sys
import time
from functools import cache
from statistics import median
from types import ModuleType
from typing import Any

import torch

from sdpo_conformance.bench.bench_cells import BenchCell
from sdpo_conformance.bench.bench_inputs import Inputs, forget, rotation
from sdpo_conformance.bench.bench_judging import UNJUDGED, judge, nonconformity
from sdpo_conformance.bench.measuring import Limit, Timing, budget_of, time_row
from sdpo_conformance.bench.memory import peak_mib
from sdpo_conformance.bench.phases import phase_ms
from sdpo_conformance.bench.subjects import NotOffered, TimedSubject, bind, load
from sdpo_conformance.bench.truth import work_inputs
from sdpo_conformance.bench.workloads import Direction, Workload
from sdpo_conformance.judging.call import ImplementationError, implementation_errors
from sdpo_conformance.judging.implementation import Implementation, LoadingError
from sdpo_conformance.protocol import Capability

MEASURED, FAILED, NOT_OFFERED, NOT_RUN, UNAVAILABLE = "measured", "failed", "not offered", "not run", "unavailable"
"""Of a row: timed; raised, crashed or hung; no entry for this work; left out for time; cannot be loaded."""

LIMIT_ROUNDS = 5
"""Bare products of which the fastest gives the rate that a step's floor is computed with."""


def measure(cell: BenchCell, benchmark: Any, deadline: float | None) -> dict[str, Any]:
    """The record of a cell. ``status`` and, unless measured, ``reason``; ``device_lost`` where
    no further call can succeed in this process."""
    if deadline is not None and time.time() > deadline:
        return {"status": NOT_RUN, "reason": "the time limit was reached"}
    try:
        implementation = loaded(cell.target)
        subject = bind(implementation, cell.target, cell.work)
        if interpreted(implementation.object):
            raise NotOffered("its kernels run in Triton's interpreter here, whose time says nothing of a GPU")
        return measured(cell, subject, implementation, benchmark)
    except LoadingError as error:
        return {"status": UNAVAILABLE, "reason": str(error)}
    except NotOffered as error:
        return {"status": NOT_OFFERED, "reason": str(error)}
    except ImplementationError as error:
        return {"status": FAILED, "reason": shortened(error.summary), "device_lost": error.device_lost}
    except torch.OutOfMemoryError as error:
        forget()
        return {"status": FAILED, "reason": shortened(f"making the inputs raised OutOfMemoryError: {error}")}
    finally:
        gc.collect()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


_LOADED: dict[str, Implementation | LoadingError] = {}


def loaded(target: str) -> Implementation:
    """Load once; a failure is repeated for every cell of the target."""
    if target not in _LOADED:
        try:
            _LOADED[target] = load(target)
        except LoadingError as error:
            _LOADED[target] = error
    found = _LOADED[target]
    if isinstance(found, LoadingError):
        raise found
    return found


def measured(cell: BenchCell, subject: TimedSubject, implementation: Implementation, benchmark: Any) -> dict[str, Any]:
    """First the call that compiles and may fail, then conformity, error, memory and time."""
    work = cell.work
    inputs = work_inputs(work)
    with implementation_errors(str(work.direction)):
        subject.run(inputs)
        settle(work)
    remarks = list(subject.remarks)
    nonconforming = "" if subject.other and subject.entry is not Capability.DIVERGENCE else conformity(cell, subject)
    verdict = UNJUDGED
    try:
        verdict = judge(subject, work)
    except (ImplementationError, RuntimeError, MemoryError) as error:
        remarks.append(shortened(f"error not judged: {error}"))
        if isinstance(error, ImplementationError) and error.device_lost:
            raise
    with implementation_errors(str(work.direction)):
        peak = peak_mib(lambda: subject.run(inputs), work.device)
        timing = time_row(benchmark, subject.run, [inputs] if subject.flops else rotation(inputs), budget_of(work))
    return {
        "status": MEASURED,
        "reason": "",
        "peak_mib": peak,
        "error": verdict.error,
        "error_of": verdict.of,
        "error_details": verdict.details or {},
        "wrong": verdict.wrong,
        "nonconforming": nonconforming,
        "other": subject.other,
        "remarks": remarks,
        "entry": subject.entry.value,
        **timing.document(),
        **({"step": step_figures(subject, work, inputs, timing)} if subject.flops else {}),
    }


def step_figures(subject: TimedSubject, work: Workload, inputs: Inputs, timing: Timing) -> dict[str, Any]:
    """Of a whole step: response tokens a second, the floor that the model's operations set at the bare product's own
    rate, and where the time goes (of one more call; on CUDA the device's time)."""
    # Back to back: a trainer that the host keeps waiting leaves the GPU at a low clock for a single product.
    limit = Limit(inputs)
    seconds = min(limit.time(inputs) for _ in range(LIMIT_ROUNDS))
    rate = 2 * work.tokens * work.head.hidden * work.head.vocabulary / seconds
    with implementation_errors(str(work.direction)):
        phases = phase_ms(lambda: subject.run(inputs), work.device)
    return {
        "tokens_per_second": work.tokens / median(timing.seconds),
        "floor_ms": 1e3 * subject.flops / rate,
        "phases_ms": phases,
    }


def settle(work: Workload) -> None:
    """Errors of a GPU arrive when it is waited for."""
    if work.device.startswith("cuda"):
        torch.cuda.synchronize()


def conformity(cell: BenchCell, subject: TimedSubject) -> str:
    return _conformity(cell.target, subject.entry, cell.work.device)


@cache
def _conformity(target: str, entry: Capability, device: str) -> str:
    try:
        return shortened(nonconformity(loaded(target), entry, device))
    except ImplementationError:
        raise
    except Exception as error:
        return shortened(f"could not be judged: {type(error).__name__}: {error}")


def interpreted(found: Any) -> bool:
    """Whether the implementation's Triton kernels run in the interpreter."""
    name = found.__name__ if isinstance(found, ModuleType) else type(found).__module__
    if "triton.runtime.interpreter" not in sys.modules:
        return False
    kind = sys.modules["triton.runtime.interpreter"].InterpretedFunction
    return any(
        isinstance(value, kind)
        for module_name, module in list(sys.modules.items())
        if module_name == name or module_name.startswith(name + ".")
        for value in list(vars(module).values())
    )


def shortened(text: str) -> str:
    """One line for a table; an exhausted memory in the words that matter."""
    text = " ".join(text.split())
    if "out of memory" in text.lower():
        wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
        return "out of memory" + (f": a request of {wanted.group(1)}" if wanted else "")
    if "DefaultCPUAllocator" in text:
        return "out of memory on the CPU"
    return text if len(text) <= 240 else text[:237] + "..."


def describe(work: Workload) -> dict[str, Any]:
    """The parameters a benchmark is filed under."""
    document = work.write()
    if work.direction is not Direction.TOPK and not work.direction.has_objective:
        document.pop("top_k")
    return document
