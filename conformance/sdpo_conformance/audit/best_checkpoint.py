"""Which checkpoint transformers' trainer held to be the best, and by what."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from sdpo_conformance.audit.checkpoints import folder_of
from sdpo_conformance.audit.declared import Declared
from sdpo_conformance.audit.errors import AuditError, shown
from sdpo_conformance.audit.run_files import parse_json, read_text

_TIMES = re.compile(r"eval_(runtime|.*_per_second|.*_time|model_preparation.*)")

_LARGEST = 1e300


@dataclass(frozen=True)
class BestCheckpoint:
    """`values`: the metric at each evaluation, by step. `value` is the best of them in the trainer's view."""

    checkpoint: str
    metric: str
    value: float
    values: tuple[tuple[int, float], ...]


def find_best(run: Path | None, checkpoints: Sequence[Path], settings: Declared) -> BestCheckpoint | None:
    """The best checkpoint by the last trainer_state.json. Its metric is the settings' metric_for_best_model, or the
    one evaluated number that ever had the best value; None where neither says it.
    """
    places = [
        *([run] if run is not None and run.is_dir() else []),
        *(folder_of(path) for path in reversed(checkpoints)),
    ]
    path = next((file for place in places if (file := place / "trainer_state.json").is_file()), None)
    try:
        document = parse_json(read_text(path), shown(path)) if path else None
    except AuditError:
        return None
    if not isinstance(document, Mapping) or not isinstance(document.get("log_history"), list):
        return None
    value, checkpoint = document.get("best_metric"), document.get("best_model_checkpoint")
    rows = [row for row in document["log_history"] if isinstance(row, Mapping) and isinstance(row.get("step"), int)]
    if not _finite(value) or not isinstance(checkpoint, str):
        return None
    named = settings.words("metric_for_best_model")
    names = {name if name.startswith("eval_") else f"eval_{name}" for name in named} or {
        key for row in rows for key, number in row.items() if _is_evaluation(key) and number == value
    }
    if len(names) != 1:
        return None
    metric = names.pop()
    numbers = {row["step"]: row[metric] for row in rows if metric in row}
    found = {step: float(number) for step, number in numbers.items() if _finite(number)}
    if len(found) < len(numbers) or value not in found.values():
        return None
    return BestCheckpoint(Path(checkpoint).name, metric, float(value), tuple(sorted(found.items())))


def _finite(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def _is_evaluation(key: object) -> bool:
    return isinstance(key, str) and key.startswith("eval_") and not _TIMES.fullmatch(key)
