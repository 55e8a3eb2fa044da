"""Known ways to get an EMA teacher wrong, as updates of plain state dicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Update = Callable[[dict[str, Tensor], State, float], dict[str, Tensor] | None]
DEFAULT_RATE = 0.05


def average(teacher: State, student: State, rate: float) -> dict[str, Tensor]:
    """The right update."""
    return {name: (1 - rate) * value + rate * student[name].detach() for name, value in teacher.items()}


def exchanged(teacher: State, student: State, rate: float) -> dict[str, Tensor]:
    """The rate is the teacher's."""
    return average(teacher, student, 1 - rate)


def constant_rate(teacher: State, student: State, rate: float) -> dict[str, Tensor]:
    return average(teacher, student, DEFAULT_RATE)


def copied(teacher: State, student: State, rate: float) -> dict[str, Tensor]:
    return average(teacher, student, 1.0)


def frozen(teacher: State, student: State, rate: float) -> dict[str, Tensor]:
    return average(teacher, student, 0.0)


def matrices_alone(teacher: State, student: State, rate: float) -> dict[str, Tensor]:
    """Vectors stay what they were."""
    new = average(teacher, student, rate)
    return {name: new[name] if value.dim() > 1 else value for name, value in teacher.items()}


def decayed(teacher: State, student: State, rate: float) -> dict[str, Tensor]:
    """The student is added undivided."""
    return {name: (1 - rate) * value + student[name].detach() for name, value in teacher.items()}


def into_the_student(teacher: State, student: State, rate: float) -> dict[str, Tensor]:
    """The student becomes the average."""
    new = average(teacher, student, rate)
    with torch.no_grad():
        for name, value in student.items():
            value.copy_(new[name])
    return new


def with_graph(teacher: State, student: State, rate: float) -> dict[str, Tensor]:
    return {name: torch.lerp(value, student[name].to(value.dtype), rate) for name, value in teacher.items()}


def by_place(teacher: State, student: State, rate: float) -> dict[str, Tensor]:
    """The student's parameter at the same place of its dict, where that has the shape."""
    pairs = zip(teacher.items(), student.values(), strict=True)
    return {
        name: (1 - rate) * value + rate * other.detach() if other.shape == value.shape else value
        for (name, value), other in pairs
    }


@torch.no_grad()
def name_by_name(teacher: State, student: State, rate: float) -> None:
    """In place under every name: a tensor that has two is averaged twice."""
    for name, value in teacher.items():
        value.lerp_(student[name].to(value), rate)


def sharing(teacher: State, student: State, rate: float) -> dict[str, Tensor]:
    """At rate 1 the student's own tensors are handed on."""
    return {name: value.detach() for name, value in student.items()} if rate == 1 else average(teacher, student, rate)


def handed_over(teacher: State, student: State, rate: float) -> dict[str, Tensor]:
    """At rate 1 the student's own tensors are handed on, parameters as they are."""
    return dict(student) if rate == 1 else average(teacher, student, rate)


class FromTheStart:
    """The average of the last student with the first teacher that was seen."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}

    def __call__(self, teacher: State, student: State, rate: float) -> dict[str, Tensor]:
        """One update."""
        if (
            set(self.first) != set(teacher)
            or next(iter(self.first.values())).dtype != next(iter(teacher.values())).dtype
        ):
            self.first = {name: value.detach().clone() for name, value in teacher.items()}
        return average(self.first, student, rate)


class Corrected:
    """The rate of the n-th batch is rate / (1 - (1 - rate)^n)."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, teacher: State, student: State, rate: float) -> dict[str, Tensor]:
        """One update."""
        self.calls += 1
        return average(teacher, student, rate / (1 - (1 - rate) ** self.calls) if 0 < rate < 1 else rate)


@dataclass(frozen=True)
class TeacherDefect:
    """``name``, ``sentence``, ``fix`` are for people; ``violates``: rules, the one that names it first; ``make``: a new
    update that is wrong so."""

    name: str
    sentence: str
    violates: tuple[str, ...]
    fix: str
    make: Callable[[], Update] = field(repr=False)
    usable_for: str = ""

    @property
    def touched(self) -> frozenset[str]:
        """What it replaces."""
        return frozenset({"update_teacher"})

    def implementation(self) -> Any:
        """What ``--impl=defect:NAME`` runs."""
        return SimpleNamespace(__name__=self.name, update_teacher=self.make())


def teacher_defects(spec: str, prefix: str) -> tuple[TeacherDefect, ...]:
    """The entries of a spec that has an EMA teacher."""

    def defect(name: str, sentence: str, rule: int, fix: str, make: Callable[[], Update]) -> TeacherDefect:
        return TeacherDefect(f"{spec}-teacher-{name}", sentence, (f"{prefix}-EMA-{rule}",), fix, make)

    right = "theta_t <- (1 - rate) theta_t + rate theta."
    return (
        defect("exchanged", "The rate weighs the teacher, not the student.", 1, right, lambda: exchanged),
        defect("copied", "The teacher is the student.", 1, right, lambda: copied),
        defect("frozen", "The teacher never moves.", 1, right, lambda: frozen),
        defect("decayed", "The student is added whole, not rate of it.", 1, right, lambda: decayed),
        defect("matrices-alone", "Only matrices are averaged.", 1, "Average every parameter.", lambda: matrices_alone),
        defect("by-place", "Parameters are paired by place, not by name.", 1, "Pair by name.", lambda: by_place),
        defect("constant-rate", "teacher_update_rate is ignored.", 2, "Read it.", lambda: constant_rate),
        defect("from-the-start", "Each update starts from the first teacher.", 3, right, FromTheStart),
        defect("corrected", "The rate is corrected for the first batches: the first is a copy.", 1, right, Corrected),
        defect(
            "into-the-student", "The student is overwritten.", 4, "Write the teacher alone.", lambda: into_the_student
        ),
        defect("with-graph", "The teacher has a graph to the student.", 4, "Update under no_grad.", lambda: with_graph),
        defect(
            "handed-over",
            "At rate 1 the student's own parameters are the teacher.",
            4,
            "Copy the values.",
            lambda: handed_over,
        ),
        defect(
            "tied-twice",
            "A tensor under two names, as tied embeddings, is averaged twice.",
            6,
            "Visit each tensor once, or return new ones.",
            lambda: name_by_name,
        ),
        defect("sharing", "At rate 1 teacher and student share memory.", 4, "Copy the values.", lambda: sharing),
    )


SEEN_IN_ONE_CALL: Mapping[str, Update] = {
    "the rate weighs the teacher, not the student": exchanged,
    "the teacher is the student": copied,
    "the teacher has not moved": frozen,
    "the student is added whole": decayed,
    "parameters are paired by place, not by name": by_place,
    f"as if teacher_update_rate were {DEFAULT_RATE}": constant_rate,
}


def mistake(before: State, student: State, rate: float, got: State) -> str:
    """In words what a wrong update did, or nothing where none of these did it."""
    exact = {name: value.double().cpu() for name, value in before.items()}
    given = {name: value.double().cpu() for name, value in student.items()}
    for words, update in SEEN_IN_ONE_CALL.items():
        found = update(dict(exact), given, rate)
        assert found is not None
        eps = 8 * max(torch.finfo(value.dtype).eps for value in before.values())
        if all(torch.allclose(got[name].detach().double().cpu(), found[name], eps, eps) for name in exact):
            return words
    return ""
