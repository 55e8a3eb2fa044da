"""Every rule of ``forward_kl_topk``, in the order of the spec."""

from __future__ import annotations

import math
from typing import Any

import torch

from sdpo_conformance.judging.compare import GRADIENT
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.specs.requirement import Level
from sdpo_conformance.specs.shared.autograd_rules import autograd_rules, limit_is_met, precision_rules
from sdpo_conformance.specs.shared.garbage import filled, with_garbage
from sdpo_conformance.specs.shared.loss_rules import over_all_positions
from sdpo_conformance.specs.shared.micro_batch_rules import cut_rule, logged_is_trained
from sdpo_conformance.specs.shared.rule import ALL, VALUE, Rule, as_test
from sdpo_conformance.specs.verl_topk.corners import CHUNKS, EVERYTHING, NEUTRAL
from sdpo_conformance.specs.verl_topk.loss_input import AGGREGATIONS

MUST, SHOULD = Level.MUST, Level.SHOULD
TOPK = "verl/trainer/distillation/fsdp/losses.py"
LOSSES = "verl/trainer/distillation/losses.py"
AGG = "verl/trainer/ppo/core_algos.py agg_loss"
SMALL = ("small", "small", "tall")


def whole(case: Any) -> Any:
    """The whole vocabulary as support, teacher renormalised: no mass is left out on either side."""
    fields = case.loss_input
    ids = torch.arange(case.vocabulary).expand(fields.student_logits.shape).contiguous()
    floor = torch.full(fields.student_logits.shape, -6.0, dtype=torch.float64)
    logprobs = floor.scatter(-1, fields.teacher_ids.long(), fields.teacher_logprobs.double().clamp(min=-9.0))
    return case.with_fields(
        teacher_ids=ids, teacher_logprobs=logprobs.log_softmax(-1).to(fields.teacher_logprobs.dtype)
    )


def without_clamp(case: Any) -> Any:
    return case.with_training(log_prob_min_clamp=None)


def at_ten(case: Any) -> Any:
    """The clamp where it is by default."""
    return case.with_training(log_prob_min_clamp=-10.0)


def without_cap(case: Any) -> Any:
    return case.with_training(loss_max_clamp=None)


def positive(case: Any) -> Any:
    """A teacher of one token that it is sure of: no sum is negative."""
    fields = case.loss_input
    logprobs = torch.full_like(fields.teacher_logprobs, -9.0)
    logprobs[..., 0] = -0.01
    return case.with_fields(teacher_logprobs=logprobs)


def below_the_cap(case: Any) -> Any:
    """Sums that the default clamp keeps below the default cap."""
    return positive(case).with_training(log_prob_min_clamp=-10.0, loss_max_clamp=10.0)


def untempered(case: Any) -> Any:
    return case.with_training(temperature=1.0)


def full_mask(case: Any) -> Any:
    """Every token counts once."""
    return case.with_fields(response_mask=torch.ones_like(case.loss_input.response_mask))


def local(case: Any) -> Any:
    """This call is the whole batch."""
    mask = case.loss_input.response_mask.double()
    tokens, rows = float(mask.sum()), int((mask.sum(-1) > 0).sum())
    return case.with_training(dp_size=1, batch_num_tokens=max(tokens, 1.0), global_batch_size=max(rows, 1))


def token_mean(case: Any) -> Any:
    return case.with_training(loss_agg_mode="token-mean")


def garbage_counts_for_nothing(subject: Subject, case: Any) -> None:
    """Wild values where nothing counts change nothing, inside the lengths too where these are given."""
    subject.agrees(with_garbage(case), ALL, control=[full_mask(case)])
    rows, positions = case.loss_input.response_mask.shape
    whole = case.with_fields(response_lengths=torch.full((rows,), positions))
    subject.agrees(whole, ALL, control=[full_mask(whole)])


def nothing_reaches(subject: Subject, case: Any) -> None:
    """NaN and both infinities where nothing counts."""
    for value in (math.nan, math.inf, -math.inf):
        limit_is_met(subject, filled(case, value), case)


def nothing_at_all(subject: Subject, case: Any) -> None:
    """No position counts."""
    empty = case.with_fields(response_mask=torch.zeros_like(case.loss_input.response_mask))
    limit_is_met(subject, empty, case)


def reported(*names: str) -> Any:
    """Judge metrics, where they are reported."""

    def check(subject: Subject, case: Any) -> None:
        outcome = subject.evaluate(case, gradient=False)
        present = [name for name in names if name in outcome.result]
        if present:
            subject.agrees(case, present)

    return check


BROAD = NEUTRAL.but(
    tokens=("plain", "student_low", "negative"),
    temperature=("one", "below"),
    mask=("full", "ragged"),
    counts=("local", "global"),
    size=SMALL,
)
REDUCED = NEUTRAL.but(tokens=("plain", "negative"), size=("small", "tall", "crowd"))

RULES = (
    Rule(
        "VTK-SUP-1",
        MUST,
        "the support is the teacher's, teacher_ids; the student is read there",
        f"{TOPK} 104-112",
        "the student's own top-k under the teacher's log-probs pairs different tokens",
        NEUTRAL,
    ),
    Rule(
        "VTK-SUP-2",
        MUST,
        "the masses of the support are neither divided out nor completed by a tail: one token alone is not 0",
        f"{TOPK} 64-72",
        "renormalised, the loss is blind to how much mass the student has on the support",
        NEUTRAL.but(support=("few", "one", "many")),
        control=whole,
    ),
    Rule(
        "VTK-DIV-1",
        MUST,
        "D = sum over the support of p (log p - log q), p the teacher",
        f"{TOPK} 64-72",
        "reverse or symmetric, another distribution is fitted",
        NEUTRAL,
        VALUE,
        together=whole,
    ),
    Rule(
        "VTK-DIV-2",
        MUST,
        "the gradient is the derivative: pi_v sum p off the support, that less p_v on it",
        f"{TOPK} 104-118, differentiated: specs/verl_topk/oracle.py",
        "a sparse gradient raises the support without lowering the rest",
        NEUTRAL.but(mask=("full", "ragged")),
        (GRADIENT,),
        value_first=True,
    ),
    Rule(
        "VTK-DIV-3",
        MUST,
        "use_chunked_topk changes how the normaliser is computed, not what it is, whatever the chunk size",
        "verl/workers/config/distillation.py: use_chunked_topk, chunked_topk_chunk_size",
        "a last chunk that is left out, or of one column, moves every log-prob",
        NEUTRAL.but(chunks=CHUNKS, size=("small", "small", "wide")),
        control=lambda case: case.with_training(use_chunked_topk=False),
    ),
    Rule(
        "VTK-CLAMP-1",
        MUST,
        "both log-probs are clamped from below at log_prob_min_clamp before exp",
        f"{TOPK} 115-117",
        "one token that the student finds impossible rules the batch",
        NEUTRAL.but(tokens=("student_low", "teacher_low", "both_low", "teacher_inf", "plain")),
        VALUE,
        control=lambda case: without_clamp(positive(case)),
    ),
    Rule(
        "VTK-CLAMP-2",
        MUST,
        "a clamped student token loses its own gradient, and no other token's",
        f"{TOPK} 116: clamp_min",
        "passed through, the gradient pushes a token that the value no longer sees",
        NEUTRAL.but(tokens=("student_low", "both_low", "plain"), clamp=("default", "other")),
        (GRADIENT,),
        value_first=True,
        control=lambda case: without_clamp(positive(case)),
    ),
    Rule(
        "VTK-CLAMP-3",
        MUST,
        "the clamp is the config's; None: no clamp",
        f"{TOPK} 115",
        "an option that is silently ignored is believed",
        NEUTRAL.but(tokens=("student_low", "plain", "both_low"), clamp=("other", "off", "default")),
        control=lambda case: at_ten(positive(case)),
    ),
    Rule(
        "VTK-FLOOR-1",
        MUST,
        "a position whose sum is negative counts 0",
        f"{LOSSES} 365: clamp_min(0.0)",
        "masses that do not sum to 1 make a negative divergence, which is then sought",
        NEUTRAL.but(tokens=("negative", "plain")),
        VALUE,
        control=positive,
    ),
    Rule(
        "VTK-FLOOR-2",
        MUST,
        "and has no gradient",
        f"{LOSSES} 365: clamp_min(0.0)",
        "the student would be pushed below the teacher",
        NEUTRAL.but(tokens=("negative", "plain")),
        (GRADIENT,),
        control=positive,
        value_first=True,
    ),
    Rule(
        "VTK-CAP-1",
        MUST,
        "D is at most loss_max_clamp; None: no cap",
        f"{LOSSES} 256-260",
        "one position rules the batch",
        NEUTRAL.but(
            tokens=("far", "plain"), clamp="off", cap=("default", "other", "off"), support=("few", "one", "many")
        ),
        VALUE,
        control=below_the_cap,
    ),
    Rule(
        "VTK-CAP-2",
        MUST,
        "beyond the cap a position has no gradient",
        f"{LOSSES} 260: clamp",
        "the value says that nothing is to be gained there",
        NEUTRAL.but(tokens=("far", "plain"), clamp="off", cap=("default", "other"), support=("few", "one", "many")),
        (GRADIENT,),
        control=lambda case: without_cap(positive(case)),
        value_first=True,
    ),
    Rule(
        "VTK-TEMP-1",
        MUST,
        "the student's logits are divided by the temperature; the teacher is scored at 1",
        "verl/workers/engine/fsdp/transformer_impl.py 98-103; experimental/teacher_loop/teacher_manager.py 41-54",
        "tempered twice, or not at all, another sharpness is fitted",
        NEUTRAL.but(temperature=("below", "above")),
        VALUE,
        control=untempered,
    ),
    Rule(
        "VTK-TEMP-2",
        MUST,
        "the gradient by the logits given carries 1 / temperature",
        "verl/workers/engine/fsdp/transformer_impl.py 98-103",
        "without it the learning rate depends on the temperature",
        NEUTRAL.but(temperature=("below", "above")),
        (GRADIENT,),
        control=untempered,
        value_first=True,
    ),
    Rule(
        "VTK-RED-1",
        MUST,
        "token-mean: the sum over this call's tokens / batch_num_tokens * dp_size, counts of the whole batch",
        f"{AGG}; verl#7225",
        "a local mean makes the gradient depend on how the batch is cut (verl#7200)",
        REDUCED.but(counts=("global", "local"), mask=("ragged", "random", "full")),
        control=lambda case: local(full_mask(case)),
    ),
    Rule(
        "VTK-RED-2",
        MUST,
        "positions whose mask is 0 count for nothing, in value and gradient",
        "verl/utils/torch_functional.py masked_sum",
        "padding that leaks trains on garbage",
        REDUCED.but(mask=("random", "ragged", "row_empty")),
        check=garbage_counts_for_nothing,
    ),
    Rule(
        "VTK-RED-3",
        MUST,
        "a fractional mask weighs its tokens, and a row of fractions is divided by their sum + 1e-8",
        AGG,
        "a mask read as a boolean changes every weight",
        REDUCED.but(mask=("fractional", "tiny"), aggregation=("token-mean", "seq-mean-token-mean")),
        control=full_mask,
    ),
    Rule(
        "VTK-RED-4",
        MUST,
        "loss_agg_mode: token sums, row sums, row means (sum + 1e-8) or sums over T, as named",
        AGG,
        "an option that is silently ignored is believed",
        REDUCED.but(aggregation=AGGREGATIONS[1:], mask=("full", "ragged")),
        control=token_mean,
    ),
    Rule(
        "VTK-RED-5",
        MUST,
        "the row modes divide by global_batch_size, empty rows included in it",
        AGG,
        "by the rows at hand, the gradient depends on how the batch is cut",
        REDUCED.but(aggregation=AGGREGATIONS[2:], mask=("row_empty", "ragged"), counts=("global", "local")),
        control=lambda case: local(full_mask(case)),
    ),
    Rule(
        "VTK-RED-6",
        MUST,
        "seq-mean-token-sum-norm divides by loss_scale_factor where it is given, else by T, padding included",
        AGG,
        "a constant normaliser that is ignored",
        REDUCED.but(
            aggregation="seq-mean-token-sum-norm",
            scale=("given", "none"),
            mask=("full", "ragged"),
            lengths=("absent", "given"),
        ),
        check=lambda subject, case: over_all_positions(subject, case, case.with_training(loss_scale_factor=None)),
    ),
    cut_rule(
        "VTK-AGG-1",
        MUST,
        "the losses of a batch's micro-batches, each called with the counts of the whole, add up to the whole batch's",
        f"{LOSSES} 262-266; verl#7200, mended by verl#7225",
        "by its own counts a micro-batch of few tokens weighs as much as one of many",
        REDUCED.but(
            tokens="plain",
            mask=("ragged", "fractional"),
            aggregation=("token-mean", "seq-mean-token-mean", "seq-mean-token-mean", *AGGREGATIONS),
            size=("crowd", "crowd", "small"),
        ),
        "cut_by_counts",
    ),
    Rule(
        "VTK-MET-1",
        MUST,
        "student_mass and teacher_mass, where reported: means before the clamp",
        f"{TOPK} 113-114",
        "after the clamp a mass may exceed 1 (verl's Megatron path does that)",
        NEUTRAL.but(tokens=("student_low", "teacher_low", "both_low"), clamp=("other", "default")),
        check=reported("student_mass", "teacher_mass"),
        share=0.5,
    ),
    Rule(
        "VTK-MET-2",
        MUST,
        "loss_min and loss_max, where reported: over the mask, after the floor, before the cap",
        f"{LOSSES} 246-249",
        "a maximum at the cap says nothing of what was capped",
        NEUTRAL.but(
            tokens=("far", "plain", "negative"), clamp="off", cap=("other", "default"), mask=("full", "ragged")
        ),
        check=reported("loss_min", "loss_max"),
        share=0.5,
    ),
    Rule(
        "VTK-MET-3",
        MUST,
        "distillation_loss, where it is returned, is the loss that is trained",
        f"{LOSSES} 225: Metric(value=distill_loss)",
        "two runs with equal logs can have different gradients",
        REDUCED.but(
            mask=("ragged", "random", "full"), tokens=("plain", "far"), clamp="off", counts=("global", "local")
        ),
        share=0.5,
        check=logged_is_trained("distillation_loss"),
    ),
    *autograd_rules("VTK", BROAD, f"{TOPK} compute_forward_kl_topk"),
    *precision_rules("VTK", EVERYTHING),
    Rule(
        "VTK-NUM-3",
        MUST,
        "an offset common to a token's logits (1e4) neither overflows nor loses the result",
        f"{TOPK} 108: log_softmax",
        "a log-sum-exp without its maximum overflows from logits of 89 on",
        NEUTRAL.but(logits="large"),
        share=0.5,
        control=lambda case: case.with_fields(
            student_logits=(case.loss_input.student_logits.double() / 2**13).to(case.loss_input.student_logits.dtype)
        ),
    ),
    Rule(
        "VTK-NUM-4",
        SHOULD,
        "NaN and inf at masked positions reach neither value nor gradient",
        "verl/utils/torch_functional.py masked_sum: a select keeps the value; upstream's gradient is NaN there",
        "padding may hold anything",
        NEUTRAL.but(mask=("random", "ragged"), size="small"),
        share=0.2,
        check=nothing_reaches,
    ),
    Rule(
        "VTK-NUM-5",
        SHOULD,
        "a call in which no position counts gives 0 and a zero gradient",
        f"{LOSSES} compute_distillation_loss_range: upstream takes the minimum of nothing and raises",
        "one micro-batch of padding ends the run",
        NEUTRAL.but(size="small"),
        share=0.2,
        check=nothing_at_all,
    ),
)

globals().update({test.__name__: test for test in map(as_test, RULES)})  # pytest collects them by name
