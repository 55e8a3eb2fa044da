"""Every rule of ms-swift's loss, in the order of the spec."""

from __future__ import annotations

import math
from typing import Any

import torch

from sdpo_conformance.judging.compare import GRADIENT, Disagreement
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.specs.ms_swift.corners import EVERYTHING, NEUTRAL
from sdpo_conformance.specs.ms_swift.loss_input import INACTIVE
from sdpo_conformance.specs.ms_swift.pipeline import active
from sdpo_conformance.specs.requirement import Level
from sdpo_conformance.specs.shared.autograd_rules import autograd_rules, gives_zeros, limit_is_met, precision_rules
from sdpo_conformance.specs.shared.loss_rules import ends_of, refuses
from sdpo_conformance.specs.shared.micro_batch_rules import cut_rule
from sdpo_conformance.specs.shared.rule import ALL, LOSS, VALUE, Rule, as_test

MUST, SHOULD = Level.MUST, Level.SHOULD
LOSS_FILE = "swift/rlhf_trainers/gkd_loss.py"
TRAINER = "swift/rlhf_trainers/gkd_trainer.py"
SMALL = ("small", "small", "tall")
KINDS = ("topk", "local", "full")


def whole(case: Any) -> Any:
    """The same teacher over the whole vocabulary, as logits."""
    fields = case.loss_input
    if fields.teacher_logits is not None:
        return case.with_training(gkd_logits_topk=None)
    b, s, _ = fields.teacher_topk_logprobs.shape
    low = torch.full((b, s, case.vocabulary), -8.0, dtype=torch.float64)
    given = fields.teacher_topk_logprobs.double().clamp(min=-9.0)
    logits = low.scatter(-1, fields.teacher_topk_indices.long(), given).to(fields.teacher_topk_logprobs.dtype)
    return case.with_fields(teacher_topk_logprobs=None, teacher_topk_indices=None, teacher_logits=logits)


def normalised(case: Any) -> Any:
    """A teacher whose top-k holds all of its mass."""
    fields = case.loss_input
    if fields.teacher_topk_logprobs is None:
        return case
    given = fields.teacher_topk_logprobs
    return case.with_fields(teacher_topk_logprobs=given.double().log_softmax(-1).to(given.dtype))


def tied(case: Any) -> Any | None:
    """The teacher's first logit off the support raised to the last one on it, the student's two made alike at the
    positions paired with it: whichever is kept, the value is one. None where all are kept."""
    fields, k = case.loss_input, case.training.gkd_logits_topk
    teacher = fields.teacher_logits
    if k is None or k >= teacher.shape[-1]:
        return None
    last, first = ends_of(teacher, teacher.topk(k, dim=-1).indices)
    student, here, there = fields.student_logits.clone(), active(fields.labels), active(fields.teacher_labels)
    student[here] = student[here].scatter(-1, first[there], student[here].gather(-1, last[there]))
    return case.with_fields(teacher_logits=teacher.scatter(-1, first, teacher.gather(-1, last)), student_logits=student)


def of_that_size(subject: Subject, case: Any) -> None:
    """The support as it is, and where teacher logits are equal at its end."""
    subject.agrees(case, ALL, control=[untopped(case)])
    if (equal := tied(case)) is not None:
        subject.agrees(equal, VALUE, control=[untopped(equal)])


def untopped(case: Any) -> Any:
    """All of the teacher's logits."""
    return case.with_training(gkd_logits_topk=None)


def at_half(case: Any) -> Any:
    return case.with_training(beta=0.5)


def untempered(case: Any) -> Any:
    return case.with_training(temperature=1.0)


def whole_response(case: Any) -> Any:
    """One row whose labels all count but the first, where a shift and a roll are the same."""
    fields = case.loss_input
    if fields.labels.shape != fields.teacher_labels.shape:
        return case
    labels = torch.where(fields.labels == INACTIVE, torch.zeros_like(fields.labels), fields.labels)
    labels[:, 0] = INACTIVE
    return case.with_fields(labels=labels, teacher_labels=labels.clone())


def one_pair(case: Any) -> Any:
    """The first row alone with one active label, the second, on both sides: whatever the order, one pair."""
    first = case.rows(torch.tensor([0]))
    fields = first.loss_input
    n = min(fields.labels.shape[1], fields.teacher_labels.shape[1])
    changes = {key: value[:, :n].contiguous() for key, value in first.tensors().items()}
    labels = torch.full_like(changes["labels"], INACTIVE)
    labels[:, 1] = 0
    changes["labels"], changes["teacher_labels"] = labels, labels.clone()
    return first.with_fields(**changes)


def equal_vocabularies(case: Any) -> Any:
    """Both sides cut to the shorter vocabulary."""
    fields = case.loss_input
    n = min(fields.student_logits.shape[-1], fields.teacher_logits.shape[-1])
    return case.with_fields(
        student_logits=fields.student_logits[..., :n].contiguous(),
        teacher_logits=fields.teacher_logits[..., :n].contiguous(),
    )


def covered(case: Any) -> Any:
    """Every position has a teacher."""
    given = case.loss_input.teacher_topk_logprobs
    return case.with_fields(teacher_topk_logprobs=torch.where(given.isinf(), torch.full_like(given, -1.0), given))


def counts_differ(subject: Subject, case: Any) -> None:
    """One label less on the teacher's side."""
    labels = case.loss_input.teacher_labels.clone()
    where = (labels[:, 1:] != INACTIVE).nonzero()
    if where.numel():
        labels[where[0, 0], where[0, 1] + 1] = INACTIVE
        refuses(subject, case.with_fields(teacher_labels=labels), "the numbers of active labels differ")


def inactive_with(case: Any, value: float | None) -> Any:
    """Other values at inactive positions: ``value``, or wild ones."""
    fields = case.loss_input
    generator = torch.Generator().manual_seed(7)
    changes = {}
    for name, labels in (
        ("student_logits", fields.labels),
        ("teacher_logits", fields.teacher_labels),
        ("teacher_topk_logprobs", fields.teacher_labels),
    ):
        tensor = getattr(fields, name)
        if tensor is None:
            continue
        noise = 20 * (2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 1)
        if value is not None:
            noise = torch.full_like(noise, value)
        changes[name] = torch.where(active(labels).unsqueeze(-1), tensor, noise.to(tensor.dtype))
    return case.with_fields(**changes)


def inactive_counts_for_nothing(subject: Subject, case: Any) -> None:
    """Wild values at inactive positions change nothing."""
    subject.agrees(inactive_with(case, None), ALL, control=[whole_response(case)])


def nothing_reaches(subject: Subject, case: Any) -> None:
    """NaN and both infinities at inactive positions."""
    for value in (math.nan, math.inf, -math.inf):
        limit_is_met(subject, inactive_with(case, value), case)


def attached(subject: Subject, case: Any) -> None:
    """No active label: the loss is 0 and backward gives zeros."""
    gives_zeros(subject, case)
    outcome = subject.evaluate(case)
    loss, gradient = float(outcome.number(LOSS)), outcome.gradients["student_logits"]
    if loss != 0 or (gradient is not None and bool(gradient.any())):
        raise Disagreement("loss", "0 and a zero gradient", f"{loss:.7g}", case=case, outcome=outcome, probe="values")


def counted(subject: Subject, case: Any) -> None:
    """total and num_valid, where they are reported."""
    outcome = subject.evaluate(case, gradient=False)
    if present := [name for name in ("total", "num_valid") if name in outcome.result]:
        subject.agrees(case, present)


def teacher_of_zero(subject: Subject, case: Any) -> None:
    """One of the K teacher log-probs is -inf, beta < 1."""
    given = case.loss_input.teacher_topk_logprobs
    if given.shape[-1] > 1:
        holed = torch.cat((torch.full_like(given[..., :1], -math.inf), given[..., 1:]), dim=-1)
        limit_is_met(subject, case.with_fields(teacher_topk_logprobs=holed), case)


BROAD = NEUTRAL.but(
    teacher=KINDS,
    beta=("half", "inside", "zero", "one"),
    temperature=("one", "below"),
    labels=("full", "ragged"),
    size=SMALL,
)
REDUCED = NEUTRAL.but(teacher=("topk", "full"), size=("small", "tall", "crowd"))
DIV = f"{LOSS_FILE} 94-150"

RULES = (
    Rule(
        "MSS-POS-1",
        MUST,
        "position t counts where label t + 1 is not -100, on both sides",
        f"{TRAINER} 107-108",
        "one token late, every position is taught its neighbour (ms-swift#8436)",
        REDUCED.but(labels=("ragged", "holes", "full")),
    ),
    Rule(
        "MSS-POS-2",
        MUST,
        "the shift is a roll: an active first label makes the row's last position active",
        f"{TRAINER} 107: torch.roll",
        "two implementations that differ here count differently",
        REDUCED.but(labels="first"),
        control=whole_response,
    ),
    Rule(
        "MSS-POS-3",
        MUST,
        "active positions of student and teacher are paired in row-major order, whatever row they are in",
        f"{LOSS_FILE} 175-215",
        "with a teacher prompt of another length every pair is another",
        REDUCED.but(prompt=("longer", "rows"), labels=("ragged", "holes")),
        control=one_pair,
    ),
    Rule(
        "MSS-POS-4",
        MUST,
        "differing numbers of active labels are refused",
        f"{LOSS_FILE} 205-207: assert",
        "pairs that shift silently teach other tokens",
        NEUTRAL.but(size="small"),
        share=0.1,
        check=counts_differ,
    ),
    Rule(
        "MSS-SUP-1",
        MUST,
        "the support is the teacher's; the student is read there",
        f"{LOSS_FILE} 253-256",
        "the student's own top-k under the teacher's values pairs different tokens",
        NEUTRAL.but(teacher=("topk", "local"), support=("few", "one", "many")),
    ),
    Rule(
        "MSS-SUP-2",
        MUST,
        "gkd_logits_topk keeps that many of the raw teacher logits, where some are equal too; None keeps all",
        f"{LOSS_FILE} 62-73; {TRAINER} 109-110",
        "an option that is silently ignored is believed",
        NEUTRAL.but(teacher=("local", "local_smaller", "full"), support=("few", "one", "many")),
        check=of_that_size,
    ),
    Rule(
        "MSS-SUP-3",
        MUST,
        "both sides are renormalised over the support by log_softmax, without tail or floor",
        f"{LOSS_FILE} 78-80, 128-130",
        "a floor at 1e-8 is CLaaS's: a teacher of little mass is scaled down by it",
        NEUTRAL.but(teacher=("topk", "local"), mass=("normal", "shifted", "low")),
        control=whole,
    ),
    Rule(
        "MSS-DIV-1",
        MUST,
        "between the ends D = beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, p the teacher",
        DIV,
        "beta on the student is another objective that also falls",
        NEUTRAL.but(teacher=KINDS, beta=("half", "inside", "near_zero", "near_one")),
        VALUE,
        together=whole,
    ),
    Rule(
        "MSS-DIV-2",
        MUST,
        "beta = 0 is the forward KL, sum p (log p - log q)",
        DIV,
        "CLaaS's alpha = 0 is 0",
        NEUTRAL.but(teacher=KINDS, beta="zero"),
        VALUE,
        control=at_half,
        together=whole,
    ),
    Rule(
        "MSS-DIV-3",
        MUST,
        "beta = 1 is the reverse KL, sum q (log q - log p)",
        DIV,
        "CLaaS's alpha = 1 is a surrogate",
        NEUTRAL.but(teacher=KINDS, beta="one"),
        VALUE,
        control=at_half,
        together=whole,
    ),
    Rule(
        "MSS-DIV-4",
        MUST,
        "the gradient is the derivative: zero off the support, summing to 0 on it",
        f"{DIV}, differentiated: specs/ms_swift/oracle.py",
        "a right value with a wrong gradient is the commonest defect of a fused loss",
        NEUTRAL.but(
            teacher=KINDS, beta=("half", "inside", "zero", "one", "near_zero", "near_one"), labels=("full", "ragged")
        ),
        (GRADIENT,),
        value_first=True,
    ),
    Rule(
        "MSS-TEMP-1",
        MUST,
        "both sides are divided by the temperature before they are normalised, log-probs from a server too",
        f"{LOSS_FILE} 264-265",
        "a teacher at another temperature pulls towards another sharpness",
        NEUTRAL.but(teacher=KINDS, temperature=("below", "above"), beta=("half", "zero", "one")),
        VALUE,
        control=untempered,
    ),
    Rule(
        "MSS-TEMP-2",
        MUST,
        "the gradient by the logits given carries 1 / temperature",
        f"{LOSS_FILE} 264",
        "without it the learning rate depends on the temperature",
        NEUTRAL.but(teacher=KINDS, temperature=("below", "above")),
        (GRADIENT,),
        control=untempered,
        value_first=True,
    ),
    Rule(
        "MSS-VOC-1",
        MUST,
        "V < V_t: the student gets the teacher's extra logits, as constants",
        f"{LOSS_FILE} 156-161",
        "cut or impossible, padding tokens of the larger vocabulary decide the loss",
        NEUTRAL.but(teacher="larger", beta=("half", "zero", "one"), size=SMALL, temperature=("one", "below", "above")),
        control=equal_vocabularies,
    ),
    Rule(
        "MSS-VOC-2",
        MUST,
        "V > V_t: the teacher gets the student's extra logits",
        f"{LOSS_FILE} 162-164",
        "impossible to the teacher, the forward KL pulls their mass away",
        NEUTRAL.but(teacher="smaller", beta=("half", "zero", "one"), size=SMALL, temperature=("one", "below", "above")),
        VALUE,
        control=equal_vocabularies,
    ),
    Rule(
        "MSS-VOC-3",
        MUST,
        "and the gradient flows through the teacher there",
        f"{LOSS_FILE} 164: assigned, not detached",
        "the published code does that; a detached copy trains otherwise",
        NEUTRAL.but(teacher="smaller", beta=("half", "zero", "one"), size=SMALL, temperature=("one", "below", "above")),
        (GRADIENT,),
        control=equal_vocabularies,
        value_first=True,
    ),
    Rule(
        "MSS-COV-1",
        MUST,
        "a position whose top-k is all infinite is dropped from value and count",
        f"{LOSS_FILE} 211-215",
        "a server's failed answer would be trained on, or dilute the rest",
        NEUTRAL.but(cover="some", support=("few", "one", "many"), size=SMALL),
        control=covered,
    ),
    Rule(
        "MSS-RED-1",
        MUST,
        "one mean over the active positions of the call",
        f"{TRAINER} 111-114",
        "a mean of row means gives tokens of short responses more weight",
        REDUCED.but(labels=("ragged", "holes", "row_empty", "full")),
    ),
    Rule(
        "MSS-RED-2",
        MUST,
        "inactive positions count for nothing",
        f"{LOSS_FILE} 199-203",
        "padding that leaks is trained on",
        REDUCED.but(labels=("ragged", "holes", "row_empty")),
        check=inactive_counts_for_nothing,
    ),
    Rule(
        "MSS-RED-3",
        MUST,
        "no active label gives 0 and a zero gradient",
        f"{TRAINER} 112-113; {LOSS_FILE} 118-121",
        "a rank without tokens must still take part in backward",
        REDUCED.but(labels="none", size="small"),
        share=0.3,
        check=attached,
    ),
    cut_rule(
        "MSS-AGG-1",
        MUST,
        "where num_valid is reported, the micro-batches' losses weighted by it are the whole batch's, gradient too",
        f"{LOSS_FILE} 237-271; swift/megatron/trainers divide the sum by the global count",
        "a caller that divides by the batch's positions would train on something else",
        REDUCED.but(labels=("ragged", "holes", "full"), size=("small", "crowd")),
        "cut_by_num_valid",
    ),
    cut_rule(
        "MSS-AGG-2",
        SHOULD,
        "the step's gradient does not depend on how the batch is cut: by num_items_in_batch, where it is given",
        f"{TRAINER} 111-114: the micro-batch's own mean; num_items_in_batch is not read",
        "positions of a micro-batch with few of them weigh more, and the step changes with the batch size",
        REDUCED.but(labels=("ragged", "holes", "full"), counts="whole", size=("small", "crowd")),
        "cut_by_counts_or_rows",
    ),
    Rule(
        "MSS-MET-1",
        MUST,
        "total and num_valid, where reported, are the mean's numerator and denominator",
        f"{LOSS_FILE} 237-271",
        "callers divide by them across ranks",
        REDUCED.but(labels=("ragged", "full"), size="small"),
        share=0.3,
        check=counted,
    ),
    *autograd_rules("MSS", BROAD, f"{LOSS_FILE} gkd_loss"),
    *precision_rules("MSS", EVERYTHING),
    Rule(
        "MSS-NUM-4",
        SHOULD,
        "NaN and inf at inactive positions reach neither value nor gradient",
        f"{LOSS_FILE} 199-203",
        "padding may hold anything",
        NEUTRAL.but(labels=("ragged", "holes"), size="small"),
        share=0.2,
        check=nothing_reaches,
    ),
    Rule(
        "MSS-NUM-5",
        SHOULD,
        "one teacher log-prob of -inf among the K gives the limit 0 log 0 = 0 where beta < 1",
        f"{DIV}: upstream's value is NaN, its gradient the limit's",
        "a server's partial answer makes the loss NaN",
        NEUTRAL.but(support="few", beta=("half", "zero"), size="small"),
        share=0.2,
        check=teacher_of_zero,
    ),
)

globals().update({test.__name__: test for test in map(as_test, RULES)})  # pytest collects them by name
