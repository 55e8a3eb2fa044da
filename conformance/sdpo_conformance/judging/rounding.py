"""Right results, rounded once to half precision: it lies behind every formula, and a small change to any of them seems
to explain it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sdpo_conformance.judging.records import Record
from sdpo_conformance.protocol import Capability

HALVES = (torch.float16, torch.bfloat16)

ROUNDING = 0.55
"""Units of roundoff that one rounding may cost, with what the sum before it was off by."""

MOST = 0.9
"""Share of the failures that a rounding has to explain: where it is one, large gradients that arrive overflow too."""


def rounding_in_words(folder: Path, failed: Sequence[Record], parts: Any) -> list[str]:
    """The diagnosis's lines where the failures are results rounded to half precision; none where they are not."""
    observed = [(one, folder / str(one.failure.get("observed") or "")) for one in failed]
    found = [roundings(record, path, parts) if path.is_file() else set() for record, path in observed]
    for dtype in HALVES:
        explained = sum(dtype in one for one in found)
        if explained and explained >= MOST * len(found):
            name = str(dtype).removeprefix("torch.")
            return [
                f"results in {name}: explains {explained} of {len(found)} failures to the last bit",
                f"Loss or metrics are right, and returned in {name}, or rounded to it last, whatever the input. Fix: "
                "compute and return them in float32.",
            ]
    return []


def roundings(record: Record, path: Path, parts: Any) -> set[torch.dtype]:
    """The half precisions that a failure may come from: what is off is the truth in it, and no gradient is off by more
    than its roundoff."""
    try:
        expected = parts.expectations(parts.load(path), Capability(record.entry))
    except ValueError:
        return set()  # an input that has to be refused: there are no right numbers
    got = {name.removeprefix("got."): value for name, value in load_file(path).items() if name.startswith("got.")}
    results = [(got[name], one) for name, one in expected.results.items() if name in got]
    gradients = [(got[key], one) for name, one in expected.gradients.items() if (key := f"gradient.{name}") in got]
    if any(value.shape != one.value.shape for value, one in (*results, *gradients)):
        return set()
    off = [value for value, one in results if bool((one.excess(value) > 1).any())]
    return {
        dtype
        for dtype in HALVES
        if off
        and all(bool((value.to(dtype).double() == value).all()) for value in off)
        and all(near(value, one.value, one.bound, dtype) for value, one in (*results, *gradients))
    }


def near(got: Tensor, truth: Tensor, bound: Tensor, dtype: torch.dtype) -> bool:
    """Whether values are as near as one rounding to a dtype leaves them, infinite where it has no larger number."""
    kind = torch.finfo(dtype)
    allowed = bound + ROUNDING * kind.eps * truth.abs() + kind.tiny * kind.eps
    beyond = (truth.abs() > kind.max) & (got == truth.sign() * torch.inf)
    return bool((((got - truth).abs() <= allowed) | beyond | (got == truth)).all())
