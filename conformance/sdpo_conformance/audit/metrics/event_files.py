"""TensorBoard's event files: the scalars in their records, and nothing else of them.

A file is a row of records: length (8 bytes), its checksum (4), an Event in protobuf's wire format, its checksum (4);
tensorflow/core/lib/io/record_writer.h and the event, summary and tensor .proto files of tensorboard/compat/proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sdpo_conformance.audit.errors import AuditError, shown
from sdpo_conformance.audit.run_files import open_regular

#: A record longer than this holds images or text and is passed over; a length past the other is none.
_LARGEST_SCALAR_RECORD = 2**20
_LARGEST_RECORD = 2**31
_MOST_RECORDS = 5_000_000
_CHECKSUM = 4
#: TensorProto's dtypes of scalars: how one is stored in tensor_content.
_STORED = {1: "<f", 2: "<d", 3: "<i", 9: "<q", 19: "<e"}
#: Its repeated fields of values: float_val, double_val, int_val, int64_val.
_VALUES = {5: "<f", 6: "<d", 7: "", 10: ""}


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
    """One row per step with every scalar of that step, of a file or of all that a folder holds: a resumed run writes
    several, and the last account of a step counts. A last record that is cut off is left out.

    Raises AuditError where a file is not made of such records.
    """
    files = sorted(entry for entry in path.iterdir() if is_event_file(entry)) if path.is_dir() else [path]
    rows: dict[int, dict[str, Any]] = {}
    for file in files:
        with open_regular(file) as opened:
            try:
                for record in _records(opened):
                    step, scalars = _event(record)
                    if scalars:
                        rows.setdefault(step, {"step": step}).update(scalars)
            except (ValueError, struct.error, UnicodeDecodeError) as error:
                raise AuditError(
                    f"{shown(file)}: is not an event file that can be read: {shown(error)}; export the scalars as CSV"
                ) from None
    return [rows[step] for step in sorted(rows)]


def _records(file: BinaryIO) -> Iterator[bytes]:
    for number in range(_MOST_RECORDS):
        head = file.read(8 + _CHECKSUM)
        if len(head) < 8 + _CHECKSUM:
            if number == 0 and head:
                raise ValueError("it ends inside its first record")
            return
        (length,) = struct.unpack("<Q", head[:8])
        if length > _LARGEST_RECORD:
            raise ValueError(f"record {number + 1} claims {length} bytes")
        if length > _LARGEST_SCALAR_RECORD:
            file.seek(length + _CHECKSUM, 1)
            continue
        record = file.read(length)
        if len(record) < length or len(file.read(_CHECKSUM)) < _CHECKSUM:
            return
        yield record


def _event(record: bytes) -> tuple[int, dict[str, float]]:
    """An Event's step and the scalars of its summary."""
    step, scalars = 0, {}
    for number, value in _fields(record):
        if number == 2 and isinstance(value, int):
            step = value
        elif number == 5 and isinstance(value, bytes):
            for inner, entry in _fields(value):
                if inner == 1 and isinstance(entry, bytes) and (scalar := _scalar(entry)) is not None:
                    scalars[scalar[0]] = scalar[1]
    return step, scalars


def _scalar(entry: bytes) -> tuple[str, float] | None:
    """The tag and number of a Summary.Value; None for one that is no single number."""
    tag, number = "", None
    for field, value in _fields(entry):
        if field == 1 and isinstance(value, bytes):
            tag = value.decode()
        elif field == 2 and isinstance(value, bytes):
            (number,) = struct.unpack("<f", value)
        elif field == 8 and isinstance(value, bytes):
            number = _tensor(value)
    return (tag, float(number)) if tag and number is not None else None


def _tensor(proto: bytes) -> float | None:
    """The one number of a TensorProto; None where it holds several, or something else."""
    kind, found = 0, []
    for field, value in _fields(proto):
        if field == 1 and isinstance(value, int):
            kind = value
        elif field == 4 and isinstance(value, bytes) and kind in _STORED:
            size = struct.calcsize(_STORED[kind])
            found += [struct.unpack(_STORED[kind], value)[0]] if len(value) == size else [0.0, 0.0] if value else []
        elif field in _VALUES and kind in _STORED:
            found += _values(value, _VALUES[field])
    return float(found[0]) if len(found) == 1 else None


def _values(value: int | bytes, form: str) -> list[float]:
    """A repeated field of numbers, packed or one at a time; of whole numbers those of one byte to ten."""
    if isinstance(value, int):
        return [float(value)]
    if form:
        size = struct.calcsize(form)
        return [struct.unpack_from(form, value, place)[0] for place in range(0, len(value) - size + 1, size)]
    found, place = [], 0
    while place < len(value):
        number, place = _varint(value, place)
        found.append(float(number))
    return found


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """A message's fields by number: whole numbers as int, everything else as its bytes."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, kind = key >> 3, key & 7
        if kind == 0:
            whole, place = _varint(message, place)
            yield number, whole
            continue
        if kind == 2:
            size, place = _varint(message, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of wire type {kind}")
        if size < 0 or place + size > len(message):
            raise ValueError("a field runs past its message")
        yield number, message[place : place + size]
        place += size


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            break
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            value &= 2**64 - 1
            return (value - 2**64 if value >= 2**63 else value), place
    raise ValueError("a number without an end")
