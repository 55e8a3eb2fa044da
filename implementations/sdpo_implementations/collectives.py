"""Sums over ranks that autograd passes through, for losses that every rank of tensor parallelism computes alike.

After a sum over tp every rank goes on with the same numbers to the same loss. So the gradient that comes back to
the sum is whole on every rank already, and is each summand's own: summing it again would count it tp times. What
every rank starts from (hidden states) gets a share of its gradient on each rank, and those are summed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

BATCH_AXES = ("dp", "cp")


class _Summed(torch.autograd.Function):
    """Forward: the sum over the group. Backward: the gradient as it comes."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: Any) -> Tensor:
        total = local.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Shared(torch.autograd.Function):
    """Forward: the tensor as it is. Backward: the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def group_of(mesh: Any, axis: str) -> Any:
    """The process group along ``axis`` of a DeviceMesh, or None where nothing is cut along it."""
    names = () if mesh is None else (mesh.mesh_dim_names or ())
    if axis not in names or mesh.size(names.index(axis)) == 1:
        return None
    return mesh.get_group(axis)


def summed(local: Tensor, group: Any) -> Tensor:
    """The sum over the ranks of ``group``; the gradient passes to each summand unchanged."""
    if group is None:
        return local
    total: Tensor = _Summed.apply(local, group)
    return total


def shared(tensor: Tensor, group: Any) -> Tensor:
    """``tensor``, which every rank of ``group`` holds, with its gradient summed over them."""
    if group is None:
        return tensor
    passed: Tensor = _Shared.apply(tensor, group)
    return passed


@torch.no_grad()
def maximum(local: Tensor, group: Any) -> Tensor:
    """The maximum over the ranks of ``group``, without graph."""
    if group is None:
        return local
    largest = local.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


@torch.no_grad()
def batch_sum(local: Tensor, mesh: Any) -> Tensor:
    """The sum over dp and cp, without graph: counts and metrics."""
    total = local.detach().clone(memory_format=torch.contiguous_format)
    for axis in BATCH_AXES:
        if (group := group_of(mesh, axis)) is not None:
            dist.all_reduce(total, group=group)
    return total


def batch_ranks(mesh: Any) -> int:
    """Over how many ranks the gradient is averaged afterwards: dp x cp."""
    names = () if mesh is None else (mesh.mesh_dim_names or ())
    sizes = [mesh.size(names.index(axis)) for axis in BATCH_AXES if axis in names]
    count = 1
    for size in sizes:
        count *= size
    return count
