"""Which known mistake an EMA teacher has: the one that every rule of updates finds the same of, on the same inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.judging.findings_alike import alike, place
from sdpo_conformance.judging.profiles import PROFILES
from sdpo_conformance.judging.records import Record
from sdpo_conformance.protocol import Capability, Claims
from sdpo_conformance.specs.requirement import Level
from sdpo_conformance.specs.shared.wrong_teachers import TeacherDefect
from sdpo_conformance.specs.spec import Spec


def found_of(defect: TeacherDefect, rule: str, seed: int, spec: Spec) -> Disagreement | None:
    """What a rule finds of the defect, if anything."""
    subject = Subject(
        defect.implementation(),
        Capability.UPDATE_TEACHER,
        Claims(),
        PROFILES["check"],
        seed,
        dtypes=spec.dtypes,
        spec=spec,
    )
    try:
        subject.run(spec.requirements()[rule])
    except Disagreement as found:
        return found
    except ImplementationError:
        pass
    return None


def same(defect: TeacherDefect, record: Record, spec: Spec) -> bool:
    """Whether a rule finds of the defect what it found of the implementation."""
    failure = record.failure
    found = found_of(defect, record.requirement, int(failure.get("seed", 0)), spec)
    return (
        found is not None
        and found.extra.get("words") == failure.get("words")
        and place(found.aspect) == place(str(failure.get("aspect")))
        and alike(found.expected, str(failure.get("expected")))
        and alike(found.got, str(failure.get("got")))
    )


def diagnose_teacher(
    failed: Sequence[Record], held: Collection[str], spec: Spec, teachers: Sequence[TeacherDefect]
) -> tuple[list[str], dict[str, Any]] | None:
    """The diagnosis's lines and its entry of ``matches``; None where no known mistake explains every failed MUST, or
    every failed SHOULD where no MUST failed."""
    mine = [one for one in failed if one.entry == Capability.UPDATE_TEACHER]
    records = [one for one in mine if one.level is Level.MUST] or mine
    if not records or any(one.failure.get("kind") == "error" for one in records):
        return None
    fitting = [
        one for one in teachers if one.violates[0] not in held and all(same(one, record, spec) for record in records)
    ]
    if not fitting:
        return None
    first, *others = fitting
    lines = [
        f"{first.name}: explains {len(records)} of {len(records)} failures of {Capability.UPDATE_TEACHER.value}",
        f"{first.sentence} Fix: {first.fix}",
    ]
    if others:
        lines.append(f"not to be told apart on these inputs: {', '.join(one.name for one in others)}")
    return lines, {
        "entry": Capability.UPDATE_TEACHER.value,
        "name": first.name,
        "kind": "defect",
        "quality": 0.0,
        "explained": len(records),
        "of": len(records),
        "fix": first.fix,
        "usable_for": "",
        "equivalent": [one.name for one in others],
        "seen": [],
    }


def with_teacher(
    answer: Mapping[str, Any] | None, teacher: tuple[list[str], dict[str, Any]] | None
) -> Mapping[str, Any] | None:
    """A loss's diagnosis and the teacher's behind it."""
    if teacher is None:
        return answer
    lines, match = teacher
    loss: Mapping[str, Any] = answer or {"lines": [], "matches": []}
    return {**loss, "lines": [*loss["lines"], *lines], "matches": [*loss["matches"], match], "usable_for": ""}
