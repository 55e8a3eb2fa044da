"""Which file of a run's folder is what. The rules are the ones docs/audit.md states."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdpo_conformance.audit.adapter import INDEX_FILE, WEIGHTS_FILE
from sdpo_conformance.audit.errors import AuditError, shown

METRICS_NAMES = (
    "metrics.json", "metrics.jsonl", "per_step_metrics.json", "per_step_metrics.jsonl",
    "distill_response.json", "distill_response.jsonl", "response.json", "responses.jsonl",
    "trainer_state.json", "trainer_log.jsonl", "logging.jsonl", "history.jsonl", "wandb-history.jsonl",
    "log.jsonl", "train_log.jsonl", "metrics.csv", "history.csv", "progress.csv", "metrics",
)  # fmt: skip
BEFORE_NAMES = ("before", "adapter_before", "lora_before", "adapter_in", "lora_in", "initial", "input")
AFTER_NAMES = ("after", "adapter_after", "lora_after", "adapter_out", "lora_out", "final", "output")
REQUEST_NAMES = ("distill_request.json", "request.json", "training.json", "training_config.json", "run.json")
PROMPT_NAMES = ("prompts.jsonl", "prompts.json", "prompts.txt")
_PICKLED = "adapter_model.bin"


@dataclass(frozen=True)
class RunFiles:
    """Where each part of a run is; None where it is not there. `ignored` names what was passed over."""

    run: Path | None
    metrics: Path | None = None
    before: Path | None = None
    after: Path | None = None
    request: Path | None = None
    prompts: Path | None = None
    ignored: tuple[str, ...] = ()
    checkpoints: tuple[Path, ...] = ()


def discover(
    run: Path | None,
    *,
    metrics: Path | None = None,
    before: Path | None = None,
    after: Path | None = None,
    request: Path | None = None,
    prompts: Path | None = None,
) -> RunFiles:
    """Fill in, from the run's folder, whatever was not named. A RUN that is a file is the metrics file.

    Raises AuditError when the folder does not exist or neither metrics nor a finished adapter is there.
    """
    ignored: list[str] = []
    checkpoints: tuple[Path, ...] = ()
    if run is not None and not run.is_dir():
        if metrics is None:
            metrics = run
            run = None
        else:
            raise AuditError(f"{shown(run)}: is not a folder; RUN is the folder that the run left behind")
    if run is not None:
        checkpoints = _checkpoints(run)
        metrics = (
            metrics
            or _first(run, METRICS_NAMES, ignored)
            or _in_checkpoint(run, "trainer_state.json")
            or _event_file(run)
        )
        before = before or _adapter(run, BEFORE_NAMES, ignored)
        after = after or _adapter(run, AFTER_NAMES, ignored)
        if after is None and len(checkpoints) > 1:
            # The folder's own adapter may be the best checkpoint rather than the last one.
            after = checkpoints[-1]
            before = before or checkpoints[0]
        after = after or _own_adapter(run) or (checkpoints[-1] if checkpoints else None)
        request = request or _first(run, REQUEST_NAMES, ignored)
        prompts = prompts or _first(run, PROMPT_NAMES, ignored)
    if metrics is None and after is None:
        place = shown(run) if run is not None else "no RUN given"
        raise AuditError(
            f"{place}: nothing to look at: no metrics ({METRICS_NAMES[0]}, {METRICS_NAMES[4]},"
            f" trainer_state.json) and no finished adapter ({AFTER_NAMES[0]}/, {AFTER_NAMES[3]}/,"
            f" {WEIGHTS_FILE}); name them with --metrics, --before, --after"
        )
    return RunFiles(run, metrics, before, after, request, prompts, tuple(ignored), checkpoints)


def _first(run: Path, names: Sequence[str], ignored: list[str]) -> Path | None:
    found = [run / name for name in names if (run / name).exists() or (run / name).is_symlink()]
    ignored.extend(path.name for path in found[1:])
    return found[0] if found else None


def _adapter(run: Path, names: Sequence[str], ignored: list[str]) -> Path | None:
    candidates = [name for stem in names for name in (stem, f"{stem}.safetensors")]
    return _first(run, candidates, ignored)


def _own_adapter(run: Path) -> Path | None:
    """The run's folder itself as a PEFT folder, or its last checkpoint."""
    for folder in (run, _last_checkpoint(run)):
        if folder is not None and _holds_weights(folder):
            return folder
    return None


def _holds_weights(folder: Path) -> bool:
    return any((folder / name).exists() for name in (WEIGHTS_FILE, INDEX_FILE, _PICKLED))


def _checkpoints(run: Path) -> tuple[Path, ...]:
    """Every checkpoint's adapter, by step: transformers' checkpoint-N, verl's global_step_N/actor/lora_adapter."""
    found: list[tuple[int, Path]] = []
    for path in run.iterdir():
        if match := re.fullmatch(r"(?:checkpoint-|global_step_?|step_?)(\d{1,12})", path.name):
            inner = (path, path / "actor" / "lora_adapter", path / "lora_adapter", path / "adapter", path / "policy")
            folder = next((place for place in inner if _holds_weights(place)), None)
            if folder is None and path.is_dir():
                named = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and _holds_weights(entry)]
                trained = [entry for entry in named if entry.name not in ("reference", "ref", "teacher")]
                folder = trained[0] if len(trained) == 1 else None
            if folder is not None:
                found.append((int(match[1]), folder))
    return tuple(folder for _, folder in sorted(found))


def _event_file(run: Path) -> Path | None:
    places = [run, run / "runs", run / "tensorboard", run / "logs", run / "tensorboard_log"]
    places += [entry for place in places[1:] if place.is_dir() for entry in sorted(place.iterdir()) if entry.is_dir()]
    found = [entry for place in places if place.is_dir() for entry in sorted(place.glob("*.tfevents.*"))]
    return found[-1] if found else None


def _in_checkpoint(run: Path, name: str) -> Path | None:
    checkpoint = _last_checkpoint(run)
    return checkpoint / name if checkpoint is not None and (checkpoint / name).exists() else None


def _last_checkpoint(run: Path) -> Path | None:
    numbered = [(int(m[1]), path) for path in run.iterdir() if (m := re.fullmatch(r"checkpoint-(\d{1,12})", path.name))]
    return max(numbered)[1] if numbered else None
