"""Known defects that several specs share, told in each spec's own words.

Each family is a function of ``make``, which gives an entry its name, its ids and its pipeline, and puts the spec's
names of options into the sentences: {topk}, {add_tail}, {alpha}, {clip}, {old}.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sdpo_conformance.specs.shared import stages
from sdpo_conformance.specs.shared import wrong_stages as wrong
from sdpo_conformance.specs.shared.defect import Parameter, SpecDefect, named
from sdpo_conformance.specs.shared.pipeline import Flow, accepting, around, both, graded, replacing

Make = Callable[..., SpecDefect]

FACTOR = Parameter("factor", 1e-3, 1e3, (0.5, 2.0, 0.01, 0.1, 10.0, 1 / 0.6931471805599453))
CAP = Parameter("cap", 1e-3, 1e6, (5.0, 1.0, 10.0, 1.2, 3.0, 4.0))
LOG_RATIO_CLAMP = Parameter("clamp", 0.05, 18.0, (10.0, 5.0, 2.0, 1.0, 0.5))
MASS_FLOOR = Parameter("floor", 1e-9, 0.9, (1e-3, 1e-2, 0.1, 1e-4, 1e-8))
EPSILON = Parameter("epsilon", 1e-9, 0.05, (1e-4, 1e-6, 1e-3, 1e-5))
BESIDE = Parameter("epsilon", 1e-12, 0.5, (1e-6, 1e-8, 1e-5, 1e-4, 1e-3, 1e-10))
TAIL_CLAMP = Parameter("clamp", 3e-7, 0.5, (1e-6, 1e-5, 1e-4, 1e-3))


def support_defects(make: Make) -> tuple[SpecDefect, ...]:
    """Wrong supports of the student."""
    return (
        make(
            "teacher-support",
            "The support is the teacher's top-k, not the student's.",
            "SUP-1",
            "topk of the student's logits; gather the teacher at those ids.",
            replacing(support=wrong.teachers_support),
        ),
        make(
            "paired-by-rank",
            "The teacher's k largest log-probs are paired with the student's by rank.",
            "SUP-1",
            "Gather the teacher's log-probs at the student's ids.",
            replacing(b=wrong.paired_by_rank),
        ),
        make(
            "support-of-rounded-logits",
            "The support is searched among logits rounded to bfloat16: near its end another token gets in.",
            "SUP-1",
            "topk of the logits as they are.",
            around("support", wrong.rounded_support),
        ),
        make(
            "one-token-fewer",
            "The support has one token fewer than {topk}.",
            "SUP-2",
            "K = min({topk}, V).",
            wrong.with_k(lambda k: k - 1),
        ),
        make(
            "one-token-more",
            "The support has one token more than {topk}.",
            "SUP-2",
            "K = min({topk}, V).",
            wrong.with_k(lambda k: k + 1),
        ),
        make(
            "ties-on-support",
            "Every token at or above the k-th largest logit is on the support: where some are equal it has more than "
            "{topk}.",
            "SUP-2",
            "Take topk's indices, not a threshold: K = min({topk}, V), whichever of equal logits.",
            wrong.with_ties(),
        ),
        make(
            "constant-k",
            "{topk} is ignored: the support has a size of its own.",
            "SUP-2",
            "K = min({topk}, V).",
            wrong.with_k(lambda k: 20),
        ),
        make(
            "whole-vocabulary-capped",
            "{topk} None still takes a top-k.",
            "SUP-3",
            "None means the whole vocabulary, without tail or renormalisation.",
            both(
                accepting(
                    lambda flow, given: setattr(flow, "finish", "tail" if flow.finish == "whole" else flow.finish)
                ),
                replacing(support=wrong.capped_whole),
            ),
        ),
        make(
            "normalised-over-support",
            "The student's log-probs are normalised over its top-k before the tail is made.",
            "TAIL-1",
            "log-prob = logit - logsumexp over the whole vocabulary.",
            wrong.at_support("student"),
        ),
        make(
            "teacher-normalised-over-support",
            "The teacher's log-probs are normalised over the support.",
            "TAIL-1",
            "log-prob = logit - logsumexp over the whole vocabulary, on both sides.",
            wrong.at_support("teacher"),
        ),
    )


def tail_defects(make: Make) -> tuple[SpecDefect, ...]:
    """Wrong tails and renormalisations."""
    return (
        make(
            "no-tail",
            "There is no tail category: both sides are renormalised over the support.",
            "TAIL-1",
            "Append log(1 - exp(min(logsumexp, -1e-7))) to both sides where {add_tail} is on.",
            wrong.finished("both", wrong.in_place_of("tail", stages.renormalised)),
            usable_for="{add_tail} = False.",
        ),
        make(
            "tail-dropped",
            "What the support leaves is neither a category nor divided out.",
            "TAIL-1",
            "Append the tail category to both sides.",
            wrong.finished("both", wrong.tail_dropped),
        ),
        make(
            "student-tail-missing",
            "The student is renormalised where the teacher has a tail of its own size.",
            "TAIL-1",
            "Make the student's tail of its own log-probs.",
            wrong.finished(
                "student",
                lambda flow, x: (
                    torch.cat((stages.renormalised(x), torch.full_like(x[..., :1], -16.1)), -1)
                    if flow.finish == "tail"
                    else stages.FINISHES[flow.finish](x)
                ),
            ),
        ),
        make(
            "teacher-tail-of-student",
            "The teacher's tail is the student's.",
            "TAIL-1",
            "Make each side's tail of its own log-probs.",
            wrong.finished(
                "teacher",
                lambda flow, x: (
                    torch.cat((x, flow.log_q[..., -1:].detach()), -1)
                    if flow.finish == "tail"
                    else stages.FINISHES[flow.finish](x)
                ),
            ),
        ),
        make(
            "teacher-tail-of-own-top-k",
            "The teacher's tail is what the teacher's own top-k leaves, not what the support leaves.",
            "TAIL-1",
            "Make each side's tail of its log-probs at the support.",
            replacing(log_p=wrong.tail_of_own_top),
        ),
        make(
            "tail-always",
            "A tail is appended although {add_tail} is off.",
            "TAIL-2",
            "Renormalise both sides over the support where {add_tail} is off.",
            wrong.finished("both", wrong.in_place_of("renormalised", stages.with_tail)),
        ),
        make(
            "not-renormalised",
            "Without a tail the log-probs are left as they are.",
            "TAIL-2",
            "Subtract each side's logsumexp over the support.",
            wrong.finished("both", wrong.in_place_of("renormalised", stages.as_they_are)),
        ),
        make(
            "mass-floored",
            "The mass that is divided out is held up at a floor.",
            "TAIL-2",
            "Subtract the logsumexp, without a floor.",
            **named(wrong.floored_mass, MASS_FLOOR),
        ),
        make(
            "tail-detached",
            "The tail takes no gradient.",
            "TAIL-3",
            "Let the gradient through the tail: it is dense off the support.",
            wrong.finished("both", wrong.in_place_of("tail", wrong.detached_tail)),
        ),
        make(
            "gradient-on-support-only",
            "The gradient is zero off the support.",
            "TAIL-3",
            "dD/dz_v = pi_v (g_0 - sum q g) off the support.",
            graded(wrong.off_the_support),
        ),
        make(
            "tail-unclamped",
            "The tail's mass is not clamped: a support that holds everything leaves log 0.",
            "TAIL-4",
            "Clamp the logsumexp to at most -1e-7.",
            wrong.finished("both", wrong.in_place_of("tail", wrong.unclamped_tail)),
        ),
        make(
            "tail-clamped-elsewhere",
            "The support's log-mass is clamped at another number than -1e-7.",
            "TAIL-6 TAIL-4",
            "Clamp the logsumexp to at most -1e-7.",
            **named(wrong.tail_clamped_at, TAIL_CLAMP),
        ),
        make(
            "clamp-leaks",
            "The gradient passes through the tail where the clamp holds.",
            "TAIL-5",
            "Where the clamp holds the tail is a constant.",
            wrong.finished("both", wrong.in_place_of("tail", wrong.leaking_tail)),
        ),
    )


def divergence_defects(make: Make) -> tuple[SpecDefect, ...]:
    """Wrong divergences."""
    return (
        make(
            "alpha-swapped",
            "{alpha} weighs the student.",
            "DIV-1",
            "m = alpha p + (1 - alpha) q, p the teacher.",
            both(around("log_m", wrong.swapped_alpha), around("per_token", wrong.swapped_alpha)),
        ),
        make(
            "halves-even",
            "Both halves weigh 1/2 whatever {alpha} is.",
            "DIV-1",
            "alpha KL(p || m) + (1 - alpha) KL(q || m).",
            wrong.only_between(wrong.halves),
        ),
        make(
            "halves-unweighted",
            "Both halves are added without weights.",
            "DIV-1",
            "alpha KL(p || m) + (1 - alpha) KL(q || m).",
            wrong.only_between(wrong.unweighted),
        ),
        make(
            "halves-swapped",
            "The halves' weights are swapped, the mixture's are not.",
            "DIV-1",
            "alpha KL(p || m) + (1 - alpha) KL(q || m).",
            around("per_token", wrong.swapped_alpha),
        ),
        make(
            "mixture-even",
            "The mixture is (p + q) / 2 whatever {alpha} is.",
            "DIV-1",
            "m = alpha p + (1 - alpha) q.",
            replacing(log_m=wrong.even_mixture),
        ),
        make(
            "mixture-swapped",
            "The mixture's weights are swapped.",
            "DIV-1",
            "m = alpha p + (1 - alpha) q.",
            around("log_m", wrong.swapped_alpha),
        ),
        make(
            "mixture-of-logs",
            "The mixture is taken of log-probs.",
            "DIV-1",
            "Mix the probabilities: logsumexp of the log-probs with log alpha and log(1 - alpha).",
            replacing(log_m=wrong.log_mean_mixture),
        ),
        make(
            "interpolated-kl",
            "Between the ends the two KLs are interpolated, without a mixture.",
            "DIV-1",
            "Both KLs are to the mixture.",
            wrong.only_between(wrong.interpolated),
        ),
        make(
            "student-half-only",
            "The teacher's half is missing.",
            "DIV-1",
            "alpha KL(p || m) + (1 - alpha) KL(q || m).",
            wrong.only_between(wrong.student_half),
        ),
        make(
            "teacher-half-only",
            "The student's half is missing.",
            "DIV-1",
            "alpha KL(p || m) + (1 - alpha) KL(q || m).",
            wrong.only_between(wrong.teacher_half),
        ),
        make(
            "category-mean",
            "The mean over categories is taken in place of their sum.",
            "DIV-1",
            "Sum over the categories.",
            around("per_token", wrong.category_mean),
        ),
        make(
            "divergence-scaled",
            "The divergence is multiplied by a constant.",
            "DIV-1",
            "Remove the factor.",
            **named(wrong.scaled_by, FACTOR),
        ),
        make(
            "smoothed",
            "A constant is added to the probabilities before their logarithm is taken.",
            "DIV-1",
            "Stay in log space.",
            **named(wrong.smoothed, EPSILON),
        ),
        make(
            "forward-kl-missing",
            "{alpha} = 0 gives the mixture's limit 0 in place of the forward KL.",
            "DIV-2",
            "{alpha} = 0: sum p (log p - log q).",
            wrong.at_end(0, wrong.limit_of_mixture),
        ),
        make(
            "forward-kl-reversed",
            "{alpha} = 0 gives the reverse KL.",
            "DIV-2",
            "{alpha} = 0: sum p (log p - log q).",
            wrong.at_end(0, wrong.reverse_kl),
        ),
        make(
            "reverse-kl-missing",
            "{alpha} = 1 gives the mixture's limit 0 in place of the reverse KL.",
            "DIV-3",
            "{alpha} = 1: sum q (log q - log p).",
            wrong.at_end(1, wrong.limit_of_mixture),
        ),
        make(
            "reverse-kl-forward",
            "{alpha} = 1 gives the forward KL.",
            "DIV-3",
            "{alpha} = 1: sum q (log q - log p).",
            wrong.at_end(1, wrong.forward_kl),
        ),
        make(
            "reverse-kl-surrogate",
            "{alpha} = 1 gives the sampled token's surrogate in place of the sum over the support.",
            "DIV-3",
            "{alpha} = 1: sum q (log q - log p) over the categories.",
            wrong.at_end(1, stages.surrogate),
        ),
        make(
            "normaliser-detached",
            "The softmax's normaliser is a constant in the backward: the gradient is not centred.",
            "DIV-4",
            "dD/dz_v = q_v (g_v - sum q g): differentiate through the logsumexp.",
            replacing(l=wrong.constant_normaliser),
        ),
        make(
            "forward-kl-gradient-of-vocabulary",
            "{alpha} = 0 has the gradient of the whole vocabulary's KL, softmax less target, whatever the support.",
            "DIV-4",
            "Differentiate the categories: off the support the gradient is pi_v (g_0 - sum q g).",
            wrong.at_end(0, wrong.softmax_less_target),
        ),
        make(
            "student-weight-detached",
            "The student's probabilities are constants: only their logarithms take a gradient.",
            "DIV-4",
            "Differentiate through q in sum q (log q - log .).",
            around(
                "per_token",
                lambda before, flow: (
                    before(flow) if flow.sampled or flow.alpha == 0 else wrong.detached_student_weight(flow)
                ),
            ),
        ),
    )


def sampled_defects(make: Make) -> tuple[SpecDefect, ...]:
    """A wrong sampled-token mode."""
    return (
        make(
            "sampled-attached",
            "The difference of log-probs takes a gradient.",
            "TOK-2",
            "sg(l[y] - lt[y]) l[y].",
            wrong.only_sampled(wrong.attached_difference),
        ),
        make(
            "sampled-bare",
            "The difference of log-probs is the loss itself.",
            "TOK-1",
            "sg(l[y] - lt[y]) l[y].",
            wrong.only_sampled(wrong.bare_difference),
        ),
        make(
            "sampled-flipped",
            "The sampled token's objective has the other sign.",
            "TOK-1",
            "sg(l[y] - lt[y]) l[y].",
            wrong.only_sampled(wrong.flipped_difference),
        ),
        make(
            "sampled-floored",
            "The teacher's log-prob of the sampled token is held up at a floor.",
            "TOK-1",
            "lt[y] as it is: there is no floor.",
            **named(wrong.floored_teacher, Parameter("floor", -30.0, -1.0, (-20.0, -10.0, -5.0))),
        ),
    )


def temperature_defects(make: Make) -> tuple[SpecDefect, ...]:
    """Wrong temperatures of two local sides."""
    return (
        make(
            "temperature-ignored",
            "The temperature is ignored.",
            "TEMP-1",
            "Divide both sides' logits by it.",
            wrong.temperature_for("neither"),
        ),
        make(
            "teacher-not-tempered",
            "Only the student is divided by the temperature.",
            "TEMP-1",
            "Divide the teacher's logits too.",
            wrong.temperature_for("student"),
        ),
        make(
            "student-not-tempered",
            "Only the teacher is divided by the temperature.",
            "TEMP-1",
            "Divide the student's logits too.",
            wrong.temperature_for("teacher"),
        ),
        make(
            "temperature-multiplied",
            "The student's logits are multiplied by the temperature.",
            "TEMP-1",
            "Divide by it.",
            replacing(student=wrong.multiplied),
        ),
        make(
            "teacher-normalised-before-tempered",
            "The teacher is normalised first and tempered after, and not normalised again.",
            "TEMP-1",
            "Divide the logits by the temperature, then normalise.",
            replacing(lt=wrong.tempered_after),
        ),
        make(
            "normaliser-not-tempered",
            "The logsumexp of the untempered logits is subtracted from the student's tempered ones.",
            "TEMP-1",
            "Take the logsumexp of the tempered logits.",
            replacing(l=wrong.normaliser_at_one),
        ),
        make(
            "support-normaliser-not-tempered",
            "At the support the logsumexp of the untempered logits is subtracted from the student's tempered ones.",
            "TEMP-1",
            "Take the logsumexp of the tempered logits.",
            replacing(a=wrong.support_normaliser_at_one),
        ),
        make(
            "temperature-squared",
            "The loss is multiplied by the square of the temperature.",
            "TEMP-1",
            "There is no such factor.",
            around("per_token", wrong.squared),
        ),
        make(
            "gradient-not-tempered",
            "The gradient lacks the temperature's 1 / tau.",
            "TEMP-2",
            "d/dz = d/dz' / tau.",
            graded(wrong.untempered_gradient),
        ),
    )


def ratio_defects(make: Make) -> tuple[SpecDefect, ...]:
    """Wrong importance ratios."""
    return (
        make(
            "no-ratio",
            "There is no importance ratio.",
            "IS-1",
            "Multiply D by min(exp(clamp(l[y] - old, -20, 20)), {clip}).",
            replacing(ratio=wrong.no_ratio),
            usable_for="One mini-batch and one epoch: there upstream's ratio is 1.",
        ),
        make(
            "ratio-inverted",
            "The ratio is old to new.",
            "IS-1",
            "exp(l[y] - old).",
            around("log_ratio", wrong.inverted),
        ),
        make(
            "ratio-against-teacher",
            "The ratio is taken to the teacher.",
            "IS-1",
            "exp(l[y] - old).",
            replacing(log_ratio=wrong.against_teacher),
        ),
        make(
            "ratio-of-previous-token",
            "The behaviour log-probs are those of the previous token.",
            "IS-6",
            "old[t] belongs to token t.",
            around("log_ratio", wrong.previous_token),
        ),
        make(
            "ratio-without-clip",
            "A ratio is applied although {clip} is None.",
            "IS-2",
            "None: no ratio.",
            replacing(
                log_ratio=lambda flow: (
                    None
                    if flow.old is None
                    else (flow.chosen.detach() - flow.old).clamp(-stages.LOG_CLAMP, stages.LOG_CLAMP)
                ),
                ratio=lambda flow: (
                    wrong.no_ratio(flow)
                    if flow.log_ratio is None
                    else flow.log_ratio.exp().clamp(max=2.0 if flow.clip is None else flow.clip)
                ),
            ),
        ),
        make(
            "ratio-unclamped",
            "The log-ratio is not clamped to +-20.",
            "IS-3",
            "Clamp before exp.",
            replacing(log_ratio=wrong.unclamped),
        ),
        make(
            "ratio-clamped-tighter",
            "The log-ratio is clamped tighter than +-20.",
            "IS-3",
            "Clamp to +-20.",
            **named(wrong.clamped_at, LOG_RATIO_CLAMP),
        ),
        make(
            "ratio-uncapped",
            "The ratio is not capped.",
            "IS-4",
            "min(ratio, {clip}).",
            replacing(ratio=wrong.uncapped),
        ),
        make(
            "cap-constant",
            "The cap is a constant, whatever {clip} says.",
            "IS-4",
            "Read {clip}.",
            **named(wrong.capped_at, CAP),
        ),
        make(
            "capped-below",
            "The ratio is capped below at 1 / {clip} as well.",
            "IS-4",
            "Cap from above only.",
            replacing(ratio=wrong.capped_both_ways),
        ),
        make(
            "ratio-at-least-one",
            "The ratio is never below 1.",
            "IS-4",
            "Cap from above only.",
            replacing(ratio=wrong.floored_at_one),
        ),
        make(
            "log-ratio-capped",
            "{clip} caps the log-ratio.",
            "IS-4",
            "Cap the ratio itself.",
            replacing(ratio=wrong.log_capped),
        ),
        make(
            "dropped-above-cap",
            "Tokens above the cap are dropped.",
            "IS-4",
            "min(ratio, {clip}).",
            replacing(ratio=wrong.zeroed_above),
        ),
        make(
            "ratio-attached",
            "The ratio takes a gradient.",
            "IS-5",
            "Detach it.",
            replacing(log_ratio=wrong.attached_log_ratio),
        ),
        make(
            "ratio-per-row",
            "One ratio stands for a row.",
            "IS-6",
            "Each token has its own.",
            around("log_ratio", wrong.row_mean_ratio),
        ),
        make(
            "ratio-per-batch",
            "One mean ratio stands for the batch.",
            "IS-6",
            "Each token has its own.",
            around("ratio", wrong.batch_mean_ratio),
        ),
        make(
            "ratio-untempered",
            "The ratio's current log-prob is taken at temperature 1.",
            "IS-7",
            "log-probs of the tempered policy.",
            replacing(log_ratio=wrong.untempered_ratio),
        ),
        make(
            "ratio-of-support",
            "The ratio's token is looked up in the support: outside it the ratio is 1.",
            "IS-1",
            "Gather l[y] from the whole vocabulary.",
            around("log_ratio", wrong.among_support),
        ),
        make(
            "old-tempered",
            "{old} is divided by the temperature once more.",
            "IS-7",
            "{old} is the tempered policy's already.",
            around("log_ratio", wrong.old_tempered),
        ),
    )


def mask_defects(make: Make) -> tuple[SpecDefect, ...]:
    """Masks that are no prefix of a row."""
    return (
        make(
            "mask-to-first-hole",
            "A row ends at its first token that does not count: what follows a hole in the mask is dropped.",
            "RED-1",
            "Multiply by the mask: a response of several turns has holes.",
            wrong.accepting_mask(wrong.to_first_hole),
        ),
        make(
            "mask-as-prefix",
            "The mask is made anew of each row's number of tokens: as many first tokens count.",
            "RED-2",
            "Multiply by the mask: it may be padded on the left or have holes.",
            wrong.accepting_mask(wrong.as_prefix),
        ),
    )


def empty_defect(make: Make, rule: str, count: Callable[[Flow], Any]) -> SpecDefect:
    """A call in which ``count`` is 0."""
    return make(
        "empty-detached",
        "Where nothing counts the loss is a constant of its own: the logits get no gradient, not one of zeros.",
        rule,
        "Return a sum that hangs on the logits, as 0 * logits.sum().",
        wrong.detached_where_empty(count),
    )


def kept_defects(make: Make, *masks: str) -> tuple[SpecDefect, ...]:
    """What an earlier call left behind. ``masks``: the fields that say which positions count."""
    return (
        make(
            "options-kept",
            "The options are read once per object: values that are written into it later are not seen.",
            "GRAD-9",
            "Read loss_input.training in every call.",
            wrong.read_once("training"),
        ),
        make(
            "positions-kept",
            "Which positions count is remembered by the mask's object, whatever is written into it later.",
            "GRAD-9",
            "Read the mask in every call, or compare its contents.",
            wrong.read_once(*masks),
        ),
    )


def plumbing_defects(make: Make) -> tuple[SpecDefect, ...]:
    """A wrong backward, wrong numerics."""
    return (
        make(
            "incoming-ignored",
            "The gradient that arrives is ignored.",
            "GRAD-1",
            "Multiply the stored gradient by what arrives.",
            wrong.autograd_changes()["incoming-ignored"],
        ),
        make(
            "gradient-doubled",
            "The gradient is twice the true one.",
            "DIV-4",
            "Check the backward's factor.",
            wrong.autograd_changes()["gradient-doubled"],
        ),
        make(
            "gradient-negated",
            "The gradient has the other sign.",
            "DIV-4",
            "Check the backward's sign.",
            wrong.autograd_changes()["gradient-negated"],
        ),
        make(
            "gradient-of-first-row",
            "Only the first row gets a gradient.",
            "DIV-4",
            "Write every row's gradient.",
            wrong.autograd_changes()["gradient-of-first-row"],
        ),
        make(
            "half-inside",
            "Logits are rounded to bfloat16 whatever they come in.",
            "NUM-1",
            "Compute in float32.",
            wrong.low_precision(torch.bfloat16),
        ),
        make(
            "logsumexp-unsafe",
            "The log-sum-exp does not subtract its maximum.",
            "NUM-3",
            "Subtract the maximum of the vocabulary first.",
            replacing(l=wrong.unsafe_logsumexp),
        ),
    )
