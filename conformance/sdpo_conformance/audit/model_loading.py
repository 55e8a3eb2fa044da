"""A local model with the run's adapters on it. Needs transformers and peft; fetches nothing, unpickles
nothing.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_conformance.audit.adapter import Adapter, TensorReader
from sdpo_conformance.audit.errors import AuditError, shown

BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class AdaptedModel:
    """`model` is a PEFT model whose adapters are named "before" and "after"; `tokenizer` is None without
    files.
    """

    model: Any
    tokenizer: Any | None
    device: str
    end_tokens: frozenset[int]
    adapters: tuple[str, ...]


def load_adapted_model(path: Path, before: Adapter | None, after: Adapter, device: str) -> AdaptedModel:
    """Load a model folder and put both adapters on it. Without a `before`, the bare model stands in for it.

    Raises AuditError when a package is missing, the folder holds no safetensors model, or an adapter does not
    fit.
    """
    try:
        import peft  # noqa: F401  # looked for before a large model is loaded
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise AuditError(
            f"--model needs {error.name}, which is not installed: pip install 'sdpo-conformance[trainer]'"
        ) from None
    if not path.is_dir():
        raise AuditError(f"{shown(path)}: is not a folder; --model takes a model that is on this machine")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype="auto"
            )
        base = loaded.to(device)
    except Exception as error:
        raise AuditError(f"{shown(path)}: cannot be loaded as a causal language model: {_first_line(error)}") from None
    end_tokens = _end_tokens(base)
    tokenizer = _tokenizer(path)
    if not end_tokens and tokenizer is not None and tokenizer.eos_token_id is not None:
        end_tokens = frozenset({int(tokenizer.eos_token_id)})
    present = [(name, adapter) for name, adapter in ((BEFORE, before), (AFTER, after)) if adapter is not None]
    donor = next((a.config for _, a in reversed(present) if a.config), {})
    model: Any = None
    for name, adapter in present:
        settings = adapter.config or donor
        if not settings:
            raise AuditError(
                f"{shown(adapter.path)}: --model needs adapter_config.json beside the weights, for rank and"
                " target modules"
            )
        if settings.get("peft_type", "LORA") != "LORA":
            raise AuditError(
                f"{shown(adapter.path)}: is a {shown(settings['peft_type'])} adapter; --model reads LoRA alone"
            )
        try:
            with _quiet():
                model = _attach(base, model, name, adapter, settings)
        except AuditError:
            raise
        except Exception as error:
            raise AuditError(f"{shown(adapter.path)}: does not fit {shown(path)}: {_first_line(error)}") from None
    model.to(device).eval()
    return AdaptedModel(model, tokenizer, device, end_tokens, tuple(name for name, _ in present))


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or deprecations of packages among themselves: stderr is for the audit's one line."""
    from transformers.utils import logging

    shown_before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown_before:
            logging.enable_progress_bar()


def _attach(base: Any, model: Any, name: str, adapter: Adapter, settings: Mapping[str, Any]) -> Any:
    """The PEFT model, made at the first adapter, with this one added under its name."""
    from peft import LoraConfig, get_peft_model

    # A config may name classes to import (auto_mapping); nothing from the run's files gets to do that.
    fields = {f.name for f in dataclasses.fields(LoraConfig)} - {"auto_mapping", "inference_mode"}
    known = {key: value for key, value in settings.items() if key in fields}
    config = LoraConfig(**{**known, "inference_mode": True, "task_type": "CAUSAL_LM"})
    if model is None:
        model = get_peft_model(base, config, adapter_name=name)
    else:
        model.add_adapter(name, config)
    _fill(model, name, adapter)
    return model


def _fill(model: Any, name: str, adapter: Adapter) -> None:
    from peft import set_peft_model_state_dict

    if adapter.weights is None:
        return  # a fresh adapter: PEFT has just initialised lora_B to zero
    reader = TensorReader(adapter)
    try:
        renamed = {key: reader.whole(key) for key in adapter.tensors}
    finally:
        reader.close()
    result: Any = set_peft_model_state_dict(model, renamed, adapter_name=name)
    if result.unexpected_keys:
        raise AuditError(
            f"{shown(adapter.path)}: does not fit the model: it has no place for {shown(result.unexpected_keys[0])}"
        )


def _end_tokens(model: Any) -> frozenset[int]:
    for source in (getattr(model, "generation_config", None), model.config):
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            return frozenset([value] if isinstance(value, int) else value)
    return frozenset()


def _tokenizer(path: Path) -> Any | None:
    from transformers import AutoTokenizer

    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise AuditError(f"{shown(path)}: its tokenizer cannot be loaded: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return shown(next(iter(str(error).strip().splitlines()), type(error).__name__))
