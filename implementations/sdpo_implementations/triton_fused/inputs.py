"""What the entries accept, checked once and laid out flat. A wrong input is a ValueError of one line."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.runtime import INTERPRETED

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Tokens:
    """A batch as N = B * T tokens: ``support`` (N, K) and ``response_ids`` (N,) int32 or int64, ``mask`` (N,) float32
    (0: the token counts for nothing, whatever stands there), all contiguous.

    ``teacher_logprobs``, ``old_student_logprobs`` and ``base_logprobs`` are as they came: no kernel needs them before
    the vocabulary's product runs, and flattening them would keep the GPU waiting for it.
    """

    teacher_logprobs: Tensor
    support: Tensor
    response_ids: Tensor
    old_student_logprobs: Tensor
    base_logprobs: Tensor
    mask: Tensor
    alpha: float
    is_clip: float
    kl_reg_weight: float


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_tensor(name: str, value: Any, dims: tuple[int, ...] | int, device: torch.device, integers: bool) -> None:
    # Messages are made where they are needed: until these checks are done, the GPU waits for its first kernel.
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, the student on {device}: move it there")
    if isinstance(dims, int):
        if value.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(value.shape)}")
    elif value.shape != dims:
        raise ValueError(f"{name} must have shape {tuple(dims)}, got {tuple(value.shape)}")
    if integers and value.dtype not in INTEGERS:
        raise ValueError(f"{name} must be int64 or int32, got {value.dtype}")


def check_floats(name: str, value: Tensor) -> None:
    if not value.dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point, got {value.dtype}")


def check_range(name: str, ids: Tensor, vocabulary: int, counted: Tensor | None) -> None:
    """On the CPU alone: on a GPU the answer would stall the queue, and the kernels give NaN instead."""
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    wrong = (ids < 0) | (ids >= vocabulary)
    if counted is not None:
        wrong = wrong & (counted if ids.dim() == counted.dim() else counted.unsqueeze(-1))
    if bool(wrong.any()):
        raise ValueError(f"{name} must lie in [0, {vocabulary}), got {int(ids[wrong][0])}")


def check_features(name: str, features: Any) -> None:
    """(B, T, width) in a supported dtype, on a device the kernels run on."""
    if not isinstance(features, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(features).__name__}")
    if features.dim() != 3:
        raise ValueError(f"{name} must have shape (B, T, width), got {tuple(features.shape)}")
    if features.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {features.dtype}")
    if features.shape[-1] == 0:
        raise ValueError(f"{name} must not be empty in its last dimension")
    if not (features.is_cuda or (INTERPRETED and features.device.type == "cpu")):
        raise ValueError(
            f"{name} is on {features.device}: move it to a CUDA device, or set TRITON_INTERPRET=1 at start for the CPU"
        )


def check_head(head: Any, hidden_name: str, hidden: Tensor) -> None:
    """(V, H) beside hidden states (B, T, H): same device, same dtype."""
    check_tensor("lm_head_weight", head, 2, hidden.device, integers=False)
    if head.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"lm_head_weight must have shape (V, {hidden.shape[-1]}) to match {hidden_name}, got {tuple(head.shape)}"
        )
    if head.shape[0] == 0:
        raise ValueError("lm_head_weight must have at least one row")
    if head.dtype != hidden.dtype:
        raise ValueError(f"lm_head_weight is {head.dtype}, {hidden_name} {hidden.dtype}: both must have the same dtype")


def check_support(support: Any, student: Tensor, vocabulary: int, counted: Tensor | None) -> None:
    """(B, T, K) token ids, 1 <= K <= V."""
    check_tensor("teacher_indices", support, 3, student.device, integers=True)
    batch, length, _ = student.shape
    k = support.shape[-1]
    if support.shape[:2] != student.shape[:2]:
        raise ValueError(f"teacher_indices must have shape {(batch, length, k)}, got {tuple(support.shape)}")
    if not 1 <= k <= vocabulary:
        raise ValueError(f"teacher_indices must hold 1 to {vocabulary} entries a token, got {k}")
    check_range("teacher_indices", support, vocabulary, counted)


def check_teacher_logprobs(teacher_logprobs: Any, support: Tensor) -> None:
    """(B, T, K) log-probs at as many ids."""
    check_tensor("teacher_logprobs", teacher_logprobs, support.shape, support.device, integers=False)
    check_floats("teacher_logprobs", teacher_logprobs)


def check_response_ids(response_ids: Any, student: Tensor, vocabulary: int, counted: Tensor | None) -> None:
    check_tensor("response_ids", response_ids, student.shape[:2], student.device, integers=True)
    check_range("response_ids", response_ids, vocabulary, counted)


def _hyperparameter(training: Any, name: str) -> float:
    try:
        value = float(getattr(training, name))
    except (AttributeError, TypeError) as error:
        raise ValueError(f"training.{name} must be a number") from error
    require(value == value, f"training.{name} must be a number, got nan")
    return value


def flat(tensor: Tensor) -> Tensor:
    """(B, T) -> (N,) or (B, T, X) -> (N, X), rows contiguous; a copy only where the layout asks for one."""
    if tensor.dim() == 2:
        return tensor.reshape(-1).contiguous()
    rows = tensor.reshape(-1, tensor.shape[-1])
    if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]:
        return rows
    return rows.contiguous()


def flat_constant(tensor: Tensor) -> Tensor:
    """The same without graph, and contiguous. (N,) stays as it is."""
    constant = (tensor.detach() if tensor.requires_grad else tensor).contiguous()
    return constant.view(-1) if constant.dim() < 3 else constant.view(-1, constant.shape[-1])


def flat_head(head: Tensor) -> Tensor:
    return head if head.stride(1) == 1 and head.stride(0) >= head.shape[1] else head.contiguous()


def read_tokens(loss_input: Any, features: Tensor, vocabulary: int) -> Tokens:
    """Check what the first kernels read beside the student's (B, T, width); ``check_logprobs`` checks the rest."""
    mask = loss_input.response_mask
    check_tensor("response_mask", mask, features.shape[:2], features.device, integers=False)
    # Only where ids are checked: on a GPU the comparison would be a kernel for nothing.
    counted = mask != 0 if features.device.type == "cpu" else None
    check_support(loss_input.teacher_indices, features, vocabulary, counted)
    check_response_ids(loss_input.response_ids, features, vocabulary, counted)
    training = loss_input.training
    alpha = _hyperparameter(training, "alpha")
    # As every kernel gets it: a ratio at the cap equals the cap wherever the two are compared.
    is_clip = ctypes.c_float(_hyperparameter(training, "is_clip")).value
    require(alpha >= 0, f"training.alpha must be at least 0, got {alpha}")
    return Tokens(
        teacher_logprobs=loss_input.teacher_logprobs,
        support=flat_constant(loss_input.teacher_indices),
        response_ids=flat_constant(loss_input.response_ids),
        old_student_logprobs=loss_input.old_student_logprobs,
        base_logprobs=loss_input.base_logprobs,
        mask=flat_constant(mask).to(torch.float32),
        alpha=alpha,
        is_clip=is_clip,
        kl_reg_weight=_hyperparameter(training, "kl_reg_weight"),
    )


def check_logprobs(loss_input: Any) -> None:
    """Check what no kernel reads before the vocabulary's product has been launched."""
    mask = loss_input.response_mask
    check_teacher_logprobs(loss_input.teacher_logprobs, loss_input.teacher_indices)
    for name in ("old_student_logprobs", "base_logprobs"):
        value = getattr(loss_input, name)
        check_tensor(name, value, mask.shape, mask.device, integers=False)
        check_floats(name, value)
