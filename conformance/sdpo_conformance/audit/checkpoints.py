"""Checkpoints of one run: which they are, and those held against each other, byte by byte."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from sdpo_conformance.audit.adapter import INDEX_FILE, OTHER_WEIGHTS_FILES, PICKLED, WEIGHTS_FILE, Adapter, open_adapter
from sdpo_conformance.audit.header import read_header
from sdpo_conformance.audit.run_files import open_regular

#: transformers' checkpoint-2, verl's global_step_2, NeMo-RL's step_2, Automodel's epoch_0_step_2, torchtune's epoch_0,
#: Megatron's iter_0000002.
_FOLDER = re.compile(r"(?:checkpoint[-_]|global_step_?|step_?|iter_?|epoch_?\d+[-_]step_?|epoch_?)(\d{1,12})")
#: mlx-lm's 0000100_adapters.safetensors.
_FILE = re.compile(r"(\d{1,12})_adapters\.safetensors")
#: Where in a checkpoint's folder the adapter is: verl, SkyRL, NeMo-RL, Automodel, prime-rl.
_INSIDE = ("", "actor/lora_adapter", "lora_adapter", "policy/lora_adapter", "adapter", "policy", "model", "weights",
           "policy/weights", "policy/weights/model", "lora_adapters", "policy/adapter")  # fmt: skip
_FROZEN = ("reference", "ref", "teacher")
_CHUNK_BYTES = 2**20


def find_checkpoints(run: Path) -> tuple[Path, ...]:
    """Every checkpoint's adapter in a run's folder, by step: folders, and mlx-lm's numbered files."""
    found: list[tuple[int, Path]] = []
    for path in run.iterdir():
        if match := _FILE.fullmatch(path.name):
            found.append((int(match[1]), path))
        elif (match := _FOLDER.fullmatch(path.name)) and path.is_dir():
            folder = next((path / place for place in _INSIDE if holds_weights(path / place)), None)
            if folder := folder or _named(path):
                found.append((int(match[1]), folder))
    return tuple(folder for _, folder in sorted(found))


def last_trainer_state(run: Path) -> Path | None:
    """transformers' record in the last checkpoint that has one, whether or not an adapter lies beside it."""
    found = [(int(match[1]), path) for path in run.iterdir() if (match := _FOLDER.fullmatch(path.name))]
    states = [folder / "trainer_state.json" for _, folder in sorted(found)]
    return next((state for state in reversed(states) if state.is_file()), None)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is called as a checkpoint is."""
    return bool(_FOLDER.fullmatch(path.name))


def holds_weights(folder: Path) -> bool:
    """Whether an adapter's weights are in the folder, readable or refused."""
    return any((folder / name).exists() for name in (WEIGHTS_FILE, INDEX_FILE, *OTHER_WEIGHTS_FILES, *PICKLED))


def _named(path: Path) -> Path | None:
    """The one sub-folder with a trained adapter: PEFT saves each named adapter in its own."""
    named = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and holds_weights(entry)]
    trained = [entry for entry in named if entry.name not in _FROZEN]
    return trained[0] if len(trained) == 1 else None


def number_of(checkpoint: Path) -> int | None:
    """The number in a checkpoint's name; `checkpoint` is where its adapter lies."""
    match = _FOLDER.fullmatch(name_of(checkpoint)) or _FILE.fullmatch(name_of(checkpoint))
    return int(match[1]) if match else None


def series_of(name: str) -> str:
    """What checkpoints of one series have in common in their names: epoch_1 and step_20 may be the same save."""
    return re.sub(r"\d+", "#", name)


def folder_of(checkpoint: Path) -> Path:
    """The numbered folder itself; `checkpoint` is where its adapter lies."""
    return next((path for path in (checkpoint, *checkpoint.parents) if is_checkpoint(path)), checkpoint)


def identical_checkpoints(checkpoints: Sequence[Path]) -> tuple[tuple[str, str], ...]:
    """Checkpoints whose adapters hold equal tensors, by name: each with the nearest earlier one of its series."""
    if len(checkpoints) < 2:
        return ()
    adapters = [open_adapter(folder) for folder in checkpoints]
    if any(len(adapter.empty) == len(adapter.tensors) for adapter in adapters):
        return ()  # nothing of nothing is equal; tensor-empty says so
    marks = [content_mark(adapter) for adapter in adapters]
    names = [name_of(path) for path in checkpoints]
    latest: dict[tuple[str, bytes], str] = {}
    found = []
    for name, mark in zip(names, marks, strict=True):
        series = (series_of(name), mark)
        found += [(latest[series], name)] if series in latest else []
        latest[series] = name
    return tuple(found)


def content_mark(adapter: Adapter) -> bytes:
    """A digest of every tensor's name, type, shape and bytes; the file's other metadata (a step, a date) apart."""
    digest = hashlib.blake2b()
    for path in dict.fromkeys(adapter.files.values()):
        for entry in sorted(read_header(path).values(), key=lambda entry: (entry.start, entry.name)):
            digest.update(repr((entry.name, entry.dtype, entry.shape)).encode())
        with open_regular(path) as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.digest()


def name_of(path: Path) -> str:
    """A checkpoint's own name, wherever in it the adapter lies."""
    numbered = (part for part in reversed(path.parts) if _FOLDER.fullmatch(part) or _FILE.fullmatch(part))
    return next(numbered, path.name)
