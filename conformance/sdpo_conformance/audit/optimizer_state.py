"""The optimizer state that CLaaS saves beside an adapter, looked at from outside.

optimizer_state.pt is a pickle in a zip archive. The pickle is never opened: the archive's directory lists
every tensor's size and checksum, and AdamW's step counters are stored as four raw bytes. That is enough to
see whether the state belongs to this adapter and whether it moved with it.
"""

from __future__ import annotations

import struct
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_conformance.audit.checkpoints import folder_of, name_of
from sdpo_conformance.audit.errors import AuditError, shown
from sdpo_conformance.audit.run_files import open_regular, parse_json, read_text

STATE_FILES = ("optimizer_state.pt", "optimizer.pt")
_DIRECTORY_LIMIT_BYTES = 64 * 2**20
_STEP_BYTES = 4


@dataclass(frozen=True)
class OptimizerState:
    """Byte sizes of the stored tensors (step counters apart), their checksums, and the counters' values."""

    path: Path
    sizes: Counter[int]
    checksums: tuple[tuple[int, int], ...]
    steps: tuple[float, ...]


def find_optimizer_state(folder: Path) -> Path | None:
    """The optimizer state's file in an adapter's folder, if there is one."""
    return next((folder / name for name in STATE_FILES if (folder / name).is_file()), None)


@dataclass(frozen=True)
class SavedCounter:
    """AdamW's step counter in a checkpoint that `global_step` updates led to, by the trainer's own count."""

    checkpoint: str
    global_step: int
    counter: int


def saved_counters(checkpoints: Sequence[Path]) -> tuple[SavedCounter, ...]:
    """The counters of all checkpoints that hold transformers' trainer_state.json beside an optimizer's state, as far as
    every four-byte tensor of the state is a whole number from 1 on, as AdamW's counters are.
    """
    found = []
    for checkpoint in checkpoints:
        folder = folder_of(checkpoint)
        path, steps = find_optimizer_state(folder), _global_step(folder)
        try:
            state = read_optimizer_state(path) if path and steps else None
        except AuditError:
            continue
        if state and steps and state.steps and all(step >= 1 and step == step // 1 for step in state.steps):
            found.append(SavedCounter(name_of(checkpoint), steps, int(max(state.steps))))
    return tuple(found)


def _global_step(folder: Path) -> int | None:
    path = folder / "trainer_state.json"
    try:
        document = parse_json(read_text(path), shown(path)) if path.is_file() else None
    except AuditError:
        return None
    steps = document.get("global_step") if isinstance(document, Mapping) else None
    return steps if isinstance(steps, int) and not isinstance(steps, bool) and steps > 0 else None


def read_optimizer_state(path: Path) -> OptimizerState | None:
    """The archive's directory and step counters; None for torch's format before 1.6, which is no archive."""
    with open_regular(path) as file:
        try:
            if file.read(4) != b"PK\x03\x04":
                return None
            with zipfile.ZipFile(_Bounded(file)) as archive:
                storages = [i for i in archive.infolist() if "/data/" in i.filename and i.file_size > 0]
                counters = [i for i in storages if i.file_size == _STEP_BYTES]
                steps = []
                for info in counters:
                    if info.compress_type == zipfile.ZIP_STORED and info.compress_size == _STEP_BYTES:
                        steps.append(struct.unpack("<f", archive.read(info))[0])
        except (
            zipfile.BadZipFile,
            OSError,
            ValueError,
            NotImplementedError,
            struct.error,
            RuntimeError,
        ) as error:
            raise AuditError(f"{shown(path)}: is not a whole torch archive: {shown(error)}") from None
    return OptimizerState(
        path=path,
        sizes=Counter(info.file_size for info in storages if info.file_size != _STEP_BYTES),
        checksums=tuple(sorted((info.file_size, info.CRC) for info in storages)),
        steps=tuple(steps),
    )


class _Bounded:
    """A file that refuses to be read in one piece larger than an archive's directory has any reason to be."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        if size > _DIRECTORY_LIMIT_BYTES:
            raise ValueError(f"its directory claims {size} bytes")
        data: bytes = self._file.read(_DIRECTORY_LIMIT_BYTES if size is None or size < 0 else size)
        return data
