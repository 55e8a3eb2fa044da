"""What the run was asked to do: the training settings and, where a request is kept, its samples."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sdpo_conformance.audit.errors import AuditError, shown
from sdpo_conformance.audit.run_files import parse_json, read_text

_LARGEST = 1e15
SERVING_NAMES = ("serving.json", "engine.json", "sampler.json", "rollout.json")
_ENGINE = re.compile(r"(vllm|sglang|tensorrt|trt-?llm|lmdeploy|tgi)\b", re.IGNORECASE)


@dataclass(frozen=True)
class TrainingSettings:
    """CLaaS's TrainingConfig fields that the audit can hold a run against. None where nothing says.

    No default is filled in: a default that the run did not use would accuse it of what it did not do.
    """

    learning_rate: float | None = None
    alpha: float | None = None
    is_clip: float | None = None
    kl_reg_weight: float | None = None
    steps_per_batch: int | None = None
    max_grad_norm: float | None = None


@dataclass(frozen=True)
class RequestSample:
    """One training sample: token ids of the prompt and the response, and what the sampler recorded."""

    prompt_token_ids: tuple[int, ...]
    response_token_ids: tuple[int, ...]
    response_logprobs: tuple[float, ...] | None


@dataclass(frozen=True)
class RunRequest:
    """The settings and samples of a run (either may be empty) and the file they came from. `engine`: the
    sampler's software, where something names one that is not the trainer's."""

    path: Path | None
    training: TrainingSettings
    samples: tuple[RequestSample, ...] = ()
    engine: str = ""

    @property
    def recorded(self) -> bool:
        """Whether every sample carries the sampler's log-probs."""
        return bool(self.samples) and all(sample.response_logprobs is not None for sample in self.samples)


NO_REQUEST = RunRequest(path=None, training=TrainingSettings())


def read_request(path: Path) -> RunRequest:
    """Read a DistillBatchRequestPayload ({"training": {...}, "samples": [...]}) or bare settings.

    Raises AuditError when the file is not a JSON object or a field has the wrong type.
    """
    where = shown(path)
    document = parse_json(read_text(path), where)
    if not isinstance(document, Mapping):
        raise AuditError(f"{where}: expected a JSON object with training settings, got {type(document).__name__}")
    nested = document.get("training")
    settings = nested if isinstance(nested, Mapping) else document
    values: dict[str, Any] = {}
    for field in fields(TrainingSettings):
        value = settings.get(field.name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
            raise AuditError(f"{where}: {field.name} must be a finite number, got {shown(repr(value))}")
        if field.name == "steps_per_batch":
            if value != value // 1 or value < 1:
                raise AuditError(f"{where}: steps_per_batch must be a positive whole number, got {value}")
            values[field.name] = int(value)
        else:
            values[field.name] = float(value)
    training = TrainingSettings(**values)
    return RunRequest(path, training, _samples(document, where), _engine(document) or _engine(settings))


def engine_beside(folder: Path) -> str:
    """The engine that a folder's serving settings name."""
    for name in SERVING_NAMES:
        try:
            document = parse_json(read_text(folder / name), name) if (folder / name).is_file() else None
        except AuditError:
            continue
        if isinstance(document, Mapping) and (engine := _engine(document)):
            return engine
    return ""


def _engine(document: Mapping[str, Any]) -> str:
    values = [document.get(key) for key in ("engine", "sampler", "rollout_engine", "inference_engine", "backend")]
    return next((value for value in values if isinstance(value, str) and _ENGINE.match(value)), "")


def _samples(document: Mapping[str, Any], where: str) -> tuple[RequestSample, ...]:
    rows = document.get("samples", ())
    if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) for row in rows):
        raise AuditError(f"{where}: samples must be a list of objects")
    samples = []
    for number, row in enumerate(rows, start=1):
        if "prompt_token_ids" not in row or "response_token_ids" not in row:
            return ()  # samples kept as text alone: nothing that can be replayed
        place = f"{where}: sample {number}"
        response = token_ids(row["response_token_ids"], f"{place}: response_token_ids")
        recorded = row.get("response_logprobs")
        logprobs = None if recorded is None else _logprobs(recorded, f"{place}: response_logprobs")
        if logprobs is not None and len(logprobs) != len(response):
            raise AuditError(f"{place} has {len(response)} response tokens and {len(logprobs)} log-probs")
        prompt = token_ids(row["prompt_token_ids"], f"{place}: prompt_token_ids")
        samples.append(RequestSample(prompt, response, logprobs))
    return tuple(samples)


def token_ids(value: object, where: str) -> tuple[int, ...]:
    """A non-empty list of token ids, or AuditError."""
    if not isinstance(value, list) or not value:
        raise AuditError(f"{where} must be a non-empty list of token ids")
    if not all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**31 for item in value):
        raise AuditError(f"{where} must hold token ids only (whole numbers from 0)")
    return tuple(value)


def _logprobs(value: object, where: str) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise AuditError(f"{where} must be a list of numbers")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int | float) or math.isnan(item):
            raise AuditError(f"{where} must hold numbers only")
    return tuple(float(item) for item in value)
