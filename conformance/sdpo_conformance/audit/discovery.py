"""Which file of a run's folder is what. The rules are the ones docs/audit.md states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sdpo_conformance.audit.adapter import WEIGHTS_FILE
from sdpo_conformance.audit.checkpoints import find_checkpoints, holds_weights, is_checkpoint, last_trainer_state
from sdpo_conformance.audit.errors import AuditError, shown
from sdpo_conformance.audit.metrics.console_log import console_log
from sdpo_conformance.audit.metrics.log_places import METRICS_NAMES, event_folder, mlflow_folder, unnamed_log
from sdpo_conformance.audit.run_files import parse_json, read_text

BEFORE_NAMES = ("before", "adapter_before", "lora_before", "adapter_in", "lora_in", "initial", "input")
AFTER_NAMES = ("after", "adapter_after", "lora_after", "adapter_out", "lora_out", "final", "output")
REQUEST_NAMES = ("distill_request.json", "request.json", "training.json", "training_config.json", "run.json")
OF_THIS_ALGORITHM = frozenset({"is_clip", "steps_per_batch"})
"""Settings that a model's config does not have."""
PROMPT_NAMES = ("prompts.jsonl", "prompts.json", "prompts.txt")
#: Folders below RUN that are looked into, and how deep: verl writes checkpoints/project/experiment/global_step_N.
_DEEPEST = 3
_MOST_FOLDERS = 500
Found = TypeVar("Found")


@dataclass(frozen=True)
class RunFiles:
    """Where each part of a run is; None where it is not there. `ignored` names what was passed over. `delivered`: RUN
    itself where it holds an adapter beside its checkpoints.
    """

    run: Path | None
    metrics: Path | None = None
    before: Path | None = None
    after: Path | None = None
    request: Path | None = None
    prompts: Path | None = None
    ignored: tuple[str, ...] = ()
    checkpoints: tuple[Path, ...] = ()
    delivered: Path | None = None


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

    Raises AuditError when the folder does not exist, neither metrics nor a finished adapter is there, or several
    runs are.
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
        before = before or _adapter(run, BEFORE_NAMES, ignored)
        after = after or _adapter(run, AFTER_NAMES, ignored)
        checkpoints = find_checkpoints(run)
        if not checkpoints and after is None and not holds_weights(run):
            checkpoints = _below(run, find_checkpoints, "checkpoints") or ()
        metrics = metrics or _metrics(run, checkpoints, ignored, bool(after or checkpoints or holds_weights(run)))
        if after is None and len(checkpoints) > 1:
            # The folder's own adapter may be the best checkpoint rather than the last one.
            after = checkpoints[-1]
            before = before or checkpoints[0]
        after = after or (run if holds_weights(run) else None) or (checkpoints[-1] if checkpoints else None)
        request = request or _first(run, REQUEST_NAMES, ignored) or _settings_in_config(run)
        prompts = prompts or _first(run, PROMPT_NAMES, ignored)
    if metrics is None and after is None:
        place = shown(run) if run is not None else "no RUN given"
        if run is not None and any(run.glob("**/*.wandb")):
            raise AuditError(
                f"{place}: nothing to look at but wandb's own binary log; export it as JSON lines"
                " (wandb.Api().run(...).scan_history(), one row a line) to metrics.jsonl"
            )
        raise AuditError(
            f"{place}: nothing to look at: no metrics ({METRICS_NAMES[0]}, {METRICS_NAMES[4]},"
            f" trainer_state.json) and no finished adapter ({AFTER_NAMES[0]}/, {AFTER_NAMES[3]}/,"
            f" {WEIGHTS_FILE}); name them with --metrics, --before, --after"
        )
    delivered = run if run is not None and checkpoints and after != run and holds_weights(run) else None
    return RunFiles(run, metrics, before, after, request, prompts, tuple(ignored), checkpoints, delivered)


def _metrics(run: Path, checkpoints: Sequence[Path], ignored: list[str], adapter: bool) -> Path | None:
    """By name; else of the last checkpoint, of an adapter or not; else any file in RUN that reads like a log; else the
    same below RUN; else what a terminal saw.

    Raises AuditError where several runs have one, unless there is an adapter to judge all the same.
    """
    named = _first(run, METRICS_NAMES, ignored)
    if named is not None:
        return named
    for checkpoint in reversed(checkpoints):
        if (checkpoint / "trainer_state.json").exists():
            return checkpoint / "trainer_state.json"
    if state := last_trainer_state(run):
        return state
    here = unnamed_log(run) or mlflow_folder(run) or event_folder(run)
    try:
        return here or _below(run, _log_in, "logs") or console_log(run)
    except AuditError as error:
        printed = console_log(run)
        if printed is None and not adapter:
            raise
        ignored.append(str(error))
        return printed


def _log_in(folder: Path) -> Path | None:
    return _first(folder, METRICS_NAMES, []) or unnamed_log(folder) or mlflow_folder(folder) or event_folder(folder)


def _below(run: Path, look: Callable[[Path], Found | None], what: str) -> Found | None:
    """What the folders below RUN hold, nearest first. Raises AuditError where several of one depth do."""
    level, seen = [run], 0
    for _ in range(_DEEPEST):
        level = [entry for folder in level for entry in _folders(folder)]
        seen += len(level)
        if seen > _MOST_FOLDERS:
            return None
        found = [(folder, result) for folder in level if (result := look(folder))]
        if len(found) > 1:
            told = ", ".join(shown(folder.relative_to(run)) for folder, _ in found[:4])
            raise AuditError(f"{shown(run)}: holds {what} of several runs ({told}); name the folder of one of them")
        if found:
            return found[0][1]
    return None


def _folders(folder: Path) -> list[Path]:
    entries = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink())
    known = (*BEFORE_NAMES, *AFTER_NAMES)
    return [e for e in entries if e.name not in known and not e.name.startswith(".") and not is_checkpoint(e)]


def _first(run: Path, names: Sequence[str], ignored: list[str]) -> Path | None:
    found = [run / name for name in names if (run / name).exists() or (run / name).is_symlink()]
    ignored.extend(path.name for path in found[1:])
    return found[0] if found else None


def _settings_in_config(run: Path) -> Path | None:
    """RUN's config.json where it holds a training's settings: most files of this name are a model's."""
    path = run / "config.json"
    try:
        document = parse_json(read_text(path), shown(path)) if path.is_file() else None
    except AuditError:
        return None
    nested = document.get("training") if isinstance(document, Mapping) else None
    own = any(isinstance(one, Mapping) and not OF_THIS_ALGORITHM.isdisjoint(one) for one in (document, nested))
    return path if own else None


def _adapter(run: Path, names: Sequence[str], ignored: list[str]) -> Path | None:
    candidates = [name for stem in names for name in (stem, f"{stem}.safetensors")]
    return _first(run, candidates, ignored)
