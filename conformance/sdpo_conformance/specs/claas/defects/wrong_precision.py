"""Ways to get the step loop wrong: what is computed or added up in bfloat16 on the way. Sums are rounded in an order of
their own, so that what comes near one of these is it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call

from sdpo_conformance.specs.claas.defects import step_loop_variants as right
from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.defects.parameter import whole_numbers
from sdpo_conformance.specs.claas.defects.step_loop_variants import Prepared, ReadWhere, Run, TrainerParts, trainer
from sdpo_conformance.specs.claas.defects.wrong_batches import micro_batches
from sdpo_conformance.specs.claas.defects.wrong_forwards import Forward, read, student_only
from sdpo_conformance.specs.claas.defects.wrong_samples import added, alone, gathered, numbered
from sdpo_conformance.specs.claas.defects.wrong_trainer import STEP_ONE, loop

SAME_PRECISION = "Read every policy in the precision that the step's own forward has: the ratio is of the two."


def in_autocast(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """The logits (1, T, V) of the model under bfloat16 autocast; autocast leaves float64 alone, so that such a model
    is read with its weights in float32."""
    options = {"input_ids": ids, "use_cache": False}
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        if next(run.model.parameters()).dtype != torch.float64:
            logits = run.model(**options).logits
        else:
            weights = {**dict(run.model.named_parameters()), **dict(run.model.named_buffers())}
            single = {name: one.float() for name, one in weights.items() if one.is_floating_point()}
            logits = functional_call(run.model, single, kwargs=options).logits
    return read(logits, response).to(next(run.model.parameters()).dtype)


def in_copy(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """The logits (1, T, V) of a copy of the model in bfloat16."""
    weights = {**dict(run.model.named_parameters()), **dict(run.model.named_buffers())}
    half = {name: one.bfloat16() for name, one in weights.items() if one.is_floating_point()}
    logits = functional_call(run.model, half, kwargs={"input_ids": ids, "use_cache": False}).logits
    return read(logits, response).to(next(run.model.parameters()).dtype)


def refreshed_by(forward: Forward) -> Callable[[Run], None]:
    """The refresh alone."""
    return lambda run: right.refresh(replace(run, forward=forward))


def base_by(forward: Forward) -> Callable[[Run, Prepared], Tensor]:
    """The base alone."""
    return lambda run, one: right.base(replace(run, forward=forward), one)


def teacher_by(forward: Forward) -> Callable[[Run, Prepared], tuple[Tensor, Tensor]]:
    """The teacher alone."""
    return lambda run, one: right.teacher(replace(run, forward=forward), one)


def summed_in_bfloat16(size: float) -> Callable[[Run, list[list[Tensor]]], list[Tensor]]:
    """The gradients of micro-batches are added into bfloat16 tensors."""

    def combine(run: Run, each: list[list[Tensor]]) -> list[Tensor]:
        sums = [torch.zeros_like(g, dtype=torch.bfloat16) for g in each[0]]
        for part in micro_batches(range(len(each)), size):
            shares = added([[g / len(each) for g in each[index]] for index in part])
            sums = [(total.to(g.dtype) + g).bfloat16() for total, g in zip(sums, shares, strict=True)]
        return [total.to(g.dtype) for total, g in zip(sums, each[0], strict=True)]

    return combine


def read_in_half(suffix: str, how: str, forward: Forward) -> list[Defect]:
    """Which of the loop's forwards are not in the model's precision."""
    beside = "the step's own forward does not: the ratio is off by hundredths"
    return [
        loop(
            f"refresh-{suffix}",
            f"The refresh {how}, {beside}.",
            ("STEP-2",),
            SAME_PRECISION,
            trainer(refresh=refreshed_by(forward)),
            (),
            STEP_ONE,
            rounded=True,
        ),
        loop(
            f"base-and-teacher-{suffix}",
            f"What scores base and teacher {how}, the policy does not.",
            ("STEP-5",),
            SAME_PRECISION,
            trainer(base=base_by(forward), teacher=teacher_by(forward)),
            rounded=True,
        ),
        loop(
            f"reads-{suffix}",
            f"Whatever is read without gradient {how}, {beside}.",
            ("STEP-2", "STEP-5", "STEP-1"),
            SAME_PRECISION,
            trainer(forward=ReadWhere(forward, lambda run, ids, response: not torch.is_grad_enabled())),
            rounded=True,
        ),
        loop(
            f"student-{suffix}",
            f"The forward with gradient {how}, what is read without gradient does not.",
            ("STEP-1", "STEP-2"),
            SAME_PRECISION,
            trainer(forward=student_only(forward)),
            rounded=True,
        ),
        loop(
            f"all-forwards-{suffix}",
            f"Every forward {how}, whatever the model's precision.",
            ("STEP-1", "STEP-2", "STEP-5"),
            "Run the model in its own precision.",
            trainer(forward=forward),
            rounded=True,
        ),
    ]


DEFECTS: tuple[Defect, ...] = (
    *read_in_half("in-autocast", "runs under bfloat16 autocast", in_autocast),
    *read_in_half("by-bfloat16-copy", "runs on a copy of the model in bfloat16", in_copy),
    replace(
        numbered(
            "gradients-summed-in-bfloat16",
            "The gradients of micro-batches, here of 2 samples, are added up in bfloat16.",
            ("STEP-1", "STEP-2"),
            "Accumulate gradients in float32.",
            "samples",
            lambda size: TrainerParts(forward=alone, reduce=gathered(summed_in_bfloat16(size))),
            whole_numbers((1, 2, 3, 4, 6, 8, 16)),
            2,
            whole=True,
        ),
        rounded=True,
    ),
)
