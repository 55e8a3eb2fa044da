"""Ways to get the step loop wrong: by which norm the gradient is clipped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch

from sdpo_conformance.specs.claas.defects.step_loop_variants import Run, trainer
from sdpo_conformance.specs.claas.defects.wrong_trainer import STEP_ONE, loop

ONE_NORM = "Clip by the norm over all parameters."
OWN_NORM = "Clip each step's gradient by its own norm."
UNCLIPPED = "Gradients whose norm stays below max_grad_norm."

LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")


def layer_of(name: str) -> str:
    """The number of a parameter's decoder layer, or nothing."""
    found = LAYER.search(name)
    return found[1] if found else ""


def in_groups(group: Callable[[str], object]) -> Callable[[Run], float]:
    """The parameters clipped in groups, by their names, each to max_grad_norm; the norm over all before."""

    def clip(run: Run) -> float:
        groups: dict[object, list[torch.nn.Parameter]] = {}
        for name, parameter in run.model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(group(name), []).append(parameter)
        return norm_of(torch.nn.utils.clip_grad_norm_(of_one, run.training.max_grad_norm) for of_one in groups.values())

    return clip


def norm_of(norms: Iterable[torch.Tensor]) -> float:
    """The norm over all of the norms of parts."""
    return float(torch.stack(list(norms)).norm())


def by_previous(first: bool) -> Callable[[Run], float]:
    """Scaled by the norm of the step before; the ``first`` step by its own, or not at all."""

    def clip(run: Run) -> float:
        own = float(torch.nn.utils.clip_grad_norm_(run.parameters, float("inf")))
        before = run.kept.get("norm", own if first else 0.0)
        run.kept["norm"] = own
        for parameter in run.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(min(1.0, run.training.max_grad_norm / (before + 1e-6)))
        return own

    return clip


DEFECTS = (
    *(
        loop(
            f"clip-in-groups-of-{name}",
            f"The gradients of {words} are clipped apart, each part to max_grad_norm by its own norm.",
            ("STEP-8",),
            ONE_NORM,
            trainer(clip=in_groups(group)),
            (),
            UNCLIPPED,
        )
        for name, words, group in (
            ("lora-b-and-rest", "the lora_B parameters and of all others", lambda name: "lora_B" in name),
            ("lora-and-rest", "LoRA's parameters and of all others", lambda name: "lora_" in name),
            ("layers", "each decoder layer", layer_of),
        )
    ),
    loop(
        "clip-by-previous-norm",
        "The gradient is scaled by the norm that the step before had, the first step's by its own.",
        ("STEP-8",),
        OWN_NORM,
        trainer(clip=by_previous(first=True)),
        (),
        STEP_ONE,
    ),
    loop(
        "clip-by-previous-norm-but-first",
        "The gradient is scaled by the norm that the step before had, the first step's not at all.",
        ("STEP-8",),
        OWN_NORM,
        trainer(clip=by_previous(first=False)),
        (),
        UNCLIPPED,
    ),
)
