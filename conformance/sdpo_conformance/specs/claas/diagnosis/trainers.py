"""The diagnosis of a trainer: what its failures already found by values, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdpo_conformance.judging.records import Record
from sdpo_conformance.specs.claas.defects import catalogue
from sdpo_conformance.specs.claas.defects.defect import Defect


@dataclass(frozen=True)
class NamedTrainer:
    """What the gradients of all runs together show: the mistake, if any, how many of the ``wrong`` steps it explains,
    how many in half precision it explains ``nearly``, what nobody can tell from it, and where the gradient is wrong, in
    words."""

    defect: Defect | None
    in_loss: bool
    explained: int
    nearly: int
    wrong: int
    alike: tuple[str, ...]
    located: tuple[str, ...]


def gathered(failed: Sequence[Record]) -> NamedTrainer:
    """What the failures keep about the gradients. Processes may have seen different runs: the one with most counts."""
    known = catalogue()
    best = NamedTrainer(None, False, 0, 0, 0, (), ())
    for record in failed:
        evidence: Mapping[str, Any] | None = record.failure.get("evidence")
        if evidence is None or int(evidence["wrong"]) <= best.wrong:
            continue
        mistake, defect = evidence["mistake"], None
        if mistake is not None and mistake["name"] in known:
            defect = known[mistake["name"]]
            if mistake["value"] is not None:
                defect = defect.at(float(mistake["value"]))
        best = NamedTrainer(
            defect,
            in_loss=mistake is not None and bool(mistake["in_loss"]),
            explained=int(evidence["explained"]),
            nearly=int(evidence["nearly"]),
            wrong=int(evidence["wrong"]),
            alike=tuple(evidence["alike"]),
            located=tuple(f"{words} ({scenario})" for scenario, words in evidence["located"].items()),
        )
    return best


@dataclass(frozen=True)
class NamedMetrics:
    """A way to report wrongly that the metrics ``keys`` are, ``wrong`` values of them; what nobody can tell from it."""

    defect: Defect
    keys: tuple[str, ...]
    wrong: int
    alike: tuple[str, ...]


def reported(failed: Sequence[Record]) -> tuple[list[NamedMetrics], tuple[str, ...]]:
    """The mistakes that the wrong metrics are, and the metrics that are wrong otherwise."""
    kept: Mapping[str, Any] = next((one.failure["metrics"] for one in failed if one.failure.get("metrics")), {})
    found = []
    for one in kept.get("named", ()):
        if one["name"] in catalogue():
            defect = catalogue()[one["name"]]
            defect = defect if one["value"] is None else defect.at(float(one["value"]))
            found.append(NamedMetrics(defect, tuple(one["keys"]), int(one["wrong"]), tuple(one["alike"])))
    return found, tuple(kept.get("rest", ()))


def stated(failed: Sequence[Record]) -> Defect | None:
    """The loop whose values wrong metrics are, where a finding of the metrics names one."""
    for record in failed:
        name = str(record.failure.get("mistake"))
        if record.failure.get("shows") == "metric" and name in catalogue():
            return catalogue()[name]
    return None


def updated(failed: Sequence[Record]) -> Defect | None:
    """The mistake that the updates of all runs show, or what was left of the model."""
    for record in failed:
        beside = record.failure.get("evidence") or {}
        shows = record.failure.get("shows") in ("update", "state")
        name = str(record.failure.get("mistake") if shows else beside.get("updates"))
        if name in catalogue():
            return catalogue()[name]
    return None
