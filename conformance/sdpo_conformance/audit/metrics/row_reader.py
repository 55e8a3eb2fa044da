"""Parsed rows and documents turned into batches of steps, in any of the shapes that tools write."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from sdpo_conformance.audit.errors import AuditError, shown
from sdpo_conformance.audit.metrics.metric_names import (
    FIELDS,
    field_of,
    is_bookkeeping,
    is_evaluation_name,
    is_summary,
    names_ratio,
    preference,
    reward_of,
    tool_of,
)
from sdpo_conformance.audit.metrics.sample_rows import mean, merge_samples, number_samples
from sdpo_conformance.audit.metrics.step_record import Batch, Batching, Step

_SAMPLE_KEYS = ("sample", "sample_id", "sample_idx", "sample_index")
_BATCH_KEYS = ("batch", "batch_id", "batch_idx", "batch_index")
_ATTEMPT_KEYS = ("attempt", "retry")
_SAMPLE_LISTS = ("per_sample_metrics", "per_sample", "samples")
_STEP_KEYS = (
    "step", "step_idx", "global_step", "train/global_step", "trainer/global_step", "training/global_step",
    "current_steps", "global_step/max_steps", "progress/batch", "iteration", "iter", "_step", "Step",
)  # fmt: skip
_LARGEST_STEP = 10**12
#: What json.dumps(..., default=str) makes of a tensor.
_TENSOR = re.compile(r"^tensor\(([^,()]{1,40})(?:,[^()]*)?\)$")


class RowReader:
    """Turns parsed JSON into batches, collecting what is odd about the record on the way."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.seen: set[str] = set()
        self.unreported: set[str] = set()
        self.evaluations: dict[int, float] = {}
        self.rewards: dict[str, list[float]] = {}

    @property
    def tool(self) -> str:
        """Whose names the rows carry."""
        return tool_of(frozenset(self.seen))

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        """Names that no known tool uses."""
        return tuple(
            sorted(key for key in self.seen if key.strip() and field_of(key) is None and not is_bookkeeping(key))
        )

    @property
    def ratio_names(self) -> tuple[str, ...]:
        """Names of an importance ratio, whosever, and then of what follows from one."""
        found = sorted(key for key in self.seen if names_ratio(key))
        return tuple(sorted(found, key=lambda key: field_of(key) not in ("sampler_ratio", "policy_ratio")))

    def look(self, rows: Sequence[Any]) -> None:
        """Note the names that the rows carry, and those that are null in every row although the loss is a number."""
        kept = [row for row in rows if isinstance(row, Mapping)]
        self.seen.update(str(key) for row in kept for key in row)
        if any(field_of(key) == "total_loss" and _finite(value) for row in kept for key, value in row.items()):
            told = {key for row in kept for key, value in row.items() if value is not None}
            self.unreported = {str(key) for row in kept for key in row if key not in told}

    def document(self, document: Any) -> tuple[str, list[Batch], Batching]:
        if isinstance(document, Mapping):
            if isinstance(document.get("log_history"), list):
                kept = [row for row in document["log_history"] if isinstance(row, Mapping)]
                return "transformers trainer_state", self.log(kept), "unknown"
            response = self.response(document)
            if response is not None:
                return "CLaaS distill response", [response], "explicit"
            columns = self.columns(document)
            if columns is not None:
                return "JSON columns", columns, "assumed"
            if _has_metrics(document):
                return "JSON object", self.rows([document]), "assumed"
            raise AuditError(
                f"{self.where}: no per-step metrics in this JSON object; expected metadata.per_step_metrics, "
                f"per_step_metrics, log_history, or fields such as {', '.join(FIELDS[:3])}"
            )
        if isinstance(document, list):
            if document and all(isinstance(row, list) for row in document):
                return "JSON array of batches", [b for rows in document for b in self.rows(rows)], "explicit"
            return self.rows_or_responses(document, "JSON array")
        raise AuditError(f"{self.where}: expected a JSON object or array of steps, got {shown(repr(document))}")

    def rows_or_responses(self, documents: Sequence[Any], kind: str) -> tuple[str, list[Batch], Batching]:
        responses = [self.response(item) if isinstance(item, Mapping) else None for item in documents]
        if documents and all(response is not None for response in responses):
            return f"{kind} of distill responses", [r for r in responses if r is not None], "explicit"
        rows = [_unwrapped(row) for row in documents]
        self.look(rows)
        if self.tool != "CLaaS" or any(isinstance(row, Mapping) and "_step" in row for row in rows):
            return f"{kind} of a {self.tool} log", self.log(rows), "unknown"
        return f"{kind} of steps", self.rows([row for row in rows if not _is_evaluation(row)]), "assumed"

    def log(self, rows: Sequence[Any]) -> list[Batch]:
        """Rows of one log that counts global steps: evaluation and summary rows are no steps, rows of one step
        that hold different fields are one, and a resumed run's second account of a step replaces the first.
        """
        self.look(rows)
        by_number: dict[int, dict[str, Any]] = {}
        last: int | None = None
        repeated = 0
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise AuditError(f"{self.where}: entry {index + 1} is {shown(repr(row))}, not an object of metrics")
            self._evaluation(row)
            if _is_evaluation(row):
                continue
            number = self.step_number(_step_of(row), index)
            fields = {name for key in row if (name := field_of(key))}
            if last is not None and number <= last:
                older = [n for n in by_number if n >= number and (n > number or _fields(by_number[n]) & fields)]
                repeated += bool(older)
                for n in older:
                    del by_number[n]
            by_number.setdefault(number, {}).update(row)
            last = number
        if repeated:
            self.notes.append(f"the log goes back {repeated} time(s), as a resumed run's does: the last account counts")
        self._rewards([by_number[number] for number in sorted(by_number)])
        return [Batch(tuple(self.step(by_number[number], number) for number in sorted(by_number)))]

    def _rewards(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep the reward components that are numbers in every row."""
        names = {key: name for row in rows for key in row if (name := reward_of(key))}
        for key, name in names.items():
            values = [float(row[key]) for row in rows if _finite(row.get(key))]
            if len(values) == len(rows):
                self.rewards[name] = values

    def _evaluation(self, row: Mapping[str, Any]) -> None:
        """Keep the loss of an evaluation whose step is told."""
        number, value = _whole(_step_of(row)), next((row[k] for k in ("eval_loss", "eval/loss") if k in row), None)
        if number is not None and isinstance(value, float):
            self.evaluations[number] = value

    def response(self, document: Mapping[str, Any]) -> Batch | None:
        """A DistillResponse, or the metadata of one. Older ones carry the last step's metrics alone."""
        metadata = document.get("metadata")
        inner = metadata if isinstance(metadata, Mapping) else document
        entries = inner.get("per_step_metrics")
        declared = _whole(inner.get("steps_per_batch_applied", inner.get("steps_per_batch")))
        if isinstance(entries, list):
            batches = self.rows(entries)
            steps = tuple(step for batch in batches for step in batch.steps)
            if len(batches) > 1:
                self.problems.append("per_step_metrics counts its steps backwards at least once")
            return Batch(steps, declared, self.values(inner, "the response's own fields"))
        if entries is not None:
            raise AuditError(f"{self.where}: per_step_metrics must be a list, got {shown(repr(entries))}")
        if inner is metadata and _has_metrics(inner):
            return Batch((Step(declared or 1, self.values(inner, "metadata")),), declared)
        return None

    def columns(self, document: Mapping[str, Any]) -> list[Batch] | None:
        """{"total_loss": [...], "kl_reg": [...]}: a list per field."""
        lists = {key: value for key, value in document.items() if field_of(key) and isinstance(value, list)}
        if not lists:
            return None
        lengths = {key: len(value) for key, value in lists.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{shown(key)} {length}" for key, length in lengths.items())
            self.problems.append(f"the lists have different lengths: {told}")
        numbers = document.get("step")
        longest = max(lengths.values())
        named = isinstance(numbers, list) and len(numbers) == longest
        rows = []
        for index in range(longest):
            row = {key: value[index] for key, value in lists.items() if index < len(value)}
            row["step"] = numbers[index] if named and isinstance(numbers, list) else index + 1
            rows.append(row)
        return self.rows(rows)

    def rows(self, rows: Iterable[Any]) -> list[Batch]:
        """One row per step, or per sample and step. A step number that does not grow starts a new batch."""
        rows = list(rows)
        self.look(rows)
        read: list[tuple[int, str | None, Step]] = []
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise AuditError(f"{self.where}: entry {index + 1} is {shown(repr(row))}, not an object of metrics")
            number = self.step_number(_step_of(row), index)
            sample = next((str(row[key]) for key in _SAMPLE_KEYS if row.get(key) is not None), None)
            read.append((number, sample, self.step(row, number)))
        numbers = [number for number, _, _ in read]
        if any(sample is not None for _, sample, _ in read):
            return merge_samples(read)
        back = [b for a, b in pairwise(numbers) if b < a]
        if back and min(back) > numbers[0]:
            return self.log(rows)  # a batch begins where the first one did; further on, a resumed run goes on
        ascending = not back
        if ascending and 1 < len(set(numbers)) < len(numbers) and len(set(Counter(numbers).values())) == 1:
            return merge_samples(number_samples(read))
        batches: list[list[Step]] = []
        firsts: list[Mapping[str, Any]] = []
        for (number, _, step), row in zip(read, rows, strict=True):
            if not batches or number <= batches[-1][-1].number:
                batches.append([])
                firsts.append(row)
            batches[-1].append(step)
        again = [index for index, (a, b) in enumerate(pairwise(firsts)) if _run_again(a, b)]
        if again:
            self.notes.append(f"{len(again)} batch(es) were run again: the last account counts")
        return [Batch(tuple(steps)) for index, steps in enumerate(batches) if index not in again]

    def step_number(self, value: object, index: int) -> int:
        if value is None:
            return index + 1
        number = _whole(value.partition("/")[0] if isinstance(value, str) else value)
        if number is None or not 0 <= number <= _LARGEST_STEP:
            raise AuditError(f"{self.where}: entry {index + 1} has the step {shown(repr(value))}, not a step number")
        return number

    def step(self, row: Mapping[str, Any], number: int) -> Step:
        place = f"step {number}"
        values = self.values(row, place)
        lists = {name: key for key in row if (name := field_of(key)) and isinstance(row[key], list)}
        samples: dict[str, dict[str, float]] = {}
        for name, key in lists.items():
            for index, value in enumerate(row[key], start=1):
                samples.setdefault(str(index), {})[name] = self.number(value, f"{place}: {name}")
        lengths = {name: len(row[key]) for name, key in lists.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} {length}" for name, length in lengths.items())
            self.problems.append(f"{place} has per-sample lists of different lengths: {told}")
        nested: list[Any] = next((row[key] for key in _SAMPLE_LISTS if isinstance(row.get(key), list)), [])
        for index, entry in enumerate(nested, start=1):
            if isinstance(entry, Mapping):
                samples[str(index)] = self.values(entry, f"{place} sample {index}")
        for name in FIELDS:
            column = [entry[name] for entry in samples.values() if name in entry]
            if column and name not in values:
                values[name] = mean(column)
        return Step(number, values, samples)

    def values(self, row: Mapping[str, Any], place: str) -> dict[str, float]:
        found: dict[str, float] = {}
        # No rate is NaN: where it is null the row is of a micro-batch, and so are other nulls of its optimizer step.
        no_update = any(row[key] is None and field_of(key) == "learning_rate" for key in row)
        chosen: dict[str, str] = {}
        for key, value in row.items():
            name = field_of(key)
            if name is None or isinstance(value, list) or (value is None and key in self.unreported):
                continue
            if value is None and no_update and name in ("learning_rate", "grad_norm"):
                continue
            if name in chosen and preference(chosen[name]) <= preference(key):
                continue
            if self.tool != "CLaaS" and not isinstance(value, float | int | str | None):
                note = f"{shown(key)} holds no numbers and was left out"
                self.notes.extend([] if note in self.notes else [note])
                continue
            found[name] = self.number(value, f"{place}: {name}")
            chosen[name] = key
        return found

    def number(self, value: object, place: str) -> float:
        """A float. null and words such as "nan" are how JSON writers spell what is not finite."""
        if value is None:
            return math.nan
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                return float(_TENSOR.sub(r"\1", value) if isinstance(value, str) else value)
            except OverflowError:
                return math.inf if isinstance(value, int) and value > 0 else -math.inf
            except ValueError:
                pass
        raise AuditError(f"{self.where}: {place} is {shown(repr(value))}, not a number")


def _has_metrics(row: Mapping[str, Any]) -> bool:
    return any(field_of(key) not in (None, "learning_rate") for key in row)


def _fields(row: Mapping[str, Any]) -> set[str]:
    return {name for key in row if (name := field_of(key))}


def _run_again(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> bool:
    """Whether two first rows are attempts at one batch: same batch, a later attempt."""
    batch = next((key for key in _BATCH_KEYS if earlier.get(key) is not None), None)
    attempt = next((key for key in _ATTEMPT_KEYS if _whole(earlier.get(key)) is not None), None)
    if batch is None or attempt is None or earlier[batch] != later.get(batch):
        return False
    before, after = _whole(earlier[attempt]), _whole(later.get(attempt))
    return before is not None and after is not None and before < after


def _step_of(row: Mapping[str, Any]) -> Any:
    return next((row[key] for key in _STEP_KEYS if row.get(key) is not None), None)


def _unwrapped(row: Any) -> Any:
    """verl's file logger keeps a step's metrics under "data"."""
    if isinstance(row, Mapping) and isinstance(row.get("data"), Mapping):
        return {**{key: value for key, value in row.items() if key != "data"}, **row["data"]}
    return row


def _is_evaluation(row: Any) -> bool:
    """A row that is no training step: none of its metrics there, or none a number beside an evaluation's that are."""
    if not isinstance(row, Mapping) or not row:
        return False
    if is_summary(row) or not _has_metrics(row):
        return True
    own = any(_finite(value) for key, value in row.items() if field_of(key) not in (None, "learning_rate"))
    return not own and any(_finite(value) for key, value in row.items() if is_evaluation_name(str(key)))


def _finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False


def _whole(value: object) -> int | None:
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 16:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else None
