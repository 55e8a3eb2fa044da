"""Every rule of the loss, in the order of the spec."""

from __future__ import annotations

import math
from typing import Any

import torch

from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.specs.lasgroup.corners import EVERYTHING, NEUTRAL, OFF_POLICY
from sdpo_conformance.specs.lasgroup.defects import WORDS
from sdpo_conformance.specs.lasgroup.loss_input import AGGREGATIONS
from sdpo_conformance.specs.requirement import Level
from sdpo_conformance.specs.shared.autograd_rules import autograd_rules, limit_is_met, precision_rules
from sdpo_conformance.specs.shared.garbage import filled, with_garbage
from sdpo_conformance.specs.shared.loss_rules import (
    ANY,
    SMALL,
    Views,
    at_least_one,
    divergence_rules,
    nothing_beside_the_count,
    over_all_positions,
    ratio_rules,
    refuses,
    sampled_rules,
    support_rules,
    tail_rules,
    temperature_rules,
)
from sdpo_conformance.specs.shared.micro_batch_rules import calls_stand_alone, cut_rule, logged_is_trained
from sdpo_conformance.specs.shared.rule import ALL, Rule, as_test
from sdpo_conformance.specs.shared.teacher_rules import teacher_rules

MUST, SHOULD = Level.MUST, Level.SHOULD
CORE = "verl/trainer/ppo/core_algos.py"
ACTOR = "verl/workers/actor/dp_actor.py"
ROLLOUT = "verl/trainer/ppo/rollout_corr_helper.py"


def with_mode(case: Any, mode: str) -> Any:
    """The divergence over a tailed or renormalised support, or over the whole vocabulary."""
    k = case.training.distillation_topk or min(4, case.vocabulary)
    return case.with_training(
        distillation_topk=None if mode == "whole" else k, distillation_add_tail=mode != "renormalised"
    )


VIEWS = Views(
    prefix="LAS",
    words=WORDS,
    neutral=NEUTRAL,
    with_mode=with_mode,
    with_k=lambda case, k: case.with_training(distillation_topk=k),
    old="old_log_probs",
    ids="response_ids",
    sources={
        "support": f"{ACTOR} 363-386, 529-535; {CORE} 1132-1136",
        "tail": f"{CORE} 1112-1131",
        "divergence": f"{CORE} 1138-1162, differentiated: specs/lasgroup/oracle.py",
        "sampled": f"{CORE} 1163-1166",
        "temperature": f"{ACTOR} 341, 523, 821-829",
        "ratio": f"{CORE} 1168-1176",
    },
)
on_policy = VIEWS.on_policy


def without_weights(case: Any) -> Any:
    return case.with_fields(rollout_is_weights=None, rollout_log_probs=None)


def rollout_is_old(case: Any) -> Any:
    """The sampler is the behaviour policy: every computed weight is 1 under a mask of 0 and 1."""
    if case.loss_input.rollout_log_probs is None:
        return case
    return case.with_fields(rollout_log_probs=case.loss_input.old_log_probs)


def not_normalised(case: Any) -> Any:
    return case.with_training(rollout_is_batch_normalize=False)


def full_mask(case: Any) -> Any:
    """Every token counts once."""
    return case.with_fields(response_mask=torch.ones_like(case.loss_input.response_mask))


def every_row(case: Any) -> Any:
    """Every row has a teacher."""
    return case.with_fields(self_distillation_mask=None)


def token_mean(case: Any) -> Any:
    return case.with_training(loss_agg_mode="token-mean")


def garbage_counts_for_nothing(subject: Subject, case: Any) -> None:
    """Wild values where nothing counts change nothing."""
    subject.agrees(with_garbage(case), ALL, control=[full_mask(case)])


def nothing_reaches(subject: Subject, case: Any) -> None:
    """NaN and both infinities where nothing counts."""
    for value in (math.nan, math.inf, -math.inf):
        limit_is_met(subject, filled(case, value), case)


def teacher_of_zero(subject: Subject, case: Any) -> None:
    """A teacher probability of exactly 0 on the support, alpha < 1."""
    logits = case.loss_input.teacher_logits.clone()
    first = case.truth.aside["support"][..., :1]
    limit_is_met(subject, case.with_fields(teacher_logits=logits.scatter(-1, first, -math.inf)), case)


BROAD = NEUTRAL.but(
    mode=ANY,
    alpha=("half", "inside", "zero", "one"),
    ratio=("mild", "below", "absent"),
    weights=("absent", "given", "token"),
    temperature=("one", "below"),
    mask=("full", "ragged"),
    rows=("absent", "some"),
    size=SMALL,
)

ANY_MODE = NEUTRAL.but(mode=ANY, alpha=("half", "inside", "zero", "one"))
OLD_REQUIRED = Rule(
    "LAS-IS-8",
    MUST,
    "is_clip set and old_log_probs missing is refused",
    f"{CORE} 1169-1170",
    "a ratio of 1 by default hides that the behaviour policy is unknown",
    NEUTRAL.but(size="small"),
    share=0.1,
    check=lambda subject, case: refuses(subject, case.with_fields(old_log_probs=None), "old_log_probs is missing"),
)
COMPUTED = ("token", "sequence")
NORMALISED = ("token_normalised", "sequence_normalised")
ROLLOUT_RULES = (
    Rule(
        "LAS-W-1",
        MUST,
        "rollout weights that are given multiply D, beside the ratio and as they are",
        f"{CORE} 1179-1180",
        "the correction for the sampler's other numerics is lost",
        ANY_MODE.but(weights="given", ratio=("on_policy", "mild", "below", "absent")),
        control=without_weights,
    ),
    Rule(
        "LAS-W-2",
        MUST,
        "computed, a token's weight is exp(old - rollout), of the batch's old policy",
        f"{ROLLOUT} 525-529",
        "of the current policy it would count the update twice",
        NEUTRAL.but(weights="token", rollout=("below", "mild"), threshold="high", ratio=("mild", "below")),
        control=lambda case: (without_weights(case), rollout_is_old(on_policy(case))),
    ),
    Rule(
        "LAS-W-3",
        MUST,
        "the weight is capped at rollout_is_threshold",
        f"{ROLLOUT} 564-565",
        "one token that the sampler found unlikely rules the batch",
        NEUTRAL.but(weights=COMPUTED, rollout=("above_cap", "mild"), threshold=("default", "low", "high")),
        control=(lambda case: without_weights(case)),
    ),
    Rule(
        "LAS-W-4",
        MUST,
        "its log-ratio is clamped to [-20, 20] before exp",
        f"{ROLLOUT} 527, 539",
        "exp overflows",
        NEUTRAL.but(weights="token", rollout=("clamp_high", "clamp_low"), threshold="high"),
        control=rollout_is_old,
    ),
    Rule(
        "LAS-W-5",
        MUST,
        "the weight is multiplied by the response mask before the cap",
        f"{ROLLOUT} 549",
        "under a fractional mask the weight would count it once less",
        NEUTRAL.but(weights=COMPUTED, mask="fractional", size=SMALL),
        control=full_mask,
    ),
    Rule(
        "LAS-W-6",
        MUST,
        "rollout_is = sequence: one weight a row, exp of the sum of its log-ratios over the response mask",
        f"{ROLLOUT} 531-541",
        "a product over tokens is not their mean, nor each token's own",
        NEUTRAL.but(weights="sequence", rollout=("mild", "below"), mask=("full", "ragged"), size=SMALL),
        control=lambda case: (without_weights(case), case.with_training(rollout_is="token")),
    ),
    Rule(
        "LAS-W-7",
        MUST,
        "rollout_is_batch_normalize divides by the capped weights' mean over the response mask, "
        "and only where it is on",
        f"{ROLLOUT} 571-596",
        "a mean over other rows than the batch's makes weights depend on who has a teacher",
        NEUTRAL.but(
            weights=(*NORMALISED, *NORMALISED, *COMPUTED),
            rows=("some", "some", "absent"),
            mask=("full", "ragged"),
            size=SMALL,
            threshold=("default", "low"),
        ),
        control=lambda case: (rollout_is_old(every_row(case)),),
    ),
)

REDUCED = NEUTRAL.but(
    mode=("tail", "sampled", "renormalised"), ratio=("mild", "absent"), size=("small", "tall", "crowd")
)
REDUCTION = (
    Rule(
        "LAS-RED-1",
        MUST,
        "token-mean: one mean over the tokens that count, not a mean of row means",
        f"{CORE} 1057-1060, 1182-1187",
        "a mean of row means gives tokens of short responses more weight",
        REDUCED.but(mask=("ragged", "random")),
        control=full_mask,
    ),
    Rule(
        "LAS-RED-2",
        MUST,
        "positions whose mask is 0 count for nothing, in value and gradient",
        f"{CORE} 1102-1104; verl/utils/torch_functional.py 266-284",
        "padding that leaks trains on garbage",
        REDUCED.but(mask=("random", "ragged", "row_empty")),
        check=garbage_counts_for_nothing,
    ),
    Rule(
        "LAS-RED-3",
        MUST,
        "rows without a re-prompt (self_distillation_mask 0) are dropped from value and denominator",
        f"{CORE} 1102-1104",
        "a row without a teacher is distilled towards itself, and dilutes the others",
        REDUCED.but(rows=("some", "none", "all"), mask=("full", "ragged")),
        control=every_row,
    ),
    Rule(
        "LAS-RED-4",
        MUST,
        "a fractional mask weighs its tokens, in numerator and denominator",
        f"{CORE} 1187",
        "a mask read as a boolean changes every weight",
        REDUCED.but(mask="fractional"),
        control=full_mask,
    ),
    Rule(
        "LAS-RED-5",
        MUST,
        "the denominator is at least 1: no token at all gives 0 and a zero gradient",
        f"{CORE} 1187: clamp(min=1.0)",
        "an empty micro-batch must not turn the adapter into NaN",
        REDUCED.but(mask=("empty", "tiny")),
        check=lambda subject, case: at_least_one(subject, case, full_mask(case)),
    ),
    Rule(
        "LAS-RED-6",
        MUST,
        "loss_agg_mode: row sums, row means (sum + 1e-8) or sums over T, padding included, as named",
        f"{CORE} 1061-1078",
        "an option that is silently ignored is believed",
        REDUCED.but(aggregation=AGGREGATIONS[1:], mask=("full", "ragged", "tiny")),
        check=lambda subject, case: over_all_positions(subject, case, token_mean(case)),
    ),
    Rule(
        "LAS-RED-7",
        MUST,
        "the row modes average over rows that have a token",
        f"{CORE} 1063-1072",
        "rows without a token would dilute the others",
        REDUCED.but(aggregation=AGGREGATIONS[1:3], mask="row_empty"),
        control=full_mask,
    ),
    Rule(
        "LAS-RED-8",
        MUST,
        "token-mean: nothing is added to the number of tokens",
        f"{CORE} 1187: clamp(min=1.0), no epsilon",
        "a constant beside it weighs most where a micro-batch has few tokens",
        NEUTRAL.but(mode=ANY, size="small"),
        share=0.5,
        dtypes=("float64",),
        check=nothing_beside_the_count,
    ),
)

STEP = (
    cut_rule(
        "LAS-AGG-1",
        SHOULD,
        "the step's gradient does not depend on how the batch is cut into micro-batches: by the batch's counts, where "
        "batch_num_tokens and global_batch_size are given, or weighted by rows as the actor does",
        f"{CORE} 1182-1187 divides by the micro-batch's own tokens; {ACTOR} 769-772, 902 weighs by rows. verl#7200",
        "a micro-batch without any re-prompted row adds 0 with full weight, and tokens of short ones count more",
        REDUCED.but(
            mask=("ragged", "full", "random"),
            rows=("some", "absent"),
            weights=("absent", "given"),
            aggregation=AGGREGATIONS,
            counts="whole",
            size=("small", "crowd"),
        ),
        "cut_by_counts_or_rows",
    ),
    Rule(
        "LAS-AGG-2",
        MUST,
        "each micro-batch's loss is its own, whatever was called before it with the same options",
        f"{CORE} compute_self_distillation_loss: nothing is kept between calls",
        "one step makes many calls with one config: what the first leaves behind decides the rest",
        REDUCED.but(mask=("ragged", "random"), aggregation=AGGREGATIONS, size=("small", "crowd")),
        dtypes=("float32", "float64"),
        share=0.5,
        check=calls_stand_alone,
    ),
    Rule(
        "LAS-MET-1",
        MUST,
        "pg_loss, where it is returned, is the loss that is trained",
        f"{ACTOR} 910: pg_loss.detach(), scaled as the loss is",
        "two runs with equal logs can have different gradients",
        REDUCED.but(mask=("ragged", "random", "full"), weights=("absent", "given"), rows=("absent", "some")),
        share=0.5,
        check=logged_is_trained("pg_loss"),
    ),
)

NUMERICS = (
    *precision_rules("LAS", EVERYTHING),
    Rule(
        "LAS-NUM-3",
        MUST,
        "an offset common to a token's logits (1e4) neither overflows nor loses the result",
        f"{ACTOR} 385, 534: logsumexp",
        "a log-sum-exp without its maximum overflows from logits of 89 on",
        NEUTRAL.but(mode=ANY, logits="large"),
        share=0.5,
        control=lambda case: case.with_fields(
            student_logits=(case.loss_input.student_logits.double() / 2**13).to(case.loss_input.student_logits.dtype),
            old_log_probs=None,
        ).with_training(is_clip=None, distillation_topk=None),
    ),
    Rule(
        "LAS-NUM-4",
        SHOULD,
        "NaN and inf at masked positions reach neither value nor gradient",
        "verl/utils/torch_functional.py 281: a select keeps the value; upstream's gradient is NaN there",
        "padding may hold anything",
        NEUTRAL.but(mode=ANY, mask=("random", "ragged"), size="small"),
        share=0.2,
        check=nothing_reaches,
    ),
    Rule(
        "LAS-NUM-5",
        SHOULD,
        "a teacher probability of 0 on the support gives the limit 0 log 0 = 0 where alpha < 1",
        f"{CORE} 1138-1162: upstream's value is NaN, its gradient the limit's",
        "a step is taken under a logged NaN",
        NEUTRAL.but(mode=("tail", "renormalised"), alpha=("half", "zero"), support=("few",), size="small"),
        share=0.2,
        check=teacher_of_zero,
    ),
)

RULES = (
    *support_rules(VIEWS),
    *tail_rules(VIEWS),
    *divergence_rules(VIEWS),
    *sampled_rules(VIEWS),
    *temperature_rules(VIEWS),
    *ratio_rules(VIEWS),
    OLD_REQUIRED,
    *ROLLOUT_RULES,
    *REDUCTION,
    *STEP,
    *teacher_rules("LAS", f"{ACTOR} 132-151, 919-920: once after all mini-batches of a batch"),
    *autograd_rules("LAS", BROAD, f"{CORE} compute_self_distillation_loss"),
    *NUMERICS,
)

globals().update({test.__name__: test for test in map(as_test, RULES)})

__all__ = ["OFF_POLICY", "RULES"]
