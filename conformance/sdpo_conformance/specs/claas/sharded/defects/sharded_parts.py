"""The sharded loss as a composition of named parts, so that a way to get it wrong is one part replaced.

Unchanged, the parts are a right implementation: each rank's statistics, summed over tp; one token mean over dp x cp.
They share no code with the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sdpo_conformance.protocol import MASS_FLOOR, METRIC_KEYS, RATIO_LOG_CLAMP, RKL_FLOOR_LOGPROB, TrainingConfig

NOWHERE = -1e30
LOG_ZERO = -1e4
BATCH = ("dp", "cp")


@dataclass
class OnRank:
    """One call on one rank. ``z`` (B, T, columns) in the working precision, padding included; ``held``: how many of
    them are ids. ``tau``, ``support`` (B, T, K), the others (B, T). What the parts leave behind follows."""

    z: Tensor
    tau: Tensor
    support: Tensor
    base: Tensor
    old: Tensor
    mask: Tensor
    y: Tensor
    training: Any
    mesh: Any
    start: int
    size: int

    peak: Tensor = field(init=False)
    mass: Tensor = field(init=False)
    chosen: Tensor = field(init=False)
    l_k: Tensor = field(init=False)
    divergence: Tensor = field(init=False)
    ratio: Tensor = field(init=False)
    k3: Tensor = field(init=False)
    count: Tensor = field(init=False)

    @property
    def columns(self) -> int:
        return self.z.shape[-1]

    @property
    def held(self) -> int:
        return max(0, min(self.columns, self.size - self.start))

    def group(self, axis: str) -> Any:
        """The process group along an axis, or None where nothing is cut along it."""
        names = self.mesh.mesh_dim_names
        cut = axis in names and self.mesh.size(names.index(axis)) > 1
        return self.mesh.get_group(axis) if cut else None

    def ranks(self, axis: str) -> int:
        names = self.mesh.mesh_dim_names
        return self.mesh.size(names.index(axis)) if axis in names else 1

    def place(self, axis: str) -> int:
        return self.mesh.get_local_rank(axis) if axis in self.mesh.mesh_dim_names else 0


Part = Callable[[OnRank], Tensor]


class Carried(torch.autograd.Function):
    """``forward(tensor)`` in the forward pass, ``backward(gradient)`` in the backward pass."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, forward: Callable[..., Tensor], backward: Callable[..., Tensor]) -> Tensor:
        ctx.back = backward
        return forward(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradient), None, None


def carried(tensor: Tensor, forward: Callable[..., Tensor], backward: Callable[..., Tensor]) -> Tensor:
    """``Carried`` with a type."""
    found: Tensor = Carried.apply(tensor, forward, backward)
    return found


def same(tensor: Tensor) -> Tensor:
    """The tensor."""
    return tensor.view_as(tensor)


def total(tensor: Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """all_reduce of a copy, without graph."""
    if group is None:
        return tensor.detach().clone()
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(copy, op=op, group=group)
    return copy


def gathered(tensor: Tensor, group: Any) -> list[Tensor]:
    """Every rank's tensor of one shape, without graph."""
    if group is None:
        return [tensor.detach()]
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.detach().contiguous(), group=group)
    return parts


def over_tp(w: OnRank, tensor: Tensor) -> Tensor:
    """The sum over tp; the gradient as it comes."""
    return carried(tensor, lambda t: total(t, w.group("tp")), same)


def share(w: OnRank, hidden: Tensor) -> Tensor:
    """Hidden states into a product with this rank's rows: their gradient is summed over tp."""
    return carried(hidden, same, lambda g: total(g, w.group("tp")))


def real(w: OnRank) -> Tensor:
    """The logits of ids, (B, T, held)."""
    return w.z[..., : w.held]


def peak(w: OnRank) -> Tensor:
    """The maximum over the whole vocabulary, (B, T)."""
    nothing = w.z.new_full((*w.z.shape[:-1], 1), NOWHERE)
    return total(torch.cat([w.z.detach()[..., : w.held], nothing], -1).amax(-1), w.group("tp"), dist.ReduceOp.MAX)


def exponentials(parts: ShardedParts, w: OnRank) -> Tensor:
    """This rank's sum of exp(z - peak), (B, T)."""
    return (parts.real(w) - w.peak.unsqueeze(-1)).exp().sum(-1)


def mass(parts: ShardedParts, w: OnRank) -> Tensor:
    """The sum over the whole vocabulary, (B, T)."""
    return parts.sum_mass(w, exponentials(parts, w))


def mine(w: OnRank, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(which ids this rank owns, their columns)."""
    local = ids - w.start
    owned = (local >= 0) & (local < w.held)
    return owned, torch.where(owned, local, 0)


def pick(parts: ShardedParts, w: OnRank, ids: Tensor) -> Tensor:
    """This rank's part of the logits at ``ids`` less the peak, 0 where another rank owns the id."""
    owned, local = parts.mine(w, ids)
    if not w.columns:
        return torch.zeros_like(ids, dtype=w.z.dtype)
    found = w.z.gather(-1, local) - w.peak.unsqueeze(-1)
    return torch.where(owned, found, 0.0)


def at(parts: ShardedParts, w: OnRank, ids: Tensor) -> Tensor:
    """Log-probs at ``ids`` (B, T, K)."""
    return parts.sum_picks(w, pick(parts, w, ids)) - w.mass.log().unsqueeze(-1)


def renormalised(logprobs: Tensor) -> Tensor:
    logprobs = logprobs.clamp(min=LOG_ZERO)
    return logprobs - logprobs.logsumexp(-1, keepdim=True).clamp(min=math.log(MASS_FLOOR))


def student_distribution(w: OnRank) -> Tensor:
    """log q, (B, T, K)."""
    return renormalised(w.l_k)


def divergence(parts: ShardedParts, w: OnRank) -> Tensor:
    """D, (B, T)."""
    alpha = w.training.alpha
    if alpha >= 1:
        match = w.support == w.y.unsqueeze(-1)
        tau_y = torch.where(match.any(-1), torch.where(match, w.tau, 0.0).sum(-1), RKL_FLOOR_LOGPROB)
        return (w.chosen - tau_y).detach() * w.chosen
    log_p, log_q = renormalised(w.tau), parts.student_distribution(w)
    log_m = log_q + 0.0
    if alpha > 0:
        log_m = torch.logaddexp(log_p + math.log(alpha), log_q + math.log1p(-alpha))
    teacher = (log_p.exp() * (log_p - log_m)).sum(-1)
    return alpha * teacher + (1 - alpha) * (log_q.exp() * (log_q - log_m)).sum(-1)


def ratio(w: OnRank) -> Tensor:
    """r, (B, T)."""
    step = (w.chosen - w.old).detach().clamp(-RATIO_LOG_CLAMP, RATIO_LOG_CLAMP)
    return step.exp().clamp(max=w.training.is_clip)


def k3(w: OnRank) -> Tensor:
    """(B, T)."""
    d = (w.chosen - w.base).clamp(-RATIO_LOG_CLAMP, RATIO_LOG_CLAMP)
    return torch.expm1(d) - d


def over_batch(w: OnRank, tensor: Tensor) -> Tensor:
    """The sum over dp and cp, without graph."""
    for axis in BATCH:
        tensor = total(tensor, w.group(axis))
    return tensor


def count(w: OnRank) -> Tensor:
    """n, 0-dim."""
    return over_batch(w, w.mask.sum()).clamp(min=1.0)


def factor(w: OnRank) -> float:
    """What a rank's share of the mean is multiplied by, because the gradient is averaged afterwards."""
    return float(w.ranks("dp") * w.ranks("cp"))


def weigh(w: OnRank, values: Tensor) -> Tensor:
    """This rank's share of the token mean, 0-dim."""
    return (values * w.mask).sum() / w.count


def metrics(w: OnRank) -> dict[str, Tensor]:
    """Of the whole batch."""
    capped = (w.ratio >= w.training.is_clip).to(w.ratio)
    own = [weigh(w, values) for values in (w.divergence * w.ratio, w.k3, w.ratio, capped)]
    return dict(zip(METRIC_KEYS, over_batch(w, torch.stack(own)).unbind(), strict=True))


def objective(parts: ShardedParts, w: OnRank) -> Tensor:
    """This rank's share of the loss, with graph."""
    share_of = parts.weigh(w, w.divergence * w.ratio)
    if w.training.kl_reg_weight:
        share_of = share_of + w.training.kl_reg_weight * parts.weigh_anchor(w, w.k3)
    return share_of


def assemble(parts: ShardedParts, w: OnRank, own: Tensor) -> Tensor:
    """The whole batch's value with this rank's gradient."""
    scaled = parts.factor(w) * own
    return parts.value(w, own) + (scaled - scaled.detach())


def finish(w: OnRank, loss: Tensor, found: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """What is returned."""
    return {"loss": loss, **found}


def accept(loss_input: Any) -> Any:
    """A hook for what happens to the input first."""
    return loss_input


def as_is(w: OnRank, gradient: Tensor) -> Tensor:
    return gradient


def per_token_gradient(w: OnRank, gradient: Tensor) -> Tensor:
    return gradient


@dataclass(frozen=True)
class ShardedParts:
    """Which function does what. A defect is this with some of them replaced."""

    accept: Callable[[Any], Any] = accept
    share: Callable[[OnRank, Tensor], Tensor] = share
    real: Part = real
    peak: Part = peak
    mass: Callable[[ShardedParts, OnRank], Tensor] = mass
    sum_mass: Callable[[OnRank, Tensor], Tensor] = over_tp
    mine: Callable[[OnRank, Tensor], tuple[Tensor, Tensor]] = mine
    at: Callable[[ShardedParts, OnRank, Tensor], Tensor] = at
    sum_picks: Callable[[OnRank, Tensor], Tensor] = over_tp
    student_distribution: Part = student_distribution
    divergence: Callable[[ShardedParts, OnRank], Tensor] = divergence
    ratio: Part = ratio
    k3: Part = k3
    prepare: Callable[[OnRank], None] = lambda w: None
    count: Part = count
    factor: Callable[[OnRank], float] = factor
    weigh: Callable[[OnRank, Tensor], Tensor] = weigh
    weigh_anchor: Callable[[OnRank, Tensor], Tensor] = weigh
    objective: Callable[[ShardedParts, OnRank], Tensor] = objective
    value: Callable[[OnRank, Tensor], Tensor] = over_batch
    assemble: Callable[[ShardedParts, OnRank, Tensor], Tensor] = assemble
    metrics: Callable[[OnRank], dict[str, Tensor]] = metrics
    finish: Callable[[OnRank, Tensor, Mapping[str, Tensor]], Mapping[str, Any]] = finish
    logits_gradient: Callable[[OnRank, Tensor], Tensor] = as_is
    hidden_gradient: Callable[[OnRank, Tensor], Tensor] = as_is
    head_gradient: Callable[[OnRank, Tensor], Tensor] = as_is
    incoming: Callable[[OnRank, Tensor], Tensor] = as_is
    early: Callable[[OnRank], Mapping[str, Any] | None] = lambda w: None
    topk: Callable[[ShardedParts, OnRank, int], tuple[Tensor, Tensor]] = lambda parts, w, k: topk(parts, w, k)

    # --- the entries ---

    def compute_sdpo_loss(self, loss_input: Any) -> Mapping[str, Any]:
        return run(self, self.accept(loss_input))

    def compute_fused_sdpo_loss(self, loss_input: Any) -> Mapping[str, Any]:
        return run(self, self.accept(loss_input))

    def compute_divergence(
        self, hidden: Tensor, head: Tensor, tau: Tensor, support: Tensor, alpha: float, *, mesh: Any,
        vocab_start: int, vocab_size: int,
    ) -> Tensor:  # fmt: skip
        tokens = torch.zeros(hidden.shape[:2], device=hidden.device)
        w = on_rank(self, hidden, head, tau, support, tokens, tokens, tokens + 1, tokens.long(),
                    TrainingConfig(alpha=alpha), mesh, vocab_start, vocab_size)  # fmt: skip
        statistics(self, w)
        w.l_k = self.at(self, w, w.support)
        return carried(self.divergence(self, w), same, lambda g: self.incoming(w, g))

    @torch.no_grad()
    def compute_response_logprobs(
        self, hidden: Tensor, head: Tensor, ids: Tensor, *, mesh: Any, vocab_start: int, vocab_size: int
    ) -> Tensor:
        w = heads_only(self, hidden, head, mesh, vocab_start, vocab_size)
        return self.at(self, w, ids.long().unsqueeze(-1)).squeeze(-1)

    @torch.no_grad()
    def compute_teacher_topk(
        self, hidden: Tensor, head: Tensor, k: int, *, mesh: Any, vocab_start: int, vocab_size: int
    ) -> tuple[Tensor, Tensor]:
        w = heads_only(self, hidden, head, mesh, vocab_start, vocab_size)
        return self.topk(self, w, min(max(1, k), vocab_size))


def working(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def on_rank(
    parts: ShardedParts, features: Tensor, head: Tensor | None, tau: Tensor, support: Tensor, base: Tensor,
    old: Tensor, mask: Tensor, y: Tensor, training: Any, mesh: Any, start: int, size: int,
) -> OnRank:  # fmt: skip
    """Upcast, put zeros where the mask is zero, multiply with the head where there is one."""
    dtype = working(features)
    mask = mask.detach().to(dtype)
    counted = mask != 0

    def clean(tensor: Tensor) -> Tensor:
        where = counted if tensor.dim() == 2 else counted.unsqueeze(-1)
        return torch.where(where, tensor.to(dtype), 0.0)

    w = OnRank(
        z=features, tau=clean(tau.detach()), support=support.long(), base=clean(base.detach()),
        old=clean(old.detach()), mask=mask, y=y.long(), training=training, mesh=mesh, start=start, size=size,
    )  # fmt: skip
    z = clean(features)
    if head is not None:
        z = carried(z, same, lambda g: parts.hidden_gradient(w, g))
        rows = carried(head.to(dtype), same, lambda g: parts.head_gradient(w, g))
        z = parts.share(w, z) @ rows.T
    w.z = carried(z, same, lambda g: parts.logits_gradient(w, g))
    return w


def heads_only(parts: ShardedParts, hidden: Tensor, head: Tensor, mesh: Any, start: int, size: int) -> OnRank:
    """Statistics of hidden states without anything else."""
    tokens = torch.zeros(hidden.shape[:2], device=hidden.device)
    none = tokens.unsqueeze(-1)
    w = on_rank(parts, hidden, head, none, none.long(), tokens, tokens, tokens + 1, tokens.long(),
                TrainingConfig(), mesh, start, size)  # fmt: skip
    statistics(parts, w)
    return w


def statistics(parts: ShardedParts, w: OnRank) -> None:
    w.peak = parts.peak(w)
    w.mass = parts.mass(parts, w)


def topk(parts: ShardedParts, w: OnRank, k: int) -> tuple[Tensor, Tensor]:
    """Candidates of every shard, then the k largest of all."""
    own = min(k, w.held)
    values = w.z.new_full((*w.z.shape[:-1], k), float("-inf"))
    ids = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    values[..., :own], found = w.z[..., : w.held].topk(own, -1)
    ids[..., :own] = found + w.start
    group = w.group("tp")
    every, every_id = torch.cat(gathered(values, group), -1), torch.cat(gathered(ids, group), -1)
    best, places = every.topk(k, -1)
    return best - (w.peak + w.mass.log()).unsqueeze(-1), every_id.gather(-1, places)


def run(parts: ShardedParts, given: Any) -> Mapping[str, Any]:
    """Either loss entry on one rank."""
    fused = hasattr(given, "student_hidden")
    w = on_rank(
        parts, given.student_hidden if fused else given.student_logits, given.lm_head_weight if fused else None,
        given.teacher_logprobs, given.teacher_indices, given.base_logprobs, given.old_student_logprobs,
        given.response_mask, given.response_ids, given.training, given.mesh, given.vocab_start, given.vocab_size,
    )  # fmt: skip
    parts.prepare(w)
    returned = parts.early(w)
    if returned is not None:
        return returned
    statistics(parts, w)
    logprobs = parts.at(parts, w, torch.cat([w.support, w.y.unsqueeze(-1)], -1))
    w.l_k, w.chosen = logprobs[..., :-1], logprobs[..., -1]
    w.divergence = parts.divergence(parts, w)
    w.ratio, w.k3 = parts.ratio(w), parts.k3(w)
    w.count = parts.count(w)
    own = carried(parts.objective(parts, w), same, lambda g: parts.incoming(w, g))
    return parts.finish(w, parts.assemble(parts, w, own), parts.metrics(w))
