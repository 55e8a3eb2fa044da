"""Ways to get the step loop wrong: when the refresh runs, and for which samples and tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdpo_conformance.specs.claas.defects import step_loop_variants as right
from sdpo_conformance.specs.claas.defects.parameter import whole_numbers
from sdpo_conformance.specs.claas.defects.step_loop_variants import Prepared, Run, TrainerParts, logprobs, trainer
from sdpo_conformance.specs.claas.defects.wrong_samples import numbered
from sdpo_conformance.specs.claas.defects.wrong_trainer import ONE_SAMPLE, REFRESH, STEP_ONE, loop

Refresh = Callable[[Run], None]
CHUNKS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 64, 128, 256)
NORMS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
MOVES = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
EVERY_SAMPLE = "Refresh every sample after every step but the last."


def after(steps: Callable[[Run], bool]) -> Refresh:
    """Only after some steps."""
    return lambda run: right.refresh(run) if steps(run) else None


def of_samples(chosen: Callable[[Run, int], bool]) -> Refresh:
    """Only some samples, by their places; the others keep what they had."""

    def refresh(run: Run) -> None:
        for index, one in enumerate(run.batch):
            if chosen(run, index):
                one.behaviour = logprobs(run, one.ids, one.response)

    return refresh


def of_tokens(chosen: Callable[[int], Tensor]) -> Refresh:
    """Only some tokens, by the response's length; the others keep what they had."""

    def refresh(run: Run) -> None:
        for one in run.batch:
            fresh = logprobs(run, one.ids, one.response)
            mask = chosen(one.response.shape[1]).to(fresh.device)
            one.behaviour = torch.where(mask, fresh, one.behaviour.to(fresh.dtype))

    return refresh


def whole_chunks(size: float) -> Callable[[int], Tensor]:
    """Which tokens of a response are in whole chunks; all where it has fewer than one."""
    return lambda length: torch.arange(length)[None] < (length // int(size) * int(size) or length)


def where_moved(least: float) -> Refresh:
    """The refresh reads a copy of the policy whose tensors are written only where an entry has moved by more than this
    part of the largest one."""

    @torch.no_grad()
    def refresh(run: Run) -> None:
        now = [parameter.detach().clone() for parameter in run.parameters]
        copies = run.kept["copies"]
        for index, value in enumerate(now):
            if float((value - copies[index]).abs().max()) > least * float(value.abs().max()):
                copies[index] = value
        for parameter, copied in zip(run.parameters, copies, strict=True):
            parameter.copy_(copied)
        right.refresh(run)
        for parameter, value in zip(run.parameters, now, strict=True):
            parameter.copy_(value)

    return refresh


def copying(run: Run) -> None:
    """The copy begins as the policy."""
    if run.step == 1:
        run.kept["copies"] = [parameter.detach().clone() for parameter in run.parameters]


def up_to(length: Callable[[list[int]], int], kept: bool) -> Refresh:
    """Only as many tokens as a length of the batch; the others keep what they had, or get zeros."""

    def refresh(run: Run) -> None:
        most = length([one.response.shape[1] for one in run.batch])
        for one in run.batch:
            fresh = logprobs(run, one.ids, one.response)
            rest = one.behaviour.to(fresh.dtype) if kept else torch.zeros_like(fresh)
            one.behaviour = torch.cat([fresh[:, :most], rest[:, most:]], dim=1)

    return refresh


def where_rate_is(least: float) -> Refresh:
    """Only where the learning rate is not thought too small for it."""
    return lambda run: right.refresh(run) if run.training.learning_rate >= least else None


def keeping_norm(run: Run) -> float:
    """Clips as it should; the norm before is kept."""
    run.kept["norm"] = norm = right.clip(run)
    return norm


def where_norm_is(least: float) -> Refresh:
    """Only where the gradient is not thought too small for the weights to have moved."""
    return lambda run: right.refresh(run) if run.kept["norm"] >= least else None


def into_one_buffer(run: Run) -> None:
    """Every sample's log-probs are written to the start of one buffer, from which all are read in the end."""
    fresh = [logprobs(run, one.ids, one.response) for one in run.batch]
    buffer = torch.zeros(1, max(one.shape[1] for one in fresh), dtype=fresh[0].dtype, device=fresh[0].device)
    for values in fresh:
        buffer[:, : values.shape[1]] = values
    for one in run.batch:
        one.behaviour = buffer[:, : one.response.shape[1]].clone()


def combined(of: Callable[[Tensor, Tensor], Tensor]) -> Refresh:
    """Old and new log-probs put together."""

    def refresh(run: Run) -> None:
        for one in run.batch:
            fresh = logprobs(run, one.ids, one.response)
            one.behaviour = of(one.behaviour.to(fresh.dtype), fresh)

    return refresh


@torch.no_grad()
def in_bfloat16(run: Run, one: Prepared) -> Tensor:
    """The policy's log-probs, of logits rounded to bfloat16 and in bfloat16 themselves."""
    logits = right.logits_at_response(run, one.ids, one.response)
    scores = logits.bfloat16().log_softmax(-1).to(logits.dtype)
    return scores.gather(-1, one.response.unsqueeze(-1)).squeeze(-1)


def all_in_bfloat16(run: Run) -> None:
    """The refresh, of bfloat16 logits."""
    for one in run.batch:
        one.behaviour = in_bfloat16(run, one)


def first_in_bfloat16(run: Run, one: Prepared) -> Tensor:
    """What stands in for log-probs that were not recorded, of bfloat16 logits."""
    return in_bfloat16(run, one) if one.recorded is None else one.recorded


DEFECTS = (
    loop(
        "refresh-skips-first",
        "There is no refresh after the first step.",
        ("STEP-2", "STEP-3"),
        REFRESH,
        trainer(refresh=after(lambda run: run.step > 1)),
        (),
        STEP_ONE,
    ),
    loop(
        "refresh-misses-last-step",
        "There is no refresh before the last step.",
        ("STEP-2", "STEP-3"),
        REFRESH,
        trainer(refresh=after(lambda run: run.step < run.training.steps_per_batch - 1)),
        (),
        STEP_ONE,
    ),
    numbered(
        "refresh-stops",
        "The refresh runs after the first 2 steps only.",
        ("STEP-2", "STEP-3"),
        REFRESH,
        "steps",
        lambda count: TrainerParts(refresh=after(lambda run: run.step <= count)),
        whole_numbers((2, 3, 4, 5, 8)),
        2,
        whole=True,
    ),
    loop(
        "refresh-of-last-sample",
        "Only the last sample's behaviour log-probs are refreshed.",
        ("STEP-2", "STEP-4"),
        EVERY_SAMPLE,
        trainer(refresh=of_samples(lambda run, index: index == len(run.batch) - 1)),
        (),
        ONE_SAMPLE,
    ),
    loop(
        "refresh-misses-last-sample",
        "The last sample's behaviour log-probs are not refreshed.",
        ("STEP-2", "STEP-4"),
        EVERY_SAMPLE,
        trainer(refresh=of_samples(lambda run, index: index < len(run.batch) - 1)),
    ),
    loop(
        "refresh-misses-first-sample",
        "The first sample's behaviour log-probs are not refreshed.",
        ("STEP-2", "STEP-4"),
        EVERY_SAMPLE,
        trainer(refresh=of_samples(lambda run, index: index > 0)),
    ),
    loop(
        "refresh-in-turn",
        "Each refresh is of one sample, the next after each step.",
        ("STEP-2", "STEP-4"),
        EVERY_SAMPLE,
        trainer(refresh=of_samples(lambda run, index: index == (run.step - 1) % len(run.batch))),
        (),
        ONE_SAMPLE,
    ),
    loop(
        "refresh-of-even-places",
        "Every second sample is refreshed, the first among them.",
        ("STEP-2", "STEP-4"),
        EVERY_SAMPLE,
        trainer(refresh=of_samples(lambda run, index: index % 2 == 0)),
        (),
        ONE_SAMPLE,
    ),
    loop(
        "refresh-of-odd-places",
        "Every second sample is refreshed, the first not among them.",
        ("STEP-2", "STEP-4"),
        EVERY_SAMPLE,
        trainer(refresh=of_samples(lambda run, index: index % 2 == 1)),
    ),
    loop(
        "refresh-alternates",
        "The refresh is of samples at odd places after odd steps, of the others after even ones.",
        ("STEP-2", "STEP-4"),
        EVERY_SAMPLE,
        trainer(refresh=of_samples(lambda run, index: index % 2 == run.step % 2)),
    ),
    loop(
        "refresh-of-unrecorded-alone",
        "Only samples of which the sampler recorded nothing are refreshed.",
        ("STEP-3", "STEP-2"),
        EVERY_SAMPLE,
        trainer(refresh=of_samples(lambda run, index: run.batch[index].recorded is None)),
        (),
        STEP_ONE,
    ),
    loop(
        "refresh-of-recorded-alone",
        "Only samples of which the sampler recorded log-probs are refreshed.",
        ("STEP-2", "STEP-3"),
        EVERY_SAMPLE,
        trainer(refresh=of_samples(lambda run, index: run.batch[index].recorded is not None)),
        (),
        "Samples that carry their log-probs.",
    ),
    numbered(
        "refresh-of-first-tokens",
        "Only the first 8 tokens of each response are refreshed.",
        ("STEP-2",),
        REFRESH,
        "tokens",
        lambda count: TrainerParts(refresh=of_tokens(lambda length: torch.arange(length)[None] < count)),
        whole_numbers((1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 64, 128, 256)),
        8,
        whole=True,
    ),
    numbered(
        "refresh-of-whole-chunks",
        "Only tokens in whole chunks of 4 are refreshed; those of an incomplete last one keep what they had.",
        ("STEP-2",),
        REFRESH,
        "tokens",
        lambda size: TrainerParts(refresh=of_tokens(whole_chunks(size))),
        whole_numbers(CHUNKS),
        4,
        whole=True,
    ),
    numbered(
        "refresh-misses-small-moves",
        "The refresh reads a copy of the policy, of which a tensor is written only where an entry of it moved by more "
        "than 0.001 of its largest.",
        ("STEP-2", "STEP-3"),
        "Copy every parameter after every step.",
        "of the largest",
        lambda least: TrainerParts(before_step=copying, refresh=where_moved(least)),
        MOVES,
        0.001,
        whole=True,
    ),
    loop(
        "refresh-misses-last-token",
        "The last token of each response is not refreshed.",
        ("STEP-2",),
        REFRESH,
        trainer(refresh=of_tokens(lambda length: torch.arange(length)[None] < length - 1)),
        (),
        STEP_ONE,
    ),
    loop(
        "refresh-misses-first-token",
        "The first token of each response is not refreshed.",
        ("STEP-2",),
        REFRESH,
        trainer(refresh=of_tokens(lambda length: torch.arange(length)[None] > 0)),
        (),
        STEP_ONE,
    ),
    *(
        loop(
            f"refresh-up-to-{whose}{'' if kept else '-then-zero'}",
            f"The refresh has only as many tokens of each response as the {words} has; the others "
            f"{'keep the log-probs that they had' if kept else 'get zeros'}.",
            ("STEP-2", "STEP-3"),
            "Refresh every token of each response, padded to the longest.",
            trainer(refresh=up_to(length, kept)),
            (),
            "Batches whose responses are equally long.",
        )
        for whose, words, length in (
            ("shortest", "shortest one", min),
            ("first", "first one", lambda lengths: lengths[0]),
            ("last", "last one", lambda lengths: lengths[-1]),
        )
        for kept in (True, False)
    ),
    loop(
        "refresh-skipped-at-rate-zero",
        "With learning_rate = 0 there is no refresh: the recorded log-probs stay for good.",
        ("STEP-2",),
        REFRESH,
        trainer(refresh=after(lambda run: run.training.learning_rate > 0)),
        (),
        "learning_rate above 0.",
    ),
    loop(
        "refresh-skipped-at-small-rates",
        "There is no refresh where the learning rate is thought too small for it: below 1e-4 in the executable form.",
        ("STEP-2", "STEP-3"),
        REFRESH,
        trainer(refresh=where_rate_is(1e-4)),
        (),
        STEP_ONE,
    ),
    numbered(
        "refresh-skipped-at-small-gradients",
        "There is no refresh after a step whose gradient's norm is below 0.001.",
        ("STEP-2", "STEP-3"),
        "Refresh after every step but the last: AdamW moves each weight by about the learning rate, however small the "
        "gradient.",
        "below",
        lambda least: TrainerParts(clip=keeping_norm, refresh=where_norm_is(least)),
        NORMS,
        0.001,
        whole=True,
    ),
    loop(
        "refresh-into-one-buffer",
        "The refresh writes every sample's log-probs into one buffer, which the later ones overwrite.",
        ("STEP-4", "STEP-2"),
        "Give each sample a row of its own: [row] * n is n times the same row.",
        trainer(refresh=into_one_buffer),
        (),
        ONE_SAMPLE,
    ),
    loop(
        "refresh-keeps-larger",
        "Of old and new log-probs the refresh keeps the larger.",
        ("STEP-2",),
        REFRESH,
        trainer(refresh=combined(torch.maximum)),
        (),
        STEP_ONE,
    ),
    loop(
        "refresh-keeps-smaller",
        "Of old and new log-probs the refresh keeps the smaller.",
        ("STEP-2",),
        REFRESH,
        trainer(refresh=combined(torch.minimum)),
        (),
        STEP_ONE,
    ),
    loop(
        "refresh-of-bfloat16-logits",
        "The refresh takes the log-softmax in bfloat16, of logits rounded to it.",
        ("STEP-2",),
        "Take log-probs of float32 logits.",
        trainer(refresh=all_in_bfloat16),
        (),
        STEP_ONE,
    ),
    loop(
        "behaviour-of-bfloat16-logits",
        "The refresh, and what stands in for log-probs that were not recorded, take the log-softmax in bfloat16.",
        ("STEP-2", "STEP-1"),
        "Take log-probs of float32 logits.",
        trainer(refresh=all_in_bfloat16, first_behaviour=first_in_bfloat16),
    ),
)
