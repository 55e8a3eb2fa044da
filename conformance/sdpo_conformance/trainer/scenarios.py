"""What trainers are run on: a model, a batch, hyperparameters, and what the sampler recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from sdpo_conformance.protocol import Claims, Sample, TrainingConfig
from sdpo_conformance.trainer.models import VOCABULARY, Family, ModelSpec, adapter_weights, build, float64_copy
from sdpo_conformance.trainer.policies import response_logits, student_logprobs

Sampler = Literal["exact", "mismatched", "partial"]

MISMATCH = 0.6
"""Standard deviation, in nats, of what a mismatched sampler recorded around the trainer's own log-probs."""

CLOSE = 0.015
"""The same where other software recorded the same policy: a hundredth of a nat, and no token beyond the cap."""

CAP_MARGIN = 0.1
"""No ratio of step 1 lies within this many nats of the cap, so that rounding cannot move clip_fraction."""


LARGEST = -0.01
"""No sampler records a probability of one, where ``certain`` does not ask for it."""

LARGEST_CAP = 1e6
"""Where ratios are spread around a cap, and there is none, they are spread around this one."""

UNLIKELY = -15.0
"""What a sampler records at most for the token of a response that is the policy's least likely."""

BELOW = 16.0
"""Nats below the policy's own log-prob that a sampler recorded, where its log-probs lie ``between`` bfloat16's: from 16
to 32 two of these are an eighth apart."""

BETWEEN_UNITS = 0.45
"""Of a unit in bfloat16's last place: how far above the next lower value such a log-prob lies."""

LONG = 32
"""Responses up to this long are sampled token by token."""


@dataclass(frozen=True)
class Scenario:
    """``lengths``: (prompt, teacher prompt, response) tokens per sample. ``sampler``: "exact" recorded the
    starting policy's log-probs, "mismatched" others, "partial" others for the second sample and none for the rest.
    ``shows``: what it is there for.

    ``same_response``: every sample has the first one's response, so their lengths must agree;
    ``same_teacher_prompt``: the last sample has the first one's teacher prompt. What a trainer remembers by
    either then belongs to another sample. ``unlikely``: the second token of every response is the policy's
    least likely, recorded at ``UNLIKELY`` or below. ``certain``: some recorded log-probs are exactly 0, that of a
    response of one token always. ``ruled_out``: the second one recorded is -inf, as a sampler's mask leaves it.

    ``groups``: per sample the number of its group; the samples of a group share their prompts. ``copies``: pairs of
    samples of which the second is the first once more. ``special``: the model's bos, eos and pad tokens, 0 and V - 1
    stand inside prompts and responses, at their first and last positions too. ``without_feedback``: samples whose
    teacher prompt is the prompt itself.

    ``nearly``: pairs of samples of which the second is the first but for its "feedback" (another teacher prompt of the
    same length), its "recorded" log-probs, or one token in the "middle" of its prompt.

    ``close``: samples that other software recorded under the same policy, log-probs off by hundredths of a nat.

    ``between``: every recorded log-prob lies far below the policy's own and nearly half-way between two values of
    bfloat16, so that rounding lowers all of them: the ratio is off by 5 % and more, one way for every token.

    ``refusable``: a setting that a trainer may refuse, in words.

    ``history``: what the trainer was run on before: "another" model with the same batch, or the "same" one with the
    batch of another sampler (``sampled_otherwise``). What it remembers by batch or by model then belongs to others.
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
    certain: bool = False
    ruled_out: bool = False
    groups: tuple[int, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    nearly: tuple[tuple[int, int, Literal["feedback", "recorded", "middle"]], ...] = ()
    special: bool = False
    without_feedback: tuple[int, ...] = ()
    close: tuple[int, ...] = ()
    between: bool = False
    refusable: str = ""
    history: tuple[Literal["another", "same"], ...] = ()

    @property
    def steps(self) -> int:
        return self.training.steps_per_batch

    @property
    def may_refuse(self) -> bool:
        """Whether a trainer may refuse the scenario: log-probs that were not recorded, a head that is no product, a
        setting."""
        return self.sampler == "partial" or bool(self.model.unusual_head or self.refusable)

    def accepts(self, error: Exception) -> bool:
        """Whether this refusal is an answer. What kind of error refuses a batch, a requirement of its own asks; a model
        or a setting is refused with a ValueError or a NotImplementedError."""
        return self.sampler == "partial" or isinstance(error, ValueError | NotImplementedError)

    @property
    def words(self) -> str:
        """For people: model, batch and hyperparameters."""
        responses = ", ".join(str(response) for _, _, response in self.lengths)
        training = self.training
        return (
            f"{self.name}: {self.model}, responses of {responses} tokens, {self.sampler} sampler, "
            f"steps_per_batch={training.steps_per_batch} alpha={training.alpha:g} "
            f"is_clip={training.is_clip:g} kl_reg_weight={training.kl_reg_weight:g} "
            f"max_grad_norm={training.max_grad_norm:g} learning_rate={training.learning_rate:g} "
            f"teacher_top_k={training.teacher_top_k}"
            + (f", after a call on {' and one on '.join(self.calls_before)}" if self.history else "")
        )

    @property
    def calls_before(self) -> tuple[str, ...]:
        """The history in words."""
        words = {"another": "another model with the same batch", "same": "this model with other log-probs"}
        return tuple(words[call] for call in self.history)


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
        model=ModelSpec("llama", tied=True, seed=12, layers=1),
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
        model=ModelSpec("qwen3", tied=True, seed=14, vocabulary=160, layers=1),
        training=TrainingConfig(learning_rate=5e-3, is_clip=20.0, teacher_top_k=150, max_grad_norm=100.0),
        lengths=((6, 9, 80),),
        sampler="mismatched",
        seed=4,
        unlikely=True,
        history=("another",),
    ),
)
"""The scenarios of float32 models that every trainer is judged on."""

BFLOAT16 = Scenario(
    name="bfloat16",
    shows="a bfloat16 base with a float32 adapter; all of the vocabulary as support: rounding cannot pick it",
    model=ModelSpec("qwen3", tied=False, seed=15, dtype="bfloat16", layers=1),
    training=TrainingConfig(
        learning_rate=5e-3, kl_reg_weight=0.1, teacher_top_k=VOCABULARY, max_grad_norm=1.0, steps_per_batch=2
    ),
    lengths=((5, 8, 24), (4, 6, 17)),
    sampler="mismatched",
    seed=5,
)

UNRECORDED = Scenario(
    name="unrecorded",
    shows="a sampler that recorded the log-probs of one sample, some of them 0 and one -inf, and not those of the "
    "samples before and after it",
    model=ModelSpec("llama", tied=False, seed=16, layers=1),
    # not the rate of the others: one that is constant is told from one that is scaled
    training=TrainingConfig(learning_rate=4e-3, teacher_top_k=20, max_grad_norm=100.0, steps_per_batch=2),
    lengths=((4, 6, 3), (4, 6, 7), (5, 6, 10)),
    sampler="partial",
    seed=6,
    certain=True,
    ruled_out=True,
)


def small(family: Family, seed: int, **more: Any) -> ModelSpec:
    """A model of some thousand parameters."""
    return ModelSpec(family, **{"tied": False, "seed": seed, "vocabulary": 43, "hidden": 16, "layers": 1, **more})


WIDER: tuple[Scenario, ...] = (
    Scenario(
        name="defaults",
        shows="every hyperparameter at its default; seventeen samples, groups that share their prompts, two samples "
        "twice, one response after two prompts of a group, the same but for feedback, for recorded log-probs and for "
        "one token in the middle of the prompt; pad = eos, as CLaaS sets it, both inside prompts and responses; "
        "prompts that begin with bos twice; recorded log-probs of exactly 0",
        model=small("qwen3", 21, eos=2, pad=2, bos=1),
        training=TrainingConfig(),
        lengths=(
            *((4, 6, 5), (4, 6, 5), (4, 6, 9), (5, 5, 5), (5, 5, 3), (5, 5, 5)),
            *((1, 7, 8), (1, 7, 8), (8, 3, 8), (8, 3, 1), (2, 9, 2), (9, 2, 4)),
            *((5, 5, 3), (8, 3, 8), (8, 3, 8), (9, 2, 4), (6, 8, 1)),
        ),
        groups=(0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10),
        copies=((3, 5), (0, 1)),
        nearly=((4, 12, "feedback"), (8, 13, "recorded"), (8, 14, "middle"), (11, 15, "middle")),
        sampler="mismatched",
        seed=21,
        special=True,
        certain=True,
    ),
    Scenario(
        name="long",
        shows="prompts past 512 and teacher prompts past 1024 tokens, one of one token; responses past 128 and 256; "
        "bos, eos and pad apart, inside prompts and responses; a low cap, alpha near 1",
        model=small("llama", 22, tied=True, bos=1, eos=42, pad=0, positions=1400),
        training=TrainingConfig(
            learning_rate=1e-3, alpha=0.9, is_clip=0.8, kl_reg_weight=0.3, teacher_top_k=7, steps_per_batch=2
        ),
        lengths=((520, 1030, 12), (1, 140, 270), (4, 6, 128), (2, 3, 5), (3, 4, 2), (2, 2, 2), (3, 3, 3)),
        sampler="mismatched",
        seed=22,
        special=True,
    ),
    Scenario(
        name="ten_steps",
        shows="ten steps at the default learning rate: the policy hardly moves, and the refresh still counts; "
        "DoRA; samples alike in every length, one without feedback; an anchor of weight 1",
        model=small("llama", 23, dora=True, lora_alpha=128),
        training=TrainingConfig(
            teacher_top_k=20, kl_reg_weight=1.0, alpha=0.7, max_grad_norm=100.0, steps_per_batch=10
        ),
        lengths=((6, 6, 6), (6, 6, 6)),
        sampler="exact",
        seed=23,
        without_feedback=(1,),
    ),
    Scenario(
        name="far",
        shows="learning rate 0.1: the policy of a step is far from that of the one before; teacher_top_k = 0, "
        "which means 1; alpha = 1; a cap that is hardly one; four samples, lengths that coincide; two adapters "
        "beside the active one",
        model=small("gpt2", 24, beside=True),
        training=TrainingConfig(
            learning_rate=0.1,
            alpha=1.0,
            is_clip=1e6,
            kl_reg_weight=0.02,
            teacher_top_k=0,
            max_grad_norm=10.0,
            steps_per_batch=3,
        ),
        lengths=((4, 4, 4), (4, 4, 4), (2, 6, 4), (6, 2, 4)),
        groups=(0, 0, 1, 2),
        sampler="mismatched",
        seed=24,
    ),
    Scenario(
        name="softcap",
        shows="logits that are capped; five samples; a second call on the same model",
        model=small("gemma2", 25, tied=True),
        training=TrainingConfig(
            learning_rate=2e-2, kl_reg_weight=0.1, teacher_top_k=9, max_grad_norm=0.5, steps_per_batch=2
        ),
        lengths=((3, 5, 6), (3, 5, 4), (4, 7, 2), (5, 3, 6), (2, 6, 3)),
        groups=(0, 0, 1, 2, 3),
        sampler="mismatched",
        seed=25,
        history=("same",),
    ),
    Scenario(
        name="called_again",
        shows="logits that are scaled; this model twice, another and this one again, one batch for all; alpha = 1 with "
        "one token of the teacher; gradient checkpointing on; two tokens that end a response",
        model=small("cohere", 26, tied=True, eos=(7, 5), pad=0, checkpointing=True),
        training=TrainingConfig(learning_rate=2e-2, alpha=1.0, kl_reg_weight=0.1, teacher_top_k=1, steps_per_batch=2),
        lengths=((5, 8, 7), (4, 6, 9)),
        sampler="mismatched",
        seed=26,
        special=True,
        history=("same", "same", "another"),
    ),
    Scenario(
        name="saved_head",
        shows="a head with a bias and a trainable copy of it (modules_to_save); six samples",
        model=small("phi", 27, head="saved", eos=3, pad=3),
        training=TrainingConfig(learning_rate=1e-3, alpha=0.3, teacher_top_k=3, kl_reg_weight=0.1, steps_per_batch=2),
        lengths=((3, 5, 4), (4, 4, 6), (3, 5, 4), (2, 8, 5), (7, 3, 3), (1, 1, 2)),
        sampler="mismatched",
        seed=27,
        special=True,
    ),
    Scenario(
        name="lora_head",
        shows="LoRA on the head; all of the vocabulary as support; ten samples",
        model=small("qwen3", 28, head="lora"),
        training=TrainingConfig(
            learning_rate=5e-3, kl_reg_weight=2.0, teacher_top_k=43, max_grad_norm=0.1, steps_per_batch=2
        ),
        lengths=((3, 4, 5), (5, 4, 7), *((2, 3, 2), (3, 3, 3)) * 4),
        sampler="mismatched",
        seed=28,
    ),
    Scenario(
        name="anchor_alone",
        shows="no divergence at all (alpha = 0), the anchor alone",
        model=small("llama", 29),
        training=TrainingConfig(learning_rate=5e-3, alpha=0.0, kl_reg_weight=2.0, teacher_top_k=10, steps_per_batch=5),
        lengths=((3, 4, 43),),
        sampler="mismatched",
        seed=29,
    ),
    Scenario(
        name="fresh",
        shows="an adapter as it begins, B next to 0: the student is the base; eight samples, each response shorter "
        "than the one before; alpha next to 1; two "
        "recorded by other software under the same policy",
        model=small("qwen3", 30, fresh=True, lora_alpha=16),
        training=TrainingConfig(learning_rate=5e-3, alpha=0.99, kl_reg_weight=0.5, teacher_top_k=16, steps_per_batch=2),
        lengths=((3, 3, 8), (2, 4, 7), (4, 6, 6), (3, 5, 5), (5, 3, 4), (1, 2, 3), (3, 4, 2), (2, 3, 1)),
        sampler="mismatched",
        close=(0, 2),
        seed=30,
    ),
    Scenario(
        name="crowd",
        shows="eleven samples, six alike in all lengths and four in others, whose policy moves between two steps; "
        "rsLoRA",
        model=small("qwen3", 33, rslora=True),
        training=TrainingConfig(learning_rate=1e-2, alpha=0.4, teacher_top_k=11, max_grad_norm=2.0, steps_per_batch=2),
        lengths=(*((3, 5, 4),) * 6, *((4, 6, 3),) * 4, (2, 3, 5)),
        sampler="mismatched",
        seed=33,
    ),
    Scenario(
        name="half_recorded",
        shows="the log-probs of one sample of three recorded, all of them finite and below 0; teacher_top_k = 0 with a "
        "vocabulary of more than a hundred",
        model=small("llama", 34, vocabulary=160),
        training=TrainingConfig(
            learning_rate=5e-3, alpha=1.0, kl_reg_weight=0.1, teacher_top_k=0, max_grad_norm=5.0, steps_per_batch=2
        ),
        lengths=((3, 5, 4), (4, 4, 6), (2, 6, 5)),
        sampler="partial",
        seed=34,
    ),
    Scenario(
        name="odd_settings",
        shows="what may be refused: no cap, no clipping, a negative teacher_top_k, which means 1, an adapter that is "
        "not called default, one sample of which nothing was recorded",
        model=small("llama", 35, adapter="policy"),
        training=TrainingConfig(
            learning_rate=5e-3,
            alpha=1.0,
            is_clip=math.inf,
            kl_reg_weight=0.1,
            teacher_top_k=-3,
            max_grad_norm=math.inf,
            steps_per_batch=2,
        ),
        lengths=((3, 5, 4), (4, 4, 6)),
        sampler="partial",
        seed=35,
    ),
    Scenario(
        name="still",
        shows="learning_rate = 0: no weight moves, and from step 2 on the ratio is 1 all the same",
        model=small("llama", 36),
        training=TrainingConfig(learning_rate=0.0, kl_reg_weight=0.1, teacher_top_k=12, steps_per_batch=2),
        lengths=((3, 5, 4), (4, 4, 6)),
        sampler="mismatched",
        seed=36,
        refusable="learning_rate = 0",
    ),
    Scenario(
        name="faint",
        shows="a gradient far below 1e-3: a cap and an anchor weight of 2e-6; nine samples; LoRA on the embedding",
        model=small("llama", 31, embedding="lora"),
        training=TrainingConfig(learning_rate=1e-3, is_clip=2e-6, kl_reg_weight=2e-6, teacher_top_k=12),
        lengths=((1, 2, 1), (2, 3, 2), (1, 3, 1), (2, 2, 2), (3, 4, 1), (2, 4, 3), (1, 2, 2), (2, 2, 1), (3, 1, 1)),
        sampler="mismatched",
        seed=31,
    ),
    Scenario(
        name="between",
        shows="recorded log-probs that half precision does not hold: those of bfloat16 are half a unit away, one way "
        "for all; a high cap",
        model=small("qwen3", 38),
        training=TrainingConfig(
            learning_rate=5e-3, is_clip=1e9, kl_reg_weight=0.1, teacher_top_k=43, max_grad_norm=1e9
        ),
        lengths=((5, 8, 32), (4, 6, 32)),
        sampler="mismatched",
        between=True,
        seed=38,
    ),
    Scenario(
        name="many_steps",
        shows="24 steps, all with a gradient below 1e-3, after each of which the policy moves all the same",
        model=small("llama", 37, gain=256),
        training=TrainingConfig(
            learning_rate=0.5, alpha=0.01, kl_reg_weight=1e-3, teacher_top_k=12, steps_per_batch=24
        ),
        lengths=((3, 5, 6),),
        sampler="mismatched",
        seed=37,
    ),
    Scenario(
        name="alone",
        shows="one sample of which nothing was recorded, one step, after a call on this model; a prompt and a response "
        "of 64 tokens; alpha next to 0; trainable token rows",
        model=small("qwen3", 32, embedding="tokens", positions=160),
        training=TrainingConfig(learning_rate=5e-3, alpha=0.01, kl_reg_weight=0.1, teacher_top_k=20),
        lengths=((64, 66, 64),),
        sampler="partial",
        seed=32,
        history=("same",),
    ),
)
"""What a trainer meets besides, on models of some thousand parameters: run where the others found nothing."""


def within_claims(scenario: Scenario, claims: Claims) -> Scenario:
    """The scenario as far as the implementation claims to go: one that takes a single step per batch is
    judged on-policy only."""
    most = claims.max_steps_per_batch
    if most is None:
        return scenario
    steps = min(scenario.steps, most)
    training = replace(scenario.training, steps_per_batch=steps)
    if most > 1:
        return replace(scenario, training=training)
    # no ratio is owed on-policy, but a cap below 1 would show; after a call on the same model its first log-probs are
    # no longer its own
    training = replace(training, is_clip=max(training.is_clip, 1.3))
    history = tuple(call for call in scenario.history if call == "another")
    nearly = tuple(one for one in scenario.nearly if one[2] != "recorded")
    return replace(scenario, training=training, sampler="exact", certain=False, history=history, nearly=nearly)


def wider_in_bfloat16() -> tuple[Scenario, ...]:
    """What a trainer meets besides with a bfloat16 base: recorded log-probs that this dtype does not hold."""
    found = (in_dtype(scenario, "bfloat16") for scenario in WIDER if scenario.between)
    return tuple(replace(scenario, name=f"{scenario.name}_bfloat16") for scenario in found)


def in_dtype(scenario: Scenario, dtype: str) -> Scenario:
    """The scenario with its base in another dtype."""
    return replace(scenario, model=replace(scenario.model, dtype=dtype))


def reseeded(scenario: Scenario, offset: int) -> Scenario:
    """The scenario with other weights and tokens; itself at 0."""
    if offset == 0:
        return scenario
    model = replace(scenario.model, seed=scenario.model.seed + 1000 * offset)
    return replace(scenario, model=model, seed=scenario.seed + 1000 * offset)


@lru_cache(maxsize=64)
def twin_of(spec: ModelSpec) -> Any:
    """The model in float64, built once; its adapter is overwritten at will, by ``start_of`` too."""
    return float64_copy(build(spec))


@lru_cache(maxsize=64)
def start_of(spec: ModelSpec) -> Mapping[str, Tensor]:
    """The adapter that the model comes with, float64, by name."""
    return adapter_weights(twin_of(spec))


@lru_cache(maxsize=64)
def samples_of(scenario: Scenario) -> tuple[Sample, ...]:
    """The batch. Responses are sampled from the starting policy after the sample's, or with
    ``same_response`` the first sample's, prompt."""
    model = twin_of(scenario.model)
    with torch.no_grad():
        for name, start in start_of(scenario.model).items():
            model.get_parameter(name).copy_(start)
    generator = torch.Generator().manual_seed(scenario.seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, scenario.model.vocabulary, (count,), generator=generator).tolist()

    samples: list[Sample] = []
    original = {copy: first for first, copy in scenario.copies}
    almost = {other: (first, but) for first, other, but in scenario.nearly}
    for index, (prompt_length, teacher_length, response_length) in enumerate(scenario.lengths):
        if index in original:
            samples.append(samples[original[index]])
            continue
        if index in almost:
            first, but = almost[index]
            sample = all_but(samples[first], but, tokens)
            if but == "middle":
                sample = replace(sample, response_logprobs=recording(model, sample, scenario, generator))
            samples.append(sample)
            continue
        prompt, teacher_prompt = tokens(prompt_length), tokens(teacher_length)
        if scenario.special:
            prompt = with_special(prompt, scenario.model, index)
            teacher_prompt = with_special(teacher_prompt, scenario.model, index + 1)
        if scenario.groups and (first := scenario.groups.index(scenario.groups[index])) < index:
            prompt, teacher_prompt = (
                list(samples[first].prompt_token_ids),
                list(samples[first].teacher_prompt_token_ids),
            )
        if index in scenario.without_feedback:
            teacher_prompt = list(prompt)
        if samples and scenario.same_teacher_prompt and index + 1 == len(scenario.lengths):
            teacher_prompt = list(samples[0].teacher_prompt_token_ids)
        if samples and scenario.same_response:
            response = list(samples[0].response_token_ids)
        else:
            response = respond(model, prompt, response_length, generator, scenario.unlikely)
            if scenario.special:
                response = with_special(response, scenario.model, index + 2)
        sample = Sample(prompt, response, teacher_prompt, None)
        if scenario.sampler != "partial" or index == 1:
            recorded = recording(model, sample, scenario, generator, close=index in scenario.close)
            sample = replace(sample, response_logprobs=recorded)
        samples.append(sample)
    return tuple(samples)


def all_but(sample: Sample, what: str, tokens: Callable[[int], list[int]]) -> Sample:
    """The sample with another teacher prompt, other log-probs, or another token in the middle of its prompt."""
    if what == "recorded":
        assert sample.response_logprobs is not None
        return replace(sample, response_logprobs=[r - 0.7 for r in sample.response_logprobs])
    if what == "feedback":
        return replace(sample, teacher_prompt_token_ids=tokens(len(sample.teacher_prompt_token_ids)))
    prompt = list(sample.prompt_token_ids)
    middle = len(prompt) // 2
    prompt[middle] = 3 + (prompt[middle] + 1) % 7
    return replace(sample, prompt_token_ids=prompt)


def with_special(ids: Sequence[int], spec: ModelSpec, index: int) -> list[int]:
    """Special tokens at the first, a middle and the last positions, in another way for each of four indices."""
    found, middle = list(ids), len(ids) // 2
    bos, eos, pad = spec.bos or 0, spec.eos or 0, spec.pad or 0
    eos = eos[-1] if isinstance(eos, tuple) else eos
    if index % 4 == 0:
        found[0], found[middle], found[-1] = bos, spec.vocabulary - 1, eos
    elif index % 4 == 1:
        found[-2:] = [pad, pad][: len(found)]
        found[0] = pad
    elif index % 4 == 2:
        found[-1], found[0] = eos, eos
    else:
        found[0], found[middle], found[-1] = bos, eos, bos
        found[1:2] = [bos] if len(found) > 4 else found[1:2]
    return found


@torch.no_grad()
def respond(
    model: Any, prompt: Sequence[int], length: int, generator: torch.Generator, unlikely: bool = False
) -> list[int]:
    """Sample a response from the policy; ``unlikely``: but for its second token, the least likely one. Past ``LONG``
    tokens the rest is sampled all at once, each token after a draft of those before it."""
    response: list[int] = []
    cache: Any = None
    logits = torch.empty(0)
    while len(response) < min(length, LONG):
        ids = list(prompt) if cache is None else response[-1:]
        read = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
        cache, logits = read.past_key_values, read.logits[0, -1]
        if unlikely and len(response) == 1:
            response.append(int(logits.argmin()))
        else:
            response.append(int(torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)))
    if length <= LONG:
        return response
    draft = torch.randint(0, logits.shape[-1], (length - LONG,), generator=generator).tolist()
    for _ in range(2):
        scores = response_logits(model, prompt, [*response, *draft])[0, LONG:]
        draft = torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=generator)[:, 0].tolist()
    return [*response, *draft]


def recording(
    model: Any, sample: Sample, scenario: Scenario, generator: torch.Generator, close: bool = False
) -> list[float]:
    """What the sampler recorded, exactly representable in float32."""
    own = student_logprobs(model, sample)[0]
    if scenario.sampler == "exact":
        return own.float().tolist()
    if scenario.between:
        return between_bfloat16(own - BELOW).float().tolist()
    log_cap = math.log(min(scenario.training.is_clip, LARGEST_CAP))
    log_ratio = (CLOSE if close else MISMATCH) * torch.randn(own.shape, generator=generator, dtype=torch.float64)
    if close:
        return (own - log_ratio).float().clamp(max=LARGEST).tolist()
    log_ratio[0] = log_cap + 0.7  # one token of every sample is beyond the cap
    if scenario.unlikely:
        log_ratio[1] = torch.maximum(log_ratio[1], own[1] - UNLIKELY)
    if scenario.certain:  # recorded as exactly 0
        log_ratio[2::4] = own[2::4]
        if len(own) == 1:
            log_ratio = own.clone()
    near = (log_ratio - log_cap).abs() < CAP_MARGIN
    away = log_cap + torch.where(log_ratio > log_cap, 2, -2) * CAP_MARGIN
    log_ratio = torch.where(near, away, log_ratio)
    recorded = (own - log_ratio).float()
    recorded = recorded.clamp(max=0.0 if scenario.certain else LARGEST)
    if scenario.ruled_out:
        recorded[1] = -math.inf
    return recorded.tolist()


def between_bfloat16(values: Tensor) -> Tensor:
    """Negative values lowered by less than a unit of bfloat16, to where rounding lowers them."""
    unit = torch.finfo(torch.bfloat16).eps * torch.exp2(torch.log2(-values).floor())
    return (torch.floor(values / unit) + BETWEEN_UNITS) * unit


def sampled_otherwise(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """The batch as another sampler would have recorded it: every log-prob 0.5 nats lower."""
    return tuple(
        replace(one, response_logprobs=[r - 0.5 for r in one.response_logprobs]) if one.response_logprobs else one
        for one in samples
    )
