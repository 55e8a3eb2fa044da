"""The fused loss on one rank of a DeviceMesh: no rank ever holds another's part of the logits.

tp: each rank makes its own vocabulary's statistics; one all_reduce of K + 2 + 2 TP numbers a token (the logits at
support and response, how many ids there are, and a maximum and a sum for each rank) gives every rank the same token
terms. The gradient to the hidden states is summed over tp once. dp, cp: one all_reduce of six numbers.

Ids are local here: id - vocab_start. The kernels leave out ids outside the head they are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdpo_implementations.collectives import batch_ranks, batch_sum, group_of
from sdpo_implementations.triton_fused.autograd import Forward, empty_result, policy_terms, result
from sdpo_implementations.triton_fused.inputs import (
    Tokens,
    check_features,
    check_head,
    check_logprobs,
    check_response_ids,
    check_support,
    check_teacher_logprobs,
    flat,
    flat_constant,
    flat_head,
    read_tokens,
)
from sdpo_implementations.triton_fused.kernels.expected_row import ExpectedRows, expected_rows
from sdpo_implementations.triton_fused.kernels.floor_rows import add_floor_rows
from sdpo_implementations.triton_fused.kernels.head_gradient import head_gradient
from sdpo_implementations.triton_fused.kernels.logits_entry import logits_gradient, logits_logsumexp, pick_tokens
from sdpo_implementations.triton_fused.kernels.logsumexp import hidden_logsumexp
from sdpo_implementations.triton_fused.kernels.support_gradient import hidden_gradient
from sdpo_implementations.triton_fused.kernels.teacher_topk import hidden_topk
from sdpo_implementations.triton_fused.kernels.token_logits import chosen_token_logits, fill_token_logits
from sdpo_implementations.triton_fused.kernels.token_loss import PolicyTerms, TokenTerms, token_terms
from sdpo_implementations.triton_fused.kernels.vocabulary_product import buffer_columns, tiling
from sdpo_implementations.triton_fused.runtime import Fork, on_device


@dataclass(frozen=True)
class Shard:
    """This rank's stretch of the vocabulary of ``size``: ``held`` ids from ``start`` on; place ``place`` of ``ranks``
    in ``group`` (None where nothing is cut along tp)."""

    mesh: Any
    group: Any
    place: int
    ranks: int
    start: int
    held: int
    size: int

    @classmethod
    def of(cls, mesh: Any, start: int, size: int, rows: int, device: torch.device) -> Shard:
        """Raises ValueError where the ranks of tp do not hold the vocabulary once."""
        group = group_of(mesh, "tp")
        held = max(0, min(rows, size - start))
        if group is None:
            place, ranks, total = 0, 1, held
        else:
            place, ranks = mesh.get_local_rank("tp"), dist.get_world_size(group)
            total = held_by_all(held, group) if device.type == "cpu" else size
        if total != size:
            raise ValueError(
                f"the ranks of tp hold {total} ids of a vocabulary of {size}: each its own stretch from vocab_start on"
            )
        return cls(mesh, group, place, ranks, start, held, size)

    def local(self, ids: Tensor) -> Tensor:
        """Global ids as this rank counts them; those of other ranks lie outside [0, held)."""
        return ids - self.start

    def owns(self, local: Tensor) -> Tensor:
        return (local >= 0) & (local < self.held)


def held_by_all(held: int, group: Any) -> int:
    """How many ids the ranks hold together. On the CPU alone: on a GPU the answer would stall the queue, and
    ``combined`` gives NaN instead."""
    total = torch.tensor(held)
    dist.all_reduce(total, group=group)
    return int(total)


@dataclass(frozen=True)
class Statistics:
    """Of the whole vocabulary, equal on every rank of tp: logits at support (N, K) or None and response (N,), row
    maximum and log of the sum (N,). ``share`` (N,) float64: this rank's mass over the whole."""

    at_support: Tensor | None
    chosen: Tensor
    row_max: Tensor
    log_sum: Tensor
    share: Tensor


def combined(at_support: Tensor | None, chosen: Tensor, row_max: Tensor, log_sum: Tensor, shard: Shard) -> Statistics:
    """One all_reduce. Each rank puts its maximum and sum into places of its own, so that a sum brings them to all."""
    n_rows, wide = chosen.shape[0], 0 if at_support is None else at_support.shape[1]
    packed = torch.zeros((n_rows, wide + 2 + 2 * shard.ranks), dtype=torch.float32, device=chosen.device)
    if at_support is not None:
        packed[:, :wide] = at_support
    packed[:, wide] = chosen
    packed[:, wide + 1] = shard.held
    packed[:, wide + 2 + shard.place] = row_max
    packed[:, wide + 2 + shard.ranks + shard.place] = log_sum.exp()
    if shard.group is not None:
        dist.all_reduce(packed, group=shard.group)
    maxima, sums = packed[:, wide + 2 :].split(shard.ranks, dim=1)
    maxima = torch.where(sums > 0, maxima, float("-inf"))
    whole_max = maxima.amax(1)
    whole_sum = (sums.double() * (maxima - whole_max.unsqueeze(1)).double().exp()).sum(1).log()
    whole_sum = torch.where(packed[:, wide + 1] == shard.size, whole_sum, float("nan"))
    share = ((row_max - whole_max).double() + log_sum.double() - whole_sum).exp()
    support = packed[:, :wide].contiguous() if at_support is not None else None
    return Statistics(support, packed[:, wide].contiguous(), whole_max, whole_sum.float(), share)


def where_owned(values: Tensor, local: Tensor, counted: Tensor, shard: Shard) -> Tensor:
    """Values at ids that this rank owns, 0 elsewhere and at rows that do not count."""
    rows = counted != 0 if local.dim() == 1 else (counted != 0).unsqueeze(1)
    return torch.where(shard.owns(local) & rows, values, 0.0)


def from_hidden(
    hidden: Tensor, head: Tensor, tokens: Tokens, shard: Shard, dense: bool
) -> tuple[Statistics, ExpectedRows | None]:
    """Statistics of hidden (N, H), head (held, H), and this rank's part of e where ``dense``."""
    counted, n_rows, device = tokens.mask, hidden.shape[0], hidden.device
    at_support = torch.empty(tokens.support.shape, dtype=torch.float32, device=device) if tokens.alpha < 1 else None
    expected: ExpectedRows | None = None
    if not shard.held:
        nothing = torch.zeros(n_rows, dtype=torch.float32, device=device)
        support = None if at_support is None else torch.zeros_like(at_support)
        least = torch.full_like(nothing, float("-inf"))
        return combined(support, nothing, least, least, shard), None
    start = Fork(device)
    owned = shard.owns(tokens.response_ids)
    reference = torch.where(owned, tokens.response_ids, 0)
    chosen = chosen_token_logits(hidden, head, reference, counted)
    if dense:
        expected, row_max, log_sum = expected_rows(
            hidden, head, column_of_response(tokens, hidden, head, owned), chosen, counted
        )
    else:
        row_max, log_sum = hidden_logsumexp(hidden, head, counted)
    if at_support is not None:
        with start:
            fill_token_logits(hidden, head, tokens.support, counted, at_support)
        at_support = where_owned(at_support, tokens.support, counted, shard)
    chosen = where_owned(chosen, tokens.response_ids, counted, shard)
    return combined(at_support, chosen, row_max, log_sum, shard), expected


def column_of_response(tokens: Tokens, hidden: Tensor, head: Tensor, owned: Tensor) -> Tensor:
    """Where e takes the row W[y]: at the response on the rank that owns it, elsewhere at a column beyond the head,
    which takes no part; where the head ends with its tiles, at column 0, and W[0] is taken out again."""
    held = head.shape[0]
    tiles = tiling(hidden.shape[0], held, hidden.shape[1], hidden.dtype, hidden.device)
    beyond = held if buffer_columns(held, tiles) > held else 0
    return torch.where(owned, tokens.response_ids, beyond)


class ShardedLoss(torch.autograd.Function):
    """(hidden (N, H), head (held, H), tokens with local ids, shard, dense) -> loss () and the metrics (4,)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, tokens: Tokens, shard: Shard, dense: bool
    ) -> tuple[Tensor, Tensor]:
        with on_device(hidden):
            found, expected = from_hidden(hidden, head, tokens, shard, dense)
            terms = terms_of(found, tokens, policy_terms(tokens))
            results = reduced(terms, tokens, shard)
        ctx.save_for_backward(hidden, head)
        ctx.state = Forward(terms, found.row_max, found.log_sum, expected)
        ctx.tokens, ctx.shard, ctx.share, ctx.factor = tokens, shard, found.share, results[5]
        metrics = results[1:5]
        ctx.mark_non_differentiable(metrics)
        return results[0], metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_metrics: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, head = ctx.saved_tensors
        with on_device(hidden):
            scale = grad_loss.to(torch.float32) * ctx.factor
            found = gradients(
                hidden, head, ctx.tokens, ctx.state, ctx.share, ctx.shard, scale, ctx.needs_input_grad[:2]
            )
        return (*found, None, None, None)


class ShardedDivergence(torch.autograd.Function):
    """(hidden (N, H), head (held, H), tokens with local ids, shard) -> D (N,) float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, tokens: Tokens, shard: Shard) -> Tensor:
        with on_device(hidden):
            found, _ = from_hidden(hidden, head, tokens, shard, dense=False)
            terms = terms_of(found, tokens, None)
        ctx.save_for_backward(hidden, head)
        ctx.state = Forward(terms, found.row_max, found.log_sum, None)
        ctx.tokens, ctx.shard, ctx.share = tokens, shard, found.share
        return terms.values[0].to(torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_divergence: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head = ctx.saved_tensors
        with on_device(hidden):
            scale = grad_divergence.to(torch.float32).contiguous()
            found = gradients(
                hidden, head, ctx.tokens, ctx.state, ctx.share, ctx.shard, scale, ctx.needs_input_grad[:2]
            )
        return (*found, None, None)


class ShardedLogitsLoss(torch.autograd.Function):
    """(logits (N, held), tokens with local ids, shard) -> loss () and the metrics (4,)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tokens, shard: Shard) -> tuple[Tensor, Tensor]:
        counted = tokens.mask
        with on_device(logits):
            row_max, log_sum = logits_logsumexp(logits, counted)
            at_support = None
            if tokens.alpha < 1:
                at_support = where_owned(pick_tokens(logits, tokens.support, counted), tokens.support, counted, shard)
            chosen = pick_tokens(logits, tokens.response_ids.unsqueeze(1), counted).squeeze(1)
            chosen = where_owned(chosen, tokens.response_ids, counted, shard)
            found = combined(at_support, chosen, row_max, log_sum, shard)
            terms = terms_of(found, tokens, policy_terms(tokens))
            results = reduced(terms, tokens, shard)
        ctx.save_for_backward(logits)
        ctx.tokens, ctx.state, ctx.factor = tokens, Forward(terms, found.row_max, found.log_sum, None), results[5]
        metrics = results[1:5]
        ctx.mark_non_differentiable(metrics)
        return results[0], metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_metrics: Tensor | None) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        tokens, state = ctx.tokens, ctx.state
        with on_device(logits):
            scale = grad_loss.to(torch.float32) * ctx.factor
            gradient = logits_gradient(
                logits, tokens.support, tokens.response_ids, state.row_max, state.log_sum, state.terms, scale
            )
        return gradient.to(logits.dtype), None, None


def terms_of(found: Statistics, tokens: Tokens, policy: PolicyTerms | None) -> TokenTerms:
    """The same on every rank of tp."""
    return token_terms(
        found.at_support, found.chosen, found.row_max, found.log_sum, flat_constant(tokens.teacher_logprobs),
        tokens.support, tokens.mask, tokens.alpha, policy,
    )  # fmt: skip


def reduced(terms: TokenTerms, tokens: Tokens, shard: Shard) -> Tensor:
    """(6,) float32: loss and metrics of the whole batch, and what a token's gradient is multiplied by: dp cp / n."""
    mask = tokens.mask.double()
    clipped = ((terms.values[2] >= tokens.is_clip) * mask).sum()
    sums = torch.stack([*(torch.where(mask != 0, terms.values, 0.0) * mask).sum(1), clipped, mask.sum()])
    sums = batch_sum(sums, shard.mesh)
    count = sums[4].clamp(min=1.0)
    distill_loss, kl_reg, ratio, clip_fraction = (sums[:4] / count).unbind()
    loss = distill_loss + tokens.kl_reg_weight * kl_reg if tokens.kl_reg_weight else distill_loss
    factor = batch_ranks(shard.mesh) / count
    return torch.stack([loss, distill_loss, kl_reg, ratio, clip_fraction, factor]).float()


def gradients(
    hidden: Tensor, head: Tensor, tokens: Tokens, state: Forward, share: Tensor, shard: Shard, scale: Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """To the hidden states, whole on every rank, and to this rank's rows of the head."""
    to_hidden = to_head = None
    if needs[0]:
        to_hidden = (
            hidden_part(hidden, head, tokens, state, share, shard, scale) if shard.held else torch.zeros_like(hidden)
        )
        if shard.group is not None:
            to_hidden = to_hidden.contiguous()
            dist.all_reduce(to_hidden, group=shard.group)
    if needs[1] and shard.held:
        to_head = head_gradient(
            hidden, head, tokens.support, tokens.response_ids, tokens.mask, state.row_max, state.log_sum,
            state.terms, scale,
        )  # fmt: skip
    elif needs[1]:
        to_head = torch.zeros_like(head)
    return to_hidden, to_head


def hidden_part(
    hidden: Tensor, head: Tensor, tokens: Tokens, state: Forward, share: Tensor, shard: Shard, scale: Tensor
) -> Tensor:
    """This rank's part of the gradient to the hidden states.

    The kernel adds c e - f W[y] with c = chosen_weight + f. Its e is W[y] - S, S the mean of the head's rows under
    this rank's own softmax; of the whole vocabulary this rank holds the ``share`` w. So c (W[y] - w S) =
    c w e + c (1 - w) W[y] where the rank owns y, and -c w S elsewhere.
    """
    terms, expected = state.terms, state.expected
    if expected is None:
        gradient = hidden_gradient(head, tokens.support, tokens.response_ids, terms, scale, None)
        if 0 < tokens.alpha < 1:
            add_floor_rows(hidden, head, state.row_max, state.log_sum, terms, scale, gradient)
        return gradient.to(hidden.dtype)
    owned = shard.owns(tokens.response_ids)
    both = (terms.chosen_weight + terms.floor_weight).double()
    at_response = torch.where(owned, both * (1.0 - share) - terms.floor_weight, 0.0)
    column = column_of_response(tokens, hidden, head, owned)
    if not bool(column_is_beyond(column, head)):
        at_response = torch.where(owned, at_response, -both * share)
    slopes = torch.stack([terms.support_scale.double(), both + at_response, -at_response]).float()
    weighted = ExpectedRows(expected.rows, share_of_scale(expected.scale, share))
    changed = replace(terms, slopes=slopes)
    ids = torch.where(owned, tokens.response_ids, 0)
    return hidden_gradient(head, tokens.support, ids, changed, scale, weighted).to(hidden.dtype)


def column_is_beyond(column: Tensor, head: Tensor) -> bool:
    """Whether responses of other ranks were kept beyond the head (else at column 0)."""
    tiles = tiling(column.shape[0], head.shape[0], head.shape[1], head.dtype, head.device)
    return buffer_columns(head.shape[0], tiles) > head.shape[0]


def share_of_scale(scale: Tensor, share: Tensor) -> Tensor:
    """w times the scale of e's rows; a rank without mass adds nothing, whatever its scale."""
    return torch.where(share > 0, scale.double() * share, 0.0).float()


def compute_fused_sdpo_loss(loss_input: Any) -> Mapping[str, Tensor]:
    """``triton_fused.compute_fused_sdpo_loss`` on one rank of ``loss_input.mesh``."""
    hidden, head = loss_input.student_hidden, loss_input.lm_head_weight
    check_features("student_hidden", hidden)
    check_head(head, "student_hidden", hidden)
    shard = Shard.of(loss_input.mesh, loss_input.vocab_start, loss_input.vocab_size, head.shape[0], hidden.device)
    tokens = localised(read_tokens(loss_input, hidden, loss_input.vocab_size), shard)
    check_logprobs(loss_input)
    if tokens.mask.numel() == 0:
        return empty_result(hidden)
    differentiated = torch.is_grad_enabled() and hidden.requires_grad
    dense = differentiated and (tokens.alpha >= 1 or tokens.kl_reg_weight != 0)
    return result(*ShardedLoss.apply(flat(hidden), flat_head(head[: shard.held]), tokens, shard, dense))


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Tensor]:
    """``triton_fused.compute_sdpo_loss`` on one rank: ``student_logits`` (B, T, V of this rank)."""
    logits = loss_input.student_logits
    check_features("student_logits", logits)
    shard = Shard.of(loss_input.mesh, loss_input.vocab_start, loss_input.vocab_size, logits.shape[-1], logits.device)
    kept = logits[..., : max(1, shard.held)]
    tokens = localised(read_tokens(loss_input, kept, loss_input.vocab_size), shard)
    check_logprobs(loss_input)
    if tokens.mask.numel() == 0:
        return empty_result(logits)
    features = flat(kept)
    if not shard.held:
        features = features.masked_fill(torch.ones_like(features, dtype=torch.bool), float("-inf"))
    return result(*ShardedLogitsLoss.apply(features, tokens, shard))


def localised(tokens: Tokens, shard: Shard) -> Tokens:
    """Ids counted from the shard's start."""
    return replace(tokens, support=shard.local(tokens.support), response_ids=shard.local(tokens.response_ids))


def compute_divergence(
    hidden: Tensor, head: Tensor, logprobs: Tensor, support: Tensor, alpha: float, mesh: Any, start: int, size: int
) -> Tensor:
    """``triton_fused.compute_divergence`` on one rank."""
    check_features("student_hidden", hidden)
    check_head(head, "student_hidden", hidden)
    check_support(support, hidden, size, None)
    check_teacher_logprobs(logprobs, support)
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must be in [0, 1) for the divergence alone, got {alpha}")
    shard = Shard.of(mesh, start, size, head.shape[0], hidden.device)
    ids = shard.local(flat(support).contiguous())
    everywhere = torch.ones(ids.shape[0], dtype=torch.float32, device=ids.device)
    tokens = Tokens(
        logprobs, ids, ids[:, 0].contiguous(), everywhere, everywhere, everywhere, float(alpha), 1.0, 0.0
    )  # fmt: skip
    found: Tensor = ShardedDivergence.apply(flat(hidden), flat_head(head[: shard.held]), tokens, shard)
    return found.view(hidden.shape[:2])


@torch.no_grad()
def compute_response_logprobs(hidden: Tensor, head: Tensor, ids: Tensor, mesh: Any, start: int, size: int) -> Tensor:
    """``triton_fused.compute_response_logprobs`` on one rank."""
    check_features("student_hidden", hidden)
    check_head(head, "student_hidden", hidden)
    check_response_ids(ids, hidden, size, None)
    shard = Shard.of(mesh, start, size, head.shape[0], hidden.device)
    rows, local = flat(hidden), shard.local(flat(ids))
    everywhere = torch.ones(rows.shape[0], dtype=torch.float32, device=rows.device)
    nothing = Tokens(everywhere, local.unsqueeze(1), local, everywhere, everywhere, everywhere, 1.0, 1.0, 0.0)
    with on_device(rows):
        found, _ = from_hidden(rows, flat_head(head[: shard.held]), nothing, shard, dense=False)
    return ((found.chosen - found.row_max) - found.log_sum).view(ids.shape)


@torch.no_grad()
def compute_teacher_topk(
    hidden: Tensor, head: Tensor, k: int, mesh: Any, start: int, size: int
) -> tuple[Tensor, Tensor]:
    """``triton_fused.compute_teacher_topk`` on one rank: the k largest of all ranks, alike on every one."""
    check_features("teacher_hidden", hidden)
    check_head(head, "teacher_hidden", hidden)
    shard = Shard.of(mesh, start, size, head.shape[0], hidden.device)
    k, rows, device = min(max(1, k), size), flat(hidden), hidden.device
    logprobs = torch.full((rows.shape[0], k), float("-inf"), dtype=torch.float32, device=device)
    ids = torch.zeros((rows.shape[0], k), dtype=torch.int64, device=device)
    own = min(k, shard.held)
    if shard.held:
        with on_device(rows):
            own_logprobs, own_ids = hidden_topk(rows, flat_head(head[: shard.held]), own)
            row_max, log_sum = hidden_logsumexp(rows, flat_head(head[: shard.held]), None)
        logprobs[:, :own], ids[:, :own] = own_logprobs, own_ids + start
    else:
        row_max = log_sum = torch.full((rows.shape[0],), float("-inf"), dtype=torch.float32, device=device)
    whole = combined(None, torch.zeros_like(row_max), row_max, log_sum, shard)
    logprobs = logprobs + whole.share.log().float().unsqueeze(1)
    if shard.group is not None:
        every, every_id = ([torch.empty_like(x) for _ in range(shard.ranks)] for x in (logprobs, ids))
        dist.all_gather(every, logprobs, group=shard.group)
        dist.all_gather(every_id, ids, group=shard.group)
        logprobs, ids = torch.cat(every, 1), torch.cat(every_id, 1)
    best, places = logprobs.topk(k, dim=-1)
    shape = (*hidden.shape[:2], k)
    return best.view(shape), ids.gather(1, places).view(shape)
