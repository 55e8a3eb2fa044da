"""Ways to get the step loop wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.defects import step_loop_variants as trainer_variants
from sdpo_conformance.specs.claas.defects import wrong_importance as importance
from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.defects.loss_parts import Parts
from sdpo_conformance.specs.claas.defects.parameter import Parameter, logarithmic, whole_numbers
from sdpo_conformance.specs.claas.defects.sources import cite
from sdpo_conformance.specs.claas.defects.step_loop_variants import (
    Prepared,
    Run,
    TrainerParts,
    logprobs,
    topk,
    trainer,
)

Loss = Callable[[Any], Mapping[str, Any]]

STEP_ONE = "steps_per_batch = 1."
NO_ANCHOR = "kl_reg_weight = 0, the default."
ONE_SAMPLE = "Batches of one sample."
SIZES = (*range(1, 21), 24, 25, 30, 32, 40, 48, 50, 64, 67, 80, 96, 100, 120, 128, 140, 149, 160)
"""Supports that are tried; the scenarios' vocabularies have 67 and 160 tokens."""


def right_loss(loss_input: Any) -> Mapping[str, Any]:
    """The loss as it has to be."""
    return Parts().entry(Parts(), loss_input)


def with_loss_defect(defects: Sequence[Defect], name: str) -> Loss:
    """The loss with one catalogued defect."""
    change = next(defect.change for defect in defects if defect.name == name)
    assert change is not None
    wrong = change(Parts())
    return partial(wrong.entry, wrong)


def fitted(values: Tensor, like: Tensor) -> Tensor:
    """Another sample's log-probs cut, or repeated, to this sample's length."""
    times = -(-like.shape[1] // values.shape[1])
    return values.repeat(1, times)[:, : like.shape[1]]


# --- behaviour log-probs ---


def never(run: Run) -> None:
    """No refresh."""


def from_start(run: Run) -> None:
    """The starting policy's log-probs, kept."""
    for one, kept in zip(run.batch, run.kept["behaviour"], strict=True):
        one.behaviour = kept


def keep_own(run: Run) -> None:
    """Before each step: the log-probs under its weights."""
    if run.step == 1:
        run.kept["behaviour"] = [logprobs(run, one.ids, one.response) for one in run.batch]


def keep_latest(run: Run) -> None:
    """Before each step: the log-probs under its weights, overwriting the last."""
    run.kept["behaviour"] = [logprobs(run, one.ids, one.response) for one in run.batch]


def with_adapter_disabled(run: Run) -> None:
    """The base policy's log-probs."""
    with run.model.disable_adapter():
        trainer_variants.refresh(run)


def first_sample_only(run: Run) -> None:
    """The others keep what they had."""
    one = run.batch[0]
    one.behaviour = logprobs(run, one.ids, one.response)


def of_neighbour(run: Run) -> None:
    """Each sample gets the log-probs of the one before it."""
    fresh = [logprobs(run, one.ids, one.response) for one in run.batch]
    for one, other in zip(run.batch, [fresh[-1], *fresh[:-1]], strict=True):
        one.behaviour = fitted(other, one.response)


def of_last_for_all(run: Run) -> None:
    """A cache whose key is the same for every sample."""
    last = run.batch[-1]
    fresh = logprobs(run, last.ids, last.response)
    for one in run.batch:
        one.behaviour = fitted(fresh, one.response)


def every_other_step(run: Run) -> None:
    """Only after odd steps."""
    if run.step % 2 == 1:
        trainer_variants.refresh(run)


def once(run: Run) -> None:
    """Only after the first step."""
    if run.step == 1:
        trainer_variants.refresh(run)


def one_token_late(run: Run) -> None:
    """Sliced one position too late."""
    trainer_variants.refresh(run)
    for one in run.batch:
        one.behaviour = one.behaviour.roll(1, dims=1)


def on_teacher_prompt(run: Run) -> None:
    """Read behind the teacher's prompt."""
    for one in run.batch:
        one.behaviour = logprobs(run, one.teacher_ids, one.response)


def at_temperature(temperature: float) -> Callable[[Run], None]:
    """The refresh at the sampler's temperature."""

    def refresh(run: Run) -> None:
        for one in run.batch:
            with torch.no_grad():
                scores = trainer_variants.logits_at_response(run, one.ids, one.response) / temperature
                one.behaviour = scores.log_softmax(-1).gather(-1, one.response.unsqueeze(-1)).squeeze(-1)

    return refresh


def over_support(run: Run) -> None:
    """Normalised over the teacher's top-k."""
    for one in run.batch:
        with torch.no_grad():
            scores = trainer_variants.logits_at_response(run, one.ids, one.response)
            mass = scores.gather(-1, one.support[1]).logsumexp(-1)
            one.behaviour = scores.gather(-1, one.response.unsqueeze(-1)).squeeze(-1) - mass


def recomputed(run: Run, one: Prepared) -> Tensor:
    """The trainer's own log-probs in place of the sampler's."""
    return logprobs(run, one.ids, one.response)


def recorded_or_zero(run: Run, one: Prepared) -> Tensor:
    """Zeros where the sampler recorded nothing."""
    return torch.zeros_like(one.response, dtype=torch.float32) if one.recorded is None else one.recorded


def recorded_late(run: Run, one: Prepared) -> Tensor:
    """The sampler's log-probs, one token late."""
    return trainer_variants.first_behaviour(run, one).roll(1, dims=1)


def averaged_with_recorded(share: float) -> Callable[[Run], None]:
    """Between what was there and the current policy, of which it takes a share."""

    def refresh(run: Run) -> None:
        for one in run.batch:
            one.behaviour = (1 - share) * one.behaviour + share * logprobs(run, one.ids, one.response)

    return refresh


def every_so_many(steps: float) -> Callable[[Run], None]:
    """Only after steps that are divisible by a number."""

    def refresh(run: Run) -> None:
        if run.step % int(steps) == 0:
            trainer_variants.refresh(run)

    return refresh


def in_bfloat16(run: Run) -> None:
    """Fresh log-probs, kept in bfloat16."""
    trainer_variants.refresh(run)
    for one in run.batch:
        one.behaviour = one.behaviour.bfloat16().to(one.behaviour.dtype)


# --- base and teacher ---


def base_with_adapter(run: Run, one: Prepared) -> Tensor:
    """Base log-probs with the adapter on."""
    return logprobs(run, one.ids, one.response)


def base_late(run: Run, one: Prepared) -> Tensor:
    """Base log-probs one token late."""
    return trainer_variants.base(run, one).roll(1, dims=1)


def base_on_teacher_prompt(run: Run, one: Prepared) -> Tensor:
    """Base log-probs behind the teacher's prompt."""
    with run.model.disable_adapter():
        return logprobs(run, one.teacher_ids, one.response)


def base_follows(run: Run) -> None:
    """The anchor moves to the current policy before each step."""
    for one in run.batch:
        one.base = logprobs(run, one.ids, one.response)


def teacher_with_adapter(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
    """The teacher's support with the adapter on."""
    return topk(run, one.teacher_ids, one.response, run.training.teacher_top_k)


def teacher_on_student_prompt(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
    """The teacher without the feedback."""
    with run.model.disable_adapter():
        return topk(run, one.ids, one.response, run.training.teacher_top_k)


def teacher_late(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
    """The teacher one token late."""
    values, indices = trainer_variants.teacher(run, one)
    return values.roll(1, dims=1), indices.roll(1, dims=1)


def teacher_of(size: float) -> Callable[[Run, Prepared], tuple[Tensor, Tensor]]:
    """A support of so many tokens, whatever the config says."""

    def teacher(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
        with run.model.disable_adapter():
            return topk(run, one.teacher_ids, one.response, int(size))

    return teacher


def both_follow(run: Run) -> None:
    """Base and teacher are the current student at every step."""
    for one in run.batch:
        one.base, one.support = base_with_adapter(run, one), teacher_with_adapter(run, one)


def teacher_follows(run: Run) -> None:
    """The teacher is the current student from the second step on."""
    if run.step > 1:
        for one in run.batch:
            one.support = teacher_with_adapter(run, one)


# --- loss and reduction ---


def nothing_at_alpha_zero(loss_input: Any) -> Mapping[str, Any]:
    """At alpha = 0 a loss of 0, before anything else is looked at."""
    found = right_loss(loss_input)
    if loss_input.training.alpha > 0:
        return found
    return {"loss": 0 * found["loss"], "distill_loss": 0.0, "kl_reg": 0.0, "mean_is_ratio": 1.0, "clip_fraction": 0.0}


def binary_search(loss_input: Any) -> Mapping[str, Any]:
    """The response's token is looked for by a binary search, at alpha = 1, in a support that is in no order."""
    if loss_input.training.alpha < 1:
        return right_loss(loss_input)
    indices, y = loss_input.teacher_indices.contiguous(), loss_input.response_ids.unsqueeze(-1)
    place = torch.searchsorted(indices, y.contiguous()).clamp(max=indices.shape[-1] - 1)
    lost = (indices == y) & (indices.gather(-1, place) != y)
    floor = torch.full_like(loss_input.teacher_logprobs, -20.0)
    return right_loss(replace(loss_input, teacher_logprobs=torch.where(lost, floor, loss_input.teacher_logprobs)))


def scaled_layers(model: Any) -> list[Any]:
    """The layers with LoRA's factors."""
    return [module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)]


@contextmanager
def rescaled(model: Any, scaling_of: Callable[[Any, str], float]) -> Iterator[None]:
    """What LoRA's factors add has another scaling, by layer and adapter; magnitudes and copies of modules stay."""
    layers = scaled_layers(model)
    kept = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update({name: scaling_of(layer, name) for name in layer.scaling})
        yield
    finally:
        for layer, scaling in zip(layers, kept, strict=True):
            layer.scaling.update(scaling)


@torch.no_grad()
def half_off(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """Log-probs over the vocabulary (1, T, V) of a model whose adapter is switched off by its scaling alone."""
    with rescaled(run.model, lambda layer, name: 0.0):
        logits = trainer_variants.read(run.model, ids, response)
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def plain_scaling(layer: Any, name: str) -> float:
    """lora_alpha / r."""
    return float(layer.lora_alpha[name] / layer.r[name])


def plainly_scaled(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """The logits of an adapter scaled by lora_alpha / r."""
    with rescaled(run.model, plain_scaling):
        return trainer_variants.read(run.model, ids, response)


def otherwise_scaled(run: Run, ids: Tensor, response: Tensor) -> bool:
    """Whether the adapter has another scaling."""
    layers = scaled_layers(run.model)
    return any(scaling != plain_scaling(layer, name) for layer in layers for name, scaling in layer.scaling.items())


def base_half_off(run: Run, one: Prepared) -> Tensor:
    """Base log-probs with what scaling does not reach."""
    return half_off(run, one.ids, one.response).gather(-1, one.response.unsqueeze(-1)).squeeze(-1)


def teacher_half_off(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
    """The teacher's support with what scaling does not reach."""
    scores = half_off(run, one.teacher_ids, one.response)
    values, indices = scores.topk(min(max(1, run.training.teacher_top_k), scores.shape[-1]), dim=-1)
    return values, indices


def base_of_behaviour_where_unrecorded(run: Run) -> None:
    """Base and behaviour log-probs are one buffer where nothing was recorded."""
    for one in run.batch:
        if one.recorded is None:
            one.base = one.behaviour


def shifted_logits(loss_input: Any) -> Mapping[str, Any]:
    """The student's logits sliced one position early."""
    return right_loss(replace(loss_input, student_logits=loss_input.student_logits.roll(1, dims=1)))


def token_mean(run: Run) -> Tensor:
    """One mean over all tokens of the batch."""
    lengths = torch.tensor([one.response.shape[1] for one in run.batch], dtype=torch.float32)
    weights = (lengths / lengths.sum()).to(run.losses[0].device)
    return (torch.stack(run.losses) * weights).sum()


def divided_again(run: Run) -> Tensor:
    """The mean over samples, divided by their number once more."""
    return torch.stack(run.losses).mean() / len(run.losses)


# --- clipping, zeroing ---


def unclipped(run: Run) -> float:
    """The norm, without clipping."""
    return float(torch.nn.utils.clip_grad_norm_(run.parameters, float("inf")))


def clipped_to(limit: float) -> Callable[[Run], float]:
    """Clipped to a norm, whatever max_grad_norm."""
    return lambda run: float(torch.nn.utils.clip_grad_norm_(run.parameters, limit))


def clipped_at(times: float) -> Callable[[Run], float]:
    """Clipped to a multiple of max_grad_norm."""
    return lambda run: float(torch.nn.utils.clip_grad_norm_(run.parameters, times * run.training.max_grad_norm))


def clipped_by_order(order: float) -> Callable[[Run], float]:
    """Clipped by a norm of another order."""
    return lambda run: float(
        torch.nn.utils.clip_grad_norm_(run.parameters, run.training.max_grad_norm, norm_type=order)
    )


def clipped_part(kind: str) -> Callable[[Run], float]:
    """The parameters of one kind clipped by their own norm, the others left."""

    def clip(run: Run) -> float:
        part = [p for name, p in run.model.named_parameters() if p.requires_grad and kind in name]
        return float(torch.nn.utils.clip_grad_norm_(part, run.training.max_grad_norm))

    return clip


def clipped_each(run: Run) -> float:
    """Each parameter clipped by itself."""
    total = float(torch.nn.utils.clip_grad_norm_(run.parameters, float("inf")))
    for parameter in run.parameters:
        torch.nn.utils.clip_grad_norm_([parameter], run.training.max_grad_norm)
    return total


def clipped_by_value(run: Run) -> float:
    """Each element clipped."""
    total = float(torch.nn.utils.clip_grad_norm_(run.parameters, float("inf")))
    torch.nn.utils.clip_grad_value_(run.parameters, run.training.max_grad_norm)
    return total


def normalised(run: Run) -> float:
    """Scaled to max_grad_norm whether or not it exceeds it."""
    total = float(torch.nn.utils.clip_grad_norm_(run.parameters, float("inf")))
    for parameter in run.parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(run.training.max_grad_norm / max(total, 1e-12))
    return total


def nothing_zeroed(run: Run) -> None:
    """Gradients pile up."""


def half_zeroed(run: Run) -> None:
    """Only every second parameter's gradient is forgotten."""
    for parameter in run.parameters[::2]:
        parameter.grad = None


# --- optimizer and adapter ---


def with_options(**options: Any) -> Callable[[Run, Any], Any]:
    """The optimizer with other hyperparameters."""

    def make_optimizer(run: Run, optimizer_cls: Any) -> Any:
        right = {"lr": run.training.learning_rate, "betas": (0.9, 0.999), "weight_decay": 0.01}
        return optimizer_cls(run.parameters, **{**right, **options})

    return make_optimizer


def of_half_the_parameters(run: Run, optimizer_cls: Any) -> Any:
    """Every second adapter parameter is left out of the optimizer."""
    rest = replace(run, parameters=run.parameters[::2])
    return trainer_variants.make_optimizer(rest, optimizer_cls)


def remembering_class(run: Run, optimizer_cls: Any) -> Any:
    """The optimizer, its class kept for the steps to come."""
    run.kept["optimizer"] = optimizer_cls
    return trainer_variants.make_optimizer(run, optimizer_cls)


def rebuilt(run: Run) -> None:
    """A new optimizer for every step: its moments start from nothing."""
    if run.step > 1:
        run.optimizer = trainer_variants.make_optimizer(run, run.kept["optimizer"])


def decayed(run: Run) -> None:
    """The learning rate falls linearly over the steps."""
    for group in run.optimizer.param_groups:
        group["lr"] = run.training.learning_rate * (1 - (run.step - 1) / run.training.steps_per_batch)


def warmed_up(run: Run) -> None:
    """The learning rate starts from half."""
    for group in run.optimizer.param_groups:
        group["lr"] = run.training.learning_rate * (0.5 if run.step == 1 else 1.0)


def left_disabled(run: Run) -> None:
    """The adapter stays disabled."""
    run.model.base_model.disable_adapter_layers()


def merged_and_unmerged(run: Run) -> None:
    """The adapter is merged for a faster forward, and unmerged again."""
    run.model.merge_adapter()
    run.model.unmerge_adapter()


def left_merged(run: Run) -> None:
    """The adapter stays merged into the base's weights."""
    run.model.merge_adapter()


def base_nudged(run: Run) -> None:
    """The base's weights are decayed with the adapter's."""
    with torch.no_grad():
        for parameter in run.model.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.mul_(1 - 1e-3)


@torch.no_grad()
def restored(run: Run) -> None:
    """The adapter is put back to where it started."""
    for parameter, before in zip(run.parameters, run.kept["adapter"], strict=True):
        parameter.copy_(before)


def remember_adapter(run: Run) -> None:
    """Keep the adapter as it is before the last step."""
    if run.step == run.training.steps_per_batch:
        run.kept["adapter"] = [parameter.detach().clone() for parameter in run.parameters]


def anything(samples: Sequence[Any], training: Any) -> None:
    """No check."""


def by_assertion(samples: Sequence[Any], training: Any) -> None:
    """Checks that raise AssertionError."""
    try:
        trainer_variants.accept(samples, training)
    except ValueError as error:
        raise AssertionError(str(error)) from None


def emptiness_only(samples: Sequence[Any], training: Any) -> None:
    """Log-probs of another length than the response are cut or repeated."""
    if not samples:
        raise ValueError("samples must not be empty")


def recorded_fitted(run: Run, one: Prepared) -> Tensor:
    """The sampler's log-probs, made as long as the response."""
    return trainer_variants.first_behaviour(run, one) if one.recorded is None else fitted(one.recorded, one.response)


def one_step_only(model: Any, samples: Sequence[Any], training: Any, optimizer_cls: Any) -> Any:
    """One step whatever steps_per_batch says."""
    return trainer_variants.distill(TrainerParts(), model, samples, replace(training, steps_per_batch=1), optimizer_cls)


def one_step_more(model: Any, samples: Sequence[Any], training: Any, optimizer_cls: Any) -> Any:
    """One step more than steps_per_batch, unreported."""
    longer = replace(training, steps_per_batch=training.steps_per_batch + 1)
    result = trainer_variants.distill(TrainerParts(), model, samples, longer, optimizer_cls)
    return {"per_step_metrics": result["per_step_metrics"][:-1]}


def loop(
    name: str,
    sentence: str,
    violates: tuple[str, ...],
    fix: str,
    distill: Callable[..., Any],
    seen: tuple[str, ...] = (),
    usable_for: str = "",
    parameter: Parameter | None = None,
    rounded: bool = False,
) -> Defect:
    """A defect of the step loop."""
    return Defect(
        name=name,
        sentence=sentence,
        violates=violates,
        fix=fix,
        distill=distill,
        seen=cite(*seen),
        usable_for=usable_for,
        capabilities=(Capability.DISTILL,),
        parameter=parameter,
        rounded=rounded,
    )


REFRESH = "After every step but the last, recompute each sample's log-probs under the updated adapter."
ADAPTER_OFF = "Compute it inside model.disable_adapter(), once per sample, before the first step."

DEFECTS = (
    loop(
        "no-refresh",
        "The behaviour log-probs stay those of the sampler for all steps.",
        ("STEP-3", "STEP-2"),
        REFRESH,
        trainer(refresh=never),
        ("verl-project/verl#2501", "huggingface/trl#5413"),
        STEP_ONE,
    ),
    loop(
        "refresh-pinned-to-start",
        "The refresh gives every later step the starting policy's log-probs.",
        ("STEP-3", "STEP-2"),
        REFRESH,
        trainer(before_step=keep_own, refresh=from_start),
        ("huggingface/trl#5413",),
        STEP_ONE,
    ),
    loop(
        "refresh-before-update",
        "The refresh is taken before the optimizer's step: always one step late.",
        ("STEP-2", "STEP-3"),
        REFRESH,
        trainer(before_step=keep_latest, refresh=from_start),
        ("nishide-dev/unturtle#40",),
        STEP_ONE,
    ),
    loop(
        "refresh-once",
        "The refresh runs after the first step only.",
        ("STEP-2", "STEP-3"),
        REFRESH,
        trainer(refresh=once),
        (),
        "steps_per_batch up to 2.",
    ),
    loop(
        "refresh-every-other-step",
        "The refresh runs after every other step.",
        ("STEP-2", "STEP-3"),
        REFRESH,
        trainer(refresh=every_other_step),
        (),
        "steps_per_batch up to 2.",
    ),
    loop(
        "refresh-with-adapter-disabled",
        "The refresh is taken with the adapter disabled: the behaviour policy is the base.",
        ("STEP-2",),
        "Refresh with the adapter enabled.",
        trainer(refresh=with_adapter_disabled),
        ("huggingface/trl#1340",),
        STEP_ONE,
    ),
    loop(
        "refresh-of-first-sample",
        "Only the first sample's behaviour log-probs are refreshed.",
        ("STEP-2", "STEP-4"),
        REFRESH,
        trainer(refresh=first_sample_only),
        (),
        "Batches of one sample, or steps_per_batch = 1.",
    ),
    loop(
        "refresh-of-neighbour",
        "Each sample is refreshed with the log-probs of the sample before it.",
        ("STEP-4", "STEP-2"),
        "Keep each sample's behaviour log-probs with the sample.",
        trainer(refresh=of_neighbour),
        ("nishide-dev/unturtle#40", "kvablack/ddpo-pytorch#29"),
        "Batches of one sample, or steps_per_batch = 1.",
    ),
    loop(
        "refresh-cache-key-shared",
        "All samples share one cache entry: the last sample's log-probs.",
        ("STEP-4", "STEP-2"),
        "Keep each sample's behaviour log-probs with the sample.",
        trainer(refresh=of_last_for_all),
        ("huggingface/trl#6191",),
        "Batches of one sample, or steps_per_batch = 1.",
    ),
    loop(
        "refresh-one-token-late",
        "The refresh slices the logits one position late.",
        ("STEP-2", "STEP-4"),
        "The logits at response_start - 1 to -2 predict the response.",
        trainer(refresh=one_token_late),
        ("AI-Hypercomputer/maxtext#2103", "nlp-with-transformers/notebooks#67"),
        STEP_ONE,
    ),
    loop(
        "refresh-on-teacher-prompt",
        "The refresh reads the response behind the teacher's prompt.",
        ("STEP-2",),
        "Refresh on prompt + response.",
        trainer(refresh=on_teacher_prompt),
        (),
        STEP_ONE,
    ),
    loop(
        "refresh-at-temperature",
        "The refresh is taken at the sampler's temperature 0.7, the loss at 1.",
        ("STEP-2",),
        "Temperature 1 on both sides of the ratio.",
        trainer(refresh=at_temperature(0.7)),
        ("huggingface/trl#4159", "huggingface/trl#3029"),
        STEP_ONE,
        Parameter(
            "temperature",
            lambda t: TrainerParts(refresh=at_temperature(t)),
            logarithmic(0.3, 3.3, 12),
            "temperature 0.7",
        ),
    ),
    loop(
        "refresh-over-support",
        "The refresh is normalised over the teacher's top-k.",
        ("STEP-2",),
        "Normalise over the whole vocabulary.",
        trainer(refresh=over_support),
        ("huggingface/trl#7269",),
        STEP_ONE,
    ),
    loop(
        "refresh-averaged",
        "The refresh averages old and new log-probs, the new at a share of 0.5.",
        ("STEP-2", "STEP-3"),
        REFRESH,
        trainer(refresh=averaged_with_recorded(0.5)),
        (),
        STEP_ONE,
        Parameter(
            "share",
            lambda s: TrainerParts(refresh=averaged_with_recorded(s)),
            (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
            "share of 0.5",
        ),
    ),
    loop(
        "refresh-every-third-step",
        "The refresh runs only after steps divisible by 3.",
        ("STEP-2", "STEP-3"),
        REFRESH,
        trainer(refresh=every_so_many(3)),
        (),
        STEP_ONE,
        Parameter(
            "steps",
            lambda n: TrainerParts(refresh=every_so_many(n)),
            whole_numbers((2, 3, 4, 5)),
            "divisible by 3",
            whole=True,
        ),
    ),
    loop(
        "refresh-in-bfloat16",
        "The refreshed log-probs are kept in bfloat16.",
        ("STEP-2",),
        "Keep log-probs in float32.",
        trainer(refresh=in_bfloat16),
        (),
        STEP_ONE,
    ),
    loop(
        "sampler-logprobs-ignored",
        "The sampler's log-probs are replaced by the trainer's own, so step 1 corrects nothing.",
        ("STEP-1",),
        "Divide by what the sampler recorded; recompute only where it recorded nothing.",
        trainer(first_behaviour=recomputed),
        ("radixark/miles#1829", "NovaSky-AI/SkyRL#1315", "huggingface/trl#3867"),
        "Samplers whose log-probs are the trainer's own.",
    ),
    loop(
        "sampler-logprobs-late",
        "The sampler's log-probs are paired with the token after theirs.",
        ("STEP-1", "STEP-4"),
        "One recorded log-prob per response token, in order.",
        trainer(first_behaviour=recorded_late),
        ("huggingface/trl#6191",),
    ),
    loop(
        "missing-logprobs-as-zero",
        "Where the sampler recorded nothing, its log-probs are taken for 0.",
        ("STEP-1",),
        "Recompute them under the starting policy, or refuse the sample with a ValueError.",
        trainer(first_behaviour=recorded_or_zero),
        (),
        "Samples that carry their log-probs.",
    ),
    loop(
        "step-loss-without-ratio",
        "The loss in the loop leaves the importance ratio out; the refresh works.",
        ("STEP-1",),
        importance.APPLY_RATIO,
        trainer(loss=with_loss_defect(importance.DEFECTS, "dropped-importance-sampling")),
        ("linkedin/Liger-Kernel#1082", "huggingface/trl#4935"),
        "Samplers whose log-probs are the trainer's own.",
    ),
    loop(
        "step-ratio-inverted",
        "The loop's loss divides behaviour by current policy.",
        ("STEP-1",),
        "The log-ratio is new minus old.",
        trainer(loss=with_loss_defect(importance.DEFECTS, "ratio-inverted")),
        (),
        "Samplers whose log-probs are the trainer's own.",
    ),
    loop(
        "base-with-adapter",
        "The base log-probs are taken with the adapter enabled, so the anchor starts at 0.",
        ("STEP-5",),
        ADAPTER_OFF,
        trainer(base=base_with_adapter),
        ("kfallah/CLaaS#37", "huggingface/trl#1340"),
        NO_ANCHOR,
    ),
    loop(
        "base-follows-student",
        "The base log-probs are recomputed under the current adapter before every step.",
        ("STEP-5",),
        ADAPTER_OFF,
        trainer(before_step=base_follows),
        ("kfallah/CLaaS#37",),
        NO_ANCHOR,
    ),
    loop(
        "base-one-token-late",
        "The base log-probs are sliced one position late.",
        ("STEP-5",),
        "The logits at response_start - 1 to -2 predict the response.",
        trainer(base=base_late),
        ("AI-Hypercomputer/maxtext#2103",),
        NO_ANCHOR,
    ),
    loop(
        "base-on-teacher-prompt",
        "The base log-probs are read behind the teacher's prompt.",
        ("STEP-5",),
        "The anchor reads prompt + response, as the student does.",
        trainer(base=base_on_teacher_prompt),
        (),
        NO_ANCHOR,
    ),
    loop(
        "teacher-with-adapter",
        "The teacher is scored with the adapter enabled.",
        ("STEP-5",),
        ADAPTER_OFF,
        trainer(teacher=teacher_with_adapter),
        ("kfallah/CLaaS#37",),
    ),
    loop(
        "teacher-follows-student",
        "The teacher is scored again under the current adapter at every later step.",
        ("STEP-5",),
        ADAPTER_OFF,
        trainer(before_step=teacher_follows),
        ("huggingface/trl#4935",),
        STEP_ONE,
    ),
    loop(
        "base-and-teacher-with-adapter",
        "Base and teacher are the model with the adapter that it starts with, as in a frozen copy that keeps it.",
        ("STEP-5",),
        "Copy the model without its adapter, or disable it: get_base_model() keeps the LoRA layers.",
        trainer(base=base_with_adapter, teacher=teacher_with_adapter),
        ("kfallah/CLaaS#37",),
    ),
    loop(
        "base-and-teacher-follow-student",
        "Base and teacher are read under the current adapter at every step.",
        ("STEP-5",),
        ADAPTER_OFF,
        trainer(before_step=both_follow),
        ("kfallah/CLaaS#37",),
    ),
    loop(
        "base-and-teacher-half-off",
        "For base and teacher the adapter's scaling is 0: DoRA's magnitudes and trainable copies of modules stay on.",
        ("STEP-5",),
        ADAPTER_OFF,
        trainer(base=base_half_off, teacher=teacher_half_off),
        (),
        "Plain LoRA.",
    ),
    loop(
        "adapter-off-by-scaling",
        "For base and teacher the adapter's scaling is 0 and afterwards lora_alpha / r: the first leaves DoRA's "
        "magnitudes and trainable copies of modules on, the second is not what rsLoRA, or an adapter scaled since, "
        "has.",
        ("STEP-5", "STEP-1"),
        ADAPTER_OFF,
        trainer(
            base=base_half_off,
            teacher=teacher_half_off,
            forward=trainer_variants.ReadWhere(plainly_scaled, otherwise_scaled),
        ),
        (),
        "Plain LoRA.",
    ),
    loop(
        "adapter-scaled-by-rank",
        "The adapter is scaled by lora_alpha / r, which is not what rsLoRA, or an adapter scaled since, has.",
        ("STEP-1", "STEP-2"),
        "Put back the scaling that each layer had, or disable the adapter instead.",
        trainer(forward=trainer_variants.ReadWhere(plainly_scaled, otherwise_scaled)),
        (),
        "Plain LoRA.",
    ),
    loop(
        "base-of-behaviour-where-unrecorded",
        "Where the sampler recorded nothing, base and behaviour log-probs share a buffer: the anchor is the policy.",
        ("STEP-5",),
        ADAPTER_OFF,
        trainer(before_step=base_of_behaviour_where_unrecorded),
        (),
        "Samples that carry their log-probs.",
    ),
    loop(
        "response-token-searched-in-disorder",
        "At alpha = 1 the response's token is found by a binary search in a support that is not sorted by id.",
        ("STEP-1", "STEP-2"),
        "Compare with every entry of the support, or sort it by id first.",
        trainer(loss=binary_search),
        (),
        "alpha below 1.",
    ),
    loop(
        "teacher-on-student-prompt",
        "The teacher reads the student's prompt, without the feedback.",
        ("STEP-5",),
        "Score teacher_prompt_token_ids + response_token_ids.",
        trainer(teacher=teacher_on_student_prompt),
    ),
    loop(
        "teacher-one-token-late",
        "The teacher's top-k is sliced one position late.",
        ("STEP-5",),
        "The logits at teacher_start - 1 to -2 predict the response.",
        trainer(teacher=teacher_late),
        ("areal-project/AReaL#1729", "THU-BPM/RLCSD#6"),
    ),
    loop(
        "teacher-top-k-ignored",
        "The teacher's support is 5 tokens, whatever teacher_top_k.",
        ("STEP-5",),
        "k = min(max(1, teacher_top_k), V).",
        trainer(teacher=teacher_of(5)),
        parameter=Parameter(
            "K =", lambda k: TrainerParts(teacher=teacher_of(k)), whole_numbers(SIZES), "5", whole=True
        ),
    ),
    loop(
        "alpha-zero-skips-the-anchor",
        "At alpha = 0 the loss is 0 and nothing is trained, the anchor left out with the divergence.",
        ("STEP-1", "STEP-2"),
        "alpha = 0 takes the divergence away, and not kl_reg_weight * kl_reg.",
        trainer(loss=nothing_at_alpha_zero),
        (),
        "alpha above 0, and kl_reg_weight = 0, the default.",
    ),
    loop(
        "student-one-token-early",
        "The student's logits are sliced one position early.",
        ("STEP-1",),
        "The logits at response_start - 1 to -2 predict the response.",
        trainer(loss=shifted_logits),
        ("DeepOpt-com/WrinkleFree-Monorepo#13", "nlp-with-transformers/notebooks#67"),
    ),
    loop(
        "token-mean-over-samples",
        "One mean over all tokens of the batch, so long responses weigh more.",
        ("STEP-7",),
        "The mean over samples of their token means.",
        trainer(reduce=token_mean),
        ("huggingface/trl#3138",),
        "Batches whose responses are equally long.",
    ),
    loop(
        "sum-over-samples",
        "The samples' losses are added, not averaged.",
        ("STEP-7",),
        "Divide by the number of samples.",
        trainer(reduce=lambda run: torch.stack(run.losses).sum()),
        (),
        ONE_SAMPLE,
    ),
    loop(
        "mean-divided-again",
        "The mean over samples is divided by their number once more.",
        ("STEP-7",),
        "Divide by the number of samples once.",
        trainer(reduce=divided_again),
        ("modelscope/ms-swift#10117",),
        ONE_SAMPLE,
    ),
    loop(
        "last-sample-only",
        "Only the last sample's gradient survives.",
        ("STEP-7",),
        "Accumulate over all samples before the step.",
        trainer(reduce=lambda run: run.losses[-1] + 0 * torch.stack(run.losses).sum()),
        ("pytorch/torchtitan#3575", "huggingface/trl#583"),
        ONE_SAMPLE,
    ),
    loop(
        "gradients-not-zeroed",
        "Each step adds its gradient to those of the steps before.",
        ("STEP-8",),
        "optimizer.zero_grad() after every step.",
        trainer(zero=nothing_zeroed),
        (),
        STEP_ONE,
    ),
    loop(
        "gradients-half-zeroed",
        "Half of the adapter's parameters keep the gradient of the step before.",
        ("STEP-8",),
        "optimizer.zero_grad() over every parameter.",
        trainer(zero=half_zeroed),
        (),
        STEP_ONE,
    ),
    loop(
        "gradients-not-clipped",
        "The clip coefficient is computed and not applied.",
        ("STEP-8",),
        "clip_grad_norm_(parameters, max_grad_norm).",
        trainer(clip=unclipped),
        ("paiml/aprender#2112", "huggingface/trl#3312"),
        "Gradients whose norm stays below max_grad_norm.",
    ),
    loop(
        "clip-norm-hard-coded",
        "Gradients are clipped to norm 1, whatever max_grad_norm.",
        ("STEP-8",),
        "Read training.max_grad_norm.",
        trainer(clip=clipped_to(1.0)),
        (),
        "max_grad_norm = 1, the default.",
        Parameter("norm", lambda c: TrainerParts(clip=clipped_to(c)), logarithmic(1e-3, 10.0, 17), "norm 1"),
    ),
    loop(
        "clip-norm-multiplied",
        "Gradients are clipped to 2 times max_grad_norm.",
        ("STEP-8",),
        "clip_grad_norm_(parameters, max_grad_norm).",
        trainer(clip=clipped_at(2.0)),
        (),
        "Gradients whose norm stays below max_grad_norm.",
        Parameter(
            "times", lambda c: TrainerParts(clip=clipped_at(c)), logarithmic(2**-17, 64.0, 24), "2 times max_grad_norm"
        ),
    ),
    loop(
        "clip-by-other-norm",
        "Gradients are clipped by their norm of order 1.",
        ("STEP-8",),
        "Clip by the norm of order 2 over all parameters.",
        trainer(clip=clipped_by_order(1.0)),
        (),
        "",
        Parameter(
            "order",
            lambda n: TrainerParts(clip=clipped_by_order(n)),
            (0.5, 1.0, 1.5, 3.0, 4.0, float("inf")),
            "order 1",
            whole=True,
        ),
    ),
    loop(
        "clip-lora-b-alone",
        "Only the lora_B parameters are clipped, by their own norm.",
        ("STEP-8",),
        "Clip by the norm over all parameters.",
        trainer(clip=clipped_part("lora_B")),
        (),
        "Gradients whose norm stays below max_grad_norm.",
    ),
    loop(
        "clip-lora-a-alone",
        "Only the lora_A parameters are clipped, by their own norm.",
        ("STEP-8",),
        "Clip by the norm over all parameters.",
        trainer(clip=clipped_part("lora_A")),
        (),
        "Gradients whose norm stays below max_grad_norm.",
    ),
    loop(
        "clip-each-parameter",
        "Each parameter's gradient is clipped by itself.",
        ("STEP-8",),
        "Clip by the norm over all parameters.",
        trainer(clip=clipped_each),
        (),
        "Gradients whose norm stays below max_grad_norm.",
    ),
    loop(
        "clip-by-value",
        "Gradients are clipped element by element.",
        ("STEP-8",),
        "Clip by the norm over all parameters.",
        trainer(clip=clipped_by_value),
        (),
        "Gradients whose norm stays below max_grad_norm.",
    ),
    loop(
        "gradients-normalised",
        "Gradients are scaled to max_grad_norm also where they are smaller.",
        ("STEP-8",),
        "Scale by min(1, max_grad_norm / norm).",
        trainer(clip=normalised),
        (),
        "Gradients whose norm exceeds max_grad_norm.",
    ),
    loop(
        "optimizer-rebuilt",
        "The optimizer is rebuilt before every step, so its moments start from nothing.",
        ("STEP-10",),
        "One optimizer per call.",
        trainer(make_optimizer=remembering_class, before_step=rebuilt),
        ("thinking-machines-lab/tinker-feedback#126",),
        STEP_ONE,
    ),
    loop(
        "weight-decay-missing",
        "AdamW runs without weight decay.",
        ("STEP-10",),
        "weight_decay=0.01.",
        trainer(make_optimizer=with_options(weight_decay=0.0)),
    ),
    loop(
        "other-betas",
        "AdamW runs with other betas than (0.9, 0.999): (0.9, 0.95) in the executable form.",
        ("STEP-10",),
        "betas=(0.9, 0.999).",
        trainer(make_optimizer=with_options(betas=(0.9, 0.95))),
    ),
    loop(
        "learning-rate-hard-coded",
        "The learning rate is a constant, whatever the config says: 1e-4 in the executable form.",
        ("STEP-10",),
        "Read training.learning_rate.",
        trainer(make_optimizer=with_options(lr=1e-4)),
    ),
    loop(
        "learning-rate-decayed",
        "The learning rate falls linearly over the steps.",
        ("STEP-10",),
        "No schedule within a batch.",
        trainer(before_step=decayed),
        (),
        STEP_ONE,
    ),
    loop(
        "learning-rate-warmed-up",
        "The first step runs at half the learning rate.",
        ("STEP-10",),
        "No schedule within a batch.",
        trainer(before_step=warmed_up),
    ),
    loop(
        "half-the-adapter-trained",
        "Every second adapter parameter is missing from the optimizer.",
        ("STEP-10", "STEP-8"),
        "Optimise every parameter that requires grad.",
        trainer(make_optimizer=of_half_the_parameters),
        ("locuslab/open-unlearning#178",),
    ),
    loop(
        "last-step-lost",
        "The adapter that remains is the one before the last step.",
        ("STEP-10",),
        "Leave the adapter as the last step made it.",
        trainer(before_step=remember_adapter, finish=restored),
        ("radixark/miles#2572",),
    ),
    loop(
        "one-step-only",
        "One step is taken, whatever steps_per_batch.",
        ("STEP-6", "STEP-10"),
        "Take steps_per_batch steps.",
        one_step_only,
        (),
        STEP_ONE,
    ),
    loop(
        "one-step-more",
        "One step more than steps_per_batch is taken and not reported.",
        ("STEP-10", "STEP-6"),
        "Take steps_per_batch steps.",
        one_step_more,
    ),
    loop(
        "adapter-left-disabled",
        "The adapter is disabled on return.",
        ("STEP-9",),
        "Use disable_adapter() as a context.",
        trainer(finish=left_disabled),
        ("huggingface/peft#3636",),
    ),
    loop(
        "adapter-left-merged",
        "The adapter is merged into the base's weights on return.",
        ("STEP-9",),
        "Leave the adapter unmerged.",
        trainer(finish=left_merged),
    ),
    loop(
        "adapter-merged-and-unmerged",
        "The adapter is merged into the base and unmerged again, which leaves rounding in the base's weights.",
        ("STEP-9",),
        "Run the forward with the adapter unmerged, or merge into a copy.",
        trainer(finish=merged_and_unmerged),
    ),
    loop(
        "base-weights-decayed",
        "The base's weights are changed.",
        ("STEP-9",),
        "Optimise parameters that require grad, and no others.",
        trainer(finish=base_nudged),
        ("huggingface/peft#3447",),
    ),
    loop(
        "bad-input-accepted",
        "Nothing is checked before training.",
        ("STEP-12",),
        "Raise ValueError before anything changes.",
        trainer(accept=anything),
        ("strands-labs/robots#2028",),
        "Batches known to be good.",
    ),
    loop(
        "bad-input-asserted",
        "Bad input raises AssertionError, which python -O removes.",
        ("STEP-12",),
        "Raise ValueError.",
        trainer(accept=by_assertion),
        (),
        "Batches known to be good.",
    ),
    loop(
        "logprobs-length-unchecked",
        "Log-probs of another length than the response are cut or repeated.",
        ("STEP-11",),
        "Raise ValueError before anything changes.",
        trainer(accept=emptiness_only, first_behaviour=recorded_fitted),
        ("huggingface/trl#6191",),
        "Batches known to be good.",
    ),
)
