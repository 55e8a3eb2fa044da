"""The EMA teacher of lasgroup's and TRL's trainers, on plain state dicts.

Source: lasgroup/SDPO at 0e6d510, verl/workers/actor/dp_actor.py 132-151; trl 1.16.0, trl/trainer/callbacks.py 130-132
and trl/experimental/sdpo/teacher_sync.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

A, B = ".lora_A.", ".lora_B."


@torch.no_grad()
def update_teacher(teacher: dict[str, Tensor], student: Mapping[str, Tensor], teacher_update_rate: float) -> None:
    """theta_t <- (1 - rate) theta_t + rate theta for every parameter, in place, once per batch; one that stands under
    two names, as tied embeddings in a state dict, once too. Names as in the teacher's state dict; the student may lie
    on another device."""
    each = {(value.data_ptr(), value.shape, value.stride()): name for name, value in teacher.items()}
    for name in each.values():
        value = teacher[name]
        given = student[name].detach().to(device=value.device, dtype=value.dtype)
        value.mul_(1.0 - teacher_update_rate).add_(given, alpha=teacher_update_rate)


@torch.no_grad()
def update_adapter_teacher(
    teacher: dict[str, Tensor], student: Mapping[str, Tensor], teacher_update_rate: float
) -> None:
    """The same; of a LoRA adapter, in PEFT's names, the product of the factors is averaged and not each factor: the
    nearest product of the adapter's rank to (1 - rate) B_t A_t + rate B A takes its place."""
    pairs = [name for name in teacher if A in name]
    factors = {*pairs, *(name.replace(A, B) for name in pairs)}
    update_teacher(
        {name: value for name, value in teacher.items() if name not in factors}, student, teacher_update_rate
    )
    for name in pairs:
        into_a, into_b = teacher[name], teacher[name.replace(A, B)]
        own_a, own_b = (student[one].detach().to(into_a) for one in (name, name.replace(A, B)))
        old = into_b.double() @ into_a.double()
        new = (1.0 - teacher_update_rate) * old + teacher_update_rate * (own_b.double() @ own_a.double())
        u, size, v = torch.linalg.svd(new, full_matrices=False)
        rank = into_a.shape[0]
        root = size[:rank].sqrt()
        into_b.zero_()[:, : len(root)].copy_(u[:, :rank] * root)
        into_a.zero_()[: len(root)].copy_(root.unsqueeze(-1) * v[:rank])
