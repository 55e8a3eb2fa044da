"""How long the phases of one distill call keep the device busy, from the ranges that a trainer names.

A trainer marks its phases with ``torch.profiler.record_function("sdpo.base")`` and so on. On CUDA a kernel counts
for the phase within which it was launched, whichever thread launched it: nothing waits for the device in between.
On the CPU a phase is as long as its range.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PREFIX = "sdpo."
PHASES = ("base", "teacher", "forward", "loss", "backward", "refresh")
OTHER = "other"
"""Outside every range: the optimizer, clipping, metrics; all of a trainer that names nothing."""


def phase_ms(call: Callable[[], Any], device: str) -> dict[str, float]:
    """Milliseconds by phase, those of ``PHASES`` that took place and, on CUDA, ``OTHER``."""
    on_cuda = device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        call()
        if on_cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return busy_by_phase(events, on_cuda)


def busy_by_phase(events: list[dict[str, Any]], on_cuda: bool) -> dict[str, float]:
    """The same from a trace's events; ``ts`` and ``dur`` are in microseconds."""
    ranges = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(PREFIX))
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX)
    )
    spent: dict[str, float] = defaultdict(float)
    if not on_cuda:
        for start, end, name in ranges:
            spent[name] += end - start
    else:
        launched = {
            event["args"]["correlation"]: event["ts"]
            for event in events
            if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
        }
        starts = [start for start, _, _ in ranges]
        for event in events:
            if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
                at = launched.get(event["args"].get("correlation"))
                spent[_phase_at(at, ranges, starts)] += event["dur"]
    return {name: spent[name] / 1000 for name in (*PHASES, OTHER) if name in spent}


def _phase_at(moment: float | None, ranges: list[tuple[float, float, str]], starts: list[float]) -> str:
    """The range around a moment; ranges do not nest."""
    if moment is None:
        return OTHER
    index = bisect_right(starts, moment) - 1
    return ranges[index][2] if index >= 0 and moment <= ranges[index][1] else OTHER
