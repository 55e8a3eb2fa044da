"""The EMA teacher, judged without a trainer: ``update_teacher`` on plain state dicts.

One call stands for what the trainer does once per batch: ``theta_t <- (1 - rate) theta_t + rate theta``, each tensor
for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.cases.precision import DTYPES
from sdpo_conformance.inputs.choices import SeededSource
from sdpo_conformance.inputs.numbers import Numbers
from sdpo_conformance.judging.call import ImplementationError, implementation_errors, settings_kept
from sdpo_conformance.judging.compare import Disagreement, number, worst
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.judging.expectation import Expectation
from sdpo_conformance.protocol import Capability
from sdpo_conformance.reproduction.teacher_program import write_teacher_program
from sdpo_conformance.specs import specs
from sdpo_conformance.specs.requirement import Level, Requirement
from sdpo_conformance.specs.shared.rule import Rule
from sdpo_conformance.specs.shared.wrong_teachers import mistake

MUST, SHOULD = Level.MUST, Level.SHOULD
State = Mapping[str, Tensor]

RATE = 0.05
"""Both trainers' default of ``teacher_update_rate``."""

ROUNDINGS = 4.0
"""Roundings of the terms' size that one update may be off by: two products and a sum, in any order."""

SHAPES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (7, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.self_attn.q_proj.bias": (4,),
    "model.norm.weight": (4,),
}
"""A model's parameters: matrices, vectors, names with dots."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

ADAPTER: Mapping[str, tuple[int, ...]] = {
    "base_model.model.layers.0.q_proj.lora_A.weight": (2, 6),
    "base_model.model.layers.0.q_proj.lora_B.weight": (5, 2),
    "base_model.model.layers.1.q_proj.lora_A.weight": (2, 5),
    "base_model.model.layers.1.q_proj.lora_B.weight": (6, 2),
}
"""PEFT's names of an adapter's factors, without the adapter's name."""

AT_REST = (1, 10, 20)
"""Batches after which an adapter's teacher is looked at."""

SLACK = 1e-3
"""Of the share, in float32: a refactored delta passes through a decomposition. The square is off by 5 % and more."""


@dataclass(frozen=True, eq=False)
class TeacherCase:
    """One call after another: ``teacher`` before the first, and the student's weights at each; then ``other``, another
    teacher, with the first student, or nothing. ``seed``: the run's, that the weights are drawn by."""

    teacher: State
    students: tuple[State, ...]
    rate: float
    words: str
    other: State = field(default_factory=dict)
    seed: int = 0

    def found(
        self, aspect: str, expected: str, got: str, detail: str = "", at_rest: Sequence[int] = ()
    ) -> Disagreement:
        """A failure of this case, with the program that shows it."""
        extra = {"words": self.words, "seed": self.seed, "reproduction": partial(write, self, at_rest)}
        return Disagreement(aspect, expected, got, detail=detail, extra=extra)


def state(numbers: Numbers, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of an ordinary size."""
    return {name: (0.4 * numbers.normal(*shape)).to(dtype) for name, shape in shapes.items()}


def model_cases(subject: Subject, rates: tuple[float, ...], calls: int) -> Iterator[TeacherCase]:
    """A student that moves, in every dtype and at every rate. Two parameters of one shape have changed places in its
    dict: a parameter is known by its name."""
    source = SeededSource(f"teacher/{subject.seed}")
    for name in subject.dtypes:
        for rate in rates:
            numbers = Numbers(source.integer(0, 2**16))
            teacher, *moved = (state(numbers, SHAPES, DTYPES[name]) for _ in range(1 + calls))
            *first, before_last, last = SHAPES
            students = [{name: one[name] for name in (*first, last, before_last)} for one in moved]
            words = f"{name}, teacher_update_rate {rate:g}, {calls} call{'s' if calls > 1 else ''}"
            yield TeacherCase(teacher, tuple(students), rate, words, seed=subject.seed)


def updated(subject: Subject, teacher: dict[str, Tensor], student: State, rate: float) -> dict[str, Tensor]:
    """The teacher after one call: what came back, or ``teacher`` itself where nothing did."""
    entry = subject.entry.value
    with implementation_errors(entry), settings_kept(entry):
        found = subject.function(teacher, student, rate)
    found = teacher if found is None else found
    if not isinstance(found, Mapping) or set(found) != set(student):
        kind = f"the names {sorted(map(str, found))}" if isinstance(found, Mapping) else f"a {type(found).__name__}"
        raise ImplementationError(f"returned {kind}, expected the teacher's state dict or None")
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.shape != student[name].shape:
            raise ImplementationError(f"{name} came back as no tensor of shape {tuple(student[name].shape)}")
    return dict(found)


def averaged(teacher: State, student: State, rate: float) -> dict[str, Expectation]:
    """Truth and bounds of one call."""
    expected = {}
    for name, before in teacher.items():
        t, s = before.double().cpu(), student[name].double().cpu()
        terms = (1 - rate) * t.abs() + rate * (t.abs() + s.abs())
        eps = max(torch.finfo(one.dtype).eps for one in (before, student[name]))
        expected[name] = Expectation(
            (1 - rate) * t + rate * s, ROUNDINGS * eps * terms + torch.finfo(before.dtype).tiny
        )
    return expected


def judge(case: TeacherCase, student: State, before: State, got: State, when: str = "") -> None:
    """One call against the truth; raises Disagreement."""
    for name, expectation in averaged(before, student, case.rate).items():
        value = got[name].detach().double().cpu()
        excess, where = worst(expectation, value)
        if excess > 1:
            detail = "; ".join(filter(None, (when, mistake(before, student, case.rate, got))))
            place = f"{name}[{', '.join(map(str, where))}]" if where else name
            expected, was = (number(float(one[where])) for one in (expectation.value, value))
            raise case.found(f"the teacher's {place}", expected, was, detail)


def write(
    case: TeacherCase, at_rest: Sequence[int], folder: Path, requirement: Requirement, target: str, device: str
) -> str:
    """The failure as a program of plain PyTorch."""
    spec = next(one for one in specs() if requirement.family in one.families)
    return write_teacher_program(
        folder,
        spec,
        requirement,
        target,
        device,
        case.words,
        case.rate,
        case.teacher,
        case.students,
        case.other,
        at_rest,
    )


def on_device(subject: Subject, weights: State) -> dict[str, Tensor]:
    """Copies; a tensor under two names is one again."""
    copies = {id(value): value.detach().clone().to(subject.device) for value in weights.values()}
    return {name: copies[id(value)] for name, value in weights.items()}


def one_call(subject: Subject, case: TeacherCase) -> None:
    """The first call alone."""
    student = case.students[0]
    got = updated(subject, on_device(subject, case.teacher), on_device(subject, student), case.rate)
    judge(case, student, case.teacher, got)


def wrong_at_once(subject: Subject, case: TeacherCase, prefix: str = "") -> bool:
    """The control of rules about rates and several calls: one call at the default rate. ``prefix``: of other names, so
    that nothing kept under these is met."""
    teacher, student = (
        {prefix + name: one for name, one in state.items()} for state in (case.teacher, case.students[0])
    )
    try:
        one_call(subject, TeacherCase(teacher, (student,), RATE, case.words))
    except (Disagreement, ImplementationError):
        return True
    return False


def average_of_one(subject: Subject, _: Any) -> None:
    """One call at the default rate."""
    subject.each(model_cases(subject, (RATE,), 1), partial(one_call, subject))


def at_other_rates(subject: Subject, _: Any) -> None:
    """One call at other rates, 0 and 1 among them."""

    def check(case: TeacherCase) -> None:
        try:
            one_call(subject, case)
        except Disagreement as found:
            found.secondary = wrong_at_once(subject, case)
            raise

    subject.each(model_cases(subject, (0.0, 1.0, 0.3, 0.001, 0.9), 1), check)


def of_the_teacher_given(subject: Subject, _: Any) -> None:
    """Several batches, each from the teacher that the last left; then another teacher."""

    def check(case: TeacherCase) -> None:
        case = replace(case, other=case.students[-1])
        try:
            teacher = on_device(subject, case.teacher)
            for call, student in enumerate(case.students):
                before = {name: value.detach().clone().cpu() for name, value in teacher.items()}
                teacher = updated(subject, teacher, on_device(subject, student), case.rate)
                judge(case, student, before, teacher, f"after call {call + 1} of {len(case.students)}")
            student = case.students[0]
            got = updated(subject, on_device(subject, case.other), on_device(subject, student), case.rate)
            judge(case, student, case.other, got, "with another teacher than before")
        except Disagreement as found:
            found.secondary = wrong_at_once(subject, case, "unseen.")
            raise

    subject.each(model_cases(subject, (RATE, 0.3), 4), check)


def student_untouched(subject: Subject, _: Any) -> None:
    """The student is as it was, owns its memory, and no graph leads from the teacher to it."""

    def check(case: TeacherCase) -> None:
        given = case.students[0]
        student = {name: value.requires_grad_() for name, value in on_device(subject, given).items()}
        got = updated(subject, on_device(subject, case.teacher), student, case.rate)
        kept = {name: value.detach().clone() for name, value in got.items()}
        for name, value in student.items():
            if not torch.equal(value.detach().cpu(), given[name]):
                raise case.found(f"the student's {name}", "as before the call", "other values")
            if got[name].requires_grad:
                raise case.found(f"the teacher's {name}", "no graph", "requires_grad")
        with torch.no_grad():
            for value in student.values():
                value.add_(1.0)
        for name, value in kept.items():
            if not torch.equal(got[name].detach(), value):
                raise case.found(f"the teacher's {name}", "the same once the student has moved on", "moved along")

    subject.each(model_cases(subject, (RATE, 1.0), 1), check)


def with_tied_head(weights: State) -> dict[str, Tensor]:
    """The head is the embedding, under a name of its own, as in the state dict of a model that ties them."""
    return {**weights, HEAD: weights[EMBEDDING]}


def once_under_two_names(subject: Subject, _: Any) -> None:
    """A model whose head is its embedding."""

    def check(case: TeacherCase) -> None:
        students = tuple(with_tied_head(one) for one in case.students)
        words = f"{case.words}, {HEAD} and {EMBEDDING} one tensor"
        try:
            one_call(subject, replace(case, teacher=with_tied_head(case.teacher), students=students, words=words))
        except Disagreement as found:
            found.secondary = wrong_at_once(subject, case)
            raise

    subject.each(model_cases(subject, (RATE,), 1), check)


def deltas(weights: State) -> dict[str, Tensor]:
    """What an adapter adds to its layers, B A, float64."""
    exact = {name: value.detach().double().cpu() for name, value in weights.items()}
    return {
        name.partition(".lora_A.")[0]: exact[name.replace(".lora_A.", ".lora_B.")] @ factor
        for name, factor in exact.items()
        if ".lora_A." in name
    }


def adapter_at_rest(subject: Subject, _: Any) -> None:
    """A LoRA student at rest: the teacher's delta is 1 - (1 - rate)^n of the student's."""

    def check(case: TeacherCase) -> None:
        (student,) = case.students
        teacher, whole = on_device(subject, case.teacher), deltas(student)
        for call in range(1, max(AT_REST) + 1):
            teacher = updated(subject, teacher, on_device(subject, student), case.rate)
            share = 1 - (1 - case.rate) ** call
            for name, delta in deltas(teacher).items() if call in AT_REST else ():
                if float((delta - share * whole[name]).abs().max() / whole[name].abs().max()) <= SLACK * share:
                    continue
                got = float((delta * whole[name]).sum() / whole[name].square().sum())
                squared = "the square of it: the factors are averaged apart" if abs(got - share**2) < SLACK else ""
                aspect = f"{name}, the teacher's delta after {call} batches, of the student's"
                raise case.found(aspect, number(share), number(got), squared, AT_REST)

    student = state(Numbers(SeededSource(f"adapter/{subject.seed}").integer(0, 2**16)), ADAPTER, torch.float32)
    zeros = {name: torch.zeros_like(value) for name, value in student.items()}
    words = f"LoRA factors at rest, float32, teacher_update_rate {RATE}"
    subject.each([TeacherCase(zeros, (student,), RATE, words, seed=subject.seed)], check)


Check = Callable[[Subject, Any], None]


def teacher_rules(prefix: str, source: str, adapter_source: str = "") -> tuple[Rule, ...]:
    """``prefix``-EMA-1 to 4 and 6, and 5 where the trainer has an adapter of its own for the teacher
    (``adapter_source``)."""

    def rule(number: int, level: Level, statement: str, where: str, why: str, check: Check) -> Rule:
        return Rule(
            f"{prefix}-EMA-{number}", level, statement, where, why, check=check, entries=(Capability.UPDATE_TEACHER,)
        )

    rules = (
        rule(
            1,
            MUST,
            "an update makes each of the teacher's parameters (1 - rate) of itself plus rate of the student's",
            source,
            "with the two exchanged the teacher is the student of one batch ago",
            average_of_one,
        ),
        rule(
            2,
            MUST,
            "the rate is teacher_update_rate: 0 leaves the teacher as it is, 1 makes it the student",
            source,
            "an option that is silently ignored is believed",
            at_other_rates,
        ),
        rule(
            3,
            MUST,
            "each update starts from the teacher as the last one left it, without a correction for the first batches",
            source,
            "a correction for the start makes the first teacher the student, and no regulariser at all",
            of_the_teacher_given,
        ),
        rule(
            4,
            MUST,
            "the student is not changed, shares no memory with the teacher, and no graph leads to it",
            f"{source}: under no_grad, in place on the teacher's own data",
            "a teacher that shares the student's memory moves with every step",
            student_untouched,
        ),
    )
    tied = rule(
        6,
        SHOULD,
        "a tensor that stands under two names, as tied embeddings in a state dict, is averaged once",
        f"{source}: over parameters(), which names a shared one once",
        "in place and name by name it is averaged twice: the embedding runs ahead of the layers",
        once_under_two_names,
    )
    if not adapter_source:
        return (*rules, tied)
    adapter = rule(
        5,
        SHOULD,
        "a LoRA student at rest: the teacher's B A is 1 - (1 - rate)^n of the student's after n batches from zero",
        f"{adapter_source}: the factors are averaged apart, so that it is (1 - (1 - rate)^n)^2",
        "the teacher lags: 0.25 % of the student after one batch where teacher_update_rate says 5 %",
        adapter_at_rest,
    )
    return (*rules, adapter, tied)
