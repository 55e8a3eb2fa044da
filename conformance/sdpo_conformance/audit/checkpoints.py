"""Checkpoints of one run held against each other, byte by byte."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from sdpo_conformance.audit.adapter import open_adapter
from sdpo_conformance.audit.run_files import open_regular

_CHUNK_BYTES = 2**20


def identical_neighbours(checkpoints: Sequence[Path]) -> tuple[tuple[str, str], ...]:
    """Neighbouring checkpoints whose adapters' files are equal, by the names of their folders in the run."""
    if len(checkpoints) < 2:
        return ()
    adapters = [open_adapter(folder) for folder in checkpoints]
    marks = [tuple(_mark(file) for file in dict.fromkeys(adapter.files.values())) for adapter in adapters]
    names = [_name(folder) for folder in checkpoints]
    return tuple((names[i], names[j]) for i, j in pairwise(range(len(marks))) if marks[i] == marks[j])


def _mark(path: Path) -> bytes:
    digest = hashlib.blake2b()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.digest()


def _name(folder: Path) -> str:
    parts = folder.parts
    return next((part for part in reversed(parts) if any(c.isdigit() for c in part) and "step" in part), folder.name)
