"""An adapter on disk: found in a folder, its header checked, its tensors read a bounded block at a time."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdpo_conformance.audit.errors import AuditError, PickledError, shown
from sdpo_conformance.audit.header import TensorEntry, read_header
from sdpo_conformance.audit.names import canonical_key, unwrapped
from sdpo_conformance.audit.run_files import parse_json, read_text

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
INDEX_FILE = "adapter_model.safetensors.index.json"
#: What mlx-lm and diffusers call it.
OTHER_WEIGHTS_FILES = ("adapters.safetensors", "pytorch_lora_weights.safetensors")
#: Sub-folders of frozen adapters beside the trained one.
_NOT_TRAINED = ("reference", "ref", "teacher")
#: Pickled weights, which are refused.
PICKLED = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
#: Elements read at once: 32 MiB in float64, whatever the tensor's size.
BLOCK_ELEMENTS = 2**22
REOPEN_BYTES = 2**27


@dataclass(frozen=True)
class Adapter:
    """`tensors` by canonical name. A fresh adapter (a config without weights) has none: its lora_B are
    zero.
    """

    path: Path
    weights: Path | None
    tensors: Mapping[str, TensorEntry]
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    wrappers: Mapping[str, int] = field(default_factory=dict)

    @property
    def empty(self) -> tuple[str, ...]:
        """Tensors without elements, as ZeRO-3 leaves parameters that were not gathered. Not those of a module that
        AdaLoRA has pruned to rank 0: [0, in], [out, 0] and [0, 1]."""
        pruned = self.config.get("peft_type") == "ADALORA"
        return tuple(
            key for key, entry in self.tensors.items() if entry.numel == 0 and not (pruned and len(entry.shape) == 2)
        )

    @property
    def fresh(self) -> bool:
        """Whether this is a config alone, from which a trainer starts a new adapter."""
        return self.weights is None

    @property
    def scale(self) -> float | None:
        """What multiplies B A in the model, where the config says one number for every module."""
        rank, alpha = self.config.get("r"), self.config.get("lora_alpha")
        if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
            return None
        if self.config.get("rank_pattern") or self.config.get("alpha_pattern"):
            return None
        return float(alpha) / (rank**0.5 if self.config.get("use_rslora") else rank)

    @property
    def dropout(self) -> float:
        """lora_dropout: above 0, two forwards of the same weights differ in training mode."""
        value = self.config.get("lora_dropout")
        return float(value) if isinstance(value, int | float) else 0.0


def open_adapter(path: Path) -> Adapter:
    """A PEFT folder or a bare .safetensors file. Pickled weights are refused; nothing is ever unpickled."""
    if path.is_dir():
        path = _named_folder(path)
        index = path / INDEX_FILE
        if index.exists() and not (path / WEIGHTS_FILE).exists():
            return _from_files(path, index, _shards(index), _read_config_of(path))
        weights = path / WEIGHTS_FILE
        config = _read_config_of(path)
        if not weights.exists():
            for name in PICKLED:
                if (path / name).exists():
                    raise PickledError(_refusal(path / name))
            others = sorted(path.glob("*.safetensors"))
            usual = [other for other in others if other.name in OTHER_WEIGHTS_FILES]
            if shards := _unlisted_shards(others):
                return _from_files(path, shards[0], shards, config)
            if usual or len(others) == 1:
                weights = usual[0] if usual else others[0]
            elif others:
                told = ", ".join(shown(other.name) for other in others[:5])
                raise AuditError(f"{shown(path)}: holds several .safetensors files ({told}); name the one to look at")
            elif config:
                return Adapter(path, None, {}, config)
            else:
                raise AuditError(f"{shown(path)}: holds neither {WEIGHTS_FILE} nor {CONFIG_FILE}: not a PEFT folder")
    else:
        if path.suffix.lower() in _PICKLE_SUFFIXES:
            raise PickledError(_refusal(path))
        weights, config = path, _read_config_of(path.parent)
    return _from_files(path, weights, (weights,), config)


def _from_files(path: Path, weights: Path, files: Sequence[Path], config: Mapping[str, Any]) -> Adapter:
    tensors: dict[str, TensorEntry] = {}
    places: dict[str, Path] = {}
    wrappers: Counter[str] = Counter()
    for file in files:
        for name, entry in read_header(file).items():
            bare, found = unwrapped(name)
            wrappers.update(set(found))
            key = canonical_key(bare)
            if key in tensors:
                raise AuditError(
                    f"{shown(file)}: holds {shown(key)} for two adapters; save the one to audit on its own"
                )
            tensors[key], places[key] = entry, file
    return Adapter(path, weights, tensors, config, places, dict(wrappers))


def _named_folder(path: Path) -> Path:
    """The folder itself, or the one sub-folder that holds an adapter: PEFT saves each named adapter in its own."""
    names = (WEIGHTS_FILE, CONFIG_FILE, INDEX_FILE, *PICKLED)
    if any((path / name).exists() for name in names) or any(path.glob("*.safetensors")):
        return path
    inner = sorted(entry for entry in path.iterdir() if entry.is_dir() and any((entry / n).exists() for n in names))
    trained = [entry for entry in inner if entry.name.lower() not in _NOT_TRAINED]
    if len(trained) == 1:
        return trained[0]
    if len(inner) > 1:
        told = ", ".join(shown(entry.name) for entry in inner[:5])
        raise AuditError(f"{shown(path)}: holds several adapters ({told}); name the trained one's folder")
    return path


def _shards(index: Path) -> tuple[Path, ...]:
    document = parse_json(read_text(index), shown(index))
    places = document.get("weight_map") if isinstance(document, Mapping) else None
    if not isinstance(places, Mapping) or not places:
        raise AuditError(f"{shown(index)}: expected an index with a weight_map of tensor names to files")
    names = sorted({str(name) for name in places.values()})
    if any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise AuditError(f"{shown(index)}: names a file that is no .safetensors beside it")
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise AuditError(f"{shown(index)}: names {shown(missing[0])}, which is not there; copy every shard")
    return tuple(index.parent / name for name in names)


def _unlisted_shards(files: Sequence[Path]) -> tuple[Path, ...]:
    """Files numbered 1 of N to N of N without an index that names them; () where there are none.

    Raises AuditError where one is missing.
    """
    numbered = {file: match for file in files if (match := re.search(r"-(\d{1,5})-of-(\d{1,5})$", file.stem))}
    if not numbered:
        return ()
    total = max(int(match[2]) for match in numbered.values())
    have = {int(match[1]) for match in numbered.values()}
    if len(have) < total:
        raise AuditError(
            f"{shown(next(iter(numbered)).parent)}: holds {len(have)} of {total} shards of an adapter; copy every shard"
        )
    return tuple(numbered)


def _read_config_of(folder: Path) -> Mapping[str, Any]:
    return _read_config(folder / CONFIG_FILE) if (folder / CONFIG_FILE).exists() else {}


def _refusal(path: Path) -> str:
    return (
        f"{shown(path)}: is a pickle, which can run code when read, so it is not read. Where you trust it,"
        ' convert it: python -c "import sys, torch; from safetensors.torch import save_file; save_file({k:'
        ' v.contiguous() for k, v in torch.load(sys.argv[1], weights_only=True).items()}, sys.argv[2])"'
        f" {shown(path.name)} {WEIGHTS_FILE}"
    )


def _read_config(path: Path) -> Mapping[str, Any]:
    config = parse_json(read_text(path), shown(path))
    if not isinstance(config, Mapping):
        raise AuditError(f"{shown(path)}: expected a JSON object")
    return _as_peft(config)


def _as_peft(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """mlx-lm's config in PEFT's words: its scale multiplies B A whatever the rank (mlx_lm/tuner/lora.py)."""
    given = config.get("lora_parameters")
    if not isinstance(given, Mapping) or "peft_type" in config or "r" in config:
        return config
    rank, scale = given.get("rank"), given.get("scale")
    words = {"lora_dropout": given.get("dropout"), "base_model_name_or_path": config.get("model"), "r": rank}
    if isinstance(rank, int) and isinstance(scale, int | float):
        words["lora_alpha"] = scale * rank
    words["use_dora"] = config.get("fine_tune_type") == "dora"
    return {**config, **{name: value for name, value in words.items() if value is not None}}


class TensorReader:
    """Reads blocks of an adapter's tensors through safetensors without holding whole tensors.

    safetensors maps the file, and every page that was read stays resident as long as the mapping: the file is closed
    and opened again after each REOPEN_BYTES, so that a large adapter takes no more memory than a small one.
    """

    def __init__(self, adapter: Adapter) -> None:
        from safetensors import SafetensorError, safe_open

        if adapter.weights is None:
            raise ValueError("a fresh adapter has no tensors to read")
        self._adapter = adapter
        self._errors = (SafetensorError, OSError, RuntimeError, ValueError)
        self._safe_open = safe_open
        self._open: dict[Path, Any] = {}
        self._read = 0
        self._reopen()

    def _reopen(self) -> None:
        self.close()
        self._read = 0
        for path in dict.fromkeys(self._adapter.files.values()):
            try:
                self._open[path] = self._safe_open(str(path), framework="pt", device="cpu")
                self._open[path].__enter__()
            except self._errors as error:
                raise AuditError(f"{shown(path)}: safetensors refuses it: {shown(error)}") from None

    def close(self) -> None:
        """Let go of the files."""
        for file in self._open.values():
            file.__exit__(None, None, None)
        self._open = {}

    def block(self, key: str, where: tuple[slice, ...]) -> torch.Tensor:
        """One block of a tensor, in its own dtype. Copy what is kept: a view keeps the file's mapping."""
        if self._read > REOPEN_BYTES:
            self._reopen()
        name = self._adapter.tensors[key].name
        file = self._open[self._adapter.files[key]]
        try:
            tensor: torch.Tensor = file.get_slice(name)[where] if where else file.get_tensor(name)
        except self._errors as error:
            raise AuditError(f"{shown(self._adapter.weights)}: {shown(name)}: {shown(error)}") from None
        self._read += tensor.numel() * tensor.element_size()
        return tensor

    def whole(self, key: str) -> torch.Tensor:
        """The whole tensor, in its own dtype; for tensors known to be small."""
        return self.block(key, ())


def blocks(shape: tuple[int, ...], limit: int = BLOCK_ELEMENTS) -> Iterator[tuple[slice, ...]]:
    """Slices that cover a tensor of this shape in blocks of at most `limit` elements, none for an empty
    one.
    """
    if 0 in shape:
        return
    extents = list(shape)
    for axis, size in enumerate(shape):
        if _product(extents) <= limit:
            break
        extents[axis] = max(1, min(size, limit // max(1, _product(extents[axis + 1 :]))))
    ranges = [range(0, size, extent) for size, extent in zip(shape, extents, strict=True)]
    for starts in itertools.product(*ranges):
        yield tuple(
            slice(start, min(start + extent, size)) for start, extent, size in zip(starts, extents, shape, strict=True)
        )


def _product(sizes: list[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
