"""Timing one row with pytest-benchmark's pedantic mode: synchronised rounds, each beside the bare product.

A GPU's clock follows its power, so that single times drift by some per cent while a run goes on. Every round
therefore times the product ``h @ W.T`` right before the implementation, and a row's ratio to the limit is the median
of the rounds' own ratios. The product also sweeps the cache.

A synchronised round begins with a GPU that has nothing to do, and the host's time before the first kernel counts. In a
training step the GPU is behind, and that time is hidden: on CUDA a row is timed behind a full queue, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from math import ceil
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.bench.bench_inputs import Inputs
from sdpo_conformance.bench.workloads import Direction, Workload


@dataclass(frozen=True)
class Budget:
    """How long a row may be timed: about ``seconds`` in ``fewest`` to ``most`` rounds after ``warmup`` rounds."""

    seconds: float
    fewest: int
    most: int
    warmup: int

    def rounds(self, one: float) -> int:
        """The number of rounds, where one takes ``one`` seconds."""
        return max(self.fewest, min(self.most, int(self.seconds / max(one, 1e-9))))


FULL = Budget(seconds=0.5, fewest=5, most=50, warmup=2)
QUICK = Budget(seconds=0.3, fewest=5, most=30, warmup=1)
STEP = Budget(seconds=10.0, fewest=3, most=9, warmup=0)
"""A step has warmed up when it comes to its timing, and a slow trainer takes a quarter of a minute for one."""


def budget_of(work: Workload) -> Budget:
    if work.quick:
        return QUICK
    return STEP if work.direction is Direction.STEP else FULL


def clock() -> float:
    """Seconds, read when the GPU has done what was asked of it: pytest-benchmark's timer."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Limit:
    """The bare product h @ W.T into a given buffer, and the times it took."""

    def __init__(self, inputs: Inputs) -> None:
        rows, columns = inputs.hidden.shape[1], inputs.head.shape[0]
        self.buffer = inputs.head.new_empty(rows, columns)
        self.seconds: list[float] = []

    def run(self, inputs: Inputs) -> Tensor:
        """The product; with ``bfloat16`` inputs it accumulates in float32 and rounds once."""
        return torch.mm(inputs.hidden.detach()[0], inputs.head.T, out=self.buffer)

    def time(self, inputs: Inputs) -> float:
        start = clock()
        self.run(inputs)
        self.seconds.append(clock() - start)
        return self.seconds[-1]


@dataclass(frozen=True)
class Timing:
    """``seconds`` per round and the product's beside it, in the order they were taken; ``queued``: ratios to the
    product behind a full queue, on CUDA."""

    seconds: tuple[float, ...]
    limit_seconds: tuple[float, ...]
    queued: tuple[float, ...] = ()

    @property
    def ratios(self) -> list[float]:
        return [taken / limit for taken, limit in zip(self.seconds, self.limit_seconds, strict=True)]

    def document(self) -> dict[str, Any]:
        """What goes into ``extra_info``: the paired ratio with its quartiles, and the product's median."""
        low, middle, high = quartiles(self.ratios)
        return {
            "limit_ms": 1e3 * median(self.limit_seconds),
            "limit_ratio": middle,
            "limit_ratio_q1": low,
            "limit_ratio_q3": high,
            "limit_data": list(self.limit_seconds),
            **({"queued_ratio": median(self.queued), "queued_data": list(self.queued)} if self.queued else {}),
        }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, median(values), high


def time_row(benchmark: Any, run: Callable[[Inputs], Any], copies: list[Inputs], budget: Budget) -> Timing:
    """Warm up, choose the number of rounds, and let pytest-benchmark take them.

    Where there are several copies of the inputs, each is warmed up: a subject may keep what its own trainer would
    hand it. A single one has been run before.
    """
    limit = Limit(copies[0])
    turns = cycle(copies)
    unseen = len(copies) if len(copies) > 1 else 0
    for _ in range(max(budget.warmup, unseen)):
        run(next(turns))
        limit.run(copies[0])
    start = clock()
    limit.run(copies[0])
    run(next(turns))
    rounds = budget.rounds(clock() - start)

    def setup() -> tuple[tuple[Inputs], dict[str, Any]]:
        inputs = next(turns)
        limit.time(inputs)
        return (inputs,), {}

    def one(inputs: Inputs) -> None:
        run(inputs)

    benchmark.pedantic(one, setup=setup, rounds=rounds)
    seconds = tuple(benchmark.stats.stats.data)
    queued: tuple[float, ...] = ()
    if budget is not STEP and copies[0].head.is_cuda:
        ahead = ceil(median(seconds) / median(limit.seconds))
        queued = tuple(queued_ratio(run, next(turns), limit, ahead) for _ in range(rounds))
    return Timing(seconds, tuple(limit.seconds), queued)


def queued_ratio(run: Callable[[Inputs], Any], inputs: Inputs, limit: Limit, ahead: int) -> float:
    """The device's time for a call to its time for a product right before, behind ``ahead`` further products: as long
    as a synchronised call takes, so that the host is done before the device begins."""
    start, between, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.cuda.synchronize()
    for _ in range(ahead):
        limit.run(inputs)
    start.record()
    limit.run(inputs)
    between.record()
    run(inputs)
    end.record()
    end.synchronize()
    return between.elapsed_time(end) / start.elapsed_time(between)
