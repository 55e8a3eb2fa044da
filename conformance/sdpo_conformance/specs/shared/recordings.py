"""What a published function returned on named inputs: a manifest.json beside a .safetensors file.

The manifest's groups: ``cases``; ``nonfinite``, where a NaN or inf came back; ``raises``, what was refused. Every
entry has a ``note`` and the ``config``; the first two have ``expected`` numbers ("nan", "inf" as strings).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

RESULT = "expected."
"""Tensors whose name begins so are results; the others are inputs."""


@dataclass(frozen=True)
class Recording:
    """One named input: ``inputs`` by field name, the ``config``, and what came back: numbers in ``expected``, tensors
    in ``results``, or the ``exception`` raised."""

    name: str
    group: str
    note: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, float] = field(default_factory=dict)
    results: Mapping[str, Tensor] = field(default_factory=dict)
    exception: str = ""


def recordings(folder: Path) -> Iterator[Recording]:
    """Every recording of a folder, in its manifest's order."""
    manifest = json.loads((folder / "manifest.json").read_text())
    tensors = load_file(folder / manifest["tensors"])
    for group in ("cases", "nonfinite", "raises"):
        for name, entry in manifest.get(group, {}).items():
            own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
            yield Recording(
                name=name,
                group=group,
                note=entry["note"],
                config=entry["config"],
                inputs={key: value for key, value in own.items() if not key.startswith(RESULT)},
                expected={key: float(value) for key, value in entry.get("expected", {}).items()},
                results={key.removeprefix(RESULT): value for key, value in own.items() if key.startswith(RESULT)},
                exception=entry.get("exception", ""),
            )
