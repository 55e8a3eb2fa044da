"""Peak memory of one call, in MiB beyond what was held before it (inputs, weights); what it returns counts.

On CUDA: the allocator's own peak. On the CPU: the running sum of what PyTorch's allocator handed out, as its
profiler reports it; memory taken past it (NumPy, a compiled library) is not seen.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MIB = 2**20


def peak_mib(call: Callable[[], Any], device: str) -> float | None:
    """The peak, or None where nothing can be said."""
    gc.collect()
    return cuda_peak(call) if device.startswith("cuda") else cpu_peak(call)


def cuda_peak(call: Callable[[], Any]) -> float:
    """Of the caching allocator, on the current device."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak / MIB


def cpu_peak(call: Callable[[], Any]) -> float | None:
    """From the profiler's memory events; None where it recorded none."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == 0
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak / MIB if changes else None
