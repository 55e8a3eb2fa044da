"""GRAD: being a good citizen of autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.cases.case import divergence_incoming
from sdpo_conformance.inputs.choices import SeededSource
from sdpo_conformance.inputs.masks import without_every_second
from sdpo_conformance.judging.call import (
    ImplementationError,
    Outcome,
    call_entry,
    differentiable_output,
    gradients_of,
    identical,
    implementation_errors,
    incoming_gradient,
    lay_out,
    materialise,
)
from sdpo_conformance.judging.compare import GRADIENT, Disagreement, compare, gradient_disagreement
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.judging.settings import random_state, seeded
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.bounds import Expectation, expectations
from sdpo_conformance.specs.claas.corners import NEUTRAL, Corner
from sdpo_conformance.specs.claas.inputs.losses import Shape, build_case
from sdpo_conformance.specs.claas.inputs.masked import with_garbage
from sdpo_conformance.specs.claas.inputs.special import special_case
from sdpo_conformance.specs.claas.loss_case import LAYOUTS, LossCase
from sdpo_conformance.specs.claas.rules.aspects import ALL, DIVERGENCES
from sdpo_conformance.specs.requirement import UPSTREAM, Level, requirement

SOURCE = f"{UPSTREAM} compute_sdpo_loss, and the contract of torch.autograd"
BROAD = NEUTRAL.but(
    alpha=("half", "inside", "one"),
    ratio=("mild", "below", "above_cap"),
    anchor=("off", "on"),
    drift=("mild", "strong"),
    mask=("full", "ragged"),
    mass=("normal", "student_floor"),
)
DIVERGENCE_ONLY = NEUTRAL.but(mass=("normal", "student_floor"))


INCOMING = (0.25, -1.0, 3.0, 1000.0, 0.0, 65536.0, 2.0**20, 1.0625, 1.0078125, 0.9375, 1e-3, 2.0**-20, -300.0)
"""Gradients that arrive: of accumulation, of loss scaling, next to 1, none."""

SHARES = (1 / 3, 0.1, 0.75, 12.5)
"""More of them, rounded to the dtype that they arrive in: of three or ten micro-batches."""


def corner_of(subject: Subject) -> Any:
    """The broad corner; for a bare divergence its part below alpha = 1."""
    return DIVERGENCE_ONLY if subject.entry is Capability.DIVERGENCE else BROAD


@requirement(
    "GRAD-1",
    Level.MUST,
    "the gradient scales with the gradient that arrives at the result",
    source=SOURCE,
    why="gradient accumulation and loss scaling divide or multiply the loss: a kernel that computes its "
    "gradient in forward and ignores what arrives trains at the wrong rate",
    capabilities=DIVERGENCES,
)
def test_grad_1(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        subject.agrees(case, (GRADIENT,), control=unscaled(subject, case))

    subject.for_all(corner_of(subject).but(incoming=INCOMING[:5]), check)
    for dtype in subject.torch_dtypes:
        case = small_case(corner_of(subject).but(head="trainable"), subject.entry, dtype, subject.seed)
        arriving = (*INCOMING, *(float(torch.tensor(share, dtype=dtype)) for share in SHARES))
        subject.each((replace(case, incoming=incoming) for incoming in arriving), check)


def unscaled(subject: Subject, case: LossCase) -> LossCase:
    """The control: a gradient of 1 arrives; at a divergence, whose tokens get different ones, at one token alone."""
    if subject.entry is not Capability.DIVERGENCE:
        return replace(case, incoming=1.0)
    token = next(case.tokens_alone())
    return replace(token, incoming=1.0 / float(divergence_incoming(replace(token, incoming=1.0))))


@requirement(
    "GRAD-2",
    Level.MUST,
    "the loss reaches no input but the student's: teacher, base, old and mask, given without requires_grad, "
    "get no gradient",
    source="claas/training/distillation.py: all four are computed under no_grad",
    why="a graph into the teacher keeps it alive and trains it",
    capabilities=DIVERGENCES,
)
def test_grad_2(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        loss_input = materialise(case, subject.device)
        output = output_of(subject, loss_input)
        with implementation_errors("backward"):
            output.backward(incoming_gradient(case, subject.entry, output))
        for key in case.tensors():
            if key in case.differentiable:
                continue
            tensor = getattr(loss_input, key)
            if tensor.requires_grad or tensor.grad is not None:
                raise Disagreement(
                    f"{key} after backward",
                    "no gradient, requires_grad False",
                    f"requires_grad {tensor.requires_grad}, gradient {'set' if tensor.grad is not None else 'None'}",
                    case=case,
                    probe="frozen_inputs",
                )

    subject.for_all(corner_of(subject), check, share=0.3)


@requirement(
    "GRAD-3",
    Level.MUST,
    "no input is modified, by forward or by backward",
    source=SOURCE,
    why="a kernel that writes its gradient over the logits breaks whoever reads them next",
    capabilities=DIVERGENCES,
)
def test_grad_3(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        refuse_touched(case, subject.evaluate(case))

    corner = corner_of(subject).but(
        mask=("ragged", "full", "fractional", "holed"),
        layout=("contiguous", "transposed", "offset"),
        incoming=(1.0, 3.0),
    )
    if subject.entry is not Capability.DIVERGENCE:
        corner = corner.but(ratio=(*corner.ratio, "infinite", "certain"))
    subject.for_all(corner, check)
    small = corner_of(subject).but(mask="ragged", head="trainable", layout="contiguous")
    cases = [small_case(small, subject.entry, dtype, subject.seed) for dtype in subject.torch_dtypes]
    subject.each(cases, lambda case: untouched_elsewhere(subject, case))
    subject.each(cases[:1], lambda case: random_states_left(subject, case))
    if subject.entry is Capability.LOSS:
        subject.each((with_minus_infinity(case) for case in cases), check)


def untouched_elsewhere(subject: Subject, case: LossCase) -> None:
    """No input is modified where none asks for a gradient, or where masked positions hold NaN; refusing those with an
    error is an answer."""
    outcome = subject.evaluate(case, gradient=False)
    if not outcome.touched and subject.entry is not Capability.DIVERGENCE:
        case = with_garbage(case, math.nan)
        with suppress(ImplementationError):
            outcome = subject.evaluate(case)
    refuse_touched(case, outcome)


def random_states_left(subject: Subject, case: LossCase) -> None:
    """Random numbers may be drawn; a generator that is in one state whatever state it was in before was seeded."""
    states = []
    for number in (subject.seed + 1, subject.seed + 2):
        with seeded(number):
            subject.evaluate(case)
            states.append(random_state())
    same = [whose for whose, state in states[0].items() if state == states[1][whose]]
    if same:
        raise ImplementationError(f"{subject.entry.value} seeded the random state of {' and '.join(same)}")


def refuse_touched(case: LossCase, outcome: Outcome) -> None:
    """Raises Disagreement where the call changed an input."""
    if outcome.touched:
        raise Disagreement(
            f"{', '.join(outcome.touched)} after the call",
            "the values and requires_grad passed in",
            "others",
            case=case,
            outcome=outcome,
            probe="unmodified",
        )


def small_case(corner: Corner, entry: Capability, dtype: torch.dtype, number: int) -> LossCase:
    """One case of ordinary size."""
    return build_case(SeededSource(f"small/{number}"), corner.but(size="small", support="few"), entry, [dtype])


def with_minus_infinity(case: LossCase) -> LossCase:
    """The case with every second logit that is not needed at -inf, as padded vocabularies have."""
    logits = case.tensors()["student_logits"]
    keep = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, case.loss_input.teacher_indices.long(), True)
    keep = keep.scatter(-1, case.loss_input.response_ids.long().unsqueeze(-1), True)
    keep |= torch.arange(logits.shape[-1]) % 2 == 0
    return case.with_fields(student_logits=logits.masked_fill(~keep, -torch.inf))


@requirement(
    "GRAD-4",
    Level.MUST,
    "inputs, and the gradient that arrives at a divergence, may be non-contiguous, expanded, or views that start "
    "inside their storage",
    source="claas/training/distillation.py passes slices of logits; torch semantics",
    why="a kernel that assumes strides reads the wrong tokens",
    capabilities=DIVERGENCES,
)
def test_grad_4(subject: Subject) -> None:
    corner = corner_of(subject).but(layout=tuple(layout for layout in LAYOUTS if layout != "contiguous"))

    def check(case: LossCase) -> None:
        subject.agrees(case, ALL, control=replace(case, layout="contiguous"))
        if subject.entry is Capability.DIVERGENCE:
            incoming_laid_out(subject, replace(case, trainable_head=False))

    subject.for_all(corner, check)
    small = corner_of(subject).but(layout="contiguous", head=("frozen", "trainable"))
    cases = [small_case(small, subject.entry, dtype, subject.seed) for dtype in subject.torch_dtypes]
    subject.each(cases, lambda case: handed_over_by_a_model(subject, case))


def handed_over_by_a_model(subject: Subject, case: LossCase) -> None:
    """Logits or hidden states are a slice of what a model returned, inside its graph, and the head is its parameter:
    the same numbers as from leaves, and the slice is left as it was."""
    expected = subject.expectations(case)
    if expected is None:
        return
    key = "student_hidden" if case.fused else "student_logits"
    loss_input = materialise(case, subject.device)
    leaf = getattr(loss_input, key)
    returned = torch.cat([leaf[:, :1], leaf, leaf[:, -1:]], dim=1)
    given = {key: returned[:, 1:-1]}
    if case.fused:
        given["lm_head_weight"] = torch.nn.Parameter(loss_input.lm_head_weight.detach(), case.trainable_head)
    handed = replace(loss_input, **given)
    result = call_entry(subject.function, subject.entry, handed)
    output = differentiable_output(result, subject.entry)
    gradients = gradients_of(replace(handed, **{key: leaf}), case, subject.entry, output)
    found = compare(case, Outcome(result, gradients), ALL, expected)
    if found is not None:
        found.secondary = alone_is_wrong(subject, case)
        found.detail = found.detail or f"where {key} is a slice of what a model returned, no leaf"
    elif not identical(returned[:, 1:-1].detach().cpu(), case.tensors()[key]):
        found = Disagreement(f"{key} after the call", "the values passed in", "others", case=case)
        found.detail = "a slice of what a model returned, no leaf"
    if found is not None:
        found.probe = "from_model"
        raise found


@requirement(
    "GRAD-5",
    Level.MUST,
    "gradients accumulate, and two live graphs do not share buffers",
    source=SOURCE,
    why="CLaaS sums the losses of several samples before one backward: a reused buffer mixes them up",
    capabilities=DIVERGENCES,
)
def test_grad_5(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        other = unlike(case, subject.entry)
        if subject.expectations(case) is None or subject.expectations(other) is None:
            return
        inputs = [materialise(one, subject.device) for one in (case, other)]
        results = [call_entry(subject.function, subject.entry, one) for one in inputs]
        outputs = [differentiable_output(result, subject.entry) for result in results]
        for index, one in enumerate((case, other)):
            gradients = gradients_of(inputs[index], one, subject.entry, outputs[index])
            outcome = Outcome(results[index], gradients)
            found = compare(one, outcome, ALL, expectations(one, subject.entry))
            if found is not None:
                found.probe, found.detail = "two_graphs", found.detail or "with a second graph alive"
                found.secondary = alone_is_wrong(subject, one)
                found.extra["other"] = other if one is case else case
                raise found
        same_graph_twice(subject, case)
        same_tensors_changed(subject, case, other)
        leaf_input = materialise(case, subject.device)
        for _ in range(2):
            output = output_of(subject, leaf_input)
            with implementation_errors("backward"):
                output.backward(incoming_gradient(case, subject.entry, output))
        doubled = replace(case, incoming=2 * case.incoming)
        accumulated = {
            key: None if (grad := getattr(leaf_input, key).grad) is None else grad.detach().to("cpu", torch.float64)
            for key in case.differentiable
        }
        found = compare(doubled, Outcome({}, accumulated), (GRADIENT,), expectations(doubled, subject.entry))
        if found is not None:
            found.probe, found.detail = "accumulate", found.detail or "after two backward passes"
            found.case = case
            found.secondary = alone_is_wrong(subject, case)
            raise found

    subject.for_all(corner_of(subject).but(layout="contiguous"), check, share=0.4)
    corner = corner_of(subject).but(layout="contiguous", head="trainable")
    cases = [small_case(corner, subject.entry, dtype, subject.seed) for dtype in subject.torch_dtypes]
    subject.each(cases, lambda case: many_graphs(subject, case))
    subject.each(cases[:1], lambda case: after_an_error(subject, case))


@requirement(
    "GRAD-6",
    Level.MUST,
    "under no_grad and inference_mode the values are the same and carry no graph",
    source=SOURCE,
    why="evaluation loops call the loss without gradients",
    capabilities=DIVERGENCES,
)
def test_grad_6(subject: Subject) -> None:
    aspects = tuple(aspect for aspect in ALL if aspect != GRADIENT)

    def check(case: LossCase) -> None:
        if subject.expectations(case) is None:
            return
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                result = call_entry(subject.function, subject.entry, materialise(case, subject.device))
                key = "divergence" if subject.entry is Capability.DIVERGENCE else "loss"
                output = result.get(key)
                if isinstance(output, Tensor) and output.requires_grad:
                    raise Disagreement(
                        f"{key} under {mode.__name__}",
                        "no graph",
                        "requires_grad",
                        case=case,
                        probe=mode.__name__,
                    )
                found = compare(case, Outcome(result, {}), aspects, expectations(case, subject.entry))
            if found is not None:
                found.probe = mode.__name__
                found.secondary = alone_is_wrong(subject, case)
                raise found

    subject.for_all(corner_of(subject), check, share=0.3)
    seen_first = special_case(subject.entry, subject.widest, subject.seed, EVALUATED_FIRST)
    seen_first = seen_first.with_training(**CONFIGURED_FIRST)
    subject.each([seen_first], lambda case: trained_after_evaluation(subject, case, check))


EVALUATED_FIRST = Shape(b=2, t=6, v=29, k=11, h=14)
CONFIGURED_FIRST = {"alpha": 0.4307, "is_clip": 4.307, "kl_reg_weight": 0.04307}
"""No other input has this shape or these numbers, so what is remembered by them is made where no gradient is taken."""


def trained_after_evaluation(subject: Subject, case: LossCase, evaluate: Callable[[LossCase], object]) -> None:
    """What was made under inference_mode and kept cannot be part of a graph: a plain call afterwards is right, also of
    a shape that was trained on before."""
    if subject.expectations(case) is None:
        return
    for _ in range(2):
        evaluate(case)
        try:
            found = compare(case, subject.evaluate(case), ALL, expectations(case, subject.entry))
        except ImplementationError as error:
            error.probe = "after_evaluation"
            error.summary = f"{error.summary}, after calls under no_grad and inference_mode"
            raise
        if found is not None:
            found.secondary = alone_is_wrong(subject, case.columns(range(EVALUATED_FIRST.t - 1)))
            found.probe = "after_evaluation"
            found.detail = found.detail or "after calls under no_grad and inference_mode"
            raise found


@requirement(
    "GRAD-7",
    Level.SHOULD,
    "the same input gives bitwise the same result and gradient",
    source=SOURCE,
    why="a run that cannot be repeated cannot be debugged",
    capabilities=DIVERGENCES,
)
def test_grad_7(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        first, second = subject.evaluate(case), subject.evaluate(case)
        for key in first.result:
            if not same(first.number(key), second.number(key)):
                raise Disagreement(
                    key,
                    repr(float(first.number(key).reshape(-1)[0])),
                    "another value",
                    case=case,
                    probe="repeat",
                )
        for key, gradient in first.gradients.items():
            again = second.gradients[key]
            if (gradient is None) != (again is None) or (
                gradient is not None and again is not None and not same(gradient, again)
            ):
                raise Disagreement(
                    f"gradient to {key}", "bitwise the same twice", "different", case=case, probe="repeat"
                )

    subject.for_all(corner_of(subject), check, share=0.3)


def same(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality, NaN equal to NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def incoming_laid_out(subject: Subject, case: LossCase) -> None:
    """The gradient that ``divergence.sum()`` sends, one number in memory, and a transposed one."""
    expected = subject.expectations(case)
    if expected is None:
        return
    usual = divergence_incoming(case)
    for words in ("expanded", "transposed"):
        loss_input = materialise(case, subject.device)
        output = output_of(subject, loss_input)
        if words == "expanded":
            laid_out = usual[:1, :1].to(output).expand_as(output)
        else:
            laid_out = lay_out(usual.to(output), "transposed", "")
        with implementation_errors("backward"):
            (found,) = torch.autograd.grad(output, [loss_input.student_hidden], laid_out, allow_unused=True)
        key, scale = "student_hidden", (laid_out.detach().cpu().double() / usual).unsqueeze(-1)
        truth = expected.gradients[key]
        gradient = None if found is None else found.detach().to("cpu", torch.float64)
        scaled = Expectation(truth.value * scale, truth.bound * scale.abs())
        wrong = gradient_disagreement(key, scaled, Outcome({}, {key: gradient}))
        if wrong is not None:
            wrong.case, wrong.probe = case, f"incoming_{words}"
            wrong.detail = wrong.detail or f"the gradient that arrives is {words}"
            raise wrong


LIVE_GRAPHS = 33
"""As many samples as a batch may bring to one backward, and one more."""


def many_graphs(subject: Subject, case: LossCase) -> None:
    """Many graphs alive at once; the backward passes run from the last to the first. The first half is one case, the
    second half another: in turns, a ring of two, four or more buffers would hand each case its own."""
    cases = (case, unlike(case, subject.entry))
    if any(subject.expectations(one) is None for one in cases):
        return
    calls: list[tuple[LossCase, Any, Any, Tensor]] = []
    for number in range(LIVE_GRAPHS):
        one = cases[2 * number > LIVE_GRAPHS]
        loss_input = materialise(one, subject.device)
        result = call_entry(subject.function, subject.entry, loss_input)
        calls.append((one, loss_input, result, differentiable_output(result, subject.entry)))
    for one, loss_input, result, output in reversed(calls):
        outcome = Outcome(result, gradients_of(loss_input, one, subject.entry, output))
        found = compare(one, outcome, ALL, expectations(one, subject.entry))
        if found is not None:
            found.probe, found.detail = "two_graphs", found.detail or f"with {LIVE_GRAPHS} graphs alive"
            found.secondary = alone_is_wrong(subject, one)
            found.extra["other"] = cases[1] if one is case else case
            raise found


def same_graph_twice(subject: Subject, case: LossCase) -> None:
    """Backward twice through one graph: an error is an answer, another gradient is not."""
    twice = replace(case, incoming=-0.5)
    loss_input = materialise(twice, subject.device)
    output = output_of(subject, loss_input)
    leaves = [getattr(loss_input, key) for key in twice.differentiable]
    incoming = incoming_gradient(twice, subject.entry, output)
    try:
        torch.autograd.grad(output, leaves, incoming, retain_graph=True, allow_unused=True)
        found = torch.autograd.grad(output, leaves, incoming, allow_unused=True)
    except Exception:
        return
    gradients = {
        key: None if gradient is None else gradient.detach().to("cpu", torch.float64)
        for key, gradient in zip(twice.differentiable, found, strict=True)
    }
    wrong = compare(twice, Outcome({}, gradients), (GRADIENT,), expectations(twice, subject.entry))
    if wrong is not None:
        wrong.probe, wrong.detail = "backward_twice", wrong.detail or "at the second backward through one graph"
        wrong.secondary = alone_is_wrong(subject, twice)
        raise wrong


def after_an_error(subject: Subject, case: LossCase) -> None:
    """A call that raised, as one without a teacher does, leaves nothing behind: the next one is right."""
    if subject.expectations(case) is None:
        return
    loss_input = materialise(case, subject.device)
    with suppress(ImplementationError):
        call_entry(subject.function, subject.entry, replace(loss_input, teacher_logprobs=None))
    found = compare(case, subject.evaluate(case), ALL, expectations(case, subject.entry))
    if found is not None:
        found.secondary = alone_is_wrong(subject, case)
        found.probe, found.detail = "after_error", found.detail or "after a call that raised"
        raise found


def same_tensors_changed(subject: Subject, case: LossCase, other: LossCase) -> None:
    """A second call on the same tensor objects, changed in place as an optimizer step changes the head."""
    loss_input = materialise(case, subject.device)
    gradients_of(loss_input, case, subject.entry, output_of(subject, loss_input))
    with torch.no_grad():
        for key, tensor in other.tensors().items():
            getattr(loss_input, key).copy_(tensor)
    loss_input = replace(loss_input, training=other.training)
    result = call_entry(subject.function, subject.entry, loss_input)
    gradients = gradients_of(loss_input, other, subject.entry, differentiable_output(result, subject.entry))
    found = compare(other, Outcome(result, gradients), ALL, expectations(other, subject.entry))
    if found is not None:
        found.probe, found.detail = "changed_in_place", found.detail or "after the same tensors were changed in place"
        found.secondary = alone_is_wrong(subject, other)
        found.extra["other"] = case
        raise found


@lru_cache(maxsize=8)
def unlike(case: LossCase, entry: Capability) -> LossCase:
    """A case of the same shapes and dtypes whose results, gradients and options all differ; so do the tokens that
    count, where the entry has a mask. Kept, with its truth, for the next defect that is replayed on the case."""
    fields = case.loss_input
    tau = fields.teacher_logprobs
    leading = "student_hidden" if case.fused else "student_logits"
    other = case.with_fields(
        **{leading: case.tensors()[leading] * 0.5},
        teacher_logprobs=tau * 0.5,
        base_logprobs=fields.base_logprobs - 0.5,
        old_student_logprobs=fields.old_student_logprobs - 0.25,
        teacher_indices=(fields.teacher_indices + 1) % case.vocabulary,
        response_ids=(fields.response_ids + 1) % case.vocabulary,
    )
    if entry is not Capability.DIVERGENCE:
        other = other.with_fields(response_mask=without_every_second(fields.response_mask))
    if case.fused:
        other = other.with_fields(lm_head_weight=case.tensors()["lm_head_weight"] * 0.75)
    options = case.training
    changed = {"is_clip": options.is_clip * 0.5, "kl_reg_weight": options.kl_reg_weight + 0.25}
    if options.alpha < 1:
        changed["alpha"] = 0.5 - options.alpha / 4
    return replace(other.with_training(**changed), incoming=2.0)


def output_of(subject: Subject, loss_input: Any) -> Tensor:
    """The differentiable output of one call."""
    return differentiable_output(call_entry(subject.function, subject.entry, loss_input), subject.entry)


def alone_is_wrong(subject: Subject, case: LossCase) -> bool:
    """The control of rules about several graphs or modes: one plain call."""
    return compare(case, subject.evaluate(case), ALL, expectations(case, subject.entry)) is not None
