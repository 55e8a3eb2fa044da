"""Ways in which kernels go wrong: tiles, offsets, the projection and the gradients behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.defects.defect import DIVERGENCES, Change, Defect, around, replacing
from sdpo_conformance.specs.claas.defects.loss_parts import Parts, Result, Work, logits, project
from sdpo_conformance.specs.claas.defects.sources import cite
from sdpo_conformance.specs.claas.defects.wrong_divergence import keeping_support, valued

FUSED = (Capability.FUSED,)
HIDDEN = (Capability.FUSED, Capability.DIVERGENCE)


def without_remainder(tile: int, w: Work) -> Tensor:
    """l whose logsumexp leaves out the last V mod tile columns."""
    vocabulary = w.z.shape[-1]
    kept = vocabulary - vocabulary % tile if vocabulary > tile else vocabulary
    return w.z - torch.logsumexp(w.z[..., :kept], dim=-1, keepdim=True)


def padded_with_zeros(tile: int, w: Work) -> Tensor:
    """l whose logsumexp counts logits of 0 up to the next multiple of tile."""
    missing = -w.z.shape[-1] % tile
    return w.z - torch.logsumexp(F.pad(w.z, (0, missing)), dim=-1, keepdim=True)


def not_rescaled(tile: int, w: Work) -> Tensor:
    """l whose online logsumexp keeps its sum when a later tile raises the maximum."""
    tiles = w.z.split(tile, dim=-1)
    running = tiles[0].amax(-1, keepdim=True)
    total = (tiles[0] - running).exp().sum(-1, keepdim=True)
    for one in tiles[1:]:
        running = torch.maximum(running, one.amax(-1, keepdim=True))
        total = total + (one - running).exp().sum(-1, keepdim=True)
    return w.z - (running + total.log())


def divisible(by: int, size: int) -> int:
    """The part of size that fills whole tiles; sizes below one tile stay."""
    return size - size % by if size > by else size


def last_columns_without_gradient(w: Work, gradient: Tensor) -> Tensor:
    """No gradient to the last V mod 16 columns."""
    kept = divisible(16, gradient.shape[-1])
    return torch.cat([gradient[..., :kept], torch.zeros_like(gradient[..., kept:])], dim=-1)


def late_tokens_without_gradient(w: Work, gradient: Tensor) -> Tensor:
    """No gradient to tokens past the 16th."""
    return torch.cat([gradient[:, :16], torch.zeros_like(gradient[:, 16:])], dim=1)


def support_only(w: Work, gradient: Tensor) -> Tensor:
    """The gradient at the support and the response token; 0 elsewhere."""
    kept = torch.zeros_like(gradient, dtype=torch.bool)
    kept = kept.scatter(-1, w.support, True).scatter(-1, w.y.unsqueeze(-1), True)
    return torch.where(kept, gradient, 0.0)


def wrapped(w: Work) -> Tensor:
    """l[y] read through an int16 offset into the flattened logits."""
    rows = torch.arange(w.y.numel(), device=w.y.device).reshape(w.y.shape)
    offsets = rows * w.l.shape[-1] + w.y
    return w.l.flatten()[offsets.to(torch.int16).long() % max(w.l.numel(), 1)]


def tf32(tensor: Tensor) -> Tensor:
    """Rounded to the 10 mantissa bits that tensor cores keep of a float32."""
    if tensor.dtype != torch.float32:
        return tensor
    rounded = ((tensor.detach().contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return rounded + tensor - tensor.detach()


def without_last_features(w: Work) -> Tensor:
    """Logits that leave out the last H mod 16 features."""
    if w.head is None:
        return w.z
    kept = divisible(16, w.z.shape[-1])
    return project(w.z[..., :kept], w.head[..., :kept])


def of_previous_position(w: Work) -> Tensor:
    """Logits of the hidden state one position earlier."""
    return logits(w) if w.head is None else project(w.z.roll(1, dims=1), w.head)


def soft_capped(w: Work) -> Tensor:
    """Logits bounded by 30 tanh(z / 30)."""
    return 30 * torch.tanh(logits(w) / 30)


def head_of_first_row(w: Work) -> Tensor:
    """Logits through which only the first row of the batch reaches the head's gradient."""
    if w.head is None:
        return w.z
    return torch.cat([project(w.z[:1], w.head), project(w.z[1:], w.head.detach())])


def head_of_last_tile(tile: float) -> Change:
    """Logits through which only the last tile of tokens reaches the head's gradient: each overwrites it."""

    def logits(w: Work) -> Tensor:
        if w.head is None:
            return w.z
        tokens = w.z.reshape(-1, w.z.shape[-1])
        last = max(len(tokens) - 1, 0) // int(tile) * int(tile)
        found = torch.cat([project(tokens[:last], w.head.detach()), project(tokens[last:], w.head)])
        return found.reshape(*w.z.shape[:-1], len(w.head))

    return replacing(logits=logits)


def hidden_or_head(w: Work) -> Tensor:
    """Logits that pass gradient to the hidden states only while the head is frozen."""
    if w.head is None:
        return w.z
    return project(w.z.detach() if w.head.requires_grad else w.z, w.head)


def head_beside_hidden(w: Work) -> Tensor:
    """Logits that pass gradient to the head only where the hidden states ask for one too; a graph they always have."""
    if w.head is None:
        return w.z
    if w.z.requires_grad:
        return project(w.z, w.head)
    return project(w.z, w.head.detach()) + torch.zeros((), dtype=w.z.dtype, device=w.z.device, requires_grad=True)


def head_rows_of_support(w: Work, gradient: Tensor) -> Tensor:
    """The head's gradient in the rows of the supports alone."""
    kept = torch.zeros(gradient.shape[0], dtype=torch.bool, device=gradient.device)
    kept[w.support.flatten()] = True
    return torch.where(kept.unsqueeze(-1), gradient, 0.0)


def head_made_trainable(before: Callable[[Parts, Any], Result], parts: Parts, loss_input: Any) -> Result:
    """The head asks for a gradient from here on, and gets one."""
    if loss_input.lm_head_weight.is_leaf and loss_input.lm_head_weight.is_floating_point():
        loss_input.lm_head_weight.requires_grad_()
    return before(parts, loss_input)


def negatives_lost(w: Work) -> Tensor:
    """Picked logits merged over tiles by the maximum, from 0 on."""
    return valued(w.z.clamp(min=0.0), w.z) - w.z.logsumexp(-1, keepdim=True)


def overlapped(z: Tensor, tile: float) -> Tensor:
    """The sum of full tiles of columns, (B, T, 1), as a logsumexp: the last one begins earlier, and what it shares with
    the one before counts twice."""
    width, size = z.shape[-1], int(tile)
    first = max(0, width - size) if width % size else width
    return torch.cat([z, z[..., first : width - width % size]], -1).logsumexp(-1, keepdim=True)


def overlapping(tile: float) -> Change:
    """Overlapped tiles in the value; the backward's softmax has the same normaliser."""

    def log_softmax(w: Work) -> Tensor:
        lse = overlapped(w.z, tile).detach()
        return w.z - valued(lse, ((w.z - lse).exp().detach() * w.z).sum(-1, keepdim=True))

    return replacing(log_softmax=log_softmax)


def counted_twice(tile: float) -> Change:
    """The same with the gradient of what it adds up: what two tiles share pulls twice as well."""
    return replacing(log_softmax=lambda w: w.z - overlapped(w.z, tile))


def filtered(threshold: float) -> Change:
    """Softmax entries below a threshold left out of the backward."""

    def log_softmax(w: Work) -> Tensor:
        lse = w.z.logsumexp(-1, keepdim=True)
        kept = (w.z - lse).exp().detach()
        kept = torch.where(kept > threshold, kept, 0.0)
        return w.z - valued(lse, (kept * w.z).sum(-1, keepdim=True))

    return replacing(log_softmax=log_softmax)


def unscaled_head() -> Change:
    """The gradient that arrives scales the hidden states' gradient and not the head's."""
    arrived: list[Tensor] = []

    def incoming(gradient: Tensor) -> Tensor:
        arrived[:] = [gradient]
        return gradient

    return replacing(incoming=incoming, head_gradient=lambda w, gradient: gradient / arrived[0])


DEFECTS = (
    Defect(
        name="support-past-64-dropped",
        sentence="Entries of the support past the 64th are left out.",
        violates=("GJS-1", "FUS-6"),
        fix="Loop over tiles of the support.",
        change=keeping_support(lambda size: min(size, 64)),
        usable_for="teacher_top_k up to 64.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="support-past-32-dropped",
        sentence="Entries of the support past the 32nd are left out.",
        violates=("GJS-1", "FUS-6"),
        fix="Loop over tiles of the support.",
        change=keeping_support(lambda size: min(size, 32)),
        usable_for="teacher_top_k up to 32.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="support-remainder-dropped",
        sentence="A support of more than 8 entries loses the last K mod 8 of them.",
        violates=("GJS-1", "FUS-6"),
        fix="Mask the last tile of the support instead of skipping it.",
        change=keeping_support(lambda size: divisible(8, size)),
        usable_for="teacher_top_k up to 8 or divisible by 8.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="vocabulary-remainder-dropped",
        sentence="The logsumexp leaves out the last V mod 16 columns.",
        violates=("IS-1", "KL-1", "FUS-6"),
        fix="Mask the last tile of the vocabulary instead of skipping it.",
        change=replacing(log_softmax=lambda w: without_remainder(16, w)),
        seen=cite("verl-project/verl#2656"),
        usable_for="Vocabularies divisible by 16.",
    ),
    Defect(
        name="vocabulary-padded-with-zeros",
        sentence="The logsumexp counts the padding of the last tile of 16 columns as logits of 0.",
        violates=("IS-1", "KL-1", "FUS-6"),
        fix="Load -inf outside the vocabulary.",
        change=replacing(log_softmax=lambda w: padded_with_zeros(16, w)),
        seen=cite("verl-project/verl#2899", "verl-project/verl#5349"),
        usable_for="Vocabularies divisible by 16.",
    ),
    Defect(
        name="online-logsumexp-not-rescaled",
        sentence="The online logsumexp over tiles of 32 columns keeps its sum when a later tile raises the maximum.",
        violates=("IS-1", "KL-1", "FUS-6"),
        fix="Multiply the running sum with exp(old maximum - new maximum).",
        change=replacing(log_softmax=lambda w: not_rescaled(32, w)),
        seen=cite("verl-project/verl#2656"),
        usable_for="Vocabularies of up to 32 tokens.",
    ),
    Defect(
        name="vocabulary-tile-overlaps",
        sentence="The last tile of 32 columns begins earlier, to be full: what it shares with the one before counts "
        "twice in the logsumexp.",
        violates=("IS-1", "KL-1", "FUS-6"),
        fix="Mask what the tile before has counted.",
        change=overlapping(32),
        usable_for="Vocabularies of up to 32 tokens.",
    ),
    Defect(
        name="vocabulary-tile-counted-twice",
        sentence="The last tile of 32 columns begins earlier, to be full, and what it shares with the one before "
        "counts twice in the logsumexp and in its gradient.",
        violates=("IS-1", "KL-1", "FUS-6"),
        fix="Mask what the tile before has counted.",
        change=counted_twice(32),
        usable_for="Vocabularies of up to 32 tokens.",
    ),
    Defect(
        name="negative-logits-lost",
        sentence="Logits at the support and the response are merged over tiles by the maximum, from 0: no negative "
        "one is seen.",
        violates=("IS-1", "FUS-1", "GJS-1"),
        fix="Add the tiles up, or begin at -inf.",
        change=replacing(log_softmax=negatives_lost),
    ),
    Defect(
        name="softmax-gradient-filtered",
        sentence="Softmax entries below 0.000244 are left out of the backward, in float32 too.",
        violates=("KL-4", "RKL-3", "NUM-1"),
        fix="Filter in half precision alone, below what that rounds away.",
        change=filtered(2.0**-12),
        usable_for="bfloat16 runs.",
    ),
    Defect(
        name="last-columns-without-gradient",
        sentence="The last V mod 16 columns get no gradient.",
        violates=("GJS-9", "RKL-3", "KL-4", "FUS-2"),
        fix="Mask the last tile of the vocabulary instead of skipping it.",
        change=replacing(logits_gradient=last_columns_without_gradient),
        usable_for="Vocabularies divisible by 16.",
    ),
    Defect(
        name="late-tokens-without-gradient",
        sentence="Tokens past the 16th get no gradient.",
        violates=("RED-1", "GJS-9", "FUS-2"),
        fix="Launch the backward over every tile of tokens.",
        change=replacing(logits_gradient=late_tokens_without_gradient),
        usable_for="Responses of up to 16 tokens.",
        capabilities=DIVERGENCES,
    ),
    Defect(
        name="gradient-off-support-lost",
        sentence="Logits outside the support and the response token get no gradient, not even from the log-prob of the"
        " response.",
        violates=("KL-4", "RKL-3", "FUS-2"),
        fix="l[y] depends on every logit: anchor and reverse-KL surrogate pull on the whole vocabulary.",
        change=replacing(logits_gradient=support_only),
        usable_for="alpha < 1 with kl_reg_weight = 0.",
    ),
    Defect(
        name="offset-overflow",
        sentence="The response token is read at an offset that wraps at 32768 elements, as int32 does at 2^31.",
        violates=("RED-5", "IS-10", "FUS-6"),
        fix="Compute offsets into B x T x V in int64.",
        change=replacing(chosen=wrapped),
        usable_for="Batches with fewer than 2^15 logits (2^31 in the int32 form).",
    ),
    Defect(
        name="tf32-projection",
        sentence="Float32 hidden states and head are rounded to TF32 before their product.",
        violates=("FUS-1", "NUM-1"),
        fix="Ask the matmul for IEEE float32: input_precision='ieee', or allow_tf32 off.",
        change=replacing(logits=lambda w: w.z if w.head is None else project(tf32(w.z), tf32(w.head))),
        usable_for="bfloat16 runs.",
        capabilities=FUSED,
    ),
    Defect(
        name="soft-capped-logits",
        sentence="The kernel soft-caps the logits at 30, as Gemma's head does, whatever the model.",
        violates=("FUS-1",),
        fix="The logits are student_hidden @ lm_head_weight.T.",
        change=replacing(logits=soft_capped),
        seen=cite("huggingface/trl#6629", "huggingface/trl#7301"),
        capabilities=FUSED,
    ),
    Defect(
        name="scaled-logits",
        sentence="The kernel divides the logits by the generation temperature 0.9.",
        violates=("FUS-1",),
        fix="The logits are student_hidden @ lm_head_weight.T.",
        change=replacing(logits=lambda w: logits(w) / 0.9),
        seen=cite("huggingface/trl#5731", "unslothai/unsloth#11277"),
        capabilities=FUSED,
    ),
    Defect(
        name="hidden-shifted",
        sentence="Each token is scored with the hidden state of the position before it.",
        violates=("FUS-1",),
        fix="student_hidden[t] predicts response_ids[t]: the caller has already shifted.",
        change=replacing(logits=of_previous_position),
        seen=cite("DeepOpt-com/WrinkleFree-Monorepo#13", "AI-Hypercomputer/maxtext#2103"),
        capabilities=FUSED,
    ),
    Defect(
        name="hidden-remainder-dropped",
        sentence="With more than 16 features, the last H mod 16 of them are left out of the product.",
        violates=("FUS-6", "FUS-1"),
        fix="Mask the last tile of features instead of skipping it.",
        change=replacing(logits=without_last_features),
        seen=cite("verl-project/verl#2899"),
        usable_for="Hidden sizes divisible by 16.",
        capabilities=FUSED,
    ),
    Defect(
        name="hidden-gradient-scaled",
        sentence="The gradient of the hidden states is divided by the number of tokens once more.",
        violates=("FUS-2",),
        fix="dD/dh = dD/dz @ lm_head_weight.",
        change=replacing(hidden_gradient=lambda w, gradient: gradient / max(w.mask.numel(), 2)),
        capabilities=FUSED,
    ),
    Defect(
        name="hidden-gradient-in-bfloat16",
        sentence="The gradient of the hidden states is rounded to bfloat16, whatever the input.",
        violates=("FUS-2", "NUM-1"),
        fix="Accumulate and store it in the input's dtype or better.",
        change=replacing(hidden_gradient=lambda w, gradient: gradient.bfloat16().to(gradient.dtype)),
        usable_for="bfloat16 input.",
        capabilities=FUSED,
    ),
    Defect(
        name="hidden-gradient-lost-with-head",
        sentence="When the head asks for a gradient, the hidden states get none.",
        violates=("FUS-3", "FUS-2"),
        fix="Return both gradients.",
        change=replacing(logits=hidden_or_head),
        usable_for="Frozen heads.",
        capabilities=FUSED,
    ),
    Defect(
        name="head-gradient-lost-with-hidden",
        sentence="Where the hidden states ask for no gradient, the head gets none.",
        violates=("FUS-3",),
        fix="dD/dW where lm_head_weight.requires_grad, whatever the hidden states ask for.",
        change=replacing(logits=head_beside_hidden),
        usable_for="Frozen heads.",
        capabilities=FUSED,
    ),
    Defect(
        name="head-gradient-missing",
        sentence="The head's gradient is zero though the head asks for one.",
        violates=("FUS-3",),
        fix="dD/dW = (dD/dz)^T @ h where lm_head_weight.requires_grad.",
        change=replacing(head_gradient=lambda w, gradient: torch.zeros_like(gradient)),
        seen=cite("linkedin/Liger-Kernel#1298"),
        usable_for="Frozen heads.",
        capabilities=FUSED,
    ),
    Defect(
        name="head-gradient-not-scaled",
        sentence="The gradient that arrives at the loss scales the hidden states' gradient, not the head's.",
        violates=("GRAD-1", "FUS-3"),
        fix="Multiply both by the gradient that arrives.",
        change=unscaled_head(),
        usable_for="Frozen heads.",
        capabilities=FUSED,
    ),
    Defect(
        name="head-gradient-of-first-row",
        sentence="Only the first row of the batch contributes to the head's gradient.",
        violates=("FUS-3",),
        fix="Sum the head's gradient over all rows.",
        change=replacing(logits=head_of_first_row),
        usable_for="Frozen heads, and batches of one row.",
        capabilities=FUSED,
    ),
    Defect(
        name="head-gradient-of-last-tile",
        sentence="Each tile of 4 tokens overwrites the head's gradient instead of adding to it.",
        violates=("FUS-3",),
        fix="Accumulate over tiles.",
        change=head_of_last_tile(4),
        usable_for="Frozen heads.",
        capabilities=FUSED,
    ),
    Defect(
        name="head-gradient-of-support",
        sentence="Only the head's rows of the supports get a gradient.",
        violates=("FUS-3",),
        fix="Anchor and reverse-KL surrogate reach every row of the head.",
        change=replacing(head_gradient=head_rows_of_support),
        usable_for="Frozen heads, and alpha < 1 with kl_reg_weight = 0.",
        capabilities=FUSED,
    ),
    Defect(
        name="head-gradient-though-frozen",
        sentence="A frozen head is made to ask for a gradient, and one is computed for it.",
        violates=("FUS-3",),
        fix="Compute dD/dW only where lm_head_weight.requires_grad.",
        change=around("entry", head_made_trainable),
        seen=cite("fla-org/flash-linear-attention#1253", "linkedin/Liger-Kernel#1441"),
        usable_for="Memory to spare: the values and the gradient to hidden are right.",
        capabilities=FUSED,
    ),
)
