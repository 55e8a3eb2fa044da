"""Known ways to get ms-swift's loss wrong, and other algorithms that are taken for it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.specs.ms_swift.loss_input import INACTIVE
from sdpo_conformance.specs.ms_swift.pipeline import PIPELINE
from sdpo_conformance.specs.shared import catalogue as common
from sdpo_conformance.specs.shared import stages
from sdpo_conformance.specs.shared import wrong_stages as wrong
from sdpo_conformance.specs.shared.defect import Maker, Parameter, SpecDefect, executable, named
from sdpo_conformance.specs.shared.pipeline import (
    LOG_ZERO,
    Change,
    Flow,
    Stage,
    accepting,
    around,
    both,
    graded,
    replacing,
)

WORDS = {"topk": "gkd_logits_topk", "alpha": "beta", "add_tail": "", "clip": "", "old": ""}
defect = Maker("ms-swift", "MSS", PIPELINE, WORDS)

# --- positions ---


def unshifted(labels: Tensor) -> Tensor:
    """Labels taken for positions: one token late."""
    return labels != INACTIVE


def without_roll(labels: Tensor) -> Tensor:
    """A shift whose last position is inactive, whatever the first label is."""
    found = labels.roll(-1, dims=1) != INACTIVE
    return found & (torch.arange(labels.shape[1], device=labels.device) < labels.shape[1] - 1)


def across_rows(labels: Tensor) -> Tensor:
    """A shift over the flattened batch: a row's last position follows the next row's first label."""
    return labels.flatten().roll(-1).view_as(labels) != INACTIVE


def zero_inactive(labels: Tensor) -> Tensor:
    """Label 0 taken for padding."""
    return labels.roll(-1, dims=1) > 0


def shifted_by(function: Any) -> Change:
    """Other active positions, on both sides."""
    return replacing(here=lambda flow: function(flow.labels), there=lambda flow: function(flow.teacher_labels))


def lenient(before: Stage, flow: Flow) -> Tensor:
    """As many positions as both have."""
    n = min(int(flow.here.sum()), int(flow.there.sum()))
    found: Tensor = flow.z[flow.here][:n]
    return found


def reversed_pairs(before: Stage, flow: Flow) -> Tensor:
    """Positions paired from the last to the first."""
    found: Tensor = before(flow)
    return found.flip(0)


def column_major(before: Stage, flow: Flow) -> Tensor:
    """The teacher's positions in column-major order."""
    where = flow.there.T.nonzero()
    found: Tensor = flow.x[where[:, 1], where[:, 0]]
    return found


def students_column_major(before: Stage, flow: Flow) -> Tensor:
    """The student's positions in column-major order."""
    before(flow)  # which refuses differing counts
    where = flow.here.T.nonzero()
    found: Tensor = flow.z[where[:, 1], where[:, 0]]
    return found


def column_major_ids(before: Stage, flow: Flow) -> Tensor | None:
    if flow.ids is None:
        return before(flow)
    where = flow.there.T.nonzero()
    found: Tensor = flow.ids[where[:, 1], where[:, 0]]
    return found


# --- support, distributions ---


def ties_on_support(before: Stage, flow: Flow) -> Tensor | None:
    """Every teacher logit at or above the k-th largest."""
    flow.inside = None
    if flow.ids is not None or flow.k is None or flow.k >= flow.teacher_rows.shape[-1]:
        return before(flow)
    ids, flow.inside = wrong.at_or_above(flow.teacher_rows, flow.k)
    return ids


def only_inside(before: Stage, flow: Flow) -> Tensor:
    """Nothing where a row has fewer of them than others."""
    found: Tensor = before(flow)
    return found if flow.inside is None else found.masked_fill(~flow.inside, LOG_ZERO)


def students_support(before: Stage, flow: Flow) -> Tensor | None:
    """The student's own top-k under the teacher's values."""
    found = before(flow)
    return None if found is None else flow.student_rows.detach().topk(found.shape[-1], dim=-1).indices


def whole(before: Stage, flow: Flow) -> Tensor | None:
    """gkd_logits_topk ignored: the whole vocabulary."""
    return before(flow) if flow.ids is not None else None


def of_one_vocabulary(before: Stage, flow: Flow) -> Tensor:
    """The teacher's rows with the student's extra logits, before the top-k of them is taken."""
    rows: Tensor = before(flow)
    if flow.ids is not None or flow.k is None:
        return rows
    return torch.cat((rows, flow.student_rows[:, rows.shape[-1] :].detach().to(rows)), dim=-1)


def values_sorted(before: Stage, flow: Flow) -> Tensor:
    """A given top-k's values sorted, its ids as they are."""
    found: Tensor = before(flow)
    return found if flow.ids is None else found.sort(-1, descending=True).values


def over_vocabulary(before: Stage, flow: Flow) -> Tensor:
    """The student's log-probs over the vocabulary, not over the support."""
    if flow.support is None:
        return before(flow)
    logprobs = (flow.student_rows[flow.covered] / flow.temperature).log_softmax(-1)
    found: Tensor = logprobs.gather(-1, flow.support[flow.covered])
    return found


def as_given(before: Stage, flow: Flow) -> Tensor:
    """The teacher's log-probs as they are."""
    if flow.ids is None:
        return before(flow)
    found: Tensor = flow.teacher_raw[flow.covered] / flow.temperature
    return found


def floored(value: float) -> Change:
    """The teacher's mass held up at a floor."""

    def finish(before: Stage, flow: Flow) -> Tensor:
        if flow.ids is None:
            return before(flow)
        x = flow.teacher_raw[flow.covered] / flow.temperature
        found: Tensor = x - x.logsumexp(-1, keepdim=True).clamp(min=torch.tensor(value).log().item())
        return found

    return around("log_p", finish)


def tailed(flow: Flow) -> Tensor:
    """A tail category on both sides of a top-k."""
    if flow.support is None or flow.ids is None:
        return stages.divergence(flow)
    logprobs = (flow.student_rows[flow.covered] / flow.temperature).log_softmax(-1)
    given = flow.log_q, flow.log_p, flow.log_m
    flow.log_q = stages.with_tail(logprobs.gather(-1, flow.support[flow.covered]))
    flow.log_p = stages.with_tail(flow.teacher_raw[flow.covered])
    flow.log_m = stages.mixture(flow)
    found = stages.divergence(flow)
    flow.log_q, flow.log_p, flow.log_m = given
    return found


# --- temperature ---


def untempered(stage: str) -> Change:
    """One side at temperature 1."""

    def at_one(before: Stage, flow: Flow) -> Tensor:
        given, flow.temperature = flow.temperature, 1.0
        found: Tensor = before(flow)
        flow.temperature = given
        return found

    return around(stage, at_one)


def tempered_after(before: Stage, flow: Flow) -> Tensor:
    """The teacher's log-probs divided by the temperature, and not normalised again."""
    found: Tensor = flow.teacher_raw[flow.covered].log_softmax(-1) / flow.temperature
    return found


def constant_normaliser(before: Stage, flow: Flow) -> Tensor:
    """log-softmax whose logsumexp takes no gradient."""
    tempered = flow.student_raw[flow.covered] / flow.temperature
    found: Tensor = tempered - tempered.logsumexp(-1, keepdim=True).detach()
    return found


def served_untempered(before: Stage, flow: Flow) -> Tensor:
    """Log-probs that are given are not tempered; logits are."""
    if flow.ids is None:
        return before(flow)
    found: Tensor = flow.teacher_raw[flow.covered].log_softmax(-1)
    return found


# --- vocabularies ---


def cut_to_teacher(before: Stage, flow: Flow) -> Tensor:
    """Both sides cut to the shorter vocabulary."""
    found: Tensor = before(flow)
    if flow.support is not None:
        return found
    return found[..., : min(flow.z.shape[-1], flow.x.shape[-1])]


def detached_loan(before: Stage, flow: Flow) -> Tensor:
    """The student's logits that the teacher borrows, without their gradient."""
    found: Tensor = before(flow)
    return found.detach()


def untempered_loan(side: str) -> Change:
    """What one side borrows multiplied by the temperature, so that tempering leaves it as it was."""

    def lend(before: Stage, flow: Flow) -> Tensor:
        found: Tensor = before(flow)
        own = flow.z.shape[-1] if side == "student" else flow.x.shape[-1]
        if flow.support is not None or found.shape[-1] == own:
            return found
        return torch.cat((found[..., :own], found[..., own:] * flow.temperature), dim=-1)

    return around(f"{side}_raw", lend)


def shut(side: str) -> Change:
    """The longer vocabulary's extra tokens impossible on the shorter side."""

    def close(before: Stage, flow: Flow) -> Tensor:
        found: Tensor = before(flow)
        own = flow.z.shape[-1] if side == "student" else flow.x.shape[-1]
        if flow.support is not None or found.shape[-1] == own:
            return found
        return torch.cat((found[..., :own], torch.full_like(found[..., own:], -1e4)), dim=-1)

    return around(f"{side}_raw", close)


# --- cover, reduction ---


def all_covered(before: Stage, flow: Flow) -> Tensor:
    """Positions of which the teacher says nothing stay, with a uniform teacher."""
    found: Tensor = before(flow)
    flow.teacher_raw = torch.where(found.unsqueeze(-1), flow.teacher_raw, torch.zeros_like(flow.teacher_raw))
    return torch.ones_like(found)


def counting_uncovered(flow: Flow) -> Tensor:
    """Positions of which the teacher says nothing are in the denominator."""
    return torch.tensor(float(flow.covered.numel()), device=flow.z.device)


def counting_all(flow: Flow) -> Tensor:
    """Every position of the batch in the denominator."""
    return torch.tensor(float(flow.labels.numel()), device=flow.z.device)


def summed(flow: Flow) -> Tensor:
    found: Tensor = flow.total
    return found


def row_means(flow: Flow) -> Tensor:
    """Each row averaged before the rows are."""
    rows = flow.here.nonzero()[flow.covered][:, 0]
    filled = rows.unique()
    means = [flow.per_token[rows == row].mean() for row in filled]
    return torch.stack(means).mean() if means else flow.total


def per_batch(flow: Flow) -> Tensor:
    found: Tensor = flow.total / max(flow.labels.shape[0], 1)
    return found


MASS_FLOOR = Parameter("floor", 1e-12, 1.0, (1e-8, 1e-10, 1e-6, 1e-3))

POSITIONS = (
    defect(
        "unshifted",
        "Labels are taken for positions, unshifted.",
        "POS-1",
        "Position t predicts label t + 1: roll the labels by -1.",
        shifted_by(unshifted),
    ),
    defect(
        "teacher-unshifted",
        "The teacher's labels are not shifted.",
        "POS-1",
        "Roll both sides' labels.",
        replacing(there=lambda flow: unshifted(flow.teacher_labels)),
    ),
    defect(
        "label-zero-inactive",
        "Label 0 is taken for padding.",
        "POS-1",
        "A position counts where its label is not -100: 0 is a token.",
        shifted_by(zero_inactive),
    ),
    defect(
        "shift-without-roll",
        "A row's first label, active, does not make its last position active.",
        "POS-2",
        "torch.roll, as upstream has it.",
        shifted_by(without_roll),
    ),
    defect(
        "shift-across-rows",
        "The labels are shifted over the flattened batch.",
        "POS-2",
        "torch.roll along dims=1: each row by itself.",
        shifted_by(across_rows),
    ),
    defect(
        "pairs-reversed",
        "Student and teacher positions are paired in another order.",
        "POS-3",
        "Both in row-major order.",
        around("teacher_rows", reversed_pairs),
    ),
    defect(
        "pairs-by-column",
        "The teacher's positions are taken in column-major order.",
        "POS-3",
        "Both in row-major order.",
        both(around("teacher_rows", column_major), around("support", column_major_ids)),
    ),
    defect(
        "both-by-column",
        "Both sides' positions are taken in column-major order: other pairs where a row's places differ.",
        "POS-3",
        "Both in row-major order.",
        both(
            around("student_rows", students_column_major),
            around("teacher_rows", column_major),
            around("support", column_major_ids),
        ),
    ),
    defect(
        "counts-unchecked",
        "Differing numbers of active labels are accepted.",
        "POS-4",
        "Refuse them.",
        both(
            around("student_rows", lenient),
            around("teacher_rows", lambda before, flow: before(flow)[: flow.student_rows.shape[0]]),
            around(
                "support",
                lambda before, flow: None if (ids := before(flow)) is None else ids[: flow.student_rows.shape[0]],
            ),
        ),
    ),
)

SUPPORT = (
    defect(
        "student-support",
        "The student's own top-k stands under the teacher's values.",
        "SUP-1",
        "Gather the student at the teacher's ids.",
        around("support", students_support),
    ),
    defect(
        "values-sorted-alone",
        "The values of a given top-k are sorted and its ids are not.",
        "SUP-1",
        "Pair each value with its id, whatever their order.",
        around("teacher_raw", values_sorted),
    ),
    defect(
        "topk-ignored",
        "{topk} is ignored.",
        "SUP-2",
        "Keep the {topk} largest raw teacher logits.",
        around("support", whole),
    ),
    defect(
        "ties-on-support",
        "Every teacher logit at or above the k-th largest is kept: where some are equal there are more than {topk}.",
        "SUP-2",
        "Take topk's indices, not a threshold: {topk} of them, whichever of equal logits.",
        both(
            around("support", ties_on_support), around("teacher_raw", only_inside), around("student_raw", only_inside)
        ),
    ),
    defect(
        "topk-of-wider-vocabulary",
        "The vocabularies are made one before the top-k: logits of the student's that the teacher lacks enter it.",
        "SUP-2",
        "Take the top-k of the teacher's own logits.",
        around("teacher_rows", of_one_vocabulary),
    ),
    defect(
        "student-over-vocabulary",
        "The student is normalised over the vocabulary, not over the support.",
        "SUP-3",
        "log_softmax over the K logits of the support.",
        around("log_q", over_vocabulary),
    ),
    defect(
        "teacher-as-given",
        "The teacher's log-probs are not renormalised over the support.",
        "SUP-3",
        "log_softmax over the K.",
        around("log_p", as_given),
    ),
    defect(
        "mass-floored",
        "The teacher's mass is held up at a floor.",
        "SUP-3",
        "log_softmax, without a floor.",
        **named(floored, MASS_FLOOR),
    ),
    defect(
        "tail-added",
        "A tail category is appended to a top-k.",
        "SUP-3",
        "The support alone.",
        replacing(per_token=tailed),
    ),
)

TEMPERATURE = (
    defect(
        "temperature-ignored",
        "The temperature is ignored.",
        "TEMP-1",
        "Divide both sides by it.",
        both(untempered("log_q"), untempered("log_p")),
    ),
    defect(
        "teacher-not-tempered",
        "Only the student is divided by the temperature.",
        "TEMP-1",
        "Divide the teacher too.",
        untempered("log_p"),
    ),
    defect(
        "student-not-tempered",
        "Only the teacher is divided by the temperature.",
        "TEMP-1",
        "Divide the student too.",
        untempered("log_q"),
    ),
    defect(
        "served-not-tempered",
        "Log-probs that are given are not divided by the temperature.",
        "TEMP-1",
        "Divide them too, then renormalise.",
        around("log_p", served_untempered),
    ),
    defect(
        "teacher-normalised-before-tempered",
        "The teacher is normalised first and tempered after, and not normalised again.",
        "TEMP-1",
        "Divide by the temperature, then normalise.",
        around("log_p", tempered_after),
    ),
    defect(
        "temperature-squared",
        "The loss is multiplied by the square of the temperature.",
        "TEMP-1",
        "There is no such factor.",
        around("per_token", wrong.squared),
    ),
    defect(
        "gradient-not-tempered",
        "The gradient lacks the temperature's 1 / tau.",
        "TEMP-2",
        "d/dz = d/dz' / tau.",
        graded(wrong.untempered_gradient),
    ),
)

VOCABULARY = (
    defect(
        "vocabularies-cut",
        "Both sides are cut to the shorter vocabulary.",
        "VOC-1",
        "Continue the shorter side with the other's logits.",
        both(around("student_raw", cut_to_teacher), around("teacher_raw", cut_to_teacher)),
    ),
    defect(
        "extra-teacher-logits-untempered",
        "The logits that the student borrows of the teacher are not divided by the temperature.",
        "VOC-1",
        "Make the vocabularies one, then divide by the temperature.",
        untempered_loan("student"),
    ),
    defect(
        "extra-student-logits-untempered",
        "The logits that the teacher borrows of the student are not divided by the temperature.",
        "VOC-2",
        "Make the vocabularies one, then divide by the temperature.",
        untempered_loan("teacher"),
    ),
    defect(
        "extra-teacher-tokens-shut",
        "Teacher tokens that the student lacks are impossible to it.",
        "VOC-1",
        "The student gets the teacher's logits there.",
        shut("student"),
    ),
    defect(
        "extra-student-tokens-shut",
        "Student tokens that the teacher lacks are impossible to it.",
        "VOC-2",
        "The teacher gets the student's logits there.",
        shut("teacher"),
    ),
    defect(
        "loan-detached",
        "What the teacher borrows of the student takes no gradient.",
        "VOC-3",
        "The gradient flows through the teacher there.",
        around("teacher_raw", detached_loan),
    ),
)

REDUCTION = (
    defect(
        "uncovered-kept",
        "A position whose top-k is all -inf stays, with a uniform teacher.",
        "COV-1",
        "Drop it from value and count.",
        around("covered", all_covered),
    ),
    defect(
        "uncovered-counted",
        "A position whose top-k is all -inf is in the denominator.",
        "COV-1",
        "Drop it from value and count.",
        replacing(count=counting_uncovered),
    ),
    defect(
        "all-positions",
        "The denominator counts every position.",
        "RED-1",
        "Divide by the active positions.",
        replacing(count=counting_all),
    ),
    defect(
        "summed",
        "The sum is returned in place of the mean.",
        "RED-1",
        "Divide by the active positions.",
        replacing(loss=summed),
    ),
    defect(
        "row-means",
        "Each row is averaged before the rows are.",
        "RED-1",
        "One mean over the active positions.",
        replacing(loss=row_means),
    ),
    defect(
        "per-batch",
        "The sum is divided by the number of rows.",
        "RED-1",
        "Divide by the active positions.",
        replacing(loss=per_batch),
    ),
)


def by_own_count(flow: Flow, loss_input: Any) -> None:
    """num_items_in_batch is not read."""
    flow.items = None


STEP = (
    defect(
        "count-kept",
        "The first micro-batch's number of positions is kept for those after it.",
        "AGG-1",
        "Count each micro-batch's own positions.",
        wrong.kept_for_the_step("count"),
    ),
    defect(
        "items-ignored",
        "num_items_in_batch is ignored: each micro-batch takes its own mean.",
        "AGG-2",
        "Divide by num_items_in_batch where it is given.",
        accepting(by_own_count),
        usable_for="steps of one micro-batch, and callers that weigh by num_valid.",
    ),
)

INSTEAD = "Compute ms-swift's loss (docs/spec-ms-swift.md), or judge this with the spec it follows."


def claas(flow: Flow) -> Tensor:
    """CLaaS's divergence: 0 at beta = 0 and, as a limit, at 1."""
    if flow.alpha in (0, 1):
        return 0 * stages.kl(flow.log_q, flow.log_p).detach() + 0 * flow.log_q.sum(-1)
    return stages.jensen_shannon(flow)


DIALECTS = (
    defect(
        "is-claas",
        "This computes CLaaS's divergence (mass floor 1e-8, 0 at beta = 0).",
        "SUP-3",
        INSTEAD,
        both(floored(1e-8), replacing(per_token=claas)),
        dialect="CLaaS's divergence",
        usable_for="--spec claas: the ratio and the refresh are owed.",
    ),
    defect(
        "is-trl-server",
        "This computes TRL's server path: a served teacher is not tempered, row means.",
        "TEMP-1",
        INSTEAD,
        both(around("log_p", served_untempered), replacing(loss=row_means)),
        dialect="TRL's server path",
        usable_for="--spec trl.",
    ),
    defect(
        "is-lasgroup",
        "This computes a divergence with a tail category: lasgroup's on the teacher's top-k.",
        "SUP-3",
        INSTEAD,
        replacing(per_token=tailed),
        dialect="lasgroup's loss on the teacher's top-k",
        usable_for="--spec lasgroup, on the student's top-k.",
    ),
    defect(
        "is-verl-topk",
        "This computes verl's forward_kl_topk.",
        "SUP-3",
        INSTEAD,
        both(
            around("log_q", over_vocabulary),
            around("log_p", as_given),
            replacing(
                per_token=lambda flow: (
                    (flow.log_p.clamp(min=-10.0).exp() * (flow.log_p.clamp(min=-10.0) - flow.log_q.clamp(min=-10.0)))
                    .sum(-1)
                    .clamp(0.0, 10.0)
                )
            ),
        ),
        dialect="verl's forward_kl_topk",
        usable_for="--spec verl-topk.",
    ),
)


def divergences() -> tuple[SpecDefect, ...]:
    """Those of the shared entries that need no sampled token."""
    kept = [one for one in common.divergence_defects(defect) if "surrogate" not in one.name]
    return tuple(kept)


NORMALISER = defect(
    "normaliser-detached",
    "The softmax's normaliser is a constant in the backward: the gradient is not centred.",
    "DIV-4",
    "dD/dz_v = q_v (g_v - sum q g): differentiate through the logsumexp.",
    around("log_q", constant_normaliser),
)

FAMILIES: Mapping[str, tuple[SpecDefect, ...]] = {
    "positions": POSITIONS,
    "support": SUPPORT,
    "divergence": (*divergences(), NORMALISER),
    "temperature": TEMPERATURE,
    "vocabulary": VOCABULARY,
    "reduction": (*REDUCTION, common.empty_defect(defect, "RED-3", lambda flow: flow.here.sum())),
    "step": STEP,
    "kept": common.kept_defects(defect, "labels", "teacher_labels"),
    "plumbing": tuple(one for one in common.plumbing_defects(defect) if "logsumexp" not in one.name),
}


@cache
def catalogue() -> Mapping[str, SpecDefect]:
    """Every defect by name; dialects are apart."""
    return MappingProxyType({one.name: one for family in FAMILIES.values() for one in family})


def load(name: str) -> Any:
    """The executable form of an entry, or of two as ``one+other``, as ``--impl=defect:NAME`` takes it."""
    return executable(name, catalogue(), DIALECTS)
