"""RED: from tokens to one number."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_conformance.judging.call import call_entry, implementation_errors, materialise
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.protocol import METRIC_KEYS, RESULT_KEYS
from sdpo_conformance.specs.claas.corners import NEUTRAL
from sdpo_conformance.specs.claas.inputs.masked import padded, with_garbage
from sdpo_conformance.specs.claas.inputs.on_policy import on_policy
from sdpo_conformance.specs.claas.inputs.special import with_masks
from sdpo_conformance.specs.claas.loss_case import LossCase
from sdpo_conformance.specs.claas.rules.aspects import ALL, LOSSES
from sdpo_conformance.specs.requirement import UPSTREAM, Level, requirement

SOURCE = f"{UPSTREAM} compute_sdpo_loss: mask_sum and the two means"
BROAD = NEUTRAL.but(
    ratio=("mild", "below", "above_cap"),
    anchor=("off", "on"),
    drift=("mild", "strong"),
    alpha=("half", "inside", "one"),
)


def full_mask(case: LossCase) -> LossCase:
    """The control: every token counts once."""
    return case.with_fields(response_mask=torch.ones_like(case.loss_input.response_mask))


def metric_of_ratio(found: Disagreement) -> bool:
    """Whether the loss is right and a metric of the ratio is not: IS-10's finding."""
    return found.aspect.startswith(("mean_is_ratio", "clip_fraction"))


def put_together(subject: Subject, case: LossCase) -> None:
    """Judge a batch; what is wrong on a token alone is another rule's finding, what is right on-policy IS-6's, and
    what masked positions do RED-2's."""
    try:
        subject.agrees(case, ALL)
    except Disagreement as found:
        found.secondary = (
            metric_of_ratio(found)
            or not subject.right_alone(case, ALL)
            or not subject.wrong_on(on_policy(case), ALL)
            or subject.tells_apart(case, with_garbage(case), ALL)
        )
        raise


def alike(subject: Subject, case: LossCase, other: LossCase) -> None:
    """Judge ``other``, the same tokens in another arrangement; what is as wrong in ``case`` is not this rule's."""
    try:
        subject.agrees(other, ALL)
    except Disagreement as found:
        found.secondary = metric_of_ratio(found) or not subject.tells_apart(case, other, ALL)
        raise


@requirement(
    "RED-1",
    Level.MUST,
    "one mean over all tokens of the batch, not a mean of row means",
    source=SOURCE,
    why="a mean of row means gives tokens of short responses more weight",
    capabilities=LOSSES,
)
def test_red_1(subject: Subject) -> None:
    corner = BROAD.but(mask=("ragged", "random", "full"), size=("small", "tall", "crowd"))
    subject.for_all(corner, lambda case: put_together(subject, case))


@requirement(
    "RED-2",
    Level.MUST,
    "positions whose mask is 0 count for nothing, in values, metrics and gradients",
    source=f"{SOURCE}: * response_mask",
    why="padding that leaks trains on garbage",
    capabilities=LOSSES,
)
def test_red_2(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        garbage = with_garbage(case)
        try:
            subject.agrees(garbage, ALL)
        except Disagreement as found:
            found.secondary = metric_of_ratio(found) or not subject.tells_apart(case, garbage, ALL)
            raise

    subject.for_all(BROAD.but(mask=("random", "ragged")), check)
    subject.each_unless_refused(with_masks(subject.entry, subject.widest, subject.seed), check)


@requirement(
    "RED-3",
    Level.MUST,
    "an all-zero mask gives 0 everywhere and a zero gradient: the denominator is at least 1",
    source=f"{SOURCE}: .clamp(min=1.0)",
    why="a batch without response tokens must not turn the adapter into NaN",
    capabilities=LOSSES,
)
def test_red_3(subject: Subject) -> None:
    subject.for_all(BROAD.but(mask="empty"), lambda case: subject.agrees(case, ALL, control=full_mask(case)), share=0.5)


@requirement(
    "RED-4",
    Level.MUST,
    "a fractional mask weighs its tokens; the denominator is max(sum of the mask, 1)",
    source=SOURCE,
    why="a mask read as a boolean, or a denominator that counts tokens, changes every weight",
    capabilities=LOSSES,
)
def test_red_4(subject: Subject) -> None:
    corner = BROAD.but(mask=("fractional", "holed", "tiny"))
    subject.for_all(corner, lambda case: subject.agrees(case, ALL, control=full_mask(case)))


@requirement(
    "RED-5",
    Level.MUST,
    "permuting rows, repeating the batch, and padding with masked columns change nothing",
    source=f"{SOURCE}: a sum over positions",
    why="rows mixed up, or a tile that reads its neighbour, show only with several different rows",
    capabilities=LOSSES,
)
def test_red_5(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        rows = case.loss_input.response_ids.shape[0]
        for keep in (torch.arange(rows).flip(0), torch.arange(rows).repeat(2)):
            alike(subject, case, case.rows(keep))
        alike(subject, case, padded(case))

    corner = BROAD.but(mask=("full", "ragged", "fractional"), size=("small", "tall", "crowd"))
    subject.for_all(corner, check, share=0.35)


@requirement(
    "RED-6",
    Level.MUST,
    "the result has the five keys: loss a 0-dim floating tensor on the input's device, differentiable; each "
    "metric a float or a 0-dim tensor without graph",
    source=f"{UPSTREAM} compute_sdpo_loss: the returned SDPOLossResult",
    why="a caller reads these keys and calls backward",
    capabilities=LOSSES,
)
def test_red_6(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        result = call_entry(subject.function, subject.entry, materialise(case, subject.device))
        problem = problem_with(dict(result), subject.device)
        if problem:
            raise Disagreement("the result", problem[0], problem[1], case=case, probe="types")

    subject.for_all(BROAD.but(mask=("full", "ragged", "empty")), check, share=0.3)


def problem_with(result: dict[str, object], device: str) -> tuple[str, str] | None:
    """What is wrong with keys and types: (expected, got), or None."""
    missing = [key for key in RESULT_KEYS if key not in result]
    if missing:
        return f"keys {', '.join(RESULT_KEYS)}", f"no {', '.join(missing)}"
    loss = result["loss"]
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        return "loss: a floating tensor", type(loss).__name__
    if loss.dim() != 0:
        return "loss: 0-dim", f"shape {tuple(loss.shape)}"
    if not loss.requires_grad:
        return "loss: differentiable", "a tensor without graph"
    if loss.device.type != torch.device(device).type:
        return f"loss on {device}", f"on {loss.device}"
    for key in METRIC_KEYS:
        value = result[key]
        if isinstance(value, Tensor):
            if value.dim() != 0:
                return f"{key}: a float or a 0-dim tensor", f"shape {tuple(value.shape)}"
            if value.requires_grad:
                return f"{key}: no graph", "a tensor that requires grad"
        elif isinstance(value, bool) or not is_number(value):
            return f"{key}: a float or a 0-dim tensor", type(value).__name__
    return None


def is_number(value: object) -> bool:
    """A real number that ``float`` takes, strings excluded."""
    if isinstance(value, str | bytes):
        return False
    with implementation_errors("float() of a metric"):
        try:
            float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return False
    return True
