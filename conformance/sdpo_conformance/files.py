"""Writing files whole or not at all: a reader, or a crash, never meets half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a path beside ``path`` to write to; it takes ``path``'s place at the end, and goes where writing failed.
    Missing folders are made. An OSError speaks of ``path``."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise type(error)(error.errno, f"cannot write: {error.strerror}", str(path)) from error
    finally:
        with suppress(OSError):
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
    if scratch:
        write_over(path, safetensors_bytes(tensors, metadata or {}))
        return
    from safetensors.torch import save_file

    copies = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    with whole(path) as partial:
        save_file(copies, partial, metadata=dict(metadata) if metadata else None)


def write_over(path: Path, data: bytes) -> None:
    """Write over what a file holds. Emptying it first, as ``open`` does, takes ten times as long."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.write(file, data)
        os.ftruncate(file, len(data))
    finally:
        os.close(file)


SAFETENSORS_NAMES = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
    "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""Dtypes as a .safetensors header names them."""


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A .safetensors file: by hand because the library's checks of shared memory and sparse tensors take as long as a
    call of the loss, and a case is written before every call."""
    import torch

    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    blocks, end = [], 0
    for name, tensor in tensors.items():
        block = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        dtype = SAFETENSORS_NAMES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + len(block)]}
        blocks.append(block)
        end += len(block)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *blocks])
