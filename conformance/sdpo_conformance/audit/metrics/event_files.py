"""TensorBoard's event files, read with TensorBoard's own reader where it is installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from sdpo_conformance.audit.errors import AuditError, shown


def is_event_file(path: Path) -> bool:
    """Whether the name is one that TensorBoard's writers give."""
    return ".tfevents." in path.name and path.is_file()


def holds_event_files(path: Path) -> bool:
    """Whether a folder holds event files and no JSON, which would be read first."""
    if not path.is_dir():
        return False
    entries = list(path.iterdir())
    return any(map(is_event_file, entries)) and not any(entry.suffix in (".json", ".jsonl") for entry in entries)


def read_event_file(path: Path) -> list[dict[str, Any]]:
    """One row per step with every scalar of that step, of a file or of all that a folder holds (a resumed run writes
    several). Raises AuditError without the tensorboard package.
    """
    try:
        accumulators = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
        make_ndarray = importlib.import_module("tensorboard.util.tensor_util").make_ndarray
    except ImportError:
        raise AuditError(
            f"{shown(path)}: is a TensorBoard event file, and tensorboard, which reads it, is not installed:"
            " pip install tensorboard, or export the scalars as CSV"
        ) from None
    try:
        events = accumulators.EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        rows: dict[int, dict[str, Any]] = {}
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                rows.setdefault(event.step, {"step": event.step})[tag] = event.value
        for tag in events.Tags()["tensors"]:
            for event in events.Tensors(tag):
                array = make_ndarray(event.tensor_proto)
                if array.size == 1 and array.dtype.kind in "fiu":
                    rows.setdefault(event.step, {"step": event.step})[tag] = float(array.reshape(()))
    except Exception as error:
        raise AuditError(f"{shown(path)}: TensorBoard cannot read it: {shown(error)}") from None
    return [rows[step] for step in sorted(rows)]
