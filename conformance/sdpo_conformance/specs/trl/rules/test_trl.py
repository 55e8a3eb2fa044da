"""Every rule of TRL's loss, in the order of the spec."""

from __future__ import annotations

import math
from typing import Any

import torch

from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.specs.requirement import Level
from sdpo_conformance.specs.shared.autograd_rules import autograd_rules, limit_is_met, precision_rules
from sdpo_conformance.specs.shared.garbage import filled, ignored, with_garbage
from sdpo_conformance.specs.shared.loss_rules import (
    ANY,
    SMALL,
    Views,
    at_least_one,
    divergence_rules,
    nothing_beside_the_count,
    ratio_rules,
    refuses,
    sampled_rules,
    support_rules,
    tail_rules,
    temperature_rules,
)
from sdpo_conformance.specs.shared.micro_batch_rules import cut_rule, logged_is_trained
from sdpo_conformance.specs.shared.rule import ALL, Rule, as_test
from sdpo_conformance.specs.shared.teacher_rules import teacher_rules
from sdpo_conformance.specs.trl.corners import EVERYTHING, MODES, NEUTRAL, SERVED
from sdpo_conformance.specs.trl.defects import WORDS

MUST, SHOULD = Level.MUST, Level.SHOULD
UTILS = "trl/experimental/sdpo/loss_utils.py"
TRAINER = "trl/experimental/sdpo/sdpo_trainer.py"


def with_mode(case: Any, mode: str) -> Any:
    """The divergence over a tailed or renormalised support, or over the whole vocabulary."""
    k = case.training.distillation_topk or min(4, case.vocabulary)
    return case.with_training(distillation_mode=MODES[mode], distillation_topk=k, distillation_add_tail=mode == "tail")


VIEWS = Views(
    prefix="TRL",
    words=WORDS,
    neutral=NEUTRAL,
    with_mode=with_mode,
    with_k=lambda case, k: case.with_training(distillation_topk=k),
    old="old_per_token_logps",
    ids="completion_ids",
    sources={
        "support": f"{UTILS} 68-111",
        "tail": f"{UTILS} 44-53, 90-97",
        "divergence": f"{UTILS} 23-41, differentiated: specs/trl/oracle.py",
        "sampled": f"{UTILS} 113-138",
        "temperature": f"{TRAINER} 1470-1480",
        "ratio": f"{UTILS} 56-65; {TRAINER} 1237-1248",
    },
    supports=("few", "one", "many", "whole"),
)
on_policy = VIEWS.on_policy


def full_mask(case: Any) -> Any:
    """Every token counts once."""
    return case.with_fields(completion_mask=torch.ones_like(case.loss_input.completion_mask))


def every_row(case: Any) -> Any:
    """Every row has a teacher."""
    return case.with_fields(self_distillation_mask=None)


def bad_support(subject: Subject, case: Any) -> None:
    """No k, and one beyond the vocabulary."""
    for k in (None, case.vocabulary + 1):
        refuses(subject, case.with_training(distillation_topk=k), f"distillation_topk is {k}, V {case.vocabulary}")


def garbage_counts_for_nothing(subject: Subject, case: Any) -> None:
    """Wild values where nothing counts change nothing."""
    subject.agrees(with_garbage(case), ALL, control=[full_mask(case)])


def nothing_reaches(subject: Subject, case: Any) -> None:
    """NaN and both infinities where nothing counts."""
    for value in (math.nan, math.inf, -math.inf):
        limit_is_met(subject, filled(case, value), case)


def padding_of_server(subject: Subject, case: Any) -> None:
    """-inf from the server where nothing counts."""
    where = ignored(case)
    fields = case.loss_input
    empty = torch.full_like(fields.teacher_topk_logprobs, -math.inf)
    padded = case.with_fields(
        teacher_topk_logprobs=torch.where(where.unsqueeze(-1), empty, fields.teacher_topk_logprobs),
        teacher_actual_logprobs=torch.where(where, empty[..., 0], fields.teacher_actual_logprobs),
    )
    subject.agrees(padded, ALL, control=[case])


def unanswered(subject: Subject, case: Any) -> None:
    """No log-prob for a token that counts."""
    actual = case.loss_input.teacher_actual_logprobs
    counted = ~ignored(case)
    if bool(counted.any()):
        missing = torch.where(counted, torch.full_like(actual, -math.inf), actual)
        refuses(subject, case.with_fields(teacher_actual_logprobs=missing), "a token that counts has no log-prob")


def local_teacher(case: Any) -> Any:
    """The same student and options with a local teacher over the student's own top-k."""
    fields = case.loss_input
    k = fields.teacher_topk_ids.shape[-1]
    local = case.with_training(use_teacher_server=False, distillation_topk=k)
    return local.with_fields(teacher_logits=0.5 * fields.student_logits.flip(-1))


def teacher_of_zero(subject: Subject, case: Any) -> None:
    """A teacher probability of exactly 0 on the support, alpha < 1."""
    logits = case.loss_input.teacher_logits.clone()
    first = case.truth.aside["support"][..., :1]
    limit_is_met(subject, case.with_fields(teacher_logits=logits.scatter(-1, first, -math.inf)), case)


BROAD = NEUTRAL.but(
    teacher=("local", "served"),
    mode=ANY,
    alpha=("half", "inside", "zero", "one"),
    ratio=("mild", "below", "absent"),
    temperature=("one", "below"),
    mask=("full", "ragged"),
    rows=("absent", "some"),
    size=SMALL,
)
REDUCED = NEUTRAL.but(
    mode=("renormalised", "sampled", "tail"), ratio=("mild", "no_old"), size=("small", "tall", "crowd")
)

RULES = (
    *support_rules(VIEWS),
    Rule(
        "TRL-SUP-4",
        MUST,
        "topk_logits refuses a missing distillation_topk, and one beyond the vocabulary",
        f"{TRAINER} 1207-1208; {UTILS} 82: torch.topk",
        "a silent min(k, V) hides a wrong config",
        NEUTRAL.but(size="small", support="few"),
        share=0.1,
        check=bad_support,
    ),
    *tail_rules(VIEWS),
    *divergence_rules(VIEWS),
    *sampled_rules(VIEWS),
    *temperature_rules(VIEWS),
    *ratio_rules(VIEWS),
    Rule(
        "TRL-IS-8",
        MUST,
        "old_per_token_logps missing: there is no ratio, and no error",
        f"{TRAINER} 1237-1238",
        "by default it is missing: no optimizer step lies between generation and use",
        NEUTRAL.but(mode=ANY, ratio="no_old", is_clip=("default", "low")),
        control=lambda case: VIEWS.without_ratio(case),
    ),
    Rule(
        "TRL-SRV-1",
        MUST,
        "a served teacher's own top-k is the support; its log-probs are taken as they are, whatever the temperature",
        f"{TRAINER} 1318-1333",
        "the server has applied the temperature already",
        SERVED.but(
            temperature=("below", "above", "one"),
            alpha=("half", "inside", "zero", "one"),
            ratio="no_old",
            support=("few", "few", "many", "whole"),  # one token, renormalised, is 0: a control that clears nothing
        ),
        control=local_teacher,
    ),
    Rule(
        "TRL-SRV-2",
        MUST,
        "a served teacher's -inf where nothing counts does no harm",
        f"{TRAINER} 1293-1303, 1326-1327",
        "padding comes back as -inf",
        SERVED.but(mask=("ragged", "random", "row_empty")),
        check=padding_of_server,
    ),
    Rule(
        "TRL-SRV-3",
        MUST,
        "a token that counts and has no served log-prob is refused",
        f"{TRAINER} 1298-1299",
        "a request that failed would be trained on",
        SERVED.but(size="small", mode=("renormalised", "sampled")),
        share=0.1,
        check=unanswered,
    ),
    Rule(
        "TRL-SRV-4",
        MUST,
        "sampled_token with a served teacher: sg(l[y] - lt[y]) l[y], whatever alpha is",
        f"{TRAINER} 1313-1315",
        "the option is the other modes'",
        SERVED.but(mode="sampled", alpha=("half", "one", "inside"), ratio=("no_old", "mild")),
    ),
    Rule(
        "TRL-RED-1",
        MUST,
        "each row is averaged over its own tokens, then the rows over B",
        f"{TRAINER} 1252-1255",
        "one token mean gives long completions more weight",
        REDUCED.but(mask=("ragged", "random")),
        control=full_mask,
    ),
    Rule(
        "TRL-RED-2",
        MUST,
        "positions whose mask is 0 count for nothing, in value and gradient",
        f"{TRAINER} 1427-1431",
        "padding that leaks trains on garbage",
        REDUCED.but(mask=("random", "ragged", "row_empty")),
        check=garbage_counts_for_nothing,
    ),
    Rule(
        "TRL-RED-3",
        MUST,
        "rows without a re-prompt (self_distillation_mask 0) add 0 and count in B",
        f"{TRAINER} 1427-1431, 1252-1255",
        "left out of B, the step's size depends on how many rows have a teacher",
        REDUCED.but(rows=("some", "none", "all"), mask=("full", "ragged")),
        control=every_row,
    ),
    Rule(
        "TRL-RED-4",
        MUST,
        "a fractional mask weighs its tokens, in numerator and denominator",
        f"{TRAINER} 1252",
        "a mask read as a boolean changes every weight",
        REDUCED.but(mask="weighted"),
        control=full_mask,
    ),
    Rule(
        "TRL-RED-5",
        MUST,
        "each row's denominator is at least 1; no token at all gives 0 and a zero gradient",
        f"{TRAINER} 1204-1208, 1252-1254",
        "a floor for the batch is none for a row",
        REDUCED.but(mask=("tiny", "empty")),
        check=lambda subject, case: at_least_one(subject, case, full_mask(case)),
    ),
    Rule(
        "TRL-RED-6",
        MUST,
        "rows without a token add 0 and count in B",
        f"{TRAINER} 1252-1255: mean over all rows",
        "left out of B, the step's size depends on them",
        REDUCED.but(mask="row_empty"),
        control=full_mask,
    ),
    Rule(
        "TRL-RED-7",
        MUST,
        "the rows' means are averaged, not summed",
        f"{TRAINER} 1255: mean()",
        "summed, the step grows with the batch",
        REDUCED.but(mask="full", size=("small", "crowd")),
        of_several=True,
    ),
    Rule(
        "TRL-RED-8",
        MUST,
        "nothing is added to a row's number of tokens",
        f"{TRAINER} 1252-1254: clamp(min=1.0), no epsilon",
        "a constant beside it weighs most where a completion is short",
        NEUTRAL.but(mode=ANY, size="small"),
        share=0.5,
        dtypes=("float64",),
        check=nothing_beside_the_count,
    ),
    cut_rule(
        "TRL-AGG-1",
        MUST,
        "micro-batches of one size, each divided by their number, add up to the whole batch's step",
        f"{TRAINER} 1142-1143, 1252-1255: means over rows, divided by current_gradient_accumulation_steps",
        "a normaliser that rows of another micro-batch decide makes the step depend on the cut",
        REDUCED.but(mask=("ragged", "random", "row_empty"), rows=("some", "absent"), size=("small", "crowd")),
        "cut_by_rows",
    ),
    Rule(
        "TRL-MET-1",
        SHOULD,
        "the logged loss is the one that is trained",
        f"{TRAINER} 1257-1264: a token mean is logged, row means are trained",
        "two runs with equal logs can have different gradients",
        REDUCED.but(mask=("ragged", "random", "row_empty"), size=("small", "crowd")),
        share=0.5,
        check=logged_is_trained("logged_distillation_loss"),
    ),
    *teacher_rules(
        "TRL",
        "trl/trainer/callbacks.py 130-132; trl/experimental/sdpo/teacher_sync.py 54-65: every teacher_sync_steps steps",
        "trl/experimental/sdpo/teacher_sync.py 114-179",
    ),
    *autograd_rules("TRL", BROAD, f"{TRAINER} _compute_self_distillation_loss"),
    *precision_rules("TRL", EVERYTHING),
    Rule(
        "TRL-NUM-3",
        MUST,
        "an offset common to a token's logits (1e4) neither overflows nor loses the result",
        f"{UTILS} 80: logsumexp",
        "a log-sum-exp without its maximum overflows from logits of 89 on",
        NEUTRAL.but(mode=ANY, logits="large", ratio="no_old"),
        share=0.5,
        control=lambda case: case.with_fields(
            student_logits=(case.loss_input.student_logits.double() / 2**13).to(case.loss_input.student_logits.dtype)
        ),
    ),
    Rule(
        "TRL-NUM-4",
        SHOULD,
        "NaN and inf at masked positions reach neither value nor gradient",
        f"{TRAINER} 1252: the mask multiplies; upstream's loss is NaN there",
        "padding may hold anything",
        NEUTRAL.but(mode=ANY, mask=("random", "ragged"), size="small"),
        share=0.2,
        check=nothing_reaches,
    ),
    Rule(
        "TRL-NUM-5",
        SHOULD,
        "a teacher probability of 0 on the support gives the limit 0 log 0 = 0 where alpha < 1",
        f"{UTILS} 23-41: upstream's value is NaN, its gradient the limit's",
        "a step is taken under a logged NaN",
        NEUTRAL.but(mode=("tail", "renormalised"), alpha=("half", "zero"), support=("few",), size="small"),
        share=0.2,
        check=teacher_of_zero,
    ),
)

globals().update({test.__name__: test for test in map(as_test, RULES)})  # pytest collects them by name
