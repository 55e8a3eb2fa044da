"""Ways to get the generalised Jensen-Shannon divergence wrong (alpha < 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo_conformance.protocol import MASS_FLOOR
from sdpo_conformance.specs.claas.defects.defect import DIVERGENCES, Change, Defect, around, both, replacing
from sdpo_conformance.specs.claas.defects.loss_parts import (
    LOG_ZERO,
    Part,
    Work,
    jensen_shannon,
    kl,
    log_of,
    mix,
    renormalise,
    student_distribution,
)
from sdpo_conformance.specs.claas.defects.sources import cite


def raw_teacher(w: Work) -> Tensor:
    """tau as it came."""
    return w.tau.clamp(min=LOG_ZERO)


def raw_student(w: Work) -> Tensor:
    """l[S] as it is."""
    return w.l_k


def with_tail(logprobs: Tensor) -> Tensor:
    """The support's log-probs, and one entry more for all the mass outside it."""
    mass = logprobs.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7)
    return torch.cat([logprobs, torch.log1p(-mass)], dim=-1)


def onto_student_support(w: Work) -> None:
    """The student's K largest in place of the teacher's; -20 where the teacher's value is not known."""
    own = w.l.detach().topk(w.support.shape[-1], dim=-1).indices
    known = own.unsqueeze(-1) == w.support.unsqueeze(-2)
    tau = torch.where(known, w.tau.unsqueeze(-2), 0.0).sum(-1)
    w.tau, w.support = torch.where(known.any(-1), tau, -20.0), own


def at_own_top_k(before: Part, w: Work) -> Tensor:
    """l at the student's top-k; from here on ``w.tau`` and ``w.support`` are on it too."""
    onto_student_support(w)
    return before(w)


def valued(value: Tensor, gradient_of: Tensor) -> Tensor:
    """One tensor's value with another's gradient."""
    return value.detach() + (gradient_of - gradient_of.detach())


def teacher_part(w: Work) -> Tensor:
    """alpha KL(p, m)."""
    return w.alpha * kl(w.log_p, w.log_m)


def student_part(w: Work) -> Tensor:
    """(1 - alpha) KL(q, m)."""
    return (1 - w.alpha) * kl(w.log_q, w.log_m)


def with_alpha(function: Callable[[float], float]) -> Change:
    """Another alpha for everything that reads it."""

    def accept(before: Callable[[Any], Work], loss_input: Any) -> Work:
        w = before(loss_input)
        w.alpha = function(w.alpha)
        return w

    return around("accept", accept)


def keeping_support(function: Callable[[int], int]) -> Change:
    """Only the first entries of the support, however many ``function`` says."""

    def accept(before: Callable[[Any], Work], loss_input: Any) -> Work:
        w = before(loss_input)
        keep = function(w.support.shape[-1])
        w.tau, w.support = w.tau[..., :keep], w.support[..., :keep]
        return w

    return around("accept", accept)


def added_to_mass(logprobs: Tensor, mass: float = 1e-8) -> Tensor:
    """log of exp(x_k) / (sum_k exp(x_k) + mass)."""
    log_mass = torch.logsumexp(logprobs, dim=-1, keepdim=True)
    return logprobs - torch.logaddexp(log_mass, torch.full_like(log_mass, math.log(mass)))


def floored_entries(logprobs: Tensor) -> Tensor:
    """Every probability lifted to 1e-8 before they are renormalised."""
    return renormalise(logprobs.clamp(min=math.log(1e-8)))


def without_floor(logprobs: Tensor) -> Tensor:
    """log of exp(x_k) / sum_k exp(x_k), however small the sum."""
    return torch.log_softmax(logprobs, dim=-1)


def single_entry_kept(before: Part, w: Work) -> Tensor:
    """log q, not renormalised where the support is one token."""
    return w.l_k if w.l_k.shape[-1] == 1 else before(w)


def logged_with(epsilon: float, w: Work) -> Tensor:
    """D with epsilon added inside every logarithm."""
    p, q, m = w.log_p.exp(), w.log_q.exp(), w.log_m.exp()
    log_m = torch.log(m + epsilon)
    on_teacher = (p * (torch.log(p + epsilon) - log_m)).sum(-1)
    on_student = (q * (torch.log(q + epsilon) - log_m)).sum(-1)
    return w.alpha * on_teacher + (1 - w.alpha) * on_student


def clipped_terms(w: Work) -> Tensor:
    """D with every entry's contribution clipped at 0.05."""
    on_teacher = w.log_p.exp() * (w.log_p - w.log_m)
    on_student = w.log_q.exp() * (w.log_q - w.log_m)
    return (w.alpha * on_teacher + (1 - w.alpha) * on_student).clamp(max=0.05).sum(-1)


def absolute_terms(w: Work) -> Tensor:
    """D with the absolute value of every entry's contribution."""
    on_teacher = w.log_p.exp() * (w.log_p - w.log_m).abs()
    on_student = w.log_q.exp() * (w.log_q - w.log_m).abs()
    return (w.alpha * on_teacher + (1 - w.alpha) * on_student).sum(-1)


def in_bfloat16(w: Work) -> Tensor:
    """log_softmax with its result rounded to bfloat16, whatever the input."""
    return w.l.to(torch.bfloat16).to(w.l.dtype).gather(-1, w.support)


def first_entries_only(keep: int, before: Part, w: Work) -> Tensor:
    """l[S] whose entries past ``keep`` pass no gradient."""
    at_support = before(w)
    return torch.cat([at_support[..., :keep], at_support[..., keep:].detach()], dim=-1)


AGREES_ON_SUPPORT = "Nothing but the full vocabulary as support (K = V), where the two agree."
METRICS_ONLY = "Reading the metrics: every value is right, the gradient is not."


def alpha_rounded(before: Callable[[Any], Work], loss_input: Any) -> Work:
    """alpha as bfloat16 holds it."""
    w = before(loss_input)
    w.alpha = torch.tensor(w.alpha, dtype=torch.bfloat16).item()
    return w


def coefficients(w: Work, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What a hand-written backward of D has: the support's own entries (B, T, K), and the factor of the softmax
    (B, T), which is 0 down to the mass floor. ``weights``: those of the centring term, q unless given."""
    q, slope = w.log_q.exp(), (1 - w.alpha) * (w.log_q - w.log_m)
    total = ((q if weights is None else weights) * slope).sum(-1, keepdim=True)
    floored = w.l_k.exp().sum(-1, keepdim=True) < MASS_FLOOR
    own = q * slope - torch.where(floored, 0.0, total) * q
    return own.detach(), torch.where(floored, total, 0.0).squeeze(-1).detach()


def by_hand(own: Tensor, dense: Tensor, support: Tensor, w: Work) -> Tensor:
    """D with the gradient of these coefficients, put where ``support`` says."""
    entries = (own * w.z.gather(-1, support)).sum(-1)
    return valued(jensen_shannon(w), entries - dense * w.z.logsumexp(-1))


def centred_by_given_mass(w: Work) -> Tensor:
    """The centring term sums over the student's probabilities before they are renormalised."""
    return by_hand(*coefficients(w, w.l_k.exp()), w.support, w)


def scattered_in_order(w: Work) -> Tensor:
    """The support's entries written at its ids in ascending order."""
    return by_hand(*coefficients(w), w.support.sort(-1).values, w)


def response_overwritten(w: Work) -> Tensor:
    """The response token's entry is stored and not added: the divergence's own is lost there."""
    own, dense = coefficients(w)
    return by_hand(torch.where(w.support == w.y.unsqueeze(-1), 0.0, own), dense, w.support, w)


def lanes_counted(before: Callable[[Any], Work], loss_input: Any) -> Work:
    """K padded to a power of two with token 0, impossible to the teacher."""
    w = before(loss_input)
    lanes = (1 << (w.support.shape[-1] - 1).bit_length()) - w.support.shape[-1]
    w.tau, w.support = F.pad(w.tau, (0, lanes), value=LOG_ZERO), F.pad(w.support, (0, lanes))
    return w


def transposed(before: Part, w: Work) -> Tensor:
    """D made (T, B) and read as (B, T)."""
    found = before(w)
    return found.T.reshape(found.shape)


def nothing_for_one(w: Work) -> Tensor:
    """D of a support of one token taken for 0."""
    return 0 * w.chosen if w.support.shape[-1] == 1 and not w.reverse else w.divergence


def support_in_sixteen_bits(before: Callable[[Any], Work], loss_input: Any) -> Work:
    """Ids of the support with their upper bits lost."""
    w = before(loss_input)
    w.support = w.support & 0xFFFF
    return w


def floor_under_grad(w: Work) -> Tensor:
    """log q with the floor on its mass only where a gradient is made."""
    if torch.is_grad_enabled() and w.z.requires_grad:
        return student_distribution(w)
    return w.l_k.log_softmax(-1)


DEFECTS = (
    Defect(
        name="no-renormalisation",
        sentence="Neither side is renormalised over the teacher's support.",
        violates=("GJS-2", "GJS-1", "GJS-6"),
        fix="Divide both sides by their mass on the support, floored at 1e-8, before the divergence.",
        change=replacing(teacher_distribution=raw_teacher, student_distribution=raw_student),
        seen=cite("verl-project/verl#7856"),
        usable_for=AGREES_ON_SUPPORT,
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="no-renormalisation-clamped",
        sentence="Neither side is renormalised, and the negative values that this gives are clamped to 0.",
        violates=("GJS-2", "GJS-1", "GJS-9"),
        fix="Renormalise both sides over the support; a divergence of distributions needs no clamp.",
        change=replacing(
            teacher_distribution=raw_teacher,
            student_distribution=raw_student,
            jensen_shannon=lambda w: jensen_shannon(w).clamp(min=0),
        ),
        seen=cite("verl-project/verl#7856"),
        usable_for=AGREES_ON_SUPPORT,
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="teacher-alone-renormalised",
        sentence="The teacher is renormalised over the support, the student keeps its full-vocabulary mass.",
        violates=("GJS-2", "GJS-1", "GJS-6"),
        fix="Renormalise the student over the support as well.",
        change=replacing(student_distribution=raw_student),
        usable_for=AGREES_ON_SUPPORT,
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="student-alone-renormalised",
        sentence="The student is renormalised over the support, the teacher keeps its full-vocabulary mass.",
        violates=("GJS-2", "GJS-1", "GJS-4"),
        fix="Renormalise the teacher over the support as well.",
        change=replacing(teacher_distribution=raw_teacher),
        usable_for=AGREES_ON_SUPPORT,
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="tail-bucket",
        sentence="The mass outside the support is one more outcome of the divergence, in place of renormalising.",
        violates=("GJS-2", "GJS-1", "GJS-6"),
        fix="Drop the tail bucket and renormalise both sides over the teacher's top-k.",
        change=replacing(
            teacher_distribution=lambda w: with_tail(w.tau.clamp(min=LOG_ZERO)),
            student_distribution=lambda w: with_tail(w.l_k),
        ),
        seen=cite("Gen-Verse/OpenClaw-RL#4", "verl-project/verl#7855"),
        usable_for=AGREES_ON_SUPPORT,
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="student-top-k",
        sentence="The support is the student's top-k, not the teacher's.",
        violates=("GJS-2", "GJS-1"),
        fix="Gather the student's log-probs at teacher_indices; never take a top-k of the student.",
        change=around("student_at_support", at_own_top_k),
        seen=cite("verl-project/verl#6676", "verl-project/verl#7425"),
        usable_for=AGREES_ON_SUPPORT,
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="alpha-swapped",
        sentence="alpha weighs the student where it has to weigh the teacher.",
        violates=("GJS-3", "GJS-1", "GJS-7"),
        fix="m = alpha p + (1 - alpha) q, and alpha KL(p, m) + (1 - alpha) KL(q, m).",
        change=replacing(
            mixture=lambda w: mix(w.log_p, w.log_q, 1 - w.alpha),
            jensen_shannon=lambda w: (1 - w.alpha) * kl(w.log_p, w.log_m) + w.alpha * kl(w.log_q, w.log_m),
        ),
        seen=cite("huggingface/trl#3043", "linkedin/Liger-Kernel#425", "kfallah/CLaaS#1"),
        usable_for="alpha = 0.5 only, where the two agree.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="alpha-swapped-in-mixture",
        sentence="The mixture is (1 - alpha) p + alpha q; the two divergences are weighted as they should be.",
        violates=("GJS-3", "GJS-1"),
        fix="m = alpha p + (1 - alpha) q.",
        change=replacing(mixture=lambda w: mix(w.log_p, w.log_q, 1 - w.alpha)),
        seen=cite("huggingface/trl#3043"),
        usable_for="alpha = 0.5 only, where the two agree.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="alpha-swapped-outside",
        sentence="The mixture is right, but the two divergences carry each other's weights.",
        violates=("GJS-3", "GJS-1"),
        fix="alpha KL(p, m) + (1 - alpha) KL(q, m).",
        change=replacing(
            jensen_shannon=lambda w: (1 - w.alpha) * kl(w.log_p, w.log_m) + w.alpha * kl(w.log_q, w.log_m)
        ),
        seen=cite("modelscope/ms-swift#10213", "huggingface/trl#6780"),
        usable_for="alpha = 0.5 only, where the two agree.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="alpha-ignored",
        sentence="alpha is 0.5 whatever the config says.",
        violates=("GJS-3", "GJS-1", "GJS-7"),
        fix="Read training.alpha.",
        change=with_alpha(lambda alpha: alpha if alpha >= 1 else 0.5),
        seen=cite("huggingface/trl#5731"),
        usable_for="alpha = 0.5 and alpha = 1.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="alpha-in-bfloat16",
        sentence="alpha is held in bfloat16, whatever the input: 0.3 is 0.30078.",
        violates=("GJS-3", "GJS-1"),
        fix="Keep alpha a Python float, or in float32.",
        change=around("accept", alpha_rounded),
        usable_for="alpha = 0.5 only, where the two agree.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="mixture-half-and-half",
        sentence="The mixture is (p + q) / 2 at every alpha; only the outer weights follow the config.",
        violates=("GJS-3", "GJS-1"),
        fix="m = alpha p + (1 - alpha) q.",
        change=replacing(mixture=lambda w: mix(w.log_p, w.log_q, 0.5)),
        usable_for="alpha = 0.5 and alpha = 1.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="outer-weights-half",
        sentence="The two divergences are averaged with 1/2 each at every alpha; only the mixture follows the config.",
        violates=("GJS-3", "GJS-1"),
        fix="alpha KL(p, m) + (1 - alpha) KL(q, m).",
        change=replacing(jensen_shannon=lambda w: 0.5 * (kl(w.log_p, w.log_m) + kl(w.log_q, w.log_m))),
        usable_for="alpha = 0.5 and alpha = 1.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="outer-weights-missing",
        sentence="The two divergences are added without their weights.",
        violates=("GJS-1", "GJS-6"),
        fix="alpha KL(p, m) + (1 - alpha) KL(q, m).",
        change=replacing(jensen_shannon=lambda w: kl(w.log_p, w.log_m) + kl(w.log_q, w.log_m)),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="geometric-mixture",
        sentence="The mixture is taken in log space: log m = alpha log p + (1 - alpha) log q.",
        violates=("GJS-1",),
        fix="log m = logaddexp(log alpha + log p, log(1 - alpha) + log q).",
        change=replacing(mixture=lambda w: w.alpha * w.log_p + (1 - w.alpha) * w.log_q),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="kl-arguments-flipped",
        sentence="KL(m, p) and KL(m, q) in place of KL(p, m) and KL(q, m): F.kl_div's arguments the other way round.",
        violates=("GJS-1",),
        fix="KL(a, m) is F.kl_div(log m, log a, log_target=True): the reference distribution comes second.",
        change=replacing(
            jensen_shannon=lambda w: w.alpha * kl(w.log_m, w.log_p) + (1 - w.alpha) * kl(w.log_m, w.log_q)
        ),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="forward-kl",
        sentence="The divergence is KL(p, q) at every alpha below 1.",
        violates=("GJS-1", "GJS-6", "GJS-7"),
        fix="Take both divergences to the mixture.",
        change=replacing(jensen_shannon=lambda w: kl(w.log_p, w.log_q)),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="reverse-kl-on-support",
        sentence="The divergence is KL(q, p) at every alpha below 1.",
        violates=("GJS-1", "GJS-6", "GJS-7"),
        fix="Take both divergences to the mixture.",
        change=replacing(jensen_shannon=lambda w: kl(w.log_q, w.log_p)),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="alpha-zero-forward-kl",
        sentence="alpha = 0 is read as the forward KL of teacher and student.",
        violates=("GJS-7",),
        fix="At alpha = 0 the mixture is the student: the divergence is 0 and has no gradient.",
        change=around("jensen_shannon", lambda before, w: before(w) if w.alpha > 0 else kl(w.log_p, w.log_q)),
        seen=cite("modelscope/ms-swift#10078", "modelscope/twinkle#112"),
        usable_for="alpha > 0.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="alpha-zero-reverse-kl",
        sentence="alpha = 0 is read as the reverse KL of student and teacher.",
        violates=("GJS-7",),
        fix="At alpha = 0 the mixture is the student: the divergence is 0 and has no gradient.",
        change=around("jensen_shannon", lambda before, w: before(w) if w.alpha > 0 else kl(w.log_q, w.log_p)),
        seen=cite("modelscope/twinkle#112"),
        usable_for="alpha > 0.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="alpha-clipped",
        sentence="alpha is clipped to [0.001, 0.999]: 0 gives a divergence, 1 another objective.",
        violates=("GJS-7", "RKL-1"),
        fix="Treat alpha = 0 and alpha = 1 as the cases they are.",
        change=with_alpha(lambda alpha: min(max(alpha, 1e-3), 1 - 1e-3)),
        seen=cite("verl-project/verl-recipe#151"),
        usable_for="0.001 <= alpha <= 0.999.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="log-base-two",
        sentence="Logarithms are taken to base 2: bits, not nats.",
        violates=("GJS-1", "GJS-6"),
        fix="Use natural logarithms.",
        change=replacing(jensen_shannon=lambda w: jensen_shannon(w) / math.log(2)),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="mean-over-support",
        sentence="The entries of the support are averaged, not summed.",
        violates=("GJS-1",),
        fix="Sum over the support.",
        change=replacing(jensen_shannon=lambda w: jensen_shannon(w) / w.log_p.shape[-1]),
        usable_for="K = 1, where the divergence is 0 anyway.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="temperature-on-both",
        sentence="Teacher and student are softened with temperature 2 inside the divergence.",
        violates=("GJS-1",),
        fix="The divergence has no temperature.",
        change=both(
            around("student_at_support", lambda before, w: (before(w) / 2).clamp(min=LOG_ZERO)),
            around("teacher_distribution", lambda before, w: renormalise(before(w) / 2)),
        ),
        seen=cite("huggingface/trl#5731"),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="temperature-on-student",
        sentence="The student's logits are divided by a temperature of 0.8 inside the divergence, the teacher's not.",
        violates=("GJS-1", "GJS-6"),
        fix="The divergence has no temperature.",
        change=around("student_at_support", lambda before, w: before(w) / 0.8),
        seen=cite("huggingface/trl#3029", "huggingface/trl#5731"),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="divergence-of-one-token-skipped",
        sentence="The divergence over a support of one token is taken for 0 without being computed.",
        violates=("GJS-8",),
        fix="Below a mass of 1e-8 one token's distribution is not 1: compute it as for any other support.",
        change=replacing(per_token=nothing_for_one),
        usable_for="Supports of two tokens or more.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="support-ids-of-sixteen-bits",
        sentence="Ids of the support are kept in 16 bits: from 65536 on they are other tokens.",
        violates=("NUM-1", "NUM-2"),
        fix="Keep ids in 32 or 64 bits.",
        change=around("accept", support_in_sixteen_bits),
        usable_for="Vocabularies of up to 65536 tokens.",
    ),
    Defect(
        name="mass-floor-under-grad-alone",
        sentence="Where no gradient is made, the student's support is renormalised without the floor on its mass.",
        violates=("GRAD-6",),
        fix="Compute the values in one way, whether or not a gradient is asked for.",
        change=replacing(student_distribution=floor_under_grad),
        usable_for="Training.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="epsilon-in-logarithm",
        sentence="1e-5 is added inside the logarithms.",
        violates=("GJS-1", "GJS-9"),
        fix="Compute in log space, with 0 log 0 = 0; no epsilon.",
        change=replacing(jensen_shannon=lambda w: logged_with(1e-5, w)),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="epsilon-in-mixture",
        sentence="1e-4 is added to the mixture inside its logarithm.",
        violates=("GJS-1", "GJS-6"),
        fix="log m = logaddexp(log alpha + log p, log(1 - alpha) + log q); no epsilon.",
        change=around("mixture", lambda before, w: torch.log(before(w).exp() + 1e-4)),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="terms-clipped",
        sentence="Each entry's contribution to the divergence is clipped at 0.05.",
        violates=("GJS-1", "GJS-9"),
        fix="Sum the contributions as they are.",
        change=replacing(jensen_shannon=clipped_terms),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="absolute-terms",
        sentence="The absolute value of each entry's contribution is summed.",
        violates=("GJS-1", "GJS-6"),
        fix="Sum the signed contributions; only the sum is non-negative.",
        change=replacing(jensen_shannon=absolute_terms),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="divergence-offset",
        sentence="1e-5 is added to each token's divergence, so equal distributions are not at 0.",
        violates=("GJS-6", "GJS-1"),
        fix="Return the divergence itself.",
        change=replacing(jensen_shannon=lambda w: jensen_shannon(w) + 1e-5),
        seen=cite("erfanzar/EasyDeL#267"),
        usable_for="Training: the gradient is right, the values are off by a constant.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="faint-entries-dropped",
        sentence="Entries of the support that the teacher gives less than e^-50 are taken for padding, and leave the "
        "student's sum too.",
        violates=("GJS-2",),
        fix="Take every entry of the support: it has no padding.",
        change=around("student_at_support", lambda before, w: before(w).masked_fill(w.tau < -50.0, LOG_ZERO)),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="single-token-support",
        sentence="A support of one token is not renormalised, so its divergence is not 0.",
        violates=("GJS-6", "GJS-2"),
        fix="Renormalise whatever the size of the support; K = 1 then gives 0.",
        change=around("student_distribution", single_entry_kept),
        usable_for="K > 1.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="support-order-lost",
        sentence="The student is gathered at sorted token ids while the teacher keeps the order of its top-k.",
        violates=("GJS-5", "GJS-1"),
        fix="Keep both sides in the order of teacher_indices.",
        change=replacing(student_at_support=lambda w: w.l.gather(-1, w.support.sort(-1).values).clamp(min=LOG_ZERO)),
        seen=cite("kvablack/ddpo-pytorch#29"),
        usable_for="Supports sorted by token id.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="support-padding-counted",
        sentence="K is padded to a power of two with token id 0, whose student probability counts each time.",
        violates=("GJS-2", "FUS-6"),
        fix="Mask the padding on both sides: -inf for the student's log-probs as for the teacher's.",
        change=around("accept", lanes_counted),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="tokens-transposed",
        sentence="The divergence is computed for (T, B) and read as (B, T): tokens change places.",
        violates=("RED-5", "GJS-1", "IS-6"),
        fix="Transpose back before the rows are read.",
        change=around("per_token", transposed),
        usable_for="Batches of one row, as the step loop makes them.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="raw-logits-on-support",
        sentence="The student's logits on the support are renormalised without their logsumexp over the vocabulary,"
        " so the mass floor sees another mass.",
        violates=("GJS-8", "GJS-4"),
        fix="Subtract the logsumexp over the whole vocabulary before the support's mass is compared with 1e-8.",
        change=replacing(student_at_support=lambda w: w.z.gather(-1, w.support).clamp(min=LOG_ZERO)),
        usable_for="Students whose mass on the support is above 1e-8, with logits not far below 0.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="mass-floor-missing",
        sentence="The support's mass is divided out however small it is.",
        violates=("GJS-8",),
        fix="Divide by max(mass, 1e-8).",
        change=replacing(
            teacher_distribution=lambda w: without_floor(w.tau.clamp(min=LOG_ZERO)),
            student_distribution=lambda w: without_floor(w.l_k),
        ),
        usable_for="Supports that hold more than 1e-8 of both distributions, as a teacher's top-100 does.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="mass-floor-on-teacher-only",
        sentence="The 1e-8 floor applies to the teacher's mass, not to the student's.",
        violates=("GJS-8",),
        fix="Divide by max(mass, 1e-8) on both sides.",
        change=replacing(student_distribution=lambda w: without_floor(w.l_k)),
        usable_for="Students that hold more than 1e-8 of their mass on the support.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="mass-floor-on-student-only",
        sentence="The 1e-8 floor applies to the student's mass, not to the teacher's.",
        violates=("GJS-8",),
        fix="Divide by max(mass, 1e-8) on both sides.",
        change=replacing(teacher_distribution=lambda w: without_floor(w.tau.clamp(min=LOG_ZERO))),
        usable_for="Teachers that hold more than 1e-8 of their mass on the support: any top-k does.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="mass-floor-too-high",
        sentence="The mass floor is 1e-6.",
        violates=("GJS-8",),
        fix="The floor is 1e-8.",
        change=replacing(
            teacher_distribution=lambda w: renormalise(w.tau.clamp(min=LOG_ZERO), 1e-6),
            student_distribution=lambda w: renormalise(w.l_k, 1e-6),
        ),
        usable_for="Supports that hold more than 1e-6 of both distributions.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="mass-floor-added",
        sentence="1e-8 is added to the support's mass where the mass is to be clamped from below.",
        violates=("GJS-8",),
        fix="Divide by max(mass, 1e-8), not by mass + 1e-8.",
        change=replacing(
            teacher_distribution=lambda w: added_to_mass(w.tau.clamp(min=LOG_ZERO)),
            student_distribution=lambda w: added_to_mass(w.l_k),
        ),
        usable_for="Supports that hold much more than 1e-8 of both distributions.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="mass-floor-per-entry",
        sentence="Each probability is lifted to 1e-8, not their sum.",
        violates=("GJS-8", "GJS-9"),
        fix="Clamp the support's mass, not its entries.",
        change=replacing(
            teacher_distribution=lambda w: floored_entries(w.tau),
            student_distribution=lambda w: floored_entries(w.l_k),
        ),
        seen=cite("ByteDance-Seed/VeOmni#771"),
        usable_for="Supports whose every entry has more than 1e-8 of both distributions.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="divergence-detached",
        sentence="No gradient flows through the divergence.",
        violates=("GJS-9",),
        fix="Compute the divergence of the student's log-probs with their graph.",
        change=replacing(per_token=lambda w: w.divergence.detach() + 0 * w.chosen),
        seen=cite("Goekdeniz-Guelmez/mlx-lm-lora#69"),
        usable_for=METRICS_ONLY,
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="divergence-gradient-halved",
        sentence="The value is right, the gradient of the divergence is half of it.",
        violates=("GJS-9",),
        fix="dD/dz[S_k] = q_k (s_k - sum_j q_j s_j) with s = (1 - alpha) (log q - log m).",
        change=replacing(per_token=lambda w: valued(w.divergence, w.divergence / 2)),
        usable_for=METRICS_ONLY,
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="divergence-gradient-negated",
        sentence="The value is right, the gradient of the divergence has the other sign.",
        violates=("GJS-9",),
        fix="dD/dz[S_k] = q_k (s_k - sum_j q_j s_j) with s = (1 - alpha) (log q - log m).",
        change=replacing(per_token=lambda w: valued(w.divergence, -w.divergence)),
        seen=cite("fla-org/flash-linear-attention#1076"),
        usable_for=METRICS_ONLY,
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="student-mass-detached",
        sentence="The student's mass on the support is divided out as a constant, so its gradient is missing.",
        violates=("GJS-9",),
        fix="Differentiate through the normaliser: subtract q_k sum_j q_j s_j.",
        change=replacing(
            student_distribution=lambda w: (
                w.l_k - torch.logsumexp(w.l_k, -1, keepdim=True).clamp(min=math.log(1e-8)).detach()
            )
        ),
        seen=cite("NVIDIA-NeMo/Automodel#2428"),
        usable_for=METRICS_ONLY,
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="gradient-centred-by-given-mass",
        sentence="The gradient's centring term sums over the student's probabilities before they are renormalised.",
        violates=("GJS-9",),
        fix="dD/dz_k = q_k (g_k - sum q g): q is renormalised over the support in both places.",
        change=replacing(jensen_shannon=centred_by_given_mass),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="gradient-at-sorted-ids",
        sentence="The backward writes the support's entries at its ids in ascending order, not at their own.",
        violates=("GJS-9", "GJS-5"),
        fix="Sort ids and coefficients together.",
        change=replacing(jensen_shannon=scattered_in_order),
        usable_for="Supports sorted by token id.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="response-gradient-overwrites",
        sentence="The response token's gradient is stored, not added: the divergence's own entry is lost there.",
        violates=("GJS-9",),
        fix="scatter_add, not scatter: the response token may be in the support.",
        change=replacing(jensen_shannon=response_overwritten),
    ),
    Defect(
        name="mixture-detached-below-floor",
        sentence="The mixture is held constant in the backward: exact while the student is normalised, wrong below"
        " the mass floor.",
        violates=("GJS-8", "GJS-9"),
        fix="Below the floor add the terms that a detached mixture drops, or let autograd through the mixture.",
        change=around("mixture", lambda before, w: before(w).detach()),
        usable_for="Students that hold more than 1e-8 of their mass on the support.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="teacher-part-without-gradient",
        sentence="KL(p, m) is taken for a constant, though m depends on the student.",
        violates=("GJS-9",),
        fix="Differentiate both divergences.",
        change=replacing(jensen_shannon=lambda w: teacher_part(w).detach() + student_part(w)),
        usable_for=METRICS_ONLY,
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="student-part-without-gradient",
        sentence="KL(q, m) is taken for a constant.",
        violates=("GJS-9",),
        fix="Differentiate both divergences.",
        change=replacing(jensen_shannon=lambda w: teacher_part(w) + student_part(w).detach()),
        usable_for=METRICS_ONLY,
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="gradient-of-other-objective",
        sentence="The value is the divergence, the gradient is that of KL(p, q): softmax minus teacher.",
        violates=("GJS-9",),
        fix="dD/dz[S_k] = q_k (s_k - sum_j q_j s_j) with s = (1 - alpha) (log q - log m).",
        change=replacing(jensen_shannon=lambda w: valued(jensen_shannon(w), kl(w.log_p, w.log_q))),
        usable_for=METRICS_ONLY,
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="support-tile-without-gradient",
        sentence="Entries of the support past the 16th are in the value but pass no gradient.",
        violates=("GJS-9",),
        fix="Loop over every tile of the support in the backward too.",
        change=around("student_at_support", lambda before, w: first_entries_only(16, before, w)),
        usable_for="teacher_top_k up to 16.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="divergence-in-bfloat16",
        sentence="The student's log-probs are rounded to bfloat16 before the divergence, whatever the input.",
        violates=("NUM-1", "GJS-1"),
        fix="Keep log-probs in float32.",
        change=replacing(
            student_at_support=lambda w: (
                valued(F.log_softmax(w.z, -1).bfloat16().to(w.z), w.l).gather(-1, w.support).clamp(min=LOG_ZERO)
            )
        ),
        seen=cite("genlm/genlm-backend#66", "erfanzar/EasyDeL#267"),
        usable_for="bfloat16 runs that bear its rounding.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="probabilities-in-float16",
        sentence="p and q are held in float16 before the logarithm: what is below 6e-8 becomes 0.",
        violates=("NUM-1", "GJS-1"),
        fix="Keep probabilities in float32, or stay in log space.",
        change=replacing(
            student_distribution=lambda w: valued(
                renormalise(w.l_k).exp().half().to(w.l_k).log().clamp(min=LOG_ZERO), renormalise(w.l_k)
            )
        ),
        usable_for="Nothing that needs the tail of the support.",
        capabilities=DIVERGENCES,
    ),
)

__all__ = [
    "DEFECTS",
    "keeping_support",
    "log_of",
    "onto_student_support",
    "valued",
    "with_alpha",
    "with_tail",
]
