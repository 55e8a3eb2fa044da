"""Writing files whole or not at all: a reader, or a crash, never meets half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a path beside ``path`` to write to; it takes ``path``'s place at the end, and goes where writing failed.
    Missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text, UTF-8."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON; NaN and infinity raise ValueError, what JSON does not know is written as its text."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, default=str) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, scratch: bool = False
) -> None:
    """Write a .safetensors file of contiguous copies. ``scratch``: in place, and half of it where the writer is killed:
    taking a file's place waits for the disk, which a file written before every call cannot afford."""
    from safetensors.torch import save_file

    copies = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    text = dict(metadata) if metadata else None
    if scratch:
        path.unlink(missing_ok=True)
        save_file(copies, path, metadata=text)
        return
    with whole(path) as partial:
        save_file(copies, partial, metadata=text)
