"""The differentiable entries: kernels strung together, forward and backward, as autograd functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdpo_implementations.triton_fused.inputs import Tokens
from sdpo_implementations.triton_fused.kernels.expected_row import ExpectedRows, expected_rows
from sdpo_implementations.triton_fused.kernels.floor_rows import add_floor_rows
from sdpo_implementations.triton_fused.kernels.head_gradient import head_gradient
from sdpo_implementations.triton_fused.kernels.logits_entry import (
    logits_gradient,
    logits_logsumexp,
    pick_tokens,
)
from sdpo_implementations.triton_fused.kernels.logsumexp import hidden_logsumexp
from sdpo_implementations.triton_fused.kernels.reduction import reduce_tokens
from sdpo_implementations.triton_fused.kernels.support_gradient import hidden_gradient
from sdpo_implementations.triton_fused.kernels.token_logits import chosen_token_logits, fill_token_logits
from sdpo_implementations.triton_fused.kernels.token_loss import PolicyTerms, TokenTerms, token_terms
from sdpo_implementations.triton_fused.runtime import Fork, on_device

METRICS = ("distill_loss", "kl_reg", "mean_is_ratio", "clip_fraction")


@dataclass(frozen=True)
class Forward:
    """What the backward needs of the forward; ``expected`` e where the dense term was asked for."""

    terms: TokenTerms
    row_max: Tensor
    log_sum: Tensor
    expected: ExpectedRows | None


def policy_terms(tokens: Tokens) -> PolicyTerms:
    return PolicyTerms(
        tokens.response_ids, tokens.old_student_logprobs, tokens.base_logprobs, tokens.is_clip, tokens.kl_reg_weight
    )


def forward_from_hidden(
    hidden: Tensor, head: Tensor, tokens: Tokens, policy: PolicyTerms | None, dense: bool
) -> Forward:
    """Per-token terms of hidden (N, H), head (V, H). ``dense``: make e as well, in two products instead of one."""
    counted = tokens.mask
    at_support = None
    if tokens.alpha < 1:
        at_support = torch.empty(tokens.support.shape, dtype=torch.float32, device=hidden.device)
    start = Fork(hidden.device)
    expected: ExpectedRows | None = None
    # The product is bound by arithmetic, gathering the support's rows by memory: they share the device.
    if dense:
        chosen = chosen_token_logits(hidden, head, tokens.response_ids, counted)
        expected, row_max, log_sum = expected_rows(hidden, head, tokens.response_ids, chosen, counted)
    else:
        row_max, log_sum = hidden_logsumexp(hidden, head, counted)
        chosen = chosen_token_logits(hidden, head, tokens.response_ids, counted)
    if at_support is not None:
        with start:
            fill_token_logits(hidden, head, tokens.support, counted, at_support)
    terms = token_terms(
        at_support, chosen, row_max, log_sum, tokens.teacher_logprobs, tokens.support, tokens.mask, tokens.alpha, policy
    )
    return Forward(terms, row_max, log_sum, expected)


def backward_to_hidden(
    hidden: Tensor, head: Tensor, tokens: Tokens, state: Forward, scale: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients (N, H) and (V, H) of sum scale * (token loss), those that are needed."""
    to_hidden = to_head = None
    if needs[0]:
        gradient = hidden_gradient(head, tokens.support, tokens.response_ids, state.terms, scale, state.expected)
        if state.expected is None and 0 < tokens.alpha < 1:
            add_floor_rows(hidden, head, state.row_max, state.log_sum, state.terms, scale, gradient)
        to_hidden = gradient.to(hidden.dtype)
    if needs[1]:
        to_head = head_gradient(
            hidden, head, tokens.support, tokens.response_ids, tokens.mask,
            state.row_max, state.log_sum, state.terms, scale,
        )  # fmt: skip
    return to_hidden, to_head


class FusedLoss(torch.autograd.Function):
    """(hidden (N, H), head (V, H), tokens, dense) -> loss () and the metrics (4,).

    ``dense``: a gradient to the hidden states will be wanted that has a dense term.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, tokens: Tokens, dense: bool) -> tuple[Tensor, Tensor]:
        with on_device(hidden):
            state = forward_from_hidden(hidden, head, tokens, policy_terms(tokens), dense)
            results = reduce_tokens(state.terms, tokens.mask, tokens.is_clip, tokens.kl_reg_weight)
        ctx.save_for_backward(hidden, head)
        ctx.tokens, ctx.state, ctx.inverse_count = tokens, state, results[5]
        metrics = results[1:5]
        ctx.mark_non_differentiable(metrics)
        return results[0], metrics

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_loss: Tensor, grad_metrics: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, head = ctx.saved_tensors
        with on_device(hidden):
            scale = grad_loss.to(torch.float32) * ctx.inverse_count
            to_hidden, to_head = backward_to_hidden(
                hidden, head, ctx.tokens, ctx.state, scale, ctx.needs_input_grad[:2]
            )
        return to_hidden, to_head, None, None


class FusedDivergence(torch.autograd.Function):
    """(hidden (N, H), head (V, H), tokens) -> D (N,) float32, without policy terms."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, tokens: Tokens) -> Tensor:
        with on_device(hidden):
            ctx.state = forward_from_hidden(hidden, head, tokens, None, dense=False)
        ctx.save_for_backward(hidden, head)
        ctx.tokens = tokens
        return ctx.state.terms.values[0].to(torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_divergence: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, head = ctx.saved_tensors
        with on_device(hidden):
            scale = grad_divergence.to(torch.float32).contiguous()
            to_hidden, to_head = backward_to_hidden(
                hidden, head, ctx.tokens, ctx.state, scale, ctx.needs_input_grad[:2]
            )
        return to_hidden, to_head, None


class LogitsLoss(torch.autograd.Function):
    """(logits (N, V), tokens) -> loss () and the metrics (4,)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        with on_device(logits):
            row_max, log_sum = logits_logsumexp(logits, tokens.mask)
            at_support = pick_tokens(logits, tokens.support, tokens.mask) if tokens.alpha < 1 else None
            chosen = pick_tokens(logits, tokens.response_ids.unsqueeze(1), tokens.mask).squeeze(1)
            terms = token_terms(
                at_support, chosen, row_max, log_sum, tokens.teacher_logprobs, tokens.support, tokens.mask,
                tokens.alpha, policy_terms(tokens),
            )  # fmt: skip
            results = reduce_tokens(terms, tokens.mask, tokens.is_clip, tokens.kl_reg_weight)
        ctx.save_for_backward(logits)
        ctx.tokens, ctx.state, ctx.inverse_count = tokens, Forward(terms, row_max, log_sum, None), results[5]
        metrics = results[1:5]
        ctx.mark_non_differentiable(metrics)
        return results[0], metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_metrics: Tensor | None) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        tokens, state = ctx.tokens, ctx.state
        with on_device(logits):
            scale = grad_loss.to(torch.float32) * ctx.inverse_count
            gradient = logits_gradient(
                logits, tokens.support, tokens.response_ids, state.row_max, state.log_sum, state.terms, scale
            )
        return gradient.to(logits.dtype), None


def result(loss: Tensor, metrics: Tensor) -> Mapping[str, Tensor]:
    return {"loss": loss, **dict(zip(METRICS, metrics.unbind(), strict=True))}


def empty_result(features: Tensor) -> Mapping[str, Tensor]:
    """No token at all: a loss of 0 that can be differentiated, to zeros."""
    zeros = torch.zeros(len(METRICS), dtype=torch.float32, device=features.device)
    return result(features.float().sum() * 0.0, zeros)
