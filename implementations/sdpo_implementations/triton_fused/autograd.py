"""The differentiable entries: kernels strung together, forward and backward, as autograd functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdpo_implementations.triton_fused.inputs import Tokens, flat, flat_constant
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
from sdpo_implementations.triton_fused.kernels.support_order import MOST_ENTRIES
from sdpo_implementations.triton_fused.kernels.token_logits import chosen_token_logits, fill_token_logits
from sdpo_implementations.triton_fused.kernels.token_loss import PolicyTerms, TokenTerms, token_terms
from sdpo_implementations.triton_fused.kernels.vocabulary_product import Wanted
from sdpo_implementations.triton_fused.runtime import INTERPRETED, on_device

NARROW = 1024
"""Width of a head up to which gathering the support's rows costs less than taking their logits from the product."""

METRICS = ("distill_loss", "kl_reg", "mean_is_ratio", "clip_fraction")


@dataclass(frozen=True)
class VocabularyLogits:
    """What the product of hidden states and head leaves of the vocabulary: logits at the ``support`` (N, K), None for
    alpha >= 1, and at the response, ``chosen`` (N,); the logsumexp as ``row_max`` + ``log_sum`` (N,); ``expected`` e
    where the dense term was asked for."""

    support: Tensor | None
    chosen: Tensor
    row_max: Tensor
    log_sum: Tensor
    expected: ExpectedRows | None


@dataclass(frozen=True)
class Forward:
    """What the backward needs of the forward; ``expected`` e where the dense term was asked for."""

    terms: TokenTerms
    row_max: Tensor
    log_sum: Tensor
    expected: ExpectedRows | None


def policy_terms(tokens: Tokens) -> PolicyTerms:
    return PolicyTerms(
        tokens.response_ids,
        flat_constant(tokens.old_student_logprobs),
        flat_constant(tokens.base_logprobs),
        tokens.is_clip,
        tokens.kl_reg_weight,
    )


@torch.no_grad()
def vocabulary_logits(hidden: Tensor, head: Tensor, tokens: Tokens, dense: bool) -> VocabularyLogits:
    """Launch the product of hidden (B, T, H) and head (V, H). ``dense``: make e as well, by a second product.

    Until the product is launched the GPU waits, so that all that can come later does.
    """
    with on_device(hidden):
        hidden = flat(hidden)
        counted, support, ids = tokens.mask, tokens.support, tokens.response_ids
        n_rows, k_support = support.shape
        logits: Tensor | None = None
        wanted: Wanted | None = None
        expected: ExpectedRows | None = None
        if tokens.alpha < 1:
            # The product has the support's logits. But float32 products are summed one by one: taken, they would cost
            # a divergence of near-equal distributions a digit. And rows of a narrow head are read sooner than taken.
            narrow = hidden.shape[1] <= NARROW and not INTERPRETED
            taken = hidden.dtype != torch.float32 and k_support < MOST_ENTRIES and not narrow
            with_response = taken and not dense
            logits = torch.empty((n_rows, k_support + with_response), dtype=torch.float32, device=hidden.device)
            if taken:
                wanted = Wanted(support, ids if with_response else None, logits)
            else:
                fill_token_logits(hidden, head, support, counted, logits)
        if wanted is not None and not dense:
            row_max, log_sum = hidden_logsumexp(hidden, head, counted, wanted)
            chosen = wanted.logits[:, k_support]
        elif dense:
            chosen = chosen_token_logits(hidden, head, ids, counted)
            expected, row_max, log_sum = expected_rows(hidden, head, ids, chosen, counted, wanted)
        else:
            row_max, log_sum = hidden_logsumexp(hidden, head, counted)
            chosen = chosen_token_logits(hidden, head, ids, counted)
        return VocabularyLogits(logits, chosen, row_max, log_sum, expected)


def forward_from_logits(product: VocabularyLogits, tokens: Tokens, policy: PolicyTerms | None) -> Forward:
    """Per-token terms, of the divergence alone without ``policy``."""
    terms = token_terms(
        product.support, product.chosen, product.row_max, product.log_sum, flat_constant(tokens.teacher_logprobs),
        tokens.support, tokens.mask, tokens.alpha, policy,
    )  # fmt: skip
    return Forward(terms, product.row_max, product.log_sum, product.expected)


def backward_to_hidden(
    hidden: Tensor, head: Tensor, tokens: Tokens, state: Forward, scale: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients (B, T, H) and (V, H) of sum scale * (token loss), those that are needed."""
    to_hidden = to_head = None
    shape = hidden.shape
    hidden = flat(hidden)
    if needs[0]:
        gradient = hidden_gradient(head, tokens.support, tokens.response_ids, state.terms, scale, state.expected)
        if state.expected is None and 0 < tokens.alpha < 1:
            add_floor_rows(hidden, head, state.row_max, state.log_sum, state.terms, scale, gradient)
        to_hidden = gradient.to(hidden.dtype).view(shape)
    if needs[1]:
        to_head = head_gradient(
            hidden, head, tokens.support, tokens.response_ids, tokens.mask,
            state.row_max, state.log_sum, state.terms, scale,
        )  # fmt: skip
    return to_hidden, to_head


class FusedLoss(torch.autograd.Function):
    """(hidden (B, T, H), head (V, H), tokens, their ``vocabulary_logits``) -> loss () and the metrics (4,)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, tokens: Tokens, product: VocabularyLogits
    ) -> tuple[Tensor, Tensor]:
        with on_device(hidden):
            state = forward_from_logits(product, tokens, policy_terms(tokens))
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
    """(hidden (B, T, H), head (V, H), tokens) -> D (N,) float32, without policy terms."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, tokens: Tokens) -> Tensor:
        with on_device(hidden):
            ctx.state = forward_from_logits(vocabulary_logits(hidden, head, tokens, dense=False), tokens, None)
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
                at_support, chosen, row_max, log_sum, flat_constant(tokens.teacher_logprobs), tokens.support,
                tokens.mask, tokens.alpha, policy_terms(tokens),
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
