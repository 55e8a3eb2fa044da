"""Ways to get the step loop wrong: the optimizer's settings, what it is given, how often it steps, what is left."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from sdpo_conformance.specs.claas.defects import step_loop_variants as right
from sdpo_conformance.specs.claas.defects.step_loop_variants import Run, TrainerParts, trainer
from sdpo_conformance.specs.claas.defects.wrong_trainer import ONE_SAMPLE, STEP_ONE, loop, with_options

NO_SCHEDULE = "No schedule within a batch."
EVERY_PARAMETER = "Optimise every parameter that requires grad."
WHOLE_STATE = "One optimizer per call, or its whole state restored."
NEW_OPTIMIZER = "One optimizer per call, made anew."
AS_FOUND = "Leave the model and the process as they were found."


def at_rate(times: Callable[[Run], float]) -> Callable[[Run], None]:
    """The learning rate is multiplied at every step."""

    def before_step(run: Run) -> None:
        for group in run.optimizer.param_groups:
            group["lr"] = run.training.learning_rate * times(run)

    return before_step


def rated(times: Callable[[Run], float]) -> Callable[[Run, Any], Any]:
    """The learning rate is multiplied for good."""
    return lambda run, optimizer_cls: with_options(lr=times(run) * run.training.learning_rate)(run, optimizer_cls)


def cosine(run: Run) -> float:
    """Half a wave from 1 at the first step towards 0."""
    return 0.5 * (1 + math.cos(math.pi * (run.step - 1) / run.training.steps_per_batch))


TENTH = 10
"""Parts of all steps, in one of which a schedule warms up or decays."""


def late(run: Run) -> float:
    """1, and in the last tenth of the steps falling to 0 behind the last."""
    steps = run.training.steps_per_batch
    return min(1.0, (steps - run.step + 1) / max(1, steps // TENTH))


def early(run: Run) -> float:
    """Rising over the first tenth of the steps, where that is more than one, then 1."""
    return min(1.0, run.step / max(1, run.training.steps_per_batch // TENTH))


def by_kind(**of_b: Any) -> Callable[[Run, Any], Any]:
    """The lora_B parameters in a group with other settings."""

    def make_optimizer(run: Run, optimizer_cls: Any) -> Any:
        is_b = {id(p) for name, p in run.model.named_parameters() if "lora_B" in name}
        groups = [
            {"params": [p for p in run.parameters if id(p) not in is_b]},
            {
                "params": [p for p in run.parameters if id(p) in is_b],
                **{key: value(run) if callable(value) else value for key, value in of_b.items()},
            },
        ]
        return optimizer_cls(groups, lr=run.training.learning_rate, betas=(0.9, 0.999), weight_decay=0.01)

    return make_optimizer


def trained(wanted: Callable[[str], bool]) -> Callable[[Run, Any], Any]:
    """The optimizer gets the parameters of these names alone."""

    def make_optimizer(run: Run, optimizer_cls: Any) -> Any:
        names = {id(p): name for name, p in run.model.named_parameters()}
        rest = replace(run, parameters=[p for p in run.parameters if wanted(names[id(p)])])
        return right.make_optimizer(rest, optimizer_cls)

    return make_optimizer


def is_of_first_layer(name: str) -> bool:
    """Whether a parameter is of the first decoder layer."""
    return ".layers.0." in name or ".h.0." in name


_KEPT: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def kept(run: Run, optimizer_cls: Any) -> Any:
    """The optimizer of the first call on a model, for every later one."""
    if run.model not in _KEPT:
        _KEPT[run.model] = right.make_optimizer(run, optimizer_cls)
    return _KEPT[run.model]


def forgotten(*what: str) -> Callable[[Run], None]:
    """These tensors of the optimizer's state begin each step at 0."""

    def before_step(run: Run) -> None:
        for state in run.optimizer.state.values():
            for name in what:
                state[name].zero_()

    return before_step


def in_steps(change: Callable[[int], int]) -> Callable[..., Any]:
    """Another number of steps, reported as far as they were asked for."""

    def distill(model: Any, samples: Sequence[Any], training: Any, optimizer_cls: Any) -> Any:
        steps = change(training.steps_per_batch)
        other = replace(training, steps_per_batch=steps)
        result = right.distill(TrainerParts(), model, samples, other, optimizer_cls)
        return {"per_step_metrics": result["per_step_metrics"][: training.steps_per_batch]}

    return distill


def step_for_each(run: Run) -> None:
    """Before the loop's own step, which is the last sample's: one for each of the others."""
    for one in run.batch[:-1]:
        right.sample_loss(run, one, right.right_loss)["loss"].backward()
        right.clip(run)
        run.optimizer.step()
        right.zero(run)


def steps_for_each(model: Any, samples: Sequence[Any], training: Any, optimizer_cls: Any) -> Any:
    """An optimizer step after every sample."""
    parts = TrainerParts(before_step=step_for_each, reduce=lambda run: run.losses[-1])
    return right.distill(parts, model, samples, training, optimizer_cls)


STEPPED = 4
"""Samples of a micro-batch, where the optimizer steps after each."""


def step_for_each_part(run: Run) -> None:
    """Before the loop's own step, which is the last micro-batch's: one for each of the others."""
    for at in range(0, len(run.batch) - STEPPED, STEPPED):
        part = run.batch[at : at + STEPPED]
        torch.stack([right.sample_loss(run, one, right.right_loss)["loss"] for one in part]).mean().backward()
        right.clip(run)
        run.optimizer.step()
        right.zero(run)


def steps_for_each_part(model: Any, samples: Sequence[Any], training: Any, optimizer_cls: Any) -> Any:
    """An optimizer step after every micro-batch."""
    last = (len(samples) - 1) // STEPPED * STEPPED
    parts = TrainerParts(before_step=step_for_each_part, reduce=lambda run: torch.stack(run.losses[last:]).mean())
    return right.distill(parts, model, samples, training, optimizer_cls)


def or_default(run: Run, optimizer_cls: Any) -> Any:
    """A learning rate of 0 is taken for none."""
    if run.training.learning_rate:
        return right.make_optimizer(run, optimizer_cls)
    return right.make_optimizer(replace(run, training=replace(run.training, learning_rate=3e-5)), optimizer_cls)


def left_in_evaluation(run: Run) -> None:
    """The model stays in evaluation mode."""
    run.model.eval()


def left_another_active(run: Run) -> None:
    """The adapter that was loaded first is the active one from now on."""
    run.model.set_adapter(next(iter(run.model.peft_config)))


def left_frozen(run: Run) -> None:
    """The adapter stays without requires_grad."""
    for parameter in run.parameters:
        parameter.requires_grad_(False)


def left_trainable(run: Run) -> None:
    """The base asks for gradients from now on."""
    for parameter in run.model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)


def left_hooked(run: Run) -> None:
    """A hook stays on the model."""
    run.model.register_forward_hook(lambda module, given, out: None)


def left_settings(run: Run) -> None:
    """Anomaly detection stays on."""
    torch.autograd.set_detect_anomaly(True)


def seeded_inside(run: Run) -> None:
    """The process's generators begin again at every step."""
    import random

    import numpy

    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)


def writing_samples(model: Any, samples: Sequence[Any], training: Any, optimizer_cls: Any) -> Any:
    """Each prompt has its response at its end from now on."""
    found = right.distill(TrainerParts(), model, samples, training, optimizer_cls)
    for sample in samples:
        sample.prompt_token_ids.extend(sample.response_token_ids)
    return found


DEFECTS = (
    loop(
        "other-weight-decay",
        "AdamW's weight decay is another than 0.01: 0.1 in the executable form.",
        ("STEP-10",),
        "weight_decay=0.01.",
        trainer(make_optimizer=with_options(weight_decay=0.1)),
    ),
    loop(
        "weight-decay-of-some-missing",
        "Some of the adapter's parameters have no weight decay: lora_B's in the executable form.",
        ("STEP-10",),
        "weight_decay=0.01 for every parameter.",
        trainer(make_optimizer=by_kind(weight_decay=0.0)),
    ),
    loop(
        "other-epsilon",
        "AdamW's epsilon is another than 1e-8: 1e-6 in the executable form.",
        ("STEP-10",),
        "eps=1e-8, the default.",
        trainer(make_optimizer=with_options(eps=1e-6)),
    ),
    loop(
        "amsgrad-on",
        "AdamW runs with amsgrad.",
        ("STEP-10",),
        "amsgrad=False, the default.",
        trainer(make_optimizer=with_options(amsgrad=True)),
    ),
    loop(
        "learning-rate-scaled",
        "The learning rate is the config's times a constant: a half in the executable form.",
        ("STEP-10",),
        "Take training.learning_rate as it is.",
        trainer(make_optimizer=rated(lambda run: 0.5)),
    ),
    loop(
        "learning-rate-of-some-scaled",
        "Some of the adapter's parameters have the learning rate times a constant: lora_B's 16 times in the executable "
        "form, as in LoRA+.",
        ("STEP-10",),
        "training.learning_rate for every parameter.",
        trainer(make_optimizer=by_kind(lr=lambda run: 16 * run.training.learning_rate)),
    ),
    loop(
        "learning-rate-zero-as-unset",
        "learning_rate = 0 is taken for unset, and is another: 3e-5 in the executable form.",
        ("STEP-10",),
        "Ask whether the setting is None, not whether it is true: 0 is a value.",
        trainer(make_optimizer=or_default),
        (),
        "learning_rate above 0.",
    ),
    loop(
        "learning-rate-times-samples",
        "The learning rate is multiplied by the number of samples.",
        ("STEP-10",),
        "Take training.learning_rate as it is.",
        trainer(make_optimizer=rated(lambda run: len(run.batch))),
        (),
        ONE_SAMPLE,
    ),
    loop(
        "learning-rate-over-steps",
        "The learning rate is divided by steps_per_batch.",
        ("STEP-10",),
        "Take training.learning_rate as it is.",
        trainer(make_optimizer=rated(lambda run: 1 / run.training.steps_per_batch)),
        (),
        STEP_ONE,
    ),
    loop(
        "learning-rate-cosine",
        "The learning rate falls along a cosine over the steps.",
        ("STEP-10",),
        NO_SCHEDULE,
        trainer(before_step=at_rate(cosine)),
        (),
        STEP_ONE,
    ),
    loop(
        "learning-rate-warmed-up-over-all-steps",
        "The learning rate grows linearly over the steps, to the config's at the last.",
        ("STEP-10",),
        NO_SCHEDULE,
        trainer(before_step=at_rate(lambda run: run.step / run.training.steps_per_batch)),
        (),
        STEP_ONE,
    ),
    loop(
        "learning-rate-falls-late",
        "The learning rate is the config's until the last steps, over which it falls: the last tenth in the "
        "executable form.",
        ("STEP-10",),
        NO_SCHEDULE,
        trainer(before_step=at_rate(late)),
        (),
        "A batch of few steps.",
    ),
    loop(
        "learning-rate-rises-early",
        "The learning rate rises over the first steps and is the config's from there on: over the first tenth in the "
        "executable form.",
        ("STEP-10",),
        NO_SCHEDULE,
        trainer(before_step=at_rate(early)),
        (),
        "A batch of few steps.",
    ),
    loop(
        "learning-rate-scheduled",
        "The learning rate changes from step to step: it halves in the executable form.",
        ("STEP-10",),
        NO_SCHEDULE,
        trainer(before_step=at_rate(lambda run: 0.5 ** (run.step - 1))),
    ),
    loop(
        "optimizer-kept-across-calls",
        "The optimizer of an earlier call on the same model goes on, with its moments and its count of steps.",
        ("STEP-10",),
        NEW_OPTIMIZER,
        trainer(make_optimizer=kept),
        (),
        "The first call on a model.",
    ),
    loop(
        "step-count-forgotten",
        "The optimizer keeps its moments and forgets its count of steps: each update is corrected as the first is.",
        ("STEP-10",),
        WHOLE_STATE,
        trainer(before_step=forgotten("step")),
        (),
        STEP_ONE,
    ),
    loop(
        "moments-forgotten",
        "The optimizer keeps its count of steps and forgets its moments.",
        ("STEP-10",),
        WHOLE_STATE,
        trainer(before_step=forgotten("exp_avg", "exp_avg_sq")),
        (),
        STEP_ONE,
    ),
    loop(
        "first-moments-forgotten",
        "The optimizer forgets its first moments from step to step.",
        ("STEP-10",),
        WHOLE_STATE,
        trainer(before_step=forgotten("exp_avg")),
        (),
        STEP_ONE,
    ),
    loop(
        "second-moments-forgotten",
        "The optimizer forgets its second moments from step to step.",
        ("STEP-10",),
        WHOLE_STATE,
        trainer(before_step=forgotten("exp_avg_sq")),
        (),
        STEP_ONE,
    ),
    loop(
        "lora-b-alone-trained",
        "The optimizer gets the lora_B parameters alone.",
        ("STEP-10", "STEP-8"),
        EVERY_PARAMETER,
        trainer(make_optimizer=trained(lambda name: "lora_B" in name)),
    ),
    loop(
        "lora-a-alone-trained",
        "The optimizer gets the lora_A parameters alone.",
        ("STEP-10", "STEP-8"),
        EVERY_PARAMETER,
        trainer(make_optimizer=trained(lambda name: "lora_A" in name)),
    ),
    loop(
        "beside-lora-untrained",
        "The optimizer gets the parameters whose name has lora_ in it, and not those of modules_to_save or trained "
        "token rows.",
        ("STEP-10", "STEP-8"),
        EVERY_PARAMETER,
        trainer(make_optimizer=trained(lambda name: "lora_" in name)),
        (),
        "Adapters of LoRA layers alone.",
    ),
    loop(
        "beside-lora-factors-untrained",
        "The optimizer gets the lora_A and lora_B parameters, and not DoRA's magnitudes, LoRA on embeddings, "
        "modules_to_save or trained token rows.",
        ("STEP-10", "STEP-8"),
        EVERY_PARAMETER,
        trainer(make_optimizer=trained(lambda name: "lora_A." in name or "lora_B." in name)),
        (),
        "Adapters of LoRA's two factors alone.",
    ),
    loop(
        "part-of-adapter-untrained",
        "Some of the adapter's parameters are missing from the optimizer: all but the first layer's in the executable "
        "form.",
        ("STEP-10", "STEP-8"),
        EVERY_PARAMETER,
        trainer(make_optimizer=trained(is_of_first_layer)),
        ("locuslab/open-unlearning#178",),
    ),
    loop(
        "one-step-less",
        "One step less than steps_per_batch is taken.",
        ("STEP-6", "STEP-10"),
        "Take steps_per_batch steps.",
        in_steps(lambda steps: steps - 1),
    ),
    loop(
        "twice-the-steps",
        "Twice as many steps as steps_per_batch are taken.",
        ("STEP-10", "STEP-6"),
        "Take steps_per_batch steps.",
        in_steps(lambda steps: 2 * steps),
    ),
    loop(
        "step-for-each-sample",
        "The optimizer steps after every sample, not once for all of them.",
        ("STEP-10", "STEP-7", "STEP-1", "STEP-2"),
        "Accumulate over all samples, then step once.",
        steps_for_each,
        (),
        ONE_SAMPLE,
    ),
    loop(
        "step-for-each-micro-batch",
        "The optimizer steps after every micro-batch, not once for all samples: of 4 in the executable form.",
        ("STEP-10", "STEP-7", "STEP-1", "STEP-2"),
        "Accumulate over all samples, then step once.",
        steps_for_each_part,
        (),
        "Batches of one micro-batch.",
    ),
    loop(
        "model-left-in-evaluation-mode",
        "A model that came in training mode is left in evaluation mode.",
        ("STEP-9",),
        AS_FOUND,
        trainer(finish=left_in_evaluation),
    ),
    loop(
        "other-adapter-left-active",
        "Another adapter is made active than the one that came active: the one loaded first in the executable form.",
        ("STEP-9",),
        "Use model.disable_adapter(), which leaves the active adapter as it is, or set that one again by its name.",
        trainer(finish=left_another_active),
        (),
        "A model with one adapter.",
    ),
    loop(
        "adapter-left-frozen",
        "The adapter's parameters are left without requires_grad.",
        ("STEP-9",),
        AS_FOUND,
        trainer(finish=left_frozen),
    ),
    loop(
        "base-left-trainable",
        "Parameters of the base are left with requires_grad.",
        ("STEP-9",),
        AS_FOUND,
        trainer(finish=left_trainable),
    ),
    loop(
        "hook-left",
        "A hook is left on the model.",
        ("STEP-9",),
        AS_FOUND,
        trainer(finish=left_hooked),
    ),
    loop(
        "settings-left",
        "A setting that holds for all of torch is left changed: anomaly detection in the executable form.",
        ("STEP-9",),
        AS_FOUND,
        trainer(finish=left_settings),
    ),
    loop(
        "seeded-inside",
        "The trainer seeds the process's random generators.",
        ("STEP-9",),
        AS_FOUND,
        trainer(finish=seeded_inside),
    ),
    loop(
        "samples-written",
        "The trainer writes into the samples it was given.",
        ("STEP-9",),
        "Work on copies.",
        writing_samples,
    ),
)
