"""Stages that are wrong in every spec that has them: supports, tails, divergences, temperatures, ratios."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.specs.shared import stages
from sdpo_conformance.specs.shared.drawing import lengths_of
from sdpo_conformance.specs.shared.pipeline import (
    LOG_ZERO,
    Change,
    Flow,
    Pipeline,
    Result,
    Stage,
    accepting,
    around,
    arriving,
    both,
    graded,
    replacing,
)

# --- support ---


def teachers_support(flow: Flow) -> Tensor:
    """The teacher's top-k."""
    return stages.student_support(flow) if flow.k is None else top(flow.teacher, flow.k)


def top(logits: Tensor, k: int) -> Tensor:
    return logits.detach().topk(min(k, logits.shape[-1]), dim=-1).indices


def paired_by_rank(flow: Flow) -> Tensor:
    """The teacher's k largest log-probs, whatever tokens they are of."""
    if flow.k is None:
        return stages.teacher_at_support(flow)
    return flow.lt.topk(flow.support.shape[-1], dim=-1).values


def with_k(change: Callable[[int], int]) -> Change:
    """Another k, at least 1."""

    def support(before: Stage, flow: Flow) -> Tensor:
        if flow.k is None:
            return before(flow)
        given, flow.k = flow.k, max(1, change(flow.k))
        found = before(flow)
        flow.k = given
        return found

    return around("support", support)


def rounded_support(before: Stage, flow: Flow) -> Tensor:
    """The top-k of logits rounded to bfloat16."""
    given, flow.student = flow.student, flow.student.detach().to(torch.bfloat16)
    found: Tensor = before(flow)
    flow.student = given
    return found


def at_or_above(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ids of as many largest logits as any row has at or above its k-th largest, and which of them are."""
    least = logits.topk(k, dim=-1).values[..., -1:]
    most = int((logits >= least).sum(-1).max()) if logits.numel() else k
    values, ids = logits.topk(most, dim=-1)
    return ids, values >= least


def with_ties() -> Change:
    """Every logit at or above the k-th largest is on the support."""

    def support(before: Stage, flow: Flow) -> Tensor:
        flow.inside = None
        if flow.k is None or flow.k >= flow.student.shape[-1] or getattr(flow, "served", False):
            return before(flow)
        ids, flow.inside = at_or_above(flow.student.detach(), flow.k)
        return ids

    def only_inside(before: Stage, flow: Flow) -> Tensor:
        found: Tensor = before(flow)
        return found if flow.inside is None else found.masked_fill(~flow.inside, LOG_ZERO)

    return both(around("support", support), around("a", only_inside), around("b", only_inside))


def capped_whole(flow: Flow) -> Tensor:
    """A top-k of 100 where the whole vocabulary is asked for."""
    flow.k = min(flow.student.shape[-1] // 2, 100) if flow.k is None else flow.k
    return stages.student_support(flow)


def over_support(logprobs: Tensor) -> Tensor:
    """Normalised over the support before anything else."""
    return logprobs - logprobs.logsumexp(-1, keepdim=True)


def at_support(side: str) -> Change:
    """One side's or both sides' log-probs normalised over the support in place of the vocabulary."""

    def finish(before: Stage, flow: Flow) -> Tensor:
        return over_support(before(flow)) if not flow.sampled and flow.finish != "whole" else before(flow)

    changes = {"student": (around("a", finish),), "teacher": (around("b", finish),)}
    return both(*changes.get(side, (*changes["student"], *changes["teacher"])))


# --- tail ---


def finished(side: str, finish: Callable[[Flow, Tensor], Tensor]) -> Change:
    """Other categories for the "student", the "teacher", or "both"."""
    student: Stage = lambda flow: finish(flow, flow.a)  # noqa: E731
    teacher: Stage = lambda flow: finish(flow, flow.b)  # noqa: E731
    found = {"student": replacing(log_q=student), "teacher": replacing(log_p=teacher)}
    return found.get(side) or replacing(log_q=student, log_p=teacher)


def in_place_of(kind: str, other: Callable[[Tensor], Tensor]) -> Callable[[Flow, Tensor], Tensor]:
    """``other`` where the spec asks for ``kind``."""
    return lambda flow, logprobs: (other if flow.finish == kind else stages.FINISHES[flow.finish])(logprobs)


def tail_dropped(flow: Flow, logprobs: Tensor) -> Tensor:
    """The support as it is: what it leaves is forgotten. The other categories must follow, so both sides at once."""
    return logprobs if flow.finish == "tail" else stages.FINISHES[flow.finish](logprobs)


def detached_tail(logprobs: Tensor) -> Tensor:
    """The tail as a constant."""
    return torch.cat((logprobs, stages.with_tail(logprobs)[..., -1:].detach()), dim=-1)


def unclamped_tail(logprobs: Tensor) -> Tensor:
    """No clamp: a support that holds everything leaves log 0."""
    mass = logprobs.logsumexp(-1, keepdim=True)
    return torch.cat((logprobs, torch.log(-torch.expm1(mass))), dim=-1)


def tail_clamped_at(value: float) -> Change:
    """The clamp at -value in place of -1e-7."""
    return finished("both", in_place_of("tail", lambda logprobs: stages.with_tail(logprobs, -value)))


def leaking_tail(logprobs: Tensor) -> Tensor:
    """A clamp that lets the gradient through where it holds."""
    mass = logprobs.logsumexp(-1, keepdim=True)
    held = mass + (mass.clamp(max=stages.TAIL_CLAMP) - mass).detach()
    return torch.cat((logprobs, torch.log(-torch.expm1(held))), dim=-1)


def tail_of_own_top(flow: Flow) -> Tensor:
    """The teacher's tail as its own k largest leave it."""
    if flow.finish != "tail" or flow.lt is None:
        return stages.teacher_categories(flow)
    own = flow.lt.topk(flow.support.shape[-1], dim=-1).values
    return torch.cat((flow.b, stages.with_tail(own)[..., -1:]), dim=-1)


def off_the_support(flow: Flow, gradient: Tensor) -> Tensor:
    """A gradient with nothing off the support."""
    if flow.sampled or flow.finish != "tail":
        return gradient
    return torch.zeros_like(gradient).scatter(-1, flow.support, gradient.gather(-1, flow.support))


# --- divergence ---


def swapped_alpha(before: Stage, flow: Flow) -> Tensor:
    """alpha on the student."""
    given, flow.alpha = flow.alpha, 1 - flow.alpha
    found = before(flow)
    flow.alpha = given
    return found


def only_between(change: Callable[[Flow], Tensor]) -> Change:
    """Another divergence for 0 < alpha < 1."""

    def per_token(before: Stage, flow: Flow) -> Tensor:
        return before(flow) if flow.sampled or flow.alpha in (0, 1) else change(flow)

    return around("per_token", per_token)


def at_end(end: float, change: Callable[[Flow], Tensor]) -> Change:
    """Another divergence where alpha is ``end``, sampled tokens aside."""

    def per_token(before: Stage, flow: Flow) -> Tensor:
        return change(flow) if not flow.sampled and flow.alpha == end else before(flow)

    return around("per_token", per_token)


def limit_of_mixture(flow: Flow) -> Tensor:
    """The generalised Jensen-Shannon divergence at an end: 0, without gradient."""
    return 0 * stages.kl(flow.log_q, flow.log_p).detach() + 0 * flow.chosen


def forward_kl(flow: Flow) -> Tensor:
    return stages.kl(flow.log_p, flow.log_q)


def reverse_kl(flow: Flow) -> Tensor:
    return stages.kl(flow.log_q, flow.log_p)


def halves(flow: Flow) -> Tensor:
    """Both halves with the same weight."""
    return 0.5 * stages.kl(flow.log_p, flow.log_m) + 0.5 * stages.kl(flow.log_q, flow.log_m)


def unweighted(flow: Flow) -> Tensor:
    """The sum of both halves, unweighted."""
    return stages.kl(flow.log_p, flow.log_m) + stages.kl(flow.log_q, flow.log_m)


def even_mixture(flow: Flow) -> Tensor:
    """m = (p + q) / 2 whatever alpha is."""
    return stages.mix(flow.log_p, flow.log_q, 0.5)


def interpolated(flow: Flow) -> Tensor:
    """alpha KL(p || q) + (1 - alpha) KL(q || p): no mixture at all."""
    return flow.alpha * forward_kl(flow) + (1 - flow.alpha) * reverse_kl(flow)


def student_half(flow: Flow) -> Tensor:
    """The student's half alone."""
    return (1 - flow.alpha) * stages.kl(flow.log_q, flow.log_m)


def teacher_half(flow: Flow) -> Tensor:
    """The teacher's half alone."""
    return flow.alpha * stages.kl(flow.log_p, flow.log_m)


def log_mean_mixture(flow: Flow) -> Tensor:
    """A mixture of log-probs in place of probabilities."""
    return flow.alpha * flow.log_p + (1 - flow.alpha) * flow.log_q


def detached_student_weight(flow: Flow) -> Tensor:
    """q as a constant weight: sum sg(q) (log q - log .)."""
    weight = flow.log_q.detach().exp()
    if flow.alpha == 1:
        return (weight * (flow.log_q - flow.log_p)).sum(-1)
    teacher = stages.kl(flow.log_p, flow.log_m)
    return flow.alpha * teacher + (1 - flow.alpha) * (weight * (flow.log_q - flow.log_m)).sum(-1)


def constant_normaliser(flow: Flow) -> Tensor:
    """log-softmax whose logsumexp takes no gradient: nothing pulls the gradient's sum over the vocabulary to 0."""
    found: Tensor = flow.student - flow.student.logsumexp(-1, keepdim=True).detach()
    return found


def with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    """A value with another's gradient."""
    return value.detach() + (other - other.detach())


def softmax_less_target(flow: Flow) -> Tensor:
    """The forward KL with the whole vocabulary's gradient, whatever its categories are."""
    if flow.lt is None:
        return stages.divergence(flow)
    return with_gradient_of(stages.divergence(flow), stages.kl(flow.lt, flow.l))


def category_mean(before: Stage, flow: Flow) -> Tensor:
    """The mean over categories in place of their sum."""
    return before(flow) if flow.sampled else before(flow) / flow.log_q.shape[-1]


def scaled_by(value: float) -> Change:
    """D times a number."""
    return around("per_token", lambda before, flow: value * before(flow))


def floored_mass(floor: float) -> Change:
    """The renormalising mass held up at a floor."""

    def finish(logprobs: Tensor) -> Tensor:
        lowest = torch.as_tensor(floor).log().item()
        return logprobs - logprobs.logsumexp(-1, keepdim=True).clamp(min=lowest)

    return finished("both", in_place_of("renormalised", finish))


def smoothed(epsilon: float) -> Change:
    """log(x + epsilon) in place of log x on both sides."""

    def finish(flow: Flow, logprobs: Tensor) -> Tensor:
        return (stages.FINISHES[flow.finish](logprobs).exp() + epsilon).log()

    return finished("both", finish)


# --- sampled token ---


def only_sampled(change: Callable[[Flow], Tensor]) -> Change:
    """Another objective in the sampled-token mode."""
    return around("per_token", lambda before, flow: change(flow) if flow.sampled else before(flow))


def attached_difference(flow: Flow) -> Tensor:
    """(l - lt) l with the gradient of both factors."""
    return (flow.chosen - flow.teacher_chosen) * flow.chosen


def bare_difference(flow: Flow) -> Tensor:
    """l - lt: the gradient knows nothing of the teacher."""
    return flow.chosen - flow.teacher_chosen


def flipped_difference(flow: Flow) -> Tensor:
    return (flow.teacher_chosen - flow.chosen).detach() * flow.chosen


def floored_teacher(floor: float) -> Change:
    """The teacher's log-prob of the token held up at ``floor``."""

    def surrogate(flow: Flow) -> Tensor:
        return (flow.chosen - flow.teacher_chosen.clamp(min=floor)).detach() * flow.chosen

    return only_sampled(surrogate)


# --- temperature ---


def temperature_for(side: str) -> Change:
    """Only the "student" or the "teacher" tempered, or "neither"."""
    plain_student: Stage = lambda flow: flow.z  # noqa: E731
    plain_teacher: Stage = lambda flow: flow.zt  # noqa: E731
    if side == "student":
        return replacing(teacher=plain_teacher)
    if side == "teacher":
        return replacing(student=plain_student)
    return replacing(student=plain_student, teacher=plain_teacher)


def multiplied(flow: Flow) -> Tensor:
    return flow.z * flow.temperature


def tempered_after(flow: Flow) -> Tensor:
    """The teacher's log-probs divided by the temperature, and not normalised again."""
    found: Tensor = flow.zt.log_softmax(-1) / flow.temperature
    return found


def normaliser_at_one(flow: Flow) -> Tensor:
    """Tempered logits less the logsumexp of the untempered ones."""
    found: Tensor = flow.student - flow.z.logsumexp(-1, keepdim=True)
    return found


def support_normaliser_at_one(flow: Flow) -> Tensor:
    """The support's tempered logits less the logsumexp of the untempered ones."""
    if flow.k is None or flow.sampled:
        return stages.student_at_support(flow)
    found: Tensor = flow.student.gather(-1, flow.support) - flow.z.logsumexp(-1, keepdim=True)
    return found


def squared(before: Stage, flow: Flow) -> Tensor:
    """The loss times the temperature's square, as in Hinton's distillation."""
    return before(flow) * flow.temperature**2


def untempered_gradient(flow: Flow, gradient: Tensor) -> Tensor:
    """1 / tau missing in the gradient."""
    return gradient * flow.temperature


# --- ratio ---


def no_ratio(flow: Flow) -> Tensor:
    return torch.ones_like(flow.chosen)


def inverted(before: Stage, flow: Flow) -> Tensor | None:
    found = before(flow)
    return None if found is None else -found


def unclamped(flow: Flow) -> Tensor | None:
    """No clamp to +-20."""
    return None if flow.clip is None else flow.chosen.detach() - flow.old


def clamped_at(value: float) -> Change:
    """The log-ratio clamped to +-value."""
    return around("log_ratio", lambda before, flow: None if flow.clip is None else before(flow).clamp(-value, value))


def capped_at(value: float) -> Change:
    """The cap a constant, whatever the config says."""

    def ratio(flow: Flow) -> Tensor:
        return no_ratio(flow) if flow.log_ratio is None else flow.log_ratio.exp().clamp(max=value)

    return replacing(ratio=ratio)


def uncapped(flow: Flow) -> Tensor:
    return no_ratio(flow) if flow.log_ratio is None else flow.log_ratio.exp()


def capped_both_ways(flow: Flow) -> Tensor:
    """Capped below at 1 / cap as well."""
    return no_ratio(flow) if flow.log_ratio is None else flow.log_ratio.exp().clamp(1 / flow.clip, flow.clip)


def floored_at_one(flow: Flow) -> Tensor:
    return no_ratio(flow) if flow.log_ratio is None else flow.log_ratio.exp().clamp(max=flow.clip).clamp(min=1.0)


def log_capped(flow: Flow) -> Tensor:
    """The log-ratio capped at the cap itself."""
    return no_ratio(flow) if flow.log_ratio is None else flow.log_ratio.clamp(max=flow.clip).exp()


def zeroed_above(flow: Flow) -> Tensor:
    """Tokens above the cap dropped in place of capped."""
    if flow.log_ratio is None:
        return no_ratio(flow)
    found = flow.log_ratio.exp()
    return torch.where(found > flow.clip, torch.zeros_like(found), found)


def attached_log_ratio(flow: Flow) -> Tensor | None:
    """A gradient through the ratio."""
    return None if flow.clip is None else (flow.chosen - flow.old).clamp(-stages.LOG_CLAMP, stages.LOG_CLAMP)


def row_mean_ratio(before: Stage, flow: Flow) -> Tensor | None:
    """One ratio a row: exp of the row's mean log-ratio."""
    found = before(flow)
    if found is None:
        return None
    lengths = flow.mask.sum(-1, keepdim=True).clamp(min=1.0)
    return ((found * flow.mask).sum(-1, keepdim=True) / lengths).expand_as(found)


def batch_mean_ratio(before: Stage, flow: Flow) -> Tensor:
    """One ratio for the batch."""
    found = before(flow)
    if flow.log_ratio is None:
        return found
    return ((found * flow.mask).sum() / flow.mask.sum().clamp(min=1.0)).expand_as(found)


def against_teacher(flow: Flow) -> Tensor | None:
    """The teacher's log-probs in place of the behaviour policy's."""
    if flow.clip is None:
        return None
    return (flow.chosen - flow.teacher_chosen).detach().clamp(-stages.LOG_CLAMP, stages.LOG_CLAMP)


def untempered_ratio(flow: Flow) -> Tensor | None:
    """The current log-prob at temperature 1."""
    if flow.clip is None:
        return None
    raw = flow.z.log_softmax(-1).gather(-1, flow.y.unsqueeze(-1)).squeeze(-1).detach()
    return (raw - flow.old).clamp(-stages.LOG_CLAMP, stages.LOG_CLAMP)


def among_support(before: Stage, flow: Flow) -> Tensor | None:
    """The token's log-prob looked up in the support; a ratio of 1 where it is not there."""
    found = before(flow)
    if found is None or flow.k is None:
        return found
    inside = (flow.support == flow.y.unsqueeze(-1)).any(-1)
    return torch.where(inside, found, torch.zeros_like(found))


def old_tempered(before: Stage, flow: Flow) -> Tensor | None:
    """Behaviour log-probs, which are tempered, divided by the temperature once more."""
    if flow.clip is None:
        return None
    given, flow.old = flow.old, flow.old / flow.temperature
    found = before(flow)
    flow.old = given
    return found


def previous_token(before: Stage, flow: Flow) -> Tensor | None:
    """Behaviour log-probs one token late."""
    if flow.clip is None:
        return None
    given, flow.old = flow.old, flow.old.roll(1, dims=1)
    found = before(flow)
    flow.old = given
    return found


# --- autograd ---


def ignoring(incoming: Tensor) -> Tensor:
    """A gradient made in the forward, whatever arrives."""
    return torch.ones_like(incoming)


def autograd_changes() -> dict[str, Change]:
    """What goes wrong in a hand-written backward."""
    return {
        "incoming-ignored": arriving(ignoring),
        "gradient-doubled": graded(lambda flow, gradient: 2 * gradient),
        "gradient-negated": graded(lambda flow, gradient: -gradient),
        "gradient-of-first-row": graded(
            lambda flow, gradient: torch.cat((gradient[:1], torch.zeros_like(gradient[1:])))
        ),
    }


def low_precision(dtype: torch.dtype) -> Change:
    """Logits rounded to ``dtype`` on the way in."""

    def change(before: Pipeline) -> Pipeline:
        def accept(loss_input: Any, clean: bool = True) -> Flow:
            flow = before.accept(loss_input, clean)
            flow.z = flow.z.to(dtype).to(flow.z.dtype)
            return flow

        return replace(before, accept=accept)

    return change


def unsafe_logsumexp(flow: Flow) -> Tensor:
    """A log-sum-exp without its maximum."""
    return flow.student - flow.student.exp().sum(-1, keepdim=True).log()


# --- mask ---


def accepting_mask(function: Callable[[Flow], Tensor]) -> Change:
    """Another mask for everything that reads it, and what stands under the right one's zeros as it is given."""

    def change(before: Pipeline) -> Pipeline:
        def accept(loss_input: Any, clean: bool = False) -> Flow:
            flow = before.accept(loss_input, clean)
            flow.mask = function(flow)
            return flow

        return replace(before, accept=accept)

    return change


def to_first_hole(flow: Flow) -> Tensor:
    """A row's tokens up to the first one that does not count."""
    counts = flow.mask != 0
    found: Tensor = flow.mask * ((counts.cumsum(-1) == 0) | counts).to(flow.mask).cumprod(-1)
    return found


def as_prefix(flow: Flow) -> Tensor:
    """A row's first tokens, as many as count."""
    places = torch.arange(flow.mask.shape[-1], device=flow.mask.device)
    found: Tensor = (places < (flow.mask != 0).sum(-1, keepdim=True)).to(flow.mask)
    return found


def longest(mask: Tensor) -> int:
    """Columns up to the last one in which a row counts, at least 1."""
    return max(int(lengths_of(mask).max()), 1)


def detached_where_empty(count: Callable[[Flow], Any]) -> Change:
    """A constant of its own as the loss where ``count`` is 0."""

    def loss(before: Stage, flow: Flow) -> Tensor:
        if int(count(flow)):
            found: Tensor = before(flow)
            return found
        return torch.zeros((), dtype=flow.z.dtype, device=flow.z.device, requires_grad=torch.is_grad_enabled())

    return around("loss", loss)


# --- other algorithms ---


def claas_divergence(flow: Flow) -> Tensor:
    """CLaaS's: over the teacher's top-k, renormalised down to a mass of 1e-8; 0 at alpha = 0, a surrogate at 1."""
    if flow.alpha == 1:
        inside = (flow.support == flow.y.unsqueeze(-1)).any(-1)
        teacher = torch.where(inside, flow.teacher_chosen, torch.full_like(flow.teacher_chosen, -20.0))
        return (flow.chosen - teacher).detach() * flow.chosen
    return limit_of_mixture(flow) if flow.alpha == 0 else stages.jensen_shannon(flow)


def claas_distribution(flow: Flow, logprobs: Tensor) -> Tensor:
    """Renormalised down to a mass of 1e-8."""
    return logprobs - logprobs.logsumexp(-1, keepdim=True).clamp(min=torch.tensor(1e-8).log().item())


def forward_kl_top_k(flow: Flow) -> Tensor:
    """verl's forward_kl_topk: no renormalisation, log-probs from -10 up, in [0, 10]."""
    student, teacher = flow.a.clamp(min=-10.0), flow.b.clamp(min=-10.0)
    return (teacher.exp() * (teacher - student)).sum(-1).clamp(0.0, 10.0)


def whole_support(flow: Flow) -> Tensor:
    """Every token of the vocabulary."""
    return torch.arange(flow.student.shape[-1], device=flow.student.device).expand(flow.student.shape)


WITHOUT_TAIL = finished("both", in_place_of("tail", stages.renormalised))
OVER_ALL = both(replacing(support=whole_support), finished("both", lambda flow, logprobs: logprobs))
OVER_TEACHERS_TOP_K = both(
    replacing(support=teachers_support),
    finished("both", claas_distribution),
    around("per_token", lambda before, flow: before(flow) if flow.sampled else claas_divergence(flow)),
)
FORWARD_KL_TOP_K = both(
    replacing(support=teachers_support),
    around("per_token", lambda before, flow: before(flow) if flow.sampled else forward_kl_top_k(flow)),
)


def increased(stage: str) -> Callable[[float], Change]:
    """A constant added to a count."""

    def by(epsilon: float) -> Change:
        return around(stage, lambda before, flow: before(flow) + epsilon)

    return by


# --- a step of several calls ---


def kept_for_the_step(stage: str) -> Change:
    """What the first call computes there is kept for every call with the same options object, as a step's have."""
    held: dict[str, Any] = {}

    def read(flow: Flow, loss_input: Any) -> None:
        flow.options = loss_input.training

    def first(before: Stage, flow: Flow) -> Any:
        if held.get("options") is not flow.options:
            held.update(options=flow.options, value=before(flow))
        return held["value"]

    return both(accepting(read), around(stage, first))


def read_once(*names: str) -> Change:
    """Fields of the input, ``training`` or masks, read once per object: what is written into it later is not seen."""

    def change(before: Pipeline) -> Pipeline:
        held: dict[str, tuple[Any, Any]] = {}

        def once(name: str, now: Any) -> Any:
            if name not in held or held[name][0] is not now:
                held[name] = now, now.detach().clone() if isinstance(now, Tensor) else replace(now)
            return held[name][1]

        def accept(loss_input: Any, clean: bool = True) -> Flow:
            kept = {name: once(name, getattr(loss_input, name)) for name in names}
            return before.accept(replace(loss_input, **kept), clean)

        return replace(before, accept=accept)

    return change


# --- metrics ---


def measuring(**changes: Callable[[Flow], Tensor]) -> Change:
    """Other metrics."""

    def change(before: Pipeline) -> Pipeline:
        def result(flow: Flow) -> Result:
            return {**before.result(flow), **{name: function(flow) for name, function in changes.items()}}

        return replace(before, result=result)

    return change
