"""Rules that lasgroup's and TRL's losses share: they differ in their options' names and in where they stand.

``Views`` says how a spec's inputs are turned: the input with a rule made idle, with another option, with another old.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.compare import GRADIENT, Disagreement
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.specs.requirement import Level
from sdpo_conformance.specs.shared.autograd_rules import gives_zeros
from sdpo_conformance.specs.shared.garbage import padded
from sdpo_conformance.specs.shared.rule import ALL, VALUE, Rule, fades

MUST = Level.MUST
FOCUSED = ("tail", "renormalised")
DIVERGENCES = ("tail", "renormalised", "whole")
ANY = (*DIVERGENCES, "sampled")
SMALL = ("small", "small", "tall")
EDGES = ("edge_edge", "edge_open", "open_edge")
TAILS = ("open_open", "open_closed", "closed_open", "closed_closed")
View = Callable[[Any], Any]


@dataclass(frozen=True)
class Views:
    """``prefix`` of the ids; ``words``: the spec's names of topk, add_tail, alpha, clip, old; ``neutral``: its neutral
    corner. ``with_mode`` (case, mode) and ``with_k`` (case, k) change what the divergence is over; ``old``: the field
    of the behaviour log-probs, ``ids``: of the tokens; ``sources``: where each family stands; ``supports``: kinds of K,
    those of the whole vocabulary last.
    """

    prefix: str
    words: Mapping[str, str]
    neutral: Any
    with_mode: Callable[[Any, str], Any]
    with_k: Callable[[Any, int], Any]
    old: str
    ids: str
    sources: Mapping[str, str]
    supports: tuple[str, ...] = ("few", "one", "many", "whole", "above")

    def whole(self, case: Any) -> Any:
        """The whole vocabulary: no support, no tail."""
        return self.with_mode(case, "whole")

    def renormalised(self, case: Any) -> Any:
        """No tail."""
        return self.with_mode(case, "renormalised")

    def tailed(self, case: Any) -> Any:
        """A tail."""
        return self.with_mode(case, "tail")

    def everything_as_support(self, case: Any) -> Any:
        """The whole vocabulary as a renormalised support."""
        return self.with_mode(self.with_k(case, case.vocabulary), "renormalised")

    def at_half(self, case: Any) -> Any:
        """alpha = 1/2."""
        return case.with_training(**{self.words["alpha"]: 0.5})

    def without_ratio(self, case: Any) -> Any:
        """No ratio."""
        return case.with_training(**{self.words["clip"]: None})

    def untempered(self, case: Any) -> Any:
        """Temperature 1, without a ratio, whose old belongs to the other temperature."""
        return self.without_ratio(case.with_training(temperature=1.0))

    def chosen(self, case: Any) -> torch.Tensor:
        """l[y], (B, T) float64."""
        y = getattr(case.loss_input, self.ids).long().unsqueeze(-1)
        found: torch.Tensor = case.truth.aside["l"].gather(-1, y).squeeze(-1)
        return found

    def with_old_at(self, case: Any, log_ratio: torch.Tensor | float) -> Any:
        """This log-ratio, where there is an old."""
        old = getattr(case.loss_input, self.old)
        if old is None:
            return case
        return case.with_fields(**{self.old: (self.chosen(case) - log_ratio).to(old.dtype)})

    def on_policy(self, case: Any) -> Any:
        """old is the current policy: the ratio is 1."""
        return self.with_old_at(case, 0.0)

    def within_the_clamp(self, case: Any) -> Any:
        """No log-ratio further than 2.5 from 0."""
        old = getattr(case.loss_input, self.old)
        return case if old is None else self.with_old_at(case, (self.chosen(case) - old.double()).clamp(-2.5, 2.5))

    def above_the_cap(self, case: Any) -> Any:
        """Every ratio capped, so that it has no gradient whoever takes it."""
        clip = getattr(case.training, self.words["clip"])
        return case if clip is None else self.with_old_at(case, math.log(clip) + 1)

    def with_unlikely_teacher(self, case: Any) -> Any:
        """The teacher finds every response token 30 to 40 nats unlikely."""
        logits = case.loss_input.teacher_logits
        y = getattr(case.loss_input, self.ids).long().unsqueeze(-1)
        low = logits.amin(-1, keepdim=True) - (12.0 if logits.dtype == torch.float16 else 40.0)
        return case.with_fields(teacher_logits=logits.scatter(-1, y, low))

    def tied(self, case: Any) -> Any | None:
        """The student's first logit off the support raised to the last one on it, the teacher's two made alike:
        whichever of them is on the support, the value is one. None where nothing is off the support."""
        fields, support = case.loss_input, case.truth.aside["support"]
        if support.shape[-1] == case.vocabulary:
            return None
        last, first = ends_of(fields.student_logits, support)
        changes = {
            name: logits.scatter(-1, first, logits.gather(-1, last))
            for name, logits in (
                ("student_logits", fields.student_logits),
                ("teacher_logits", fields.teacher_logits),
            )
        }
        return self.on_policy(case.with_fields(**changes))

    def of_that_size(self, subject: Subject, case: Any) -> None:
        """The support as it is, and where logits are equal at its end."""
        subject.agrees(case, ALL, control=[self.whole(case)])
        if (tied := self.tied(case)) is not None:
            subject.agrees(tied, VALUE, control=[self.whole(tied)])

    def derivative(self, subject: Subject, case: Any) -> None:
        """The gradient. A wrong value is another rule's finding; so is a gradient that is right over the whole
        vocabulary, and over a support with a tail or without."""
        try:
            subject.agrees(case, (GRADIENT,))
        except Disagreement as found:
            supports = (self.tailed(case), self.renormalised(case))
            found.secondary = subject.wrong_on(case, VALUE) or not (
                subject.wrong_on(self.whole(case), (GRADIENT,))
                or all(subject.wrong_on(one, (GRADIENT,)) for one in supports)
            )
            raise

    def likely_or_not(self, subject: Subject, case: Any) -> None:
        """The response as it is, and unlikely to the teacher."""
        try:
            subject.agrees(case, VALUE)
        except Disagreement as found:
            found.secondary = fades(subject, case, VALUE, found.excess)
            raise
        subject.agrees(self.with_unlikely_teacher(case), VALUE, control=[case])


def ends_of(logits: torch.Tensor, support: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., 1) ids: of the smallest logit on the support, and of the largest off it."""
    last = support.gather(-1, logits.gather(-1, support).argmin(-1, keepdim=True))
    return last, logits.scatter(-1, support, -torch.inf).argmax(-1, keepdim=True)


def refuses(subject: Subject, case: Any, what: str) -> None:
    """The call must raise."""
    try:
        outcome = subject.evaluate(case, gradient=False)
    except ImplementationError:
        return
    got = outcome.result.get("loss")
    words = f"loss {float(got)}" if got is not None else "a result"
    raise Disagreement("the call", f"an error: {what}", words, case=case, outcome=outcome, probe="refusal")


def nothing_beside_the_count(subject: Subject, case: Any) -> None:
    """What is wrong, and less so on more tokens, is the count's; what is wrong alike has another cause."""
    try:
        subject.agrees(case, ALL)
    except Disagreement as found:
        found.secondary = not fades(subject, case, ALL, found.excess)
        found.detail = found.detail or "less so on the same tokens several times over"
        raise


def at_least_one(subject: Subject, case: Any, idle: Any) -> None:
    """As it is, and without any token: by the mask, and by rows without a re-prompt. ``idle``: the control."""
    subject.agrees(case, ALL, control=[idle])
    mask, rows = getattr(case.loss_input, case.kind.mask), case.loss_input.student_logits.shape[0]
    none = case.with_fields(**{case.kind.mask: torch.zeros_like(mask)})
    unprompted = case.with_fields(**{case.kind.rows: torch.zeros(rows)})
    for empty in (none, unprompted):
        subject.agrees(empty, ALL, control=[idle])
        gives_zeros(subject, empty)


def over_all_positions(subject: Subject, case: Any, idle: Any) -> None:
    """As it is, and with a last column in which no row counts: it counts among the positions. ``idle``: the control."""
    subject.agrees(case, ALL, control=[idle])
    subject.agrees(padded(case), ALL, control=[case])


def support_rules(v: Views) -> tuple[Rule, ...]:
    """See the statements."""
    neutral = v.neutral
    return (
        Rule(
            f"{v.prefix}-SUP-1",
            MUST,
            "the support is the student's own top-k; the teacher is read at the student's ids",
            v.sources["support"],
            "over the teacher's top-k it is another algorithm, which teaches other tokens",
            neutral.but(mode=FOCUSED),
            control=v.whole,
        ),
        Rule(
            f"{v.prefix}-SUP-2",
            MUST,
            f"the support has min({v.words['topk']}, V) tokens, where logits are equal at its end too",
            v.sources["support"],
            f"a size of its own makes {v.words['topk']} an option without effect",
            neutral.but(mode=FOCUSED, support=v.supports, size=SMALL),
            check=v.of_that_size,
        ),
        Rule(
            f"{v.prefix}-SUP-3",
            MUST,
            "the whole vocabulary, without tail or renormalisation",
            v.sources["support"],
            "a support of some default size stands in for what was asked for",
            neutral.but(mode="whole", size=("small", "wide")),
            control=v.everything_as_support,
        ),
    )


def tail_rules(v: Views) -> tuple[Rule, ...]:
    """See the statements."""
    neutral = v.neutral
    return (
        Rule(
            f"{v.prefix}-TAIL-1",
            MUST,
            f"with {v.words['add_tail']} the last category holds, on each side, what the support leaves "
            "of the whole vocabulary's probability",
            v.sources["tail"],
            "without it the divergence is blind to how much mass the support has",
            neutral.but(support=tuple(kind for kind in neutral.support if kind != "one")),  # its control would be 0
            control=v.renormalised,
        ),
        Rule(
            f"{v.prefix}-TAIL-2",
            MUST,
            "without it both sides are renormalised over the support, without a floor",
            v.sources["tail"],
            "log-probs left as they are do not sum to 1, and their divergence may be negative",
            neutral.but(mode="renormalised", mass=("normal", "low")),
            control=v.tailed,
        ),
        Rule(
            f"{v.prefix}-TAIL-3",
            MUST,
            "the gradient goes through the tail: off the support it is pi_v (g_0 - sum q g), not zero",
            v.sources["tail"],
            "a sparse gradient is the renormalised loss's: it never takes mass from the tail",
            neutral.but(alpha=("half", "inside", "zero", "one")),
            (GRADIENT,),
            control=v.renormalised,
            value_first=True,
        ),
        Rule(
            f"{v.prefix}-TAIL-4",
            MUST,
            "the support's log-mass is clamped to at most -1e-7, so that a support which holds "
            "everything leaves 1 - exp(-1e-7)",
            v.sources["tail"],
            "log 0 is -inf, and one token that is sure turns the adapter into NaN",
            neutral.but(
                support=(*v.supports[3:], "few", "one"),
                tails=(*TAILS, "free"),
                alpha=("half", "zero", "one"),
                size=SMALL,
            ),
            ALL,
            control=v.renormalised,
        ),
        Rule(
            f"{v.prefix}-TAIL-5",
            MUST,
            "where the student's clamp holds the tail is a constant: no gradient passes through it",
            v.sources["tail"],
            "the other branch's gradient is wrong off the support",
            neutral.but(tails=("closed_open", "closed_closed"), alpha=("half", "zero", "one"), support=("few", "one")),
            (GRADIENT,),
            control=v.renormalised,
            value_first=True,
            dtypes=("float64",),
        ),
        Rule(
            f"{v.prefix}-TAIL-6",
            MUST,
            "the clamp holds below 1 - exp(-1e-7) and nowhere above it: a tail of twice that is as large as it is",
            v.sources["tail"],
            "a clamp a little earlier hides how sure the support is, where float32 cannot tell",
            neutral.but(tails=EDGES, alpha=("half", "zero", "one"), support=("few", "one"), size=SMALL),
            ALL,
            control=v.renormalised,
            dtypes=("float64",),
        ),
    )


def divergence_rules(v: Views) -> tuple[Rule, ...]:
    """See the statements."""
    neutral = v.neutral
    return (
        Rule(
            f"{v.prefix}-DIV-1",
            MUST,
            "between the ends D = alpha KL(p || m) + (1 - alpha) KL(q || m), m = alpha p + (1 - alpha) q, "
            "p the teacher, summed over the categories",
            v.sources["divergence"],
            "alpha on the student, or an even mixture, is another objective that also falls",
            neutral.but(mode=DIVERGENCES, alpha=("half", "inside", "near_zero", "near_one")),
            VALUE,
            together=v.whole,
            of_each=True,
        ),
        Rule(
            f"{v.prefix}-DIV-2",
            MUST,
            f"{v.words['alpha']} = 0 is the forward KL, sum p (log p - log q)",
            v.sources["divergence"],
            "CLaaS's alpha = 0 is the mixture's limit 0: no training at all",
            neutral.but(mode=DIVERGENCES, alpha="zero"),
            VALUE,
            control=v.at_half,
            together=v.whole,
            of_each=True,
        ),
        Rule(
            f"{v.prefix}-DIV-3",
            MUST,
            f"{v.words['alpha']} = 1 is the reverse KL, sum q (log q - log p), over the categories",
            v.sources["divergence"],
            "the sampled token's surrogate is another estimator, with another gradient",
            neutral.but(mode=DIVERGENCES, alpha="one"),
            VALUE,
            control=v.at_half,
            together=v.whole,
            of_each=True,
        ),
        Rule(
            f"{v.prefix}-DIV-4",
            MUST,
            "the gradient is the derivative, through q as well as through log q",
            v.sources["divergence"],
            "a right value with a wrong gradient is the commonest defect of a fused loss",
            neutral.but(
                mode=DIVERGENCES,
                alpha=("half", "inside", "zero", "one", "near_zero", "near_one"),
                mask=("full", "ragged"),
            ),
            check=v.derivative,
        ),
    )


def sampled_rules(v: Views) -> tuple[Rule, ...]:
    """See the statements."""
    neutral = v.neutral
    return (
        Rule(
            f"{v.prefix}-TOK-1",
            MUST,
            "sampled token: D = sg(l[y] - lt[y]) l[y], without a floor on lt[y]",
            v.sources["sampled"],
            "CLaaS floors the teacher's log-prob at -20 outside its top-k; here there is no top-k",
            neutral.but(mode="sampled", logits=("normal", "flat", "peaked")),
            VALUE,
            check=v.likely_or_not,
        ),
        Rule(
            f"{v.prefix}-TOK-2",
            MUST,
            "its gradient is (l[y] - lt[y]) (onehot(y) - pi): none through the difference",
            v.sources["sampled"],
            "with a gradient through both factors the objective is a square",
            neutral.but(mode="sampled"),
            (GRADIENT,),
            value_first=True,
        ),
        Rule(
            f"{v.prefix}-TOK-3",
            MUST,
            "it is refused for any other alpha than 1",
            v.sources["sampled"],
            "an option that is silently ignored is believed",
            neutral.but(mode="sampled", size="small"),
            share=0.1,
            check=lambda subject, case: refuses(subject, v.at_half(case), "alpha is not 1"),
        ),
    )


def temperature_rules(v: Views) -> tuple[Rule, ...]:
    """See the statements."""
    neutral = v.neutral
    return (
        Rule(
            f"{v.prefix}-TEMP-1",
            MUST,
            "both sides' logits are divided by the rollout temperature first",
            v.sources["temperature"],
            "a teacher at another temperature than the student pulls towards another sharpness",
            neutral.but(
                mode=ANY, temperature=("below", "above"), ratio="absent", alpha=("half", "inside", "zero", "one")
            ),
            VALUE,
            control=v.untempered,
        ),
        Rule(
            f"{v.prefix}-TEMP-2",
            MUST,
            "the gradient by the logits given carries 1 / temperature",
            v.sources["temperature"],
            "without it the learning rate depends on the temperature",
            neutral.but(mode=ANY, temperature=("below", "above"), ratio="absent"),
            (GRADIENT,),
            control=v.untempered,
            value_first=True,
        ),
    )


def ratio_rules(v: Views) -> tuple[Rule, ...]:
    """See the statements."""
    neutral = v.neutral
    any_mode = neutral.but(mode=ANY, alpha=("half", "inside", "zero", "one"))
    return (
        Rule(
            f"{v.prefix}-IS-1",
            MUST,
            f"D is multiplied by exp(l[y] - old): the loss depends on {v.words['old']}",
            v.sources["ratio"],
            "a stale behaviour policy is not corrected for",
            any_mode.but(ratio=("mild", "below"), is_clip="high"),
            control=v.without_ratio,
        ),
        Rule(
            f"{v.prefix}-IS-2",
            MUST,
            f"{v.words['clip']} None: there is no ratio, whatever old holds",
            v.sources["ratio"],
            "an option that cannot be switched off",
            any_mode.but(ratio="absent"),
            control=v.on_policy,
        ),
        Rule(
            f"{v.prefix}-IS-3",
            MUST,
            "the log-ratio is clamped to [-20, 20] before exp",
            v.sources["ratio"],
            "one token of a stale batch overflows, or vanishes",
            any_mode.but(ratio=("clamp_high", "clamp_low", "mild"), is_clip=("huge", "high")),
            control=v.within_the_clamp,
        ),
        Rule(
            f"{v.prefix}-IS-4",
            MUST,
            f"the ratio is capped above at {v.words['clip']}, and nowhere below",
            v.sources["ratio"],
            "a cap below as well takes its weight from where it is needed least",
            any_mode.but(ratio=("above_cap", "below", "mild"), is_clip=("default", "low", "one", "high")),
            control=v.on_policy,
        ),
        Rule(
            f"{v.prefix}-IS-5",
            MUST,
            "no gradient passes through the ratio",
            v.sources["ratio"],
            "a differentiable ratio adds D times its own gradient",
            any_mode.but(ratio=("mild", "below"), is_clip="high"),
            (GRADIENT,),
            control=v.above_the_cap,
            value_first=True,
        ),
        Rule(
            f"{v.prefix}-IS-6",
            MUST,
            "each token has its own ratio",
            v.sources["ratio"],
            "a mean ratio weighs tokens by their neighbours' staleness",
            any_mode.but(ratio=("mild", "below", "above_cap"), size=SMALL),
            VALUE,
            control=v.without_ratio,
            of_several=True,
        ),
        Rule(
            f"{v.prefix}-IS-7",
            MUST,
            "its current log-prob is that of the tempered policy",
            v.sources["ratio"],
            "old is tempered: a current log-prob at temperature 1 makes every ratio wrong on-policy",
            any_mode.but(ratio=("mild", "on_policy"), temperature=("below", "above"), is_clip=("default", "high")),
            VALUE,
            control=lambda case: (v.without_ratio(case), v.on_policy(case.with_training(temperature=1.0))),
        ),
    )
