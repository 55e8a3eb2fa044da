"""The body of one rank: ``distill`` on two ranks beside the one process that it has to equal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sdpo_conformance.protocol import Sample, TrainingConfig
from sdpo_conformance.trainer.models import ModelSpec, build
from sdpo_implementations.reference.trainer import distill
from sdpo_implementations.sharded_step_loop import shard_model

MODEL = ModelSpec("qwen3", tied=True, seed=31)
TRAINING = TrainingConfig(learning_rate=5e-3, kl_reg_weight=0.1, teacher_top_k=8, max_grad_norm=0.25, steps_per_batch=2)
SAMPLES = [
    Sample([3, 1, 4], [1, 5, 9, 2], [6, 5, 3, 1, 4], [-2.0, -1.5, -3.0, -0.5]),
    Sample([2, 7], [1, 8, 2], [8, 1, 2, 7], [-1.0, -2.5, -2.0]),
    Sample([5, 6, 7], [8, 9, 10, 11, 12], [4, 4, 5, 6, 7], None),
]
"""Three on two ranks: one of them has run out in the second pass, and one sample was recorded nothing of."""

HOLDINGS: dict[str, Callable[[Any, Any], Any]] = {
    "copy": lambda model, mesh: model,
    "DistributedDataParallel": lambda model, mesh: DistributedDataParallel(model),
    "FSDP2": shard_model,
}


def whole(tensor: Tensor) -> Tensor:
    """Gathered where it is cut."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().double().clone()


def recording(gradients: list[list[Tensor]]) -> type[torch.optim.AdamW]:
    """An AdamW that keeps the gradients it steps with."""

    class Recording(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            gradients.append([whole(p.grad) for group in self.param_groups for p in group["params"]])
            return super().step(closure)

    return Recording


def distilled(model: Any, mesh: Any) -> tuple[list[Any], list[list[Tensor]], list[Tensor]]:
    """(metrics per step, gradients per step, the adapter afterwards)."""
    gradients: list[list[Tensor]] = []
    metrics = distill(model, SAMPLES, TRAINING, recording(gradients), mesh=mesh)["per_step_metrics"]
    return list(metrics), gradients, [whole(p) for p in model.parameters() if p.requires_grad]


def compare(rank: int, ranks: int, rendezvous: str) -> None:
    """Raises AssertionError where a way to hold the model gives other metrics, gradients or weights."""
    torch.set_num_threads(1)
    one_process = distilled(build(MODEL), None)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    for holding, hold in HOLDINGS.items():
        metrics, gradients, weights = distilled(hold(build(MODEL), mesh), mesh)
        assert len(metrics) == TRAINING.steps_per_batch
        for step, (got, expected) in enumerate(zip(metrics, one_process[0], strict=True)):
            for key, value in expected.items():
                assert math.isclose(got[key], value, rel_tol=1e-4, abs_tol=1e-7), (holding, step, key, got[key], value)
        for step, (got, expected) in enumerate(zip(gradients, one_process[1], strict=True)):
            assert_close(f"{holding}, gradient of step {step + 1}", got, expected)
        assert_close(f"{holding}, weights", weights, one_process[2])
    dist.destroy_process_group()


def assert_close(what: str, got: list[Tensor], expected: list[Tensor]) -> None:
    """Within float32's rounding of the largest number of each tensor. Weights: Adam's first steps are the gradient's
    sign, so that a gradient near 0 may move a weight by a part of a step."""
    for number, (one, other) in enumerate(zip(got, expected, strict=True)):
        off = float((one - other).abs().max())
        assert off <= 2e-3 * float(other.abs().max()), f"{what}, parameter {number}: off by {off:.3g}"
