"""The diagnosis of a trainer: what its failures already found by values, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdpo_conformance.judging.records import Record
from sdpo_conformance.specs.claas.defects import catalogue
from sdpo_conformance.specs.claas.defects.defect import Defect

HALF = 0.5
"""Share of the wrong steps from which on a mistake is named."""


@dataclass
class Named:
    """A defect with the wrong steps of all runs that it explains, and those that nobody can tell from it."""

    defect: Defect
    in_loss: bool
    steps: dict[str, int] = field(default_factory=dict)
    alike: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Located:
    """What is known without a name: of each scenario, in words."""

    words: tuple[str, ...]
    wrong: int


def gathered(failed: Sequence[Record]) -> tuple[list[Named], Located]:
    """The mistakes that the failures' gradients equal, most explained first; where they are wrong."""
    known = catalogue()
    named: dict[str, Named] = {}
    wrong: dict[str, int] = {}
    words: dict[str, str] = {}
    for record in failed:
        evidence: Mapping[str, Any] | None = record.failure.get("evidence")
        if evidence is None:
            continue
        scenario = str(record.failure.get("scenario"))
        wrong[scenario] = int(evidence["wrong"])
        if evidence["located"]:
            words[scenario] = f"{evidence['located']} ({scenario})"
        mistake = evidence["mistake"]
        if mistake is None or mistake["name"] not in known:
            continue
        defect = known[mistake["name"]]
        if mistake["value"] is not None:
            defect = defect.at(float(mistake["value"]))
        one = named.setdefault(defect.name, Named(defect, bool(mistake["in_loss"])))
        one.steps[scenario] = int(evidence["explained"])
        one.alike = [name for name in evidence["alike"] if name != defect.name]
    ranked = sorted(named.values(), key=lambda one: -sum(one.steps.values()))
    return ranked, Located(tuple(words.values()), sum(wrong.values()))


def stated(failed: Sequence[Record]) -> Defect | None:
    """The anchor that a wrong kl_reg equals, where a finding of the metrics names one."""
    for record in failed:
        name = str(record.failure.get("mistake"))
        if record.failure.get("shows") == "metric" and name in catalogue():
            return catalogue()[name]
    return None
