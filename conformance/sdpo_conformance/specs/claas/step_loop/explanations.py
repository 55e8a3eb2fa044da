"""What a wrong gradient equals instead: each known mistake of a step loop, carried out in float64.

A mistake is a way to take the step at the trainer's own weights. The one whose gradient the trainer's equals
names the requirement that it breaks, and says in words what happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.specs.claas.oracle.step_loop import Gradient, StepTruth, clipped, mean_step, norm
from sdpo_conformance.specs.claas.step_loop.ground import Moment, Weights, upcast
from sdpo_conformance.trainer.models import VOCABULARY
from sdpo_conformance.trainer.policies import PreparedSample, chosen, response_logits, teacher_topk

Outcome = tuple[StepTruth, Gradient]
"""A step's metrics and unclipped gradient, and the gradient handed to the optimizer."""


@dataclass(frozen=True)
class Mistake:
    """``requirements``: the ids it breaks, the first names it; ``words``: completes "the gradient
    is the one ..."; ``take``: the step so taken, or None where the mistake cannot show at that moment."""

    name: str
    requirements: tuple[str, ...]
    words: str
    take: Callable[[Moment], Outcome | None]


def finished(moment: Moment, step: StepTruth) -> Outcome:
    """The step, clipped as the spec has it."""
    return step, clipped(step.gradient, moment.training.max_grad_norm)


def against(moment: Moment, behaviour: Sequence[Tensor] | None) -> Outcome | None:
    """The step with the ratio taken against these log-probs."""
    if behaviour is None:
        return None
    return finished(moment, mean_step(moment.outcomes(behaviour), moment.training, moment.step))


def with_prepared(moment: Moment, prepared: Sequence[PreparedSample]) -> Outcome:
    """The step with another base or teacher."""
    return finished(moment, mean_step(moment.outcomes(prepared=prepared), moment.training, moment.step))


# --- behaviour log-probs ---


def sampler_kept(moment: Moment) -> Outcome | None:
    return against(moment, moment.ground.recorded if moment.step > 1 else None)


def start_kept(moment: Moment) -> Outcome | None:
    return against(moment, moment.own(1) if moment.step > 1 else None)


def one_step_late(moment: Moment) -> Outcome | None:
    return against(moment, moment.own(moment.step - 1) if moment.step > 2 else None)


def ratio_of_one(moment: Moment) -> Outcome | None:
    return against(moment, moment.own() if moment.step == 1 else None)


def adapter_off(moment: Moment) -> Outcome | None:
    return against(moment, [one.base_logprobs for one in moment.ground.prepared])


def zero_behaviour(moment: Moment) -> Outcome | None:
    return against(moment, [torch.zeros_like(old) for old in moment.behaviour()])


def inverted(moment: Moment) -> Outcome | None:
    if moment.step > 1:
        return None
    return against(moment, [2 * own - old for own, old in zip(moment.own(), moment.behaviour(), strict=True)])


def uncapped(moment: Moment) -> Outcome | None:
    training = replace(moment.training, is_clip=math.inf)
    return finished(moment, mean_step(moment.outcomes(training=training), training, moment.step))


def padded(logprobs: Tensor, length: int) -> Tensor:
    """Another sample's log-probs, cut or padded with zeros to this one's length."""
    return torch.nn.functional.pad(logprobs[:, :length], (0, max(0, length - logprobs.shape[1])))


def repeated(logprobs: Tensor, length: int) -> Tensor:
    """Another sample's log-probs, cut or begun again."""
    return logprobs.repeat(1, -(-length // logprobs.shape[1]))[:, :length]


def swapped(
    order: Callable[[int, int], int], fit: Callable[[Tensor, int], Tensor]
) -> Callable[[Moment], Outcome | None]:
    """Sample i reads the log-probs of sample order(i, N), made to fit its length."""

    def take(moment: Moment) -> Outcome | None:
        old = moment.behaviour()
        if len(old) == 1:
            return None
        count = len(old)
        return against(moment, [fit(old[order(i, count)], old[i].shape[1]) for i in range(count)])

    return take


def behaviour_off_by(tokens: int) -> Callable[[Moment], Outcome | None]:
    """Each token reads its neighbour's log-prob."""
    return lambda moment: against(moment, [old.roll(tokens, 1) for old in moment.behaviour()])


def behaviour_after_teacher_prompt(moment: Moment) -> Outcome | None:
    """The current policy's log-probs, read after the teacher's prompt."""
    model = moment.ground.at(moment.history[-1])
    found = []
    for one in moment.ground.prepared:
        with torch.no_grad():
            logits = response_logits(model, one.sample.teacher_prompt_token_ids, one.sample.response_token_ids)
        found.append(chosen(logits, one.response_ids))
    return against(moment, found)


def student_off_by(tokens: int) -> Callable[[Moment], Outcome | None]:
    """The student's logits at neighbouring positions."""

    def read(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        return response_logits(model, prompt, response).roll(tokens, 1)

    def take(moment: Moment) -> Outcome | None:
        return finished(moment, mean_step(moment.outcomes(read=read), moment.training, moment.step))

    return take


def student_unshifted(moment: Moment) -> Outcome | None:
    """The student's logits at the response's own positions, each predicting the token after."""

    def read(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        return response_logits(model, [*prompt, response[0]], [*response[1:], response[-1]])

    return finished(moment, mean_step(moment.outcomes(read=read), moment.training, moment.step))


# --- teacher and anchor ---


def teacher_of(moment: Moment, weights: Weights, prompts: str) -> list[PreparedSample]:
    """The teacher's top-k with the adapter on at these weights, after the teacher's or student's prompt."""
    model = moment.ground.at(weights)
    found = []
    for one in moment.ground.prepared:
        with torch.no_grad():
            logits = response_logits(model, getattr(one.sample, prompts), one.sample.response_token_ids)
        values, indices = logits.log_softmax(-1).topk(one.teacher_indices.shape[-1], dim=-1)
        found.append(replace(one, teacher_logprobs=values, teacher_indices=indices))
    return found


def teacher_with_adapter(moment: Moment) -> Outcome | None:
    return with_prepared(moment, teacher_of(moment, moment.history[0], "teacher_prompt_token_ids"))


def teacher_that_moves(moment: Moment) -> Outcome | None:
    if moment.step == 1:
        return None
    return with_prepared(moment, teacher_of(moment, moment.history[-1], "teacher_prompt_token_ids"))


def teacher_without_feedback(moment: Moment) -> Outcome | None:
    off = {name: torch.zeros_like(w) if "lora_B" in name else w for name, w in moment.history[0].items()}
    return with_prepared(moment, teacher_of(moment, off, "prompt_token_ids"))


def teacher_off_by(tokens: int) -> Callable[[Moment], Outcome | None]:
    """The teacher's support of the neighbouring token."""

    def take(moment: Moment) -> Outcome | None:
        moved = [
            replace(
                one,
                teacher_logprobs=one.teacher_logprobs.roll(tokens, 1),
                teacher_indices=one.teacher_indices.roll(tokens, 1),
            )
            for one in moment.ground.prepared
        ]
        return with_prepared(moment, moved)

    return take


def support_of(size: int) -> Callable[[Moment], Outcome | None]:
    """A support of another size, where the config's is not that."""

    def take(moment: Moment) -> Outcome | None:
        model, samples = moment.ground.at(moment.history[0]), moment.ground.samples
        vocabulary = moment.ground.scenario.model.vocabulary
        if moment.ground.prepared[0].teacher_indices.shape[-1] == min(size, vocabulary):
            return None
        supports = [teacher_topk(model, sample, size) for sample in samples]
        other = [
            replace(one, teacher_logprobs=values, teacher_indices=indices)
            for one, (values, indices) in zip(moment.ground.prepared, supports, strict=True)
        ]
        return with_prepared(moment, other)

    return take


def anchored_to(moment: Moment, base: Sequence[Tensor]) -> Outcome:
    """With the anchor switched off it shows in the metric alone."""
    prepared = [replace(one, base_logprobs=b) for one, b in zip(moment.ground.prepared, base, strict=True)]
    return with_prepared(moment, prepared)


def anchor_to_start(moment: Moment) -> Outcome | None:
    return anchored_to(moment, moment.own(1))


def anchor_to_itself(moment: Moment) -> Outcome | None:
    return anchored_to(moment, moment.own()) if moment.step > 1 else None


def anchor_to_behaviour(moment: Moment) -> Outcome | None:
    return anchored_to(moment, moment.ground.recorded)


def anchor_off_by(tokens: int) -> Callable[[Moment], Outcome | None]:
    """Base log-probs of the neighbouring token."""
    return lambda moment: anchored_to(moment, [one.base_logprobs.roll(tokens, 1) for one in moment.ground.prepared])


def anchor_to_teacher(moment: Moment) -> Outcome | None:
    base = []
    for one in moment.ground.prepared:
        with torch.no_grad(), moment.ground.model.disable_adapter():
            logits = response_logits(
                moment.ground.model, one.sample.teacher_prompt_token_ids, one.sample.response_token_ids
            )
        base.append(chosen(logits, one.response_ids))
    return anchored_to(moment, base)


# --- reduction ---


def shared_out(shares: Callable[[list[int]], list[float]]) -> Callable[[Moment], Outcome | None]:
    """Samples weighed otherwise, from their response lengths."""

    def take(moment: Moment) -> Outcome | None:
        lengths = [one.response_ids.shape[1] for one in moment.ground.prepared]
        step = mean_step(moment.outcomes(), moment.training, moment.step, shares(lengths))
        return finished(moment, step)

    return take


def only(index: int) -> Callable[[list[int]], list[float]]:
    return lambda lengths: [float(i == index % len(lengths)) for i in range(len(lengths))]


# --- gradient handling ---


def gradient_kept(moment: Moment) -> Outcome | None:
    if moment.left_over is None:
        return None
    left = upcast(moment.left_over)
    step = moment.truth
    summed = {name: g + left.get(name, 0) for name, g in step.gradient.items()}
    metrics = {**step.metrics, "grad_norm": float(norm(summed))}
    return finished(moment, replace(step, gradient=summed, metrics=metrics))


def gradient_partly_kept(moment: Moment) -> Outcome | None:
    """Some tensors were not zeroed: those that look more like the sum than like this step's gradient."""
    if moment.left_over is None or moment.handed is None:
        return None
    left, handed, step = upcast(moment.left_over), moment.handed, moment.truth
    summed = {}
    for name, g in step.gradient.items():
        both = g + left.get(name, 0)
        likeness = [float((handed[name] * one).sum() / one.norm().clamp(min=1e-300)) for one in (g, both)]
        summed[name] = both if likeness[1] > likeness[0] else g
    metrics = {**step.metrics, "grad_norm": float(norm(summed))}
    return finished(moment, replace(step, gradient=summed, metrics=metrics))


def not_clipped(moment: Moment) -> Outcome | None:
    return moment.truth, moment.truth.gradient


def clipped_per_sample(moment: Moment) -> Outcome | None:
    outcomes = [(loss, clipped(gradient, moment.training.max_grad_norm)) for loss, gradient in moment.outcomes()]
    return finished(moment, mean_step(outcomes, moment.training, moment.step))


def clipped_per_tensor(moment: Moment) -> Outcome | None:
    limit = moment.training.max_grad_norm
    return moment.truth, {name: clipped({name: g}, limit)[name] for name, g in moment.truth.gradient.items()}


def clipped_by_value(moment: Moment) -> Outcome | None:
    limit = moment.training.max_grad_norm
    return moment.truth, {name: g.clamp(-limit, limit) for name, g in moment.truth.gradient.items()}


def always_scaled(moment: Moment) -> Outcome | None:
    scale = moment.training.max_grad_norm / norm(moment.truth.gradient)
    return moment.truth, {name: g * scale for name, g in moment.truth.gradient.items()}


MISTAKES: tuple[Mistake, ...] = (
    Mistake(
        "ratio-of-one",
        ("STEP-1",),
        "without the importance ratio: the log-probs that the sampler recorded do not enter it",
        ratio_of_one,
    ),
    Mistake(
        "sampler-kept",
        ("STEP-3", "STEP-2"),
        "with the sampler's log-probs of step 1 still in the ratio: they were never refreshed",
        sampler_kept,
    ),
    Mistake(
        "start-kept",
        ("STEP-3", "STEP-2"),
        "with the starting policy's log-probs in the ratio: they were never refreshed",
        start_kept,
    ),
    Mistake(
        "one-step-late",
        ("STEP-2",),
        "with log-probs from one step earlier in the ratio: refreshed before the update, not after it",
        one_step_late,
    ),
    Mistake(
        "adapter-off",
        ("STEP-2", "STEP-3"),
        "with log-probs taken with the adapter disabled in the ratio",
        adapter_off,
    ),
    Mistake("zero-behaviour", ("STEP-2",), "with zeros in place of behaviour log-probs", zero_behaviour),
    Mistake("inverted-ratio", ("STEP-1",), "with the ratio upside down: old minus new", inverted),
    Mistake("uncapped-ratio", ("STEP-1",), "without the cap is_clip on the ratio", uncapped),
    Mistake(
        "next-sample",
        ("STEP-4",),
        "with the next sample's log-probs in the ratio",
        swapped(lambda i, n: (i + 1) % n, padded),
    ),
    Mistake(
        "next-sample",
        ("STEP-4",),
        "with the next sample's log-probs in the ratio",
        swapped(lambda i, n: (i + 1) % n, repeated),
    ),
    Mistake(
        "previous-sample",
        ("STEP-4",),
        "with the previous sample's log-probs in the ratio",
        swapped(lambda i, n: (i - 1) % n, padded),
    ),
    Mistake(
        "previous-sample",
        ("STEP-4",),
        "with the previous sample's log-probs in the ratio",
        swapped(lambda i, n: (i - 1) % n, repeated),
    ),
    Mistake(
        "last-sample",
        ("STEP-4",),
        "with the last sample's log-probs in every ratio",
        swapped(lambda i, n: n - 1, padded),
    ),
    Mistake(
        "last-sample",
        ("STEP-4",),
        "with the last sample's log-probs in every ratio",
        swapped(lambda i, n: n - 1, repeated),
    ),
    Mistake(
        "first-sample",
        ("STEP-4",),
        "with the first sample's log-probs in every ratio",
        swapped(lambda i, n: 0, padded),
    ),
    Mistake(
        "first-sample",
        ("STEP-4",),
        "with the first sample's log-probs in every ratio",
        swapped(lambda i, n: 0, repeated),
    ),
    Mistake(
        "behaviour-token-early",
        ("STEP-2",),
        "with each token's predecessor's log-prob in the ratio",
        behaviour_off_by(1),
    ),
    Mistake(
        "behaviour-token-late",
        ("STEP-2",),
        "with each token's successor's log-prob in the ratio",
        behaviour_off_by(-1),
    ),
    Mistake(
        "behaviour-after-teacher-prompt",
        ("STEP-2",),
        "with log-probs read after the teacher's prompt in the ratio",
        behaviour_after_teacher_prompt,
    ),
    Mistake(
        "student-token-early",
        ("STEP-1", "STEP-2"),
        "of student logits one position too early",
        student_off_by(1),
    ),
    Mistake(
        "student-token-late",
        ("STEP-1", "STEP-2"),
        "of student logits one position too late",
        student_off_by(-1),
    ),
    Mistake(
        "student-unshifted",
        ("STEP-1", "STEP-2"),
        "of student logits without the one-token shift",
        student_unshifted,
    ),
    Mistake(
        "teacher-with-adapter",
        ("STEP-5",),
        "with a teacher whose adapter is left enabled",
        teacher_with_adapter,
    ),
    Mistake(
        "teacher-that-moves",
        ("STEP-5",),
        "with a teacher that follows the adapter's updates",
        teacher_that_moves,
    ),
    Mistake(
        "teacher-without-feedback",
        ("STEP-5",),
        "with a teacher that reads the student's prompt in place of its own",
        teacher_without_feedback,
    ),
    Mistake("teacher-token-early", ("STEP-5",), "with a teacher one position too early", teacher_off_by(1)),
    Mistake("teacher-token-late", ("STEP-5",), "with a teacher one position too late", teacher_off_by(-1)),
    *(
        Mistake(
            f"support-of-{size}",
            ("STEP-5",),
            f"with a support of {size}, not of teacher_top_k",
            support_of(size),
        )
        for size in (1, 5, 8, 10, 16, 20, 32, 50, 64, VOCABULARY, 100, 128)
    ),
    Mistake(
        "anchor-to-start",
        ("STEP-5",),
        "with the anchor at the starting policy: base log-probs taken with the adapter enabled",
        anchor_to_start,
    ),
    Mistake(
        "anchor-to-itself",
        ("STEP-5",),
        "with the anchor at the current policy: base log-probs recomputed with the adapter enabled",
        anchor_to_itself,
    ),
    Mistake("anchor-to-behaviour", ("STEP-5",), "with the anchor at the sampler's log-probs", anchor_to_behaviour),
    Mistake("anchor-to-teacher", ("STEP-5",), "with the anchor at the teacher", anchor_to_teacher),
    Mistake("anchor-token-early", ("STEP-5",), "with an anchor one position too early", anchor_off_by(1)),
    Mistake("anchor-token-late", ("STEP-5",), "with an anchor one position too late", anchor_off_by(-1)),
    Mistake(
        "pooled-tokens",
        ("STEP-7",),
        "of one mean over all tokens of the batch, not the mean of per-sample means",
        shared_out(lambda lengths: [length / sum(lengths) for length in lengths]),
    ),
    Mistake(
        "summed-samples",
        ("STEP-7",),
        "of the sum over samples, not their mean",
        shared_out(lambda n: [1.0] * len(n)),
    ),
    Mistake(
        "summed-tokens",
        ("STEP-7",),
        "of a sum over tokens, averaged over samples",
        shared_out(lambda lengths: [length / len(lengths) for length in lengths]),
    ),
    Mistake(
        "divided-again",
        ("STEP-7",),
        "of the mean over samples divided by their number once more",
        shared_out(lambda lengths: [len(lengths) ** -2.0] * len(lengths)),
    ),
    Mistake("last-sample-only", ("STEP-7",), "of the last sample alone", shared_out(only(-1))),
    Mistake("first-sample-only", ("STEP-7",), "of the first sample alone", shared_out(only(0))),
    Mistake(
        "gradient-kept",
        ("STEP-8",),
        "of this step plus the one the previous step left behind: it was not zeroed",
        gradient_kept,
    ),
    Mistake(
        "gradient-partly-kept",
        ("STEP-8",),
        "of this step plus, in some tensors, the one the previous step left behind: they were not zeroed",
        gradient_partly_kept,
    ),
    Mistake("not-clipped", ("STEP-8",), "without clipping to max_grad_norm", not_clipped),
    Mistake("clipped-per-sample", ("STEP-8",), "clipped sample by sample before the mean", clipped_per_sample),
    Mistake(
        "clipped-per-tensor",
        ("STEP-8",),
        "clipped tensor by tensor, not by the norm over all",
        clipped_per_tensor,
    ),
    Mistake("clipped-by-value", ("STEP-8",), "clipped by value, not by norm", clipped_by_value),
    Mistake("always-scaled", ("STEP-8",), "scaled up to max_grad_norm too, not only down", always_scaled),
)
"""In the order in which they are tried; the closest wins."""
