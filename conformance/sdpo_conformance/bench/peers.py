"""Published packages as rows: what each computes, and the inputs it would get from its own trainer.

A peer of another objective is timed on its native inputs (teacher hidden states or teacher logits, made outside
the timing) and is not judged by the oracle; its row says what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.bench.bench_inputs import Inputs
from sdpo_conformance.bench.workloads import Workload
from sdpo_conformance.judging.implementation import LoadingError

LossOf = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Peer:
    """``other``: what it computes where that is not the CLaaS loss, else empty. ``bind``: the loss on native
    inputs for a work, raising LoadingError where it is not installed; None: the protocol's entry serves."""

    label: str
    other: str = ""
    bind: Callable[[Workload], LossOf] | None = None


def liger_chunked(work: Workload) -> LossOf:
    """LigerFusedLinearJSDLoss as its trainer calls it; torch.compile on a GPU is its own default."""
    loss = imported("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss", "liger-kernel")(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=work.alpha, compiled=work.device.startswith("cuda")
    )
    return lambda inputs: loss(*liger_arguments(inputs))


def liger_triton(work: Workload) -> LossOf:
    """LigerFusedLinearJSD, Triton kernels under a chunked product."""
    if not work.device.startswith("cuda"):
        raise LoadingError("needs a GPU")
    loss = imported("liger_kernel.transformers.fused_linear_jsd", "LigerFusedLinearJSD", "liger-kernel")(
        jsd_beta=work.alpha
    )
    return lambda inputs: loss(*liger_arguments(inputs))


def liger_arguments(inputs: Inputs) -> tuple[Tensor, ...]:
    """Student and teacher states with the one head they share, and labels that ignore nothing."""
    teacher, ids = inputs.teacher_hidden.flatten(0, 1), inputs.response_ids.flatten()
    return inputs.hidden.flatten(0, 1), inputs.head, teacher, inputs.head, ids


def trl_topk(work: Workload) -> LossOf:
    """TRL's loss functions in the order of its trainer, top-k of the student, without the tail bucket."""
    topk_loss = imported(TRL, "compute_topk_self_distillation_loss", "trl")
    clipped = imported(TRL, "apply_importance_sampling_clipping", "trl")
    kept: dict[Tensor, Tensor] = {}

    def loss(inputs: Inputs) -> Tensor:
        teacher = teacher_logits(inputs, kept)
        logits = inputs.hidden @ inputs.head.T
        per_token = topk_loss(
            logits,
            teacher,
            distillation_topk=work.top_k,
            distillation_alpha=work.alpha,
            distillation_add_tail=False,
        )
        chosen = selected_logprobs(logits, inputs.response_ids)
        per_token = clipped(per_token, chosen, inputs.old_student_logprobs, IS_CLIP)
        return (per_token * inputs.response_mask).sum() / inputs.response_mask.sum().clamp(min=1.0)

    return loss


TRL = "trl.experimental.sdpo.loss_utils"
IS_CLIP = 5.0


def selected_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """l[y] as TRL's trainer takes it."""
    found: Tensor = imported("trl.trainer.utils", "selective_log_softmax", "trl")(logits, ids)
    return found


def teacher_logits(inputs: Inputs, kept: dict[Tensor, Tensor]) -> Tensor:
    """The teacher's logits, made once for each copy of the inputs, in the warm-up: in training they come from the
    teacher's own forward."""
    if inputs.teacher_hidden not in kept:
        with torch.no_grad():
            kept[inputs.teacher_hidden] = inputs.teacher_hidden @ inputs.head.T
    return kept[inputs.teacher_hidden]


def imported(module: str, name: str, package: str) -> Any:
    """An object of a peer; raises LoadingError with what to install."""
    try:
        return getattr(import_module(module), name)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise LoadingError(f"not installed: {module} ({reason}): pip install {package}") from None


JSD = "JSD over the whole vocabulary; no ratio, no anchor"

PEERS: Mapping[str, Peer] = {
    "adapters.claas": Peer("CLaaS eager"),
    "compile:adapters.claas": Peer("CLaaS torch.compile"),
    "adapters.liger_chunked_jsd": Peer("Liger chunked JSD", f"{JSD}; and the head's gradient", liger_chunked),
    "adapters.liger_triton_jsd": Peer("Liger Triton JSD", JSD, liger_triton),
    "adapters.trl_sdpo": Peer("TRL SDPO", "the student's top-k as support, teacher logits given; no anchor", trl_topk),
    "adapters.cut_cross_entropy": Peer("cut-cross-entropy"),
    "adapters.liger_scaled_cross_entropy": Peer("Liger scaled linear cross-entropy"),
    "adapters.quack_linear_cross_entropy": Peer("QuACK lse_target_epi"),
    "adapters.verl_linear_cross_entropy": Peer("verl linear_cross_entropy (entropy too)"),
    "adapters.torch_linear_cross_entropy": Peer("PyTorch linear_cross_entropy"),
}
"""What ``--peers`` adds, by the name an implementation is given on the command line."""

OTHERS: Mapping[str, str] = {
    "adapters.lasgroup_sdpo": "the student's top-k and a tail bucket; no anchor",
    "adapters.trl_sdpo:sampled_token": "the response tokens alone; no anchor",
    "adapters.trl_sdpo:teacher_server": "row means before the batch mean; no anchor",
}
"""Adapters that are no part of ``--peers``: what they compute."""


def other_objective(target: str) -> str:
    """What a known peer computes in place of the CLaaS loss; empty for everything else."""
    plain = target.removeprefix(COMPILE)
    return PEERS[plain].other if plain in PEERS else OTHERS.get(plain, "")


def label(target: str) -> str:
    """The name of a row."""
    return PEERS[target].label if target in PEERS else target


COMPILE = "compile:"
"""Before an implementation's name: its loss through torch.compile."""
