"""Where in a folder a run's log is: by the names that tools give it, else by what the file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdpo_conformance.audit.errors import AuditError
from sdpo_conformance.audit.metrics.event_files import is_event_file
from sdpo_conformance.audit.metrics.metric_names import field_of
from sdpo_conformance.audit.run_files import open_regular

METRICS_NAMES = (
    "metrics.json", "metrics.jsonl", "per_step_metrics.json", "per_step_metrics.jsonl",
    "distill_response.json", "distill_response.jsonl", "response.json", "responses.jsonl",
    "trainer_state.json", "trainer_log.jsonl", "logging.jsonl", "history.jsonl", "wandb-history.jsonl",
    "log.jsonl", "train_log.jsonl", "training.jsonl", "metrics.csv", "history.csv", "progress.csv", "metrics",
)  # fmt: skip
_HEAD_BYTES = 2**16
_LOG_FOLDERS = ("runs", "tensorboard", "logs", "tensorboard_log", "lightning_logs")


def unnamed_log(folder: Path) -> Path | None:
    """A .jsonl or .csv of any name whose first lines are metrics: verl's {experiment}.jsonl, wandb's export.

    Of several the first by name, packed ones (.gz) last.
    """
    ends = (".jsonl", ".csv", ".tsv", ".jsonl.gz", ".csv.gz", ".json.gz")
    files = [entry for entry in sorted(folder.iterdir()) if entry.name.endswith(ends) and entry.is_file()]
    files.sort(key=lambda entry: entry.name.endswith(".gz"))
    return next((file for file in files if _reads_like_metrics(file)), None)


def _reads_like_metrics(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            head = file.read(_HEAD_BYTES)
    except (AuditError, OSError):
        return False
    if path.suffix == ".gz":
        return True  # read whole, or refused in one line
    lines = [line for line in head.decode("utf-8", "replace").splitlines() if line.strip()]
    if not lines:
        return False
    if path.suffix in (".csv", ".tsv"):
        return any(_known(name) for name in lines[0].replace(";", ",").replace("\t", ",").split(","))
    return any(_known(key) for line in lines[:20] for key in _keys(line))


def _known(name: str) -> bool:
    return field_of(name.strip().strip('"').rsplit(" - ", 1)[-1]) not in (None, "learning_rate")


def _keys(line: str) -> list[str]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        return []
    inner = row.get("data") if isinstance(row, dict) and isinstance(row.get("data"), dict) else row
    return [str(key) for key in inner] if isinstance(inner, dict) else []


def event_folder(folder: Path) -> Path | None:
    """The folder of the newest TensorBoard event file here or one or two folders below, under the usual names."""
    places = [folder, *(folder / name for name in _LOG_FOLDERS)]
    places += [entry for place in places[1:] if place.is_dir() for entry in sorted(place.iterdir()) if entry.is_dir()]
    found = [entry for place in places if place.is_dir() for entry in sorted(place.iterdir()) if is_event_file(entry)]
    return found[-1].parent if found else None


def mlflow_folder(folder: Path) -> Path | None:
    """MLflow's metrics folder of the one run in a file store: mlruns/EXPERIMENT/RUN/metrics."""
    store = folder if folder.name == "mlruns" else folder / "mlruns"
    if not store.is_dir():
        return None
    found = [path for path in sorted(store.glob("*/*/metrics")) if path.is_dir() and any(path.iterdir())]
    return found[0] if len(found) == 1 else None
