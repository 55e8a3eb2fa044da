"""Ways to lose precision or finiteness that leave ordinary inputs right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.defects import wrong_reduction as reduction
from sdpo_conformance.specs.claas.defects.defect import DIVERGENCES, Defect, around, replacing
from sdpo_conformance.specs.claas.defects.loss_parts import Work, renormalise, token_mean, weighted
from sdpo_conformance.specs.claas.defects.sources import cite
from sdpo_conformance.specs.claas.defects.wrong_divergence import valued

HALVES = (torch.bfloat16, torch.float16)
FLOAT32_INPUT = "float32 input."


def half(w: Work) -> bool:
    """Whether the caller handed over half precision."""
    return w.given in HALVES


def log_of_sum(w: Work) -> Tensor:
    """l without subtracting the largest logit first."""
    return w.z - w.z.exp().sum(-1, keepdim=True).log()


def log_of_sum_in_half(before: Callable[[Work], Tensor], w: Work) -> Tensor:
    """The same, in the precision of half inputs only."""
    if not half(w):
        return before(w)
    mass = w.z.to(w.given).exp().sum(-1, keepdim=True)
    return valued(w.z - mass.log().to(w.z), before(w))


def through(dtype: torch.dtype) -> Callable[[Work, Tensor], Tensor]:
    """A gradient rounded to a dtype on its way."""
    return lambda w, gradient: gradient.to(dtype).to(gradient.dtype)


def through_float16_of_half(w: Work, gradient: Tensor) -> Tensor:
    """A gradient that half inputs send through float16."""
    return gradient.half().to(gradient.dtype) if half(w) else gradient


def ids_in_bfloat16(before: Callable[[Any], Work], loss_input: Any) -> Work:
    """Token ids converted with everything else: only 8 bits of them survive in bfloat16."""
    w = before(loss_input)
    if half(w):
        last = (loss_input.lm_head_weight.shape[0] if w.head is not None else w.z.shape[-1]) - 1
        w.y = w.y.to(w.given).long().clamp(max=last)
        w.support = w.support.to(w.given).long().clamp(max=last)
    return w


def about_support(w: Work, most: float) -> Tensor:
    """l with a logsumexp in which no logit counts for more than ``most`` above support and response."""
    near = torch.cat([w.support, w.y.unsqueeze(-1)], dim=-1)
    top = w.z.detach().gather(-1, near).amax(-1, keepdim=True)
    return w.z - top - (w.z - top).clamp(max=most).exp().sum(-1, keepdim=True).log()


def logged_probabilities(logprobs: Tensor) -> Tensor:
    """log q by way of q: -inf where q underflows."""
    return renormalise(logprobs).exp().log()


def support_unguarded(w: Work) -> Tensor:
    """l[S] with its infinities."""
    return w.l.gather(-1, w.support)


def nonempty(before: Callable[[Any], Work], loss_input: Any) -> Work:
    """Refuse a batch without tokens."""
    if loss_input.response_mask.numel() == 0:
        raise RuntimeError("cannot reduce over an empty response")
    return before(loss_input)


def summed_in_half(w: Work, values: Tensor) -> Tensor:
    """The token mean with its terms rounded to float16."""
    return valued((values * w.mask).half().sum().to(values) / w.count, token_mean(w, values))


def in_scaled_float16(w: Work, gradient: Tensor) -> Tensor:
    """Rounded to float16 in parts of each row's largest entry."""
    scale = gradient.abs().amax(-1, keepdim=True)
    return (gradient / scale.clamp(min=1e-30)).half().to(gradient) * scale


DEFECTS = (
    Defect(
        name="logsumexp-without-max",
        sentence="The logsumexp exponentiates the logits as they are and overflows past 88.",
        violates=("NUM-6",),
        fix="Subtract the largest logit first.",
        change=replacing(log_softmax=log_of_sum),
        seen=cite("THUDM/slime#2198"),
        usable_for="Logits below 80.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="half-logsumexp-without-max",
        sentence="bfloat16 and float16 take a path whose logsumexp stays in the input's precision, without the largest"
        " logit subtracted.",
        violates=("NUM-6", "NUM-2"),
        fix="Upcast before the logsumexp, and subtract the largest logit.",
        change=around("log_softmax", log_of_sum_in_half),
        seen=cite("huggingface/trl#7084", "google-deepmind/optax#1020"),
        usable_for=FLOAT32_INPUT,
    ),
    Defect(
        name="half-path-without-ratio",
        sentence="bfloat16 and float16 take a fast path that leaves the importance ratio out.",
        violates=("NUM-2", "IS-2"),
        fix="Apply the ratio in every precision.",
        change=replacing(weighted=lambda w: w.divergence if half(w) else weighted(w)),
        seen=cite("linkedin/Liger-Kernel#1082"),
        usable_for=FLOAT32_INPUT,
    ),
    Defect(
        name="logsumexp-about-the-support",
        sentence="The logsumexp is taken about the largest logit of support and response, and terms e^11 above it are "
        "cut off.",
        violates=("NUM-6", "NUM-1"),
        fix="Take it about the row's maximum.",
        change=replacing(log_softmax=lambda w: about_support(w, 11.0)),
    ),
    Defect(
        name="half-token-ids",
        sentence="Token ids are cast to the compute dtype with the rest of the batch: past 256 bfloat16 merges them.",
        violates=("NUM-2",),
        fix="Leave integer tensors alone when casting a batch.",
        change=around("accept", ids_in_bfloat16),
        usable_for=f"{FLOAT32_INPUT} Vocabularies of up to 256 tokens.",
    ),
    Defect(
        name="half-gradient-through-float16",
        sentence="For half inputs the gradient passes through a float16 buffer, where what is below 6e-8 vanishes.",
        violates=("NUM-2",),
        fix="Keep the gradient in float32, or in the input's dtype.",
        change=replacing(logits_gradient=through_float16_of_half),
        usable_for=FLOAT32_INPUT,
    ),
    Defect(
        name="gradient-through-bfloat16",
        sentence="The gradient of the logits is rounded to bfloat16, whatever the input.",
        violates=("NUM-1", "GJS-9"),
        fix="Store the gradient in the input's dtype.",
        change=replacing(logits_gradient=through(torch.bfloat16)),
        usable_for="bfloat16 input.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="gradient-through-float16",
        sentence="The gradient of the logits passes through float16, where what is below 6e-8 vanishes.",
        violates=("NUM-1", "GJS-9"),
        fix="Store the gradient in the input's dtype.",
        change=replacing(logits_gradient=through(torch.float16)),
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="gradient-in-scaled-float16",
        sentence="The gradient of the logits is kept in float16, divided by its row's largest entry.",
        violates=("NUM-1", "GJS-9"),
        fix="Keep the gradient in float32.",
        change=replacing(logits_gradient=in_scaled_float16),
        usable_for="bfloat16 runs that bear its rounding.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="terms-summed-in-float16",
        sentence="The token losses are rounded to float16 before they are summed.",
        violates=("NUM-1",),
        fix="Accumulate in float32.",
        change=replacing(distill_loss=lambda w: summed_in_half(w, w.weighted)),
        seen=cite("pytorch/executorch#20090"),
        usable_for="Training: the gradient is right, the value is rounded.",
    ),
    Defect(
        name="token-count-in-bfloat16",
        sentence="The token count is a bfloat16 number: past 256 it is rounded.",
        violates=("RED-4", "RED-1"),
        fix="Sum the mask in float32.",
        change=around("count", lambda before, w: before(w).bfloat16().to(w.mask)),
        seen=cite("pytorch/executorch#20090"),
        usable_for="Batches of up to 256 tokens.",
    ),
    Defect(
        name="zero-log-zero",
        sentence="A student probability that underflows makes the divergence NaN: 0 log 0.",
        violates=("NUM-3", "NUM-4"),
        fix="Stay in log space, or take 0 log 0 for 0.",
        change=replacing(student_distribution=lambda w: logged_probabilities(w.l_k)),
        usable_for="Everything upstream itself is usable for: upstream does the same.",
        capabilities=(Capability.LOSS,),
    ),
    Defect(
        name="teacher-zero-log-zero",
        sentence="A teacher probability that underflows makes the divergence NaN: 0 log 0.",
        violates=("NUM-3",),
        fix="Stay in log space, or take 0 log 0 for 0.",
        change=around("teacher_distribution", lambda before, w: before(w).exp().log()),
        usable_for="Everything upstream itself is usable for: upstream does the same.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="minus-infinity-in-support",
        sentence="A logit of -inf inside the support makes the loss NaN.",
        violates=("NUM-4",),
        fix="Give an entry whose probability is 0 neither value nor gradient.",
        change=replacing(student_at_support=support_unguarded),
        usable_for="Models that mask no logits out.",
        capabilities=(Capability.LOSS,),
    ),
    Defect(
        name="minus-infinity-off-support",
        sentence="A logit of -inf outside the support makes the gradient NaN.",
        violates=("NUM-4",),
        fix="Let a logit of -inf have probability 0 and no gradient.",
        change=around(
            "log_softmax",
            lambda before, w: before(w) + 0 * torch.where(w.z.isinf(), w.z, 0.0).sum(-1, keepdim=True),
        ),
        usable_for="Models that mask no logits out.",
        capabilities=(Capability.LOSS,),
    ),
    Defect(
        name="masked-nan-leaks",
        sentence="NaN or inf at a masked position reaches the loss: NaN times 0.",
        violates=("NUM-5",),
        fix="Select with where before multiplying with the mask.",
        change=around("accept", reduction.without_blanking),
        seen=cite("modelscope/ms-swift#9767", "huggingface/trl#5594", "NVIDIA-NeMo/Megatron-Bridge#3117"),
        usable_for="Padding with finite numbers, as upstream needs too.",
    ),
    Defect(
        name="empty-response",
        sentence="A batch with no tokens (T = 0) raises.",
        violates=("NUM-8",),
        fix="An empty sum over max(0, 1) is 0.",
        change=around("accept", nonempty),
        usable_for="Responses with at least one token.",
    ),
)
