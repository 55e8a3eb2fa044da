"""No torch inside: NumPy in float64, value and gradient by formula, a loss and its gradient handed back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .shared import Computed

Array = Any


def array(tensor: Tensor) -> Array:
    return tensor.detach().cpu().double().numpy()


def log_sum_exp(x: Array) -> Array:
    top = np.max(x, -1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return top + np.log(np.sum(np.exp(x - top), -1, keepdims=True))


def times(weight: Array, value: Array) -> Array:
    """0 times anything is 0."""
    return np.where(weight > 0, weight * np.where(weight > 0, value, 0.0), 0.0)


def results_and_gradient(z: Array, loss_input: Any) -> tuple[dict[str, float], Array]:
    training = loss_input.training
    mask = array(loss_input.response_mask)
    counts = mask != 0
    tau, old, base = (
        array(one) for one in (loss_input.teacher_logprobs, loss_input.old_student_logprobs, loss_input.base_logprobs)
    )
    tau, z = np.where(counts[..., None], tau, 0.0), np.where(counts[..., None], z, 0.0)
    old, base = np.where(counts, old, 0.0), np.where(counts, base, 0.0)
    support = loss_input.teacher_indices.cpu().long().numpy()
    y = loss_input.response_ids.cpu().long().numpy()[..., None]
    weight = mask / max(mask.sum(), 1.0)

    l = z - log_sum_exp(z)  # noqa: E741
    softmax = np.exp(l)
    chosen = np.take_along_axis(l, y, -1)[..., 0]
    ratio = np.minimum(np.exp(np.clip(chosen - old, -20, 20)), training.is_clip)
    gradient = np.zeros_like(z)
    if training.alpha >= 1:
        found = support == y
        tau_y = np.where(found.any(-1), np.where(found, tau, 0.0).sum(-1), -20.0)
        slope = chosen - tau_y
        divergence, onto = slope * chosen, slope * ratio * weight
    else:
        l_k = np.take_along_axis(l, support, -1)
        floor = np.log(1e-8)
        log_p, log_mass = tau - np.maximum(log_sum_exp(tau), floor), log_sum_exp(l_k)
        log_q = l_k - np.maximum(log_mass, floor)
        with np.errstate(divide="ignore"):
            log_m = np.logaddexp(np.log(training.alpha) + log_p, np.log1p(-training.alpha) + log_q)
        p, q = np.exp(log_p), np.exp(log_q)
        with np.errstate(invalid="ignore"):
            teacher, student = times(p, log_p - log_m).sum(-1), times(q, log_q - log_m)
        divergence = (training.alpha * teacher if training.alpha else 0.0) + (1 - training.alpha) * student.sum(-1)
        push = (1 - training.alpha) * student
        total, floored = push.sum(-1, keepdims=True), log_mass < floor
        scale = (ratio * weight)[..., None]
        np.put_along_axis(gradient, support, scale * np.where(floored, push, push - q * total), -1)
        gradient -= np.where(floored, scale * total, 0.0) * softmax
        onto = np.zeros_like(chosen)
    drift = chosen - base
    within = np.clip(drift, -20, 20)
    onto = onto + training.kl_reg_weight * weight * np.where(np.abs(drift) <= 20, np.expm1(within), 0.0)
    gradient -= onto[..., None] * softmax
    np.put_along_axis(gradient, y, np.take_along_axis(gradient, y, -1) + onto[..., None], -1)
    distill_loss = float((divergence * ratio * weight).sum())
    kl_reg = float(((np.expm1(within) - within) * weight).sum())
    return {
        "loss": distill_loss + training.kl_reg_weight * kl_reg,
        "distill_loss": distill_loss,
        "kl_reg": kl_reg,
        "mean_is_ratio": float((ratio * weight).sum()),
        "clip_fraction": float(((ratio >= training.is_clip) * weight).sum()),
    }, gradient


def handed_back(results: dict[str, float], gradients: tuple[Array | None, ...], *inputs: Tensor) -> Mapping[str, Any]:
    """The loss as a tensor that knows its gradients."""
    like = inputs[0]
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    made = [None if one is None else torch.from_numpy(one).to(like.device, wide) for one in gradients]
    loss = torch.tensor(results["loss"], dtype=wide, device=like.device)
    return {**results, "loss": Computed.apply(loss, tuple(made), *inputs)}


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    results, gradient = results_and_gradient(array(loss_input.student_logits), loss_input)
    return handed_back(results, (gradient,), loss_input.student_logits)


def compute_fused_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    hidden, head = array(loss_input.student_hidden), array(loss_input.lm_head_weight)
    hidden = np.where(array(loss_input.response_mask)[..., None] != 0, hidden, 0.0)
    results, gradient = results_and_gradient(hidden @ head.T, loss_input)
    to_head = None
    if loss_input.lm_head_weight.requires_grad:
        to_head = gradient.reshape(-1, head.shape[0]).T @ hidden.reshape(-1, head.shape[1])
    return handed_back(results, (gradient @ head, to_head), loss_input.student_hidden, loss_input.lm_head_weight)
