"""Opening files that nobody vouches for: regular files only, bounded reads, strict JSON."""

from __future__ import annotations

import gzip
import json
import os
import stat
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from sdpo_conformance.audit.errors import AuditError, shown

#: Parsed JSON can take some thirty times its length in memory, hence a limit far below the machine's.
JSON_LIMIT_BYTES = 16 * 2**20


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Folders, pipes, sockets and devices raise AuditError.

    A pipe would block and a device may never end, so the kind is looked at before anything is read;
    O_NONBLOCK covers a path that is swapped for a pipe in between.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise AuditError(f"{shown(path)}: is a folder where a file was expected; name the file inside it")
        if not stat.S_ISREG(mode):
            raise AuditError(f"{shown(path)}: is a pipe, socket or device, not a regular file; copy its content")
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        raise AuditError(f"{shown(path)}: cannot be opened: {_reason(error)}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AuditError(f"{shown(path)}: changed while it was being opened; run the audit again")
    return os.fdopen(descriptor, "rb")


def read_text(path: Path, limit: int = JSON_LIMIT_BYTES) -> str:
    """The text of a UTF-8 file of at most `limit` bytes (unpacked, of a .gz), without a byte-order mark."""
    with open_regular(path) as file:
        try:
            data = (gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file).read(limit + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise AuditError(f"{shown(path)}: cannot be read: {_reason(error)}") from None
    if len(data) > limit:
        raise AuditError(f"{shown(path)}: is larger than {limit // 2**20} MiB, the most that is read as text")
    if not data.strip():
        raise AuditError(f"{shown(path)}: is empty; expected JSON or text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AuditError(f"{shown(path)}: is not UTF-8 text (byte {error.start})") from None


def parse_json(text: str | bytes, where: str) -> Any:
    """Parse JSON, refusing duplicate keys and nesting too deep to read. NaN and Infinity are let through.

    Python's reader keeps the last of two equal keys without a word, which is a way to show one number to
    a person and another to a program.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise AuditError(f"{where}: JSON nested too deeply to be read") from None
    except json.JSONDecodeError as error:
        raise AuditError(f"{where}: is not JSON ({error.msg} at line {error.lineno}, column {error.colno})") from None
    except (ValueError, OverflowError) as error:  # duplicate keys, bytes that are no text, endless digits
        raise AuditError(f"{where}: is not JSON that can be read ({shown(error)})") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)!r} appears twice in one object")
            seen.add(key)
    return found


def _reason(error: Exception) -> str:
    return shown(getattr(error, "strerror", None) or error)
