"""Ways to get the reverse-KL surrogate wrong (alpha = 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdpo_conformance.protocol import RKL_FLOOR_LOGPROB
from sdpo_conformance.specs.claas.defects.defect import Defect, around, replacing
from sdpo_conformance.specs.claas.defects.loss_parts import (
    Part,
    Work,
    kl,
    renormalise,
    reverse_kl,
    teacher_at_response,
)
from sdpo_conformance.specs.claas.defects.sources import cite
from sdpo_conformance.specs.claas.defects.wrong_divergence import valued, with_alpha

BELOW_ONE = "alpha < 1."


def found(w: Work) -> tuple[Tensor, Tensor]:
    """tau at y or 0, and whether y is in the support, (B, T) each."""
    match = w.support == w.y.unsqueeze(-1)
    return torch.where(match, w.tau, 0.0).sum(-1), match.any(-1)


def absent(value: float) -> Part:
    """tau_y with another value outside the support."""

    def teacher_at_response(w: Work) -> Tensor:
        values, member = found(w)
        return torch.where(member, values, value)

    return teacher_at_response


def smallest_of_support(w: Work) -> Tensor:
    """tau_y, the least of the support standing in for what lies outside it."""
    values, member = found(w)
    return torch.where(member, values, w.tau.amin(-1))


def first_entry_missed(w: Work) -> Tensor:
    """tau_y where the position of the match is taken for its truth: position 0 is no match."""
    values, _ = found(w)
    position = (w.support == w.y.unsqueeze(-1)).long().argmax(-1)
    return torch.where(position > 0, values, -20.0)


def zero_is_absent(w: Work) -> Tensor:
    """tau_y where a log-prob of exactly 0 is taken for not found."""
    values, _ = found(w)
    return torch.where(values != 0, values, -20.0)


def over_support(w: Work) -> tuple[Tensor, Tensor]:
    """log p and log q on the support."""
    return renormalise(w.tau), renormalise(w.l.gather(-1, w.support))


def at_sorted_place(w: Work) -> Tensor:
    """tau_y read at the place that y has among the sorted ids."""
    ordered, wanted = w.support.sort(-1).values.contiguous(), w.y.unsqueeze(-1).contiguous()
    place = torch.searchsorted(ordered, wanted).clamp(max=ordered.shape[-1] - 1)
    member = ordered.gather(-1, place) == wanted
    return torch.where(member, w.tau.gather(-1, place), -20.0).squeeze(-1)


def what_is_left(w: Work) -> Tensor:
    """tau_y, outside the support the log of all that the support leaves, from -20 up."""
    values, member = found(w)
    left = (1 - w.tau.exp().sum(-1)).clamp(min=math.exp(-20.0)).log()
    return torch.where(member, values, left)


def onehot_alone(w: Work) -> Tensor:
    """The surrogate whose gradient lacks the softmax."""
    own = w.z.gather(-1, w.y.unsqueeze(-1)).squeeze(-1)
    return valued(reverse_kl(w), (w.chosen - w.tau_y).detach() * own)


def matched_as_given(w: Work) -> Tensor:
    """tau_y where ids are alike in the dtype of what was given."""
    match = w.support.to(w.given) == w.y.to(w.given).unsqueeze(-1)
    return torch.where(match.any(-1), torch.where(match, w.tau, 0.0).sum(-1), RKL_FLOOR_LOGPROB)


DEFECTS = (
    Defect(
        name="alpha-one-limit",
        sentence="alpha = 1 is computed as the limit of the divergence, which is 0.",
        violates=("RKL-1", "RKL-3"),
        fix="At alpha >= 1 the objective is sg(l[y] - tau_y) l[y].",
        change=replacing(reverse_kl=lambda w: 0 * w.chosen),
        seen=cite("verl-project/verl-recipe#151"),
        usable_for=BELOW_ONE,
    ),
    Defect(
        name="alpha-one-full-reverse-kl",
        sentence="alpha = 1 is the reverse KL over the support, as in lasgroup/SDPO.",
        violates=("RKL-1", "RKL-3"),
        fix="At alpha >= 1 the objective is sg(l[y] - tau_y) l[y], of the sampled token alone.",
        change=replacing(reverse_kl=lambda w: kl(*reversed(over_support(w)))),
        seen=cite("modelscope/ms-swift#10078"),
        usable_for=BELOW_ONE,
    ),
    Defect(
        name="alpha-one-forward-kl",
        sentence="alpha = 1 is the forward KL over the support.",
        violates=("RKL-1", "RKL-3"),
        fix="At alpha >= 1 the objective is sg(l[y] - tau_y) l[y], of the sampled token alone.",
        change=replacing(reverse_kl=lambda w: kl(*over_support(w))),
        seen=cite("modelscope/twinkle#112"),
        usable_for=BELOW_ONE,
    ),
    Defect(
        name="alpha-near-one-rounded",
        sentence="Every alpha from 0.9 up is treated as 1.",
        violates=("GJS-1", "GJS-6"),
        fix="Only alpha >= 1 is the reverse-KL surrogate.",
        change=with_alpha(lambda alpha: 1.0 if alpha >= 0.9 else alpha),
        usable_for="alpha < 0.9 and alpha = 1.",
    ),
    Defect(
        name="reverse-kl-unweighted",
        sentence="The surrogate is the log-ratio itself, l[y] - tau_y.",
        violates=("RKL-1", "RKL-3"),
        fix="sg(l[y] - tau_y) l[y].",
        change=replacing(reverse_kl=lambda w: w.chosen - w.tau_y),
        usable_for=BELOW_ONE,
    ),
    Defect(
        name="reverse-kl-negated",
        sentence="The surrogate has the other sign: sg(tau_y - l[y]) l[y].",
        violates=("RKL-1", "RKL-3"),
        fix="sg(l[y] - tau_y) l[y].",
        change=replacing(reverse_kl=lambda w: (w.tau_y - w.chosen).detach() * w.chosen),
        seen=cite("fla-org/flash-linear-attention#1076"),
        usable_for=BELOW_ONE,
    ),
    Defect(
        name="reverse-kl-undetached",
        sentence="The log-ratio that weighs l[y] passes gradient itself.",
        violates=("RKL-3",),
        fix="Detach l[y] - tau_y before it multiplies l[y].",
        change=replacing(reverse_kl=lambda w: (w.chosen - w.tau_y) * w.chosen),
        usable_for=f"{BELOW_ONE} At alpha = 1 the values are right, the gradient is not.",
    ),
    Defect(
        name="reverse-kl-wrong-factor-detached",
        sentence="l[y] is detached where its weight has to be.",
        violates=("RKL-3",),
        fix="Detach l[y] - tau_y, not l[y].",
        change=replacing(reverse_kl=lambda w: (w.chosen - w.tau_y) * w.chosen.detach()),
        usable_for=f"{BELOW_ONE} At alpha = 1 the values are right, the gradient is not.",
    ),
    Defect(
        name="reverse-kl-gradient-of-ratio",
        sentence="The gradient of the surrogate is multiplied by the student's probability of the token.",
        violates=("RKL-3",),
        fix="dD/dl[y] = l[y] - tau_y.",
        change=replacing(
            reverse_kl=lambda w: valued((w.chosen - w.tau_y) * w.chosen, (w.chosen - w.tau_y).detach() * w.chosen.exp())
        ),
        usable_for=f"{BELOW_ONE} At alpha = 1 the values are right, the gradient is not.",
    ),
    Defect(
        name="reverse-kl-gradient-sparse",
        sentence="The surrogate's gradient is at the response token alone: the softmax is missing.",
        violates=("RKL-3",),
        fix="(l[y] - tau_y) (onehot(y) - softmax(z)): the log-prob has a normaliser.",
        change=replacing(reverse_kl=onehot_alone),
        usable_for=BELOW_ONE,
    ),
    Defect(
        name="reverse-kl-clamped-at-zero",
        sentence="The surrogate is clamped to at least 0 like a divergence, which it is not.",
        violates=("RKL-1", "RKL-3"),
        fix="Leave sg(l[y] - tau_y) l[y] as it is: it may be negative.",
        change=around("reverse_kl", lambda before, w: before(w).clamp(min=0.0)),
        usable_for=BELOW_ONE,
    ),
    Defect(
        name="reverse-kl-teacher-renormalised",
        sentence="tau_y is renormalised over the support.",
        violates=("RKL-1",),
        fix="Take the teacher's log-prob as it came, normalised over the vocabulary.",
        change=replacing(
            teacher_at_response=lambda w: torch.where(found(w)[1], found(w)[0] - torch.logsumexp(w.tau, -1), -20.0)
        ),
        usable_for=BELOW_ONE,
    ),
    Defect(
        name="reverse-kl-student-renormalised",
        sentence="l[y] is renormalised over the support in the surrogate's weight.",
        violates=("RKL-1",),
        fix="Take the student's log-prob over the whole vocabulary.",
        change=replacing(
            reverse_kl=lambda w: (
                (w.chosen - torch.logsumexp(w.l.gather(-1, w.support), -1) - w.tau_y).detach() * w.chosen
            )
        ),
        usable_for=BELOW_ONE,
    ),
    Defect(
        name="reverse-kl-argmax-token",
        sentence="The teacher's first entry stands in for its log-prob of the sampled token.",
        violates=("RKL-1", "RKL-2"),
        fix="Look y up in teacher_indices.",
        change=replacing(teacher_at_response=lambda w: w.tau[..., 0]),
        usable_for=BELOW_ONE,
    ),
    Defect(
        name="reverse-kl-floor-by-value",
        sentence="Teacher log-probs below -20 are lifted to -20 although the token is in the support.",
        violates=("RKL-2",),
        fix="The floor is for tokens outside the support; membership decides, not the value.",
        change=replacing(teacher_at_response=lambda w: teacher_at_response(w).clamp(min=-20.0)),
        usable_for="alpha < 1, and supports whose log-probs are above -20.",
    ),
    Defect(
        name="reverse-kl-floor-missing",
        sentence="A token outside the support gets the teacher log-prob 0: the sum over no match.",
        violates=("RKL-2",),
        fix="Outside the support tau_y is -20.",
        change=replacing(teacher_at_response=absent(0.0)),
        usable_for="alpha < 1, and responses inside the support.",
    ),
    Defect(
        name="reverse-kl-floor-ten",
        sentence="The floor for tokens outside the support is -10.",
        violates=("RKL-2",),
        fix="Outside the support tau_y is -20.",
        change=replacing(teacher_at_response=absent(-10.0)),
        usable_for="alpha < 1, and responses inside the support.",
    ),
    Defect(
        name="reverse-kl-floor-log-epsilon",
        sentence="The floor for tokens outside the support is log 1e-8 = -18.4.",
        violates=("RKL-2",),
        fix="Outside the support tau_y is -20.",
        change=replacing(teacher_at_response=absent(-18.420680743952367)),
        usable_for="alpha < 1, and responses inside the support.",
    ),
    Defect(
        name="reverse-kl-floor-smallest",
        sentence="The floor for tokens outside the support is the support's smallest log-prob.",
        violates=("RKL-2",),
        fix="Outside the support tau_y is -20.",
        change=replacing(teacher_at_response=smallest_of_support),
        usable_for="alpha < 1, and responses inside the support.",
    ),
    Defect(
        name="reverse-kl-floor-of-tail",
        sentence="Outside the support tau_y is the log of the mass that the support leaves.",
        violates=("RKL-2",),
        fix="Outside the support tau_y is -20.",
        change=replacing(teacher_at_response=what_is_left),
        usable_for="alpha < 1, and responses inside the support.",
    ),
    Defect(
        name="reverse-kl-at-sorted-place",
        sentence="The response token is looked up among the sorted ids, and tau read at that place unsorted.",
        violates=("RKL-2", "RKL-1"),
        fix="Sort ids and log-probs together, or search unsorted.",
        change=replacing(teacher_at_response=at_sorted_place),
        usable_for=BELOW_ONE,
    ),
    Defect(
        name="reverse-kl-first-entry-missed",
        sentence="The position of the match is read as a truth value, so a response at position 0 counts as absent.",
        violates=("RKL-2", "RKL-1"),
        fix="Ask whether any entry matches, not where.",
        change=replacing(teacher_at_response=first_entry_missed),
        usable_for=BELOW_ONE,
    ),
    Defect(
        name="reverse-kl-zero-is-absent",
        sentence="A teacher log-prob of exactly 0 counts as not found.",
        violates=("RKL-2",),
        fix="Ask whether any entry matches, not whether the sum over matches is non-zero.",
        change=replacing(teacher_at_response=zero_is_absent),
        usable_for="alpha < 1, and teachers that are nowhere certain.",
    ),
    Defect(
        name="response-matched-in-half",
        sentence="Response and support are compared after a cast to the logits' dtype: past 256 bfloat16 merges ids.",
        violates=("RKL-1", "RKL-2", "RKL-3"),
        fix="Compare ids as integers.",
        change=replacing(teacher_at_response=matched_as_given),
        usable_for=BELOW_ONE,
    ),
    Defect(
        name="reverse-kl-outside-skipped",
        sentence="Tokens outside the support contribute nothing.",
        violates=("RKL-2",),
        fix="Outside the support tau_y is -20, and the token counts.",
        change=around("reverse_kl", lambda before, w: torch.where(found(w)[1], before(w), 0.0)),
        usable_for="alpha < 1, and responses inside the support.",
    ),
)
