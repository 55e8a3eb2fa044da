"""Known ways to get verl's ``forward_kl_topk`` wrong, and other algorithms that are taken for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.specs.shared import catalogue as common
from sdpo_conformance.specs.shared import stages
from sdpo_conformance.specs.shared import wrong_stages as wrong
from sdpo_conformance.specs.shared.defect import Maker, Parameter, SpecDefect, executable, named
from sdpo_conformance.specs.shared.pipeline import (
    Change,
    Flow,
    Stage,
    accepting,
    around,
    both,
    graded,
    replacing,
)
from sdpo_conformance.specs.verl_topk.pipeline import PIPELINE, held_up, over

WORDS = {"clamp": "log_prob_min_clamp", "cap": "loss_max_clamp", "tokens": "batch_num_tokens"}
defect = Maker("verl-topk", "VTK", PIPELINE, WORDS)

# --- support, divergence ---


def students_support(flow: Flow, loss_input: Any) -> None:
    """The student's own top-k, with the teacher's values."""
    flow.support = flow.z.detach().topk(flow.support.shape[-1], dim=-1).indices


def mask_from_lengths(flow: Flow, loss_input: Any) -> None:
    """1 up to the lengths where these are given."""
    if loss_input.response_lengths is not None:
        places = torch.arange(flow.mask.shape[1], device=flow.mask.device)
        flow.mask = (places < loss_input.response_lengths.unsqueeze(1)).to(flow.mask.dtype)
        flow.z = loss_input.student_logits.to(flow.z.dtype)
        flow.teacher = loss_input.teacher_logprobs.detach().to(flow.teacher.dtype)


def renormalising(*sides: str) -> Change:
    """The log-probs of these sides renormalised over the support."""

    def finish(before: Stage, flow: Flow) -> Tensor:
        return stages.renormalised(before(flow))

    return both(*(around(side, finish) for side in sides))


def terms(flow: Flow) -> Tensor:
    """(B, T, K): exp(b') (b' - a')."""
    found: Tensor = flow.teacher_clamped.exp() * (flow.teacher_clamped - flow.student_clamped)
    return found


def with_tail(flow: Flow) -> Tensor:
    """A tail category on both sides."""
    q, p = (stages.with_tail(one.clamp(min=-1e4)) for one in (flow.a, flow.b))
    return stages.kl(p, q)


def reverse(flow: Flow) -> Tensor:
    """sum q (log q - log p)."""
    found: Tensor = (flow.student_clamped.exp() * (flow.student_clamped - flow.teacher_clamped)).sum(-1)
    return found


def jensen_shannon(flow: Flow) -> Tensor:
    """Half of both KLs to the mean."""
    m = stages.mix(flow.teacher_clamped, flow.student_clamped, 0.5)
    return 0.5 * stages.kl(flow.teacher_clamped, m) + 0.5 * stages.kl(flow.student_clamped, m)


def cross_entropy(flow: Flow) -> Tensor:
    """-sum p log q: the teacher's entropy left out."""
    found: Tensor = -(flow.teacher_clamped.exp() * flow.student_clamped).sum(-1)
    return found


def averaged(before: Stage, flow: Flow) -> Tensor:
    """The mean over the support."""
    found: Tensor = before(flow) / flow.a.shape[-1]
    return found


def scaled(value: float) -> Change:
    """The sum times a number."""
    return around("raw", lambda before, flow: value * before(flow))


def weighed_before_clamp(flow: Flow) -> Tensor:
    """exp of the teacher's log-prob before the clamp as weight."""
    found: Tensor = (flow.b.exp() * (flow.teacher_clamped - flow.student_clamped)).sum(-1)
    return found


def in_chunks(last: Callable[[int, int], int]) -> Change:
    """The normaliser by chunks of the vocabulary, of which the last starts below ``last`` (V, size)."""

    def read(flow: Flow, loss_input: Any) -> None:
        training = loss_input.training
        flow.chunk = training.chunked_topk_chunk_size if training.use_chunked_topk else flow.z.shape[-1]

    def logprobs(flow: Flow) -> Tensor:
        z, size = flow.student, min(flow.chunk, flow.student.shape[-1])
        starts = range(0, last(z.shape[-1], size), size) if size < z.shape[-1] else (0,)
        parts = [z[..., start : start + size].logsumexp(-1) for start in starts]
        found: Tensor = z - torch.stack(parts, dim=-1).logsumexp(-1, keepdim=True)
        return found

    return both(accepting(read), replacing(l=logprobs))


# --- clamp ---


def clamped_at(value: float) -> Change:
    """Both sides clamped at a constant."""
    return replacing(
        student_clamped=lambda flow: held_up(flow.a, value), teacher_clamped=lambda flow: held_up(flow.b, value)
    )


def leaking_clamp(flow: Flow) -> Tensor:
    """A clamp that lets the gradient through."""
    found: Tensor = flow.a + (held_up(flow.a, flow.lowest) - flow.a).detach()
    return found


def dense_part_kept(flow: Flow) -> Tensor:
    """A clamped token loses its own entry of the gradient, and keeps its weight in the normaliser's."""
    clamped = held_up(flow.a, flow.lowest)
    at = flow.student.gather(-1, flow.support)
    own = at if flow.lowest is None else torch.where(flow.a < flow.lowest, at.detach(), at)
    return wrong.with_gradient_of(clamped, own - flow.student.logsumexp(-1, keepdim=True))


def over_candidates(flow: Flow) -> Tensor:
    """log-probs normalised over the support and as many of the largest other logits."""
    at = flow.student.gather(-1, flow.support)
    others = flow.student.scatter(-1, flow.support, -torch.inf)
    rest = others.topk(min(at.shape[-1], others.shape[-1]), dim=-1).values
    return at - torch.cat((at, rest), dim=-1).logsumexp(-1, keepdim=True)


def cut_rows(flow: Flow) -> Tensor:
    """A clamped token cuts its whole position's gradient."""
    clamped = held_up(flow.a, flow.lowest)
    if flow.lowest is None:
        return clamped
    return torch.where((flow.a < flow.lowest).any(-1, keepdim=True), clamped.detach(), clamped)


def dropped(flow: Flow) -> Tensor:
    """Tokens below the clamp are left out of the sum."""
    if flow.lowest is None:
        return terms(flow).sum(-1)
    kept = (flow.a >= flow.lowest) & (flow.b >= flow.lowest)
    return torch.where(kept, terms(flow), torch.zeros_like(flow.a)).sum(-1)


def floored_terms(flow: Flow) -> Tensor:
    """Each token's term floored at 0."""
    return terms(flow).clamp(min=0.0).sum(-1)


# --- floor and cap ---


def unfloored(flow: Flow) -> Tensor:
    found: Tensor = flow.raw
    return found


def absolute(flow: Flow) -> Tensor:
    found: Tensor = flow.raw.abs()
    return found


def leaking_floor(flow: Flow) -> Tensor:
    found: Tensor = flow.raw + (flow.raw.clamp(min=0.0) - flow.raw).detach()
    return found


def uncapped(flow: Flow) -> Tensor:
    found: Tensor = flow.floored
    return found


def capped_at(value: float) -> Change:
    """The cap a constant."""
    return replacing(per_token=lambda flow: flow.floored.clamp(max=value))


def leaking_cap(flow: Flow) -> Tensor:
    if flow.highest is None:
        return uncapped(flow)
    found: Tensor = flow.floored + (flow.floored.clamp(max=flow.highest) - flow.floored).detach()
    return found


def scaled_to_cap(flow: Flow) -> Tensor:
    """Positions above the cap scaled down to it, by a constant."""
    if flow.highest is None:
        return uncapped(flow)
    share = (flow.highest / flow.floored.detach().clamp(min=1e-12)).clamp(max=1.0)
    found: Tensor = flow.floored * share
    return found


def ranks_not_in_gradient(flow: Flow, gradient: Tensor) -> Tensor:
    """dp_size left out of the backward."""
    return gradient / flow.ranks


def dropped_above(flow: Flow) -> Tensor:
    """Positions above the cap count 0."""
    if flow.highest is None:
        return uncapped(flow)
    return torch.where(flow.floored > flow.highest, torch.zeros_like(flow.floored), flow.floored)


# --- temperature ---


def teacher_tempered(before: Stage, flow: Flow) -> Tensor:
    """The teacher's log-probs divided by the temperature as well."""
    found: Tensor = before(flow) / flow.temperature
    return found


# --- reduction ---


def counts(**changes: Callable[[Flow], Any]) -> Change:
    """Other counts than those given."""

    def change(flow: Flow, loss_input: Any) -> None:
        for name, function in changes.items():
            setattr(flow, name, function(flow))

    return accepting(change)


def scale_from_lengths(flow: Flow, loss_input: Any) -> None:
    """The largest length, where they are given, in place of T."""
    if flow.scale is None and loss_input.response_lengths is not None:
        flow.scale = max(int(loss_input.response_lengths.max()), 1)


def local_tokens(flow: Flow) -> Tensor:
    found: Tensor = flow.mask.sum().clamp(min=1.0)
    return found


def always(mode: str) -> Change:
    return counts(aggregation=lambda flow: mode)


def row_means(before: Stage, flow: Flow) -> Tensor:
    if flow.aggregation != "token-mean":
        return before(flow)
    found: Tensor = ((flow.per_token * flow.mask).sum(-1) / flow.lengths.clamp(min=1.0)).mean()
    return found


def unscaled_row_mean(before: Stage, flow: Flow) -> Tensor:
    """seq-mean-token-mean computed as seq-mean-token-sum."""
    if flow.aggregation != "seq-mean-token-mean":
        return before(flow)
    found: Tensor = (flow.per_token * flow.mask).sum() / flow.sequences * flow.ranks
    return found


def local_rows(flow: Flow) -> Tensor:
    found: Tensor = (flow.mask.sum(-1) > 0).sum().clamp(min=1)
    return found


def boolean_mask(flow: Flow, loss_input: Any) -> None:
    flow.mask = (flow.mask != 0).to(flow.mask)


def before_cap(flow: Flow) -> Tensor:
    """The mean of D before the cap."""
    capped, flow.per_token = flow.per_token, flow.floored
    found = PIPELINE.stages["loss"](flow).detach()
    flow.per_token = capped
    return found


CLAMP = Parameter("clamp", -60.0, -0.5, (-20.0, -5.0, -15.0, -30.0, -1.0))
CAP = Parameter("cap", 1e-3, 1e3, (10.0, 5.0, 1.0, 0.1))

SUPPORT = (
    defect(
        "student-support",
        "The student's own top-k stands under the teacher's log-probs.",
        "SUP-1",
        "Gather the student at teacher_ids.",
        accepting(students_support),
    ),
    defect(
        "renormalised",
        "Both sides are renormalised over the support.",
        "SUP-2",
        "Take the log-probs as they are.",
        renormalising("a", "b"),
    ),
    defect(
        "student-renormalised",
        "The student is renormalised over the support.",
        "SUP-2",
        "Take the log-probs as they are.",
        renormalising("a"),
    ),
    defect(
        "teacher-renormalised",
        "The teacher is renormalised over the support.",
        "SUP-2",
        "Take the log-probs as they are.",
        renormalising("b"),
    ),
    defect(
        "tail-added",
        "A tail category is appended.",
        "SUP-2",
        "Sum over the support alone.",
        replacing(raw=with_tail),
    ),
)

DIVERGENCE = (
    defect(
        "reverse-kl",
        "The reverse KL is computed.",
        "DIV-1",
        "sum p (log p - log q), p the teacher.",
        replacing(raw=reverse),
    ),
    defect(
        "jensen-shannon",
        "A Jensen-Shannon divergence is computed.",
        "DIV-1",
        "sum p (log p - log q).",
        replacing(raw=jensen_shannon),
    ),
    defect(
        "cross-entropy",
        "The cross entropy is computed: the teacher's entropy is missing.",
        "DIV-1",
        "sum p (log p - log q).",
        replacing(raw=cross_entropy),
    ),
    defect(
        "normalised-over-candidates",
        "The student is normalised over the support and its largest other logits, as many, not over the vocabulary.",
        "SUP-2 DIV-1",
        "log-prob = logit - logsumexp over the whole vocabulary.",
        replacing(a=over_candidates),
    ),
    defect(
        "last-column-left-out",
        "A last chunk of one column is left out of the normaliser.",
        "DIV-3",
        "range(0, V, chunk size): a chunk starts wherever a column is left.",
        in_chunks(lambda v, size: v - 1),
    ),
    defect(
        "last-chunk-left-out",
        "Columns behind the last whole chunk are left out of the normaliser.",
        "DIV-3",
        "range(0, V, chunk size): the last chunk is shorter than the others.",
        in_chunks(lambda v, size: v - size + 1),
    ),
    defect(
        "normaliser-detached",
        "The softmax's normaliser is a constant in the backward: the gradient is not centred.",
        "DIV-2",
        "dD/dz_v has pi_v sum p off the support: differentiate through the logsumexp.",
        replacing(l=wrong.constant_normaliser),
    ),
    defect(
        "negated",
        "The sum has the other sign.",
        "DIV-1",
        "log p - log q.",
        around("raw", lambda before, flow: -before(flow)),
    ),
    defect(
        "support-mean",
        "The mean over the support is taken.",
        "DIV-1",
        "Sum over the support.",
        around("raw", averaged),
    ),
    defect(
        "scaled",
        "The sum is multiplied by a constant.",
        "DIV-1",
        "Remove the factor.",
        **named(scaled, common.FACTOR),
    ),
    defect(
        "gradient-on-support-only",
        "The gradient is zero off the support.",
        "DIV-2",
        "dD/dz_v = pi_v sum p - p_v: dense.",
        graded(lambda flow, g: torch.zeros_like(g).scatter(-1, flow.support, g.gather(-1, flow.support))),
    ),
)

CLAMPS = (
    defect(
        "unclamped",
        "Log-probs are not clamped.",
        "CLAMP-1",
        "max(log-prob, {clamp}) on both sides, before exp.",
        replacing(
            student_clamped=lambda flow: held_up(flow.a, None), teacher_clamped=lambda flow: held_up(flow.b, None)
        ),
    ),
    defect(
        "only-student-clamped",
        "Only the student's log-probs are clamped.",
        "CLAMP-1",
        "Clamp both sides.",
        replacing(teacher_clamped=lambda flow: held_up(flow.b, None)),
    ),
    defect(
        "only-teacher-clamped",
        "Only the teacher's log-probs are clamped.",
        "CLAMP-1",
        "Clamp both sides.",
        replacing(student_clamped=lambda flow: held_up(flow.a, None)),
    ),
    defect(
        "weighed-before-clamp",
        "The teacher's weight is taken before the clamp.",
        "CLAMP-1",
        "exp of the clamped log-prob.",
        replacing(raw=weighed_before_clamp),
    ),
    defect(
        "dropped-below-clamp",
        "Tokens below the clamp are left out.",
        "CLAMP-1",
        "Clamp, and count them.",
        replacing(raw=dropped),
    ),
    defect(
        "clamp-leaks",
        "A clamped token keeps its gradient.",
        "CLAMP-2",
        "clamp_min: no gradient below it.",
        replacing(student_clamped=leaking_clamp),
    ),
    defect(
        "clamp-cuts-own-entry-alone",
        "A clamped token loses its own entry of the gradient, and keeps its weight in the normaliser's.",
        "CLAMP-2",
        "Sum P_k (pi_v - [v = S_k]) over the tokens that are not clamped.",
        replacing(student_clamped=dense_part_kept),
    ),
    defect(
        "clamp-cuts-position",
        "A clamped token cuts its position's whole gradient.",
        "CLAMP-2",
        "Only its own term is cut.",
        replacing(student_clamped=cut_rows),
    ),
    defect(
        "clamp-constant",
        "The clamp is a constant, whatever {clamp} says.",
        "CLAMP-3",
        "Read {clamp}; None: no clamp.",
        **named(clamped_at, CLAMP),
    ),
)

SWITCHES = (
    defect(
        "unfloored",
        "A negative sum counts as it is.",
        "FLOOR-1",
        "clamp_min(0).",
        replacing(floored=unfloored),
    ),
    defect(
        "absolute",
        "A negative sum counts with its absolute value.",
        "FLOOR-1",
        "clamp_min(0).",
        replacing(floored=absolute),
    ),
    defect(
        "terms-floored",
        "Each token's term is floored, not their sum.",
        "DIV-1 FLOOR-1",
        "clamp_min(0) of the sum.",
        replacing(raw=floored_terms),
    ),
    defect(
        "floor-leaks",
        "A position whose sum is negative keeps its gradient.",
        "FLOOR-2",
        "clamp_min(0): no gradient.",
        replacing(floored=leaking_floor),
    ),
    defect("uncapped", "There is no cap.", "CAP-1", "min(D, {cap}).", replacing(per_token=uncapped)),
    defect(
        "dropped-above-cap",
        "Positions above the cap count 0.",
        "CAP-1",
        "min(D, {cap}).",
        replacing(per_token=dropped_above),
    ),
    defect(
        "cap-constant",
        "The cap is a constant, whatever {cap} says.",
        "CAP-1",
        "Read {cap}; None: no cap.",
        **named(capped_at, CAP),
    ),
    defect(
        "cap-scales",
        "A position above the cap is scaled down to it: its gradient is scaled, not cut.",
        "CAP-2",
        "clamp(max): no gradient.",
        replacing(per_token=scaled_to_cap),
    ),
    defect(
        "cap-leaks",
        "A position above the cap keeps its gradient.",
        "CAP-2",
        "clamp(max): no gradient.",
        replacing(per_token=leaking_cap),
    ),
)

TEMPERATURE = (
    defect(
        "temperature-ignored",
        "The temperature is ignored.",
        "TEMP-1",
        "Divide the student's logits by it.",
        replacing(student=lambda flow: flow.z),
    ),
    defect(
        "teacher-tempered",
        "The teacher's log-probs are divided by the temperature as well.",
        "TEMP-1",
        "The teacher is scored at temperature 1.",
        around("b", teacher_tempered),
    ),
    defect(
        "temperature-multiplied",
        "The student's logits are multiplied by the temperature.",
        "TEMP-1",
        "Divide by it.",
        replacing(student=wrong.multiplied),
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

REDUCTION = (
    defect(
        "local-token-mean",
        "The denominator is this call's own token count.",
        "RED-1",
        "Divide by {tokens}, times dp_size.",
        counts(tokens=local_tokens, ranks=lambda flow: 1),
        usable_for="One micro-batch a step on one rank.",
    ),
    defect(
        "gradient-without-ranks",
        "dp_size multiplies the value, not the gradient.",
        "RED-1",
        "The gradient is that of sum / {tokens} * dp_size.",
        graded(ranks_not_in_gradient),
    ),
    defect(
        "ranks-forgotten",
        "dp_size does not multiply.",
        "RED-1",
        "sum / {tokens} * dp_size.",
        counts(ranks=lambda flow: 1),
    ),
    defect(
        "row-means",
        "Each row is averaged before the rows are.",
        "RED-1",
        "One sum over all tokens.",
        around("loss", row_means),
    ),
    defect(
        "mask-ignored",
        "The mask is ignored.",
        "RED-2",
        "Multiply by the mask.",
        wrong.accepting_mask(lambda flow: torch.ones_like(flow.mask)),
    ),
    defect(
        "mask-from-lengths",
        "Where response_lengths is given the mask is made from it: weights and holes inside a response are lost.",
        "RED-2",
        "Multiply by response_mask.",
        accepting(mask_from_lengths),
    ),
    defect(
        "mask-shifted",
        "The mask is one token late.",
        "RED-2",
        "mask[t] belongs to token t.",
        wrong.accepting_mask(lambda flow: flow.mask.roll(1, dims=1)),
    ),
    defect(
        "mask-of-first-row",
        "Every row has the first row's mask.",
        "RED-2",
        "Each row has its own.",
        wrong.accepting_mask(lambda flow: flow.mask[:1].expand_as(flow.mask)),
    ),
    defect(
        "boolean-mask",
        "A fractional mask is read as true.",
        "RED-3",
        "The mask is a weight.",
        accepting(boolean_mask),
    ),
    defect(
        "always-token-mean",
        "loss_agg_mode is ignored.",
        "RED-4",
        "Read loss_agg_mode.",
        always("token-mean"),
        usable_for="loss_agg_mode = token-mean.",
    ),
    defect(
        "row-sum-for-row-mean",
        "seq-mean-token-mean is computed as seq-mean-token-sum.",
        "RED-4",
        "Divide each row by its mask's sum + 1e-8.",
        around("loss", unscaled_row_mean),
    ),
    defect(
        "row-floor-of-one",
        "A row's mean is over at least one token.",
        "RED-3",
        "Add 1e-8 to the row's mask sum: a row of fractions is divided by less than 1.",
        replacing(lengths=lambda flow: flow.mask.sum(-1).clamp(min=1.0)),
    ),
    defect(
        "local-rows",
        "The row modes divide by this call's own rows.",
        "RED-5",
        "Divide by global_batch_size.",
        counts(sequences=local_rows),
    ),
    defect(
        "norm-by-longest",
        "seq-mean-token-sum-norm divides by the longest response, not by T.",
        "RED-6",
        "Divide by the width of response_mask, padding included.",
        counts(scale=lambda flow: wrong.longest(flow.mask) if flow.scale is None else flow.scale),
    ),
    defect(
        "norm-by-response-lengths",
        "Where response_lengths is given, seq-mean-token-sum-norm divides by the largest of them, not by T.",
        "RED-6",
        "Divide by the width of response_mask, padding included.",
        accepting(scale_from_lengths),
    ),
    defect(
        "scale-ignored",
        "loss_scale_factor is ignored.",
        "RED-6",
        "Divide by it where it is given.",
        counts(scale=lambda flow: None),
    ),
)

STEP = (
    defect(
        "row-lengths-kept",
        "The first micro-batch's row lengths are kept for those after it.",
        "AGG-1",
        "Sum each micro-batch's own mask.",
        wrong.kept_for_the_step("lengths"),
    ),
)

METRICS = (
    defect(
        "masses-after-clamp",
        "The masses are taken after the clamp.",
        "MET-1",
        "Take them before it.",
        wrong.measuring(
            student_mass=lambda flow: over(flow.student_clamped.exp().sum(-1), flow.mask, "mean"),
            teacher_mass=lambda flow: over(flow.teacher_clamped.exp().sum(-1), flow.mask, "mean"),
        ),
    ),
    defect(
        "range-after-cap",
        "loss_max is taken after the cap.",
        "MET-2",
        "Take it before it.",
        wrong.measuring(loss_max=lambda flow: over(flow.per_token, flow.mask, "max")),
    ),
    defect(
        "logs-before-cap",
        "distillation_loss is taken before the cap: not what is trained.",
        "MET-3",
        "Report the loss itself.",
        wrong.measuring(distillation_loss=before_cap),
    ),
)

INSTEAD = "Compute verl's forward_kl_topk (docs/spec-verl-topk.md), or judge this with the spec it follows."
DIALECTS = (
    defect(
        "is-ms-swift",
        "This computes ms-swift's loss at beta = 0: the forward KL, renormalised.",
        "SUP-2",
        INSTEAD,
        both(
            replacing(
                student_clamped=lambda flow: stages.renormalised(flow.a),
                teacher_clamped=lambda flow: stages.renormalised(flow.b),
                floored=unfloored,
                per_token=uncapped,
            ),
        ),
        dialect="ms-swift's loss",
        usable_for="--spec ms-swift.",
    ),
    defect(
        "is-claas",
        "This computes CLaaS's divergence at alpha = 1/2.",
        "SUP-2",
        INSTEAD,
        replacing(
            raw=lambda flow: _half_mixture(stages.renormalised(flow.a), stages.renormalised(flow.b)),
            per_token=uncapped,
        ),
        dialect="CLaaS's loss",
        usable_for="--spec claas.",
    ),
    defect(
        "is-tail",
        "This computes the forward KL with a tail category: lasgroup's or TRL's on the teacher's top-k.",
        "SUP-2",
        INSTEAD,
        replacing(raw=with_tail, per_token=uncapped),
        dialect="TRL's server path with a tail",
        usable_for="--spec trl.",
    ),
    defect(
        "is-nemo-rl",
        "This computes NeMo-RL's top-k loss: the same sum without clamp, floor or cap.",
        "CLAMP-1",
        INSTEAD,
        replacing(
            student_clamped=lambda flow: held_up(flow.a, None),
            teacher_clamped=lambda flow: held_up(flow.b, None),
            floored=unfloored,
            per_token=uncapped,
        ),
        dialect="NeMo-RL's forward top-k loss",
        usable_for="log_prob_min_clamp = None and loss_max_clamp = None, where no sum is negative.",
    ),
)


def _half_mixture(log_q: Tensor, log_p: Tensor) -> Tensor:
    log_m = stages.mix(log_p, log_q, 0.5)
    return 0.5 * stages.kl(log_p, log_m) + 0.5 * stages.kl(log_q, log_m)


def plumbing() -> tuple[SpecDefect, ...]:
    """A wrong backward, wrong numerics: DIV-4 is DIV-2 here."""
    found = common.plumbing_defects(defect)
    return tuple(
        replace(one, violates=tuple("VTK-DIV-2" if rule == "VTK-DIV-4" else rule for rule in one.violates))
        for one in found
    )


FAMILIES: Mapping[str, tuple[SpecDefect, ...]] = {
    "support": SUPPORT,
    "divergence": DIVERGENCE,
    "clamp": CLAMPS,
    "floor and cap": SWITCHES,
    "temperature": TEMPERATURE,
    "reduction": (*REDUCTION, *common.mask_defects(defect)),
    "step": STEP,
    "metric": METRICS,
    "kept": common.kept_defects(defect, "response_mask"),
    "plumbing": plumbing(),
}


@cache
def catalogue() -> Mapping[str, SpecDefect]:
    """Every defect by name; dialects are apart."""
    return MappingProxyType({one.name: one for family in FAMILIES.values() for one in family})


def load(name: str) -> Any:
    """The executable form of an entry, or of two as ``one+other``, as ``--impl=defect:NAME`` takes it."""
    return executable(name, catalogue(), DIALECTS)
