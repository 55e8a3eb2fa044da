"""Per-step metrics, whatever shape the run left them in.

Field names are CLaaS's (claas/training/distillation.py at e2331f7, per_step_metrics): step, total_loss,
distill_loss, kl_reg, mean_is_ratio, clip_fraction, grad_norm. `loss` is read as total_loss, and a prefix up
to the last "/" is dropped, so `train/kl_reg` is kl_reg.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from sdpo_conformance.audit.errors import AuditError, shown
from sdpo_conformance.audit.files import parse_json, read_text

FIELDS = (
    "total_loss", "distill_loss", "kl_reg", "mean_is_ratio", "clip_fraction", "grad_norm", "learning_rate",
)  # fmt: skip
#: Fields that move whenever the weights do: the ratio sits at 1 and the clip fraction at 0 in a sound run.
CONTINUOUS_FIELDS = ("total_loss", "distill_loss", "kl_reg", "grad_norm")
_ALIASES = {"loss": "total_loss", "lr": "learning_rate"}
_SAMPLE_KEYS = ("sample", "sample_id", "sample_idx", "sample_index")
_SAMPLE_LISTS = ("per_sample_metrics", "per_sample", "samples")
_LARGEST_STEP = 10**12

Batching = Literal["explicit", "assumed", "unknown"]


@dataclass(frozen=True)
class Step:
    """One optimizer step: its metrics, and those of each sample where the run kept them apart."""

    number: int
    values: Mapping[str, float]
    samples: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """The optimizer steps taken on one batch of samples. Only its first step uses the sampler's log-probs."""

    steps: tuple[Step, ...]
    declared_steps: int | None = None
    summary: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunMetrics:
    """All batches of a run, in order.

    `batching` says how the batches' ends are known: "explicit" (the file or the settings say), "assumed"
    (bare
    rows, taken as one batch while their step grows) or "unknown" (a trainer_state.json counts global steps).
    `problems` are faults of the record itself, in words.
    """

    path: Path
    kind: str
    batches: tuple[Batch, ...]
    batching: Batching
    problems: tuple[str, ...] = ()

    @property
    def steps(self) -> tuple[Step, ...]:
        """Every step of every batch, in order."""
        return tuple(step for batch in self.batches for step in batch.steps)

    def has(self, name: str) -> bool:
        """Whether any step reports the field."""
        return any(name in step.values for step in self.steps)

    def label(self, batch: int, step: Step) -> str:
        """How a step is named in a sentence: "step 3", or "batch 2 step 3" where there are several."""
        return f"step {step.number}" if len(self.batches) == 1 else f"batch {batch + 1} step {step.number}"

    def split(self, steps_per_batch: int) -> RunMetrics:
        """The same steps cut into batches of a known length, where the file itself did not say."""
        if self.batching == "explicit" or len(self.batches) > 1:
            return self
        steps = self.steps
        cuts = range(0, len(steps), steps_per_batch)
        batches = tuple(Batch(steps[start : start + steps_per_batch]) for start in cuts)
        return replace(self, batches=batches, batching="explicit")


def read_metrics(path: Path) -> RunMetrics:
    """Read metrics from a file, or from a folder of them.

    A folder's `sample*` files are one series per sample; its other .json and .jsonl files are one batch each,
    in natural order. Raises AuditError when nothing there holds per-step metrics.
    """
    return _read_folder(path) if path.is_dir() else _read_file(path)


def _read_file(path: Path) -> RunMetrics:
    where = shown(path)
    text = read_text(path)
    documents = _documents(text, where)
    reader = _Reader(where)
    if len(documents) == 1:
        kind, batches, batching = reader.document(documents[0])
    else:
        kind, batches, batching = reader.rows_or_responses(documents, "JSON lines")
    if not any(batch.steps for batch in batches):
        raise AuditError(f"{where}: holds no per-step metrics; expected entries with {', '.join(FIELDS[:3])}, …")
    if len(batches) > 1:  # a response to an empty batch says nothing
        batches = [batch for batch in batches if batch.steps]
    problems = (*reader.problems, *_record_problems(batches))
    return RunMetrics(path, kind, tuple(batches), batching, problems)


def _read_folder(path: Path) -> RunMetrics:
    files = [entry for entry in path.iterdir() if entry.suffix in (".json", ".jsonl")]
    if not files:
        raise AuditError(f"{shown(path)}: is a folder without .json or .jsonl files; expected metrics")
    files.sort(key=lambda entry: [int(c) if c.isdigit() else c for c in _split_digits(entry.name)])
    per_sample = [entry for entry in files if entry.name.lower().startswith("sample")]
    if not per_sample:
        parts = [_read_file(entry) for entry in files]
        batches = tuple(batch for part in parts for batch in part.batches)
        batching = parts[0].batching if len(parts) == 1 else "explicit"
        problems = tuple(f"{shown(p.path.name)}: {problem}" for p in parts for problem in p.problems)
        return RunMetrics(path, f"{len(files)} files", batches, batching, problems)
    series = {entry.stem: _read_file(entry).steps for entry in per_sample}
    lengths = {name: len(steps) for name, steps in series.items()}
    problems = ()
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{shown(name)} {length}" for name, length in lengths.items())
        problems = (f"the samples have different numbers of steps: {told}",)
    rows = [{**step.values, "step": step.number, "sample": name} for name, steps in series.items() for step in steps]
    reader = _Reader(shown(path))
    batches = tuple(reader.rows(sorted(rows, key=lambda row: row["step"])))
    return RunMetrics(path, f"{len(per_sample)} samples' files", batches, "assumed", (*problems, *reader.problems))


def _split_digits(name: str) -> list[str]:
    parts: list[str] = [""]
    for character in name:
        if character.isdigit() != parts[-1].isdigit() and parts[-1]:
            parts.append("")
        elif not parts[-1] and character.isdigit():
            parts.append("")  # text and numbers alternate, so that two names compare like with like
        parts[-1] += character
    return parts


def _documents(text: str, where: str) -> list[Any]:
    """One JSON document, or one per line."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        lines = text.splitlines()
        if error.msg == "Extra data" and len(lines) > 1:
            return [parse_json(line, f"{where}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    except (ValueError, RecursionError):
        pass
    return [parse_json(text, where)]


class _Reader:
    """Turns parsed JSON into batches, collecting what is odd about the record on the way."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.problems: list[str] = []

    def document(self, document: Any) -> tuple[str, list[Batch], Batching]:
        if isinstance(document, Mapping):
            if isinstance(document.get("log_history"), list):
                rows = [row for row in document["log_history"] if isinstance(row, Mapping) and _has_metrics(row)]
                steps = tuple(step for batch in self.rows(rows) for step in batch.steps)
                return "transformers trainer_state", [Batch(steps)], "unknown"
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
        return f"{kind} of steps", self.rows(documents), "assumed"

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
        lists = {key: value for key, value in document.items() if _name(key) and isinstance(value, list)}
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
        read: list[tuple[int, str | None, Step]] = []
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise AuditError(f"{self.where}: entry {index + 1} is {shown(repr(row))}, not an object of metrics")
            number = self.step_number(row.get("step", row.get("step_idx")), index)
            sample = next((str(row[key]) for key in _SAMPLE_KEYS if row.get(key) is not None), None)
            read.append((number, sample, self.step(row, number)))
        numbers = [number for number, _, _ in read]
        if any(sample is not None for _, sample, _ in read):
            return _merge_samples(read)
        ascending = all(a <= b for a, b in pairwise(numbers))
        if ascending and 1 < len(set(numbers)) < len(numbers) and len(set(Counter(numbers).values())) == 1:
            return _merge_samples(_number_samples(read))
        batches: list[list[Step]] = []
        for number, _, step in read:
            if not batches or number <= batches[-1][-1].number:
                batches.append([])
            batches[-1].append(step)
        return [Batch(tuple(steps)) for steps in batches]

    def step_number(self, value: object, index: int) -> int:
        if value is None:
            return index + 1
        number = _whole(value)
        if number is None or not 0 <= number <= _LARGEST_STEP:
            raise AuditError(f"{self.where}: entry {index + 1} has the step {shown(repr(value))}, not a step number")
        return number

    def step(self, row: Mapping[str, Any], number: int) -> Step:
        place = f"step {number}"
        values = self.values(row, place)
        lists = {name: key for key in row if (name := _name(key)) and isinstance(row[key], list)}
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
                values[name] = _mean(column)
        return Step(number, values, samples)

    def values(self, row: Mapping[str, Any], place: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for key, value in row.items():
            name = _name(key)
            if name is not None and not isinstance(value, list):
                found[name] = self.number(value, f"{place}: {name}")
        return found

    def number(self, value: object, place: str) -> float:
        """A float. null and words such as "nan" are how JSON writers spell what is not finite."""
        if value is None:
            return math.nan
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                return math.inf if isinstance(value, int) and value > 0 else -math.inf
            except ValueError:
                pass
        raise AuditError(f"{self.where}: {place} is {shown(repr(value))}, not a number")


def _number_samples(read: list[tuple[int, str | None, Step]]) -> list[tuple[int, str | None, Step]]:
    counts: Counter[int] = Counter()
    numbered: list[tuple[int, str | None, Step]] = []
    for number, _, step in read:
        counts[number] += 1
        numbered.append((number, str(counts[number]), step))
    return numbered


def _merge_samples(read: list[tuple[int, str | None, Step]]) -> list[Batch]:
    """Rows of one step become one step, the mean over its samples: CLaaS's reduction over samples."""
    merged: dict[int, dict[str, Mapping[str, float]]] = {}
    for number, sample, step in read:
        merged.setdefault(number, {})[sample or "?"] = step.values
    steps = []
    for number in sorted(merged):
        samples = merged[number]
        columns = {name: [v[name] for v in samples.values() if name in v] for name in FIELDS}
        steps.append(Step(number, {name: _mean(column) for name, column in columns.items() if column}, samples))
    return [Batch(tuple(steps))]


def _record_problems(batches: Sequence[Batch]) -> list[str]:
    problems = []
    steps = [step for batch in batches for step in batch.steps]
    for name in FIELDS[:-1]:
        lacking = [step.number for step in steps if name not in step.values]
        if lacking and len(lacking) < len(steps):
            told = ", ".join(str(number) for number in lacking[:5]) + (", …" if len(lacking) > 5 else "")
            problems.append(f"{name} is missing at step {told}")
    for batch in batches:
        reported = len(batch.steps)
        if batch.declared_steps is not None and reported > 1 and reported != batch.declared_steps:
            problems.append(f"{batch.declared_steps} steps were declared and {reported} reported")
        for name, value in batch.summary.items():
            last = batch.steps[-1].values.get(name) if batch.steps else None
            if last is not None and not math.isclose(last, value, rel_tol=1e-6, abs_tol=1e-12) and value == value:
                problems.append(f"the response's {name} is {value:g} but its last step says {last:g}")
    return problems


def _name(key: object) -> str | None:
    if not isinstance(key, str):
        return None
    bare = key.rsplit("/", 1)[-1]
    bare = _ALIASES.get(bare, bare)
    return bare if bare in FIELDS else None


def _has_metrics(row: Mapping[str, Any]) -> bool:
    return any(_name(key) not in (None, "learning_rate") for key in row)


def _whole(value: object) -> int | None:
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 16:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else None


def _mean(values: Sequence[float]) -> float:
    """The mean; infinite, not an exception, where the sum overflows."""
    return sum(values) / len(values)
