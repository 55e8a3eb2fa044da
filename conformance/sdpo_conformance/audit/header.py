"""The header of a safetensors file, checked before anything else reads the file.

Format: 8 bytes little-endian header length, a JSON object of {name: {dtype, shape, data_offsets}}, then the
data; offsets are relative to the end of the header, do not overlap and leave no hole
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_conformance.audit.errors import AuditError, shown
from sdpo_conformance.audit.run_files import open_regular, parse_json

#: Well above any adapter (1,198 tensors take some 150 KB), well below what exhausts memory once parsed.
HEADER_LIMIT_BYTES = 16 * 2**20
_MOST_DIMENSIONS = 16
_LARGEST_DIMENSION = 2**62

ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
#: The distance between 1 and the next larger number.
SPACING: Mapping[str, float] = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as its file declares it; `start` and `end` are byte offsets into the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of the file by name. Raises AuditError, in one line, for any file that breaks the
    format.
    """
    where = shown(path)
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise AuditError(f"{where}: is empty; expected a safetensors file")
            prefix = file.read(8)
            if len(prefix) < 8:
                raise AuditError(f"{where}: is truncated: {size} bytes, too short for a safetensors header")
            length = int.from_bytes(prefix, "little")
            if length > size - 8:
                raise AuditError(
                    f"{where}: is not a whole safetensors file: its header claims {length} bytes "
                    f"and the file has {size - 8} left; copy it again or check that it is safetensors"
                )
            if length > HEADER_LIMIT_BYTES:
                raise AuditError(f"{where}: its header claims {length} bytes, over the limit of {HEADER_LIMIT_BYTES}")
            header = file.read(length)
        except OSError as error:
            raise AuditError(f"{where}: cannot be read: {shown(error)}") from None
    document = parse_json(header, f"{where}: safetensors header")
    if not isinstance(document, Mapping):
        raise AuditError(f"{where}: its safetensors header is not a JSON object")
    entries = {name: _entry(name, value, where) for name, value in document.items() if name != "__metadata__"}
    _check_layout(entries, size - 8 - length, where)
    return entries


def _entry(name: str, value: Any, where: str) -> TensorEntry:
    place = f"{where}: tensor {shown(name)}"
    if not isinstance(value, Mapping):
        raise AuditError(f"{place}: expected dtype, shape and data_offsets, got {shown(repr(value))}")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise AuditError(f"{place}: dtype {shown(repr(dtype))} is not one of {', '.join(ITEM_BYTES)}")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or not all(map(_is_size, shape)):
        raise AuditError(f"{place}: shape {shown(repr(shape))} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise AuditError(f"{place}: data_offsets {shown(repr(offsets))} are not a begin and an end")
    entry = TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])
    if entry.end - entry.start != entry.numel * ITEM_BYTES[dtype]:
        raise AuditError(
            f"{place}: {dtype} {shown(list(shape))} takes {shown(entry.numel * ITEM_BYTES[dtype])} bytes "
            f"but its offsets span {entry.end - entry.start}"
        )
    return entry


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_DIMENSION


def _check_layout(entries: Mapping[str, TensorEntry], data_bytes: int, where: str) -> None:
    position, previous = 0, ""
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.end)):
        if entry.start < position:
            raise AuditError(f"{where}: tensor {shown(entry.name)} overlaps {shown(previous)} in the data")
        if entry.start > position:
            raise AuditError(
                f"{where}: {entry.start - position} bytes before tensor {shown(entry.name)} belong to none"
            )
        position, previous = entry.end, entry.name
    if position > data_bytes:
        raise AuditError(f"{where}: is truncated: its tensors need {position} bytes of data and it has {data_bytes}")
    if position < data_bytes:
        raise AuditError(f"{where}: {data_bytes - position} bytes after the last tensor belong to none")
