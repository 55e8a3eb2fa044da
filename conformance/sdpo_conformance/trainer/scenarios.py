"""What trainers are run on: a model, a batch, hyperparameters, and what the sampler recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch

from sdpo_conformance.protocol import Claims, Sample, TrainingConfig
from sdpo_conformance.trainer.models import VOCABULARY, ModelSpec, build, float64_copy
from sdpo_conformance.trainer.policies import response_logits, student_logprobs

Sampler = Literal["exact", "mismatched", "partial"]

MISMATCH = 0.6
"""Standard deviation, in nats, of what a mismatched sampler recorded around the trainer's own log-probs."""

CAP_MARGIN = 0.1
"""No ratio of step 1 lies within this many nats of the cap, so that rounding cannot move clip_fraction."""


LARGEST = -0.01
"""No sampler records a probability of one."""

UNLIKELY = -15.0
"""What a sampler records at most for the token of a response that is the policy's least likely."""


@dataclass(frozen=True)
class Scenario:
    """``lengths``: (prompt, teacher prompt, response) tokens per sample. ``sampler``: "exact" recorded the
    starting policy's log-probs, "mismatched" others, "partial" others for the first sample and none for the rest.
    ``shows``: what it is there for.

    ``same_response``: every sample has the first one's response, so their lengths must agree;
    ``same_teacher_prompt``: the last sample has the first one's teacher prompt. What a trainer remembers by
    either then belongs to another sample. ``unlikely``: the second token of every response is the policy's
    least likely, recorded at ``UNLIKELY`` or below. ``another_first``: the trainer is run on another model with the
    same batch before, so that what it remembers by a batch belongs to other weights.
    """

    name: str
    shows: str
    model: ModelSpec
    training: TrainingConfig
    lengths: tuple[tuple[int, int, int], ...]
    sampler: Sampler
    seed: int
    same_response: bool = False
    same_teacher_prompt: bool = False
    unlikely: bool = False
    another_first: bool = False

    @property
    def steps(self) -> int:
        return self.training.steps_per_batch

    @property
    def words(self) -> str:
        """For people: model, batch and hyperparameters."""
        responses = ", ".join(str(response) for _, _, response in self.lengths)
        training = self.training
        return (
            f"{self.name}: {self.model}, responses of {responses} tokens, {self.sampler} sampler, "
            f"steps_per_batch={training.steps_per_batch} alpha={training.alpha:g} "
            f"is_clip={training.is_clip:g} kl_reg_weight={training.kl_reg_weight:g} "
            f"max_grad_norm={training.max_grad_norm:g}"
            + (", after another model was trained on the same batch" if self.another_first else "")
        )


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        name="three_samples",
        shows="every rule at once: three samples, two of them as long as each other and with the same teacher "
        "prompt, anchor, four steps",
        model=ModelSpec("qwen3", tied=False, seed=11),
        training=TrainingConfig(
            learning_rate=5e-3, kl_reg_weight=0.1, teacher_top_k=20, max_grad_norm=0.25, steps_per_batch=4
        ),
        lengths=((5, 8, 9), (4, 9, 13), (6, 8, 9)),
        sampler="mismatched",
        seed=1,
        same_teacher_prompt=True,
    ),
    Scenario(
        name="on_policy_start",
        shows="exact sampler: wrong from step 2 on if the refresh is missing; six steps; a response of one "
        "token; teacher_top_k above the vocabulary; gradients too small to clip",
        model=ModelSpec("llama", tied=True, seed=12),
        training=TrainingConfig(
            learning_rate=5e-3, alpha=0.3, teacher_top_k=VOCABULARY + 10, max_grad_norm=100.0, steps_per_batch=6
        ),
        lengths=((3, 6, 1), (5, 5, 11)),
        sampler="exact",
        seed=2,
    ),
    Scenario(
        name="reverse_kl",
        shows="alpha = 1 on another architecture, one response after two prompts, a cap that most ratios reach, "
        "an anchor, hard clipping",
        model=ModelSpec("gpt2", tied=False, seed=13),
        training=TrainingConfig(
            learning_rate=5e-3,
            alpha=1.0,
            is_clip=1.3,
            kl_reg_weight=0.05,
            teacher_top_k=20,
            max_grad_norm=0.01,
            steps_per_batch=2,
        ),
        lengths=((4, 7, 8), (6, 9, 8)),
        sampler="mismatched",
        seed=3,
        same_response=True,
    ),
    Scenario(
        name="one_step",
        shows="one sample, one step, a long response with a token that the policy all but rules out, a wide "
        "support, a sampler that disagrees with the trainer, a high cap; after another model was trained "
        "on the same batch",
        model=ModelSpec("qwen3", tied=True, seed=14, vocabulary=160),
        training=TrainingConfig(learning_rate=5e-3, is_clip=20.0, teacher_top_k=150, max_grad_norm=100.0),
        lengths=((6, 9, 80),),
        sampler="mismatched",
        seed=4,
        unlikely=True,
        another_first=True,
    ),
)
"""The scenarios of float32 models that every trainer is judged on."""

BFLOAT16 = Scenario(
    name="bfloat16",
    shows="a bfloat16 base with a float32 adapter; all of the vocabulary as support: rounding cannot pick it",
    model=ModelSpec("qwen3", tied=False, seed=15, dtype="bfloat16"),
    training=TrainingConfig(
        learning_rate=5e-3, kl_reg_weight=0.1, teacher_top_k=VOCABULARY, max_grad_norm=1.0, steps_per_batch=2
    ),
    lengths=((5, 8, 24), (4, 6, 17)),
    sampler="mismatched",
    seed=5,
)

UNRECORDED = Scenario(
    name="unrecorded",
    shows="a sampler that recorded the log-probs of one sample and not those of the other",
    model=ModelSpec("llama", tied=False, seed=16),
    training=TrainingConfig(learning_rate=5e-3, teacher_top_k=20, max_grad_norm=100.0, steps_per_batch=2),
    lengths=((4, 6, 7), (5, 6, 10)),
    sampler="partial",
    seed=6,
)


def within_claims(scenario: Scenario, claims: Claims) -> Scenario:
    """The scenario as far as the implementation claims to go: one that takes a single step per batch is
    judged on-policy only."""
    most = claims.max_steps_per_batch
    if most is None:
        return scenario
    steps = min(scenario.steps, most)
    training = replace(scenario.training, steps_per_batch=steps)
    on_policy_only = most == 1 and scenario.sampler in ("mismatched", "partial")
    return replace(scenario, training=training, sampler="exact" if on_policy_only else scenario.sampler)


def in_dtype(scenario: Scenario, dtype: str) -> Scenario:
    """The scenario with its base in another dtype."""
    return replace(scenario, model=replace(scenario.model, dtype=dtype))


def reseeded(scenario: Scenario, offset: int) -> Scenario:
    """The scenario with other weights and tokens; itself at 0."""
    if offset == 0:
        return scenario
    model = replace(scenario.model, seed=scenario.model.seed + 1000 * offset)
    return replace(scenario, model=model, seed=scenario.seed + 1000 * offset)


@lru_cache(maxsize=32)
def samples_of(scenario: Scenario) -> tuple[Sample, ...]:
    """The batch. Responses are sampled from the starting policy after the sample's, or with
    ``same_response`` the first sample's, prompt."""
    model = float64_copy(build(scenario.model))
    generator = torch.Generator().manual_seed(scenario.seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, scenario.model.vocabulary, (count,), generator=generator).tolist()

    samples: list[Sample] = []
    for index, (prompt_length, teacher_length, response_length) in enumerate(scenario.lengths, start=1):
        prompt, teacher_prompt = tokens(prompt_length), tokens(teacher_length)
        if samples and scenario.same_teacher_prompt and index == len(scenario.lengths):
            teacher_prompt = list(samples[0].teacher_prompt_token_ids)
        if samples and scenario.same_response:
            response = list(samples[0].response_token_ids)
        else:
            response = respond(model, prompt, response_length, generator, scenario.unlikely)
        sample = Sample(prompt, response, teacher_prompt, None)
        if scenario.sampler != "partial" or not samples:
            sample = replace(sample, response_logprobs=recording(model, sample, scenario, generator))
        samples.append(sample)
    return tuple(samples)


@torch.no_grad()
def respond(
    model: Any, prompt: Sequence[int], length: int, generator: torch.Generator, unlikely: bool = False
) -> list[int]:
    """Sample a response from the policy; ``unlikely``: but for its second token, the least likely one."""
    response: list[int] = []
    while len(response) < length:
        # response_logits drops the last position, hence the placeholder token
        logits = response_logits(model, [*prompt, *response], [0])[0, -1]
        if unlikely and len(response) == 1:
            response.append(int(logits.argmin()))
        else:
            response.append(int(torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)))
    return response


def recording(model: Any, sample: Sample, scenario: Scenario, generator: torch.Generator) -> list[float]:
    """What the sampler recorded, exactly representable in float32."""
    own = student_logprobs(model, sample)[0]
    if scenario.sampler == "exact":
        return own.float().tolist()
    log_cap = math.log(scenario.training.is_clip)
    log_ratio = MISMATCH * torch.randn(own.shape, generator=generator, dtype=torch.float64)
    log_ratio[0] = log_cap + 0.7  # one token of every sample is beyond the cap
    if scenario.unlikely:
        log_ratio[1] = torch.maximum(log_ratio[1], own[1] - UNLIKELY)
    near = (log_ratio - log_cap).abs() < CAP_MARGIN
    away = log_cap + torch.where(log_ratio > log_cap, 2, -2) * CAP_MARGIN
    log_ratio = torch.where(near, away, log_ratio)
    return (own - log_ratio).clamp(max=LARGEST).float().tolist()
