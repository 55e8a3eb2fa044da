"""Ways to get the refresh's log-probs and the teacher's top-k from hidden states wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.defects.defect import Change, Defect, replacing
from sdpo_conformance.specs.claas.defects.loss_parts import (
    logprobs_of,
    project,
    response_logprobs,
    teacher_topk,
    working_dtype,
)
from sdpo_conformance.specs.claas.defects.sources import cite

LOGPROBS = (Capability.RESPONSE_LOGPROBS,)
TOPK = (Capability.TEACHER_TOPK,)


def raw_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """Logits in the working precision."""
    inside = working_dtype(hidden.dtype)
    return project(hidden.to(inside), head.to(inside))


def gathered(of: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """A function of the logits at the response tokens, without graph."""
    with torch.no_grad():
        return of(hidden, head).gather(-1, ids.long().unsqueeze(-1)).squeeze(-1)


def in_bfloat16(hidden: Tensor, head: Tensor) -> Tensor:
    """log_softmax rounded to bfloat16."""
    return logprobs_of(hidden, head).bfloat16().to(working_dtype(hidden.dtype))


def padded(hidden: Tensor, head: Tensor) -> Tensor:
    """Log-probs whose logsumexp counts zeros up to a multiple of 16 columns."""
    z = raw_logits(hidden, head)
    return z - torch.logsumexp(F.pad(z, (0, -z.shape[-1] % 16)), dim=-1, keepdim=True)


def over_top(hidden: Tensor, head: Tensor) -> Tensor:
    """Log-probs normalised over the eight largest logits."""
    z = raw_logits(hidden, head)
    return z - torch.logsumexp(z.topk(min(8, z.shape[-1]), dim=-1).values, dim=-1, keepdim=True)


def chunk_forgotten(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """Log-probs of whole chunks of eight tokens; 0 in an incomplete last one."""
    values = response_logprobs(hidden, head, ids)
    length = values.shape[1]
    kept = length - length % 8 if length > 8 else length
    return torch.where(torch.arange(length, device=values.device) < kept, values, 0.0)


def shared_normaliser(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """Log-probs whose logsumexp is that of the first token of each chunk of eight."""
    with torch.no_grad():
        z = raw_logits(hidden, head)
        normaliser = torch.logsumexp(z, dim=-1)
        first = torch.arange(z.shape[1], device=z.device) // 8 * 8
        return z.gather(-1, ids.long().unsqueeze(-1)).squeeze(-1) - normaliser[:, first]


def with_graph(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """Log-probs that keep the graph."""
    return logprobs_of(hidden, head).gather(-1, ids.long().unsqueeze(-1)).squeeze(-1)


def topk_of(of: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, head: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The top-k of a function of the logits, without graph."""
    with torch.no_grad():
        values, ids = of(hidden, head).topk(min(max(1, k), head.shape[0]), dim=-1)
        return values, ids


def renormalised(hidden: Tensor, head: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-probs normalised over the k alone."""
    values, ids = teacher_topk(hidden, head, k)
    return values - torch.logsumexp(values, dim=-1, keepdim=True), ids


def smallest(hidden: Tensor, head: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest."""
    with torch.no_grad():
        values, ids = logprobs_of(hidden, head).topk(min(max(1, k), head.shape[0]), dim=-1, largest=False)
        return values, ids


def of_first_tiles(hidden: Tensor, head: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest among the columns that fill whole tiles of 16."""
    with torch.no_grad():
        l = logprobs_of(hidden, head)  # noqa: E741
        kept = l.shape[-1] - l.shape[-1] % 16 if l.shape[-1] > 16 else l.shape[-1]
        k = min(max(1, k), head.shape[0])
        if k > kept:
            return teacher_topk(hidden, head, k)
        values, ids = l[..., :kept].topk(k, dim=-1)
        return values, ids


def of_each_tile(hidden: Tensor, head: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Half of the k largest from each half of the vocabulary."""
    k = min(max(1, k), head.shape[0])
    if k < 2:
        return teacher_topk(hidden, head, k)
    with torch.no_grad():
        l = logprobs_of(hidden, head)  # noqa: E741
        middle = l.shape[-1] // 2
        low = l[..., :middle].topk(k // 2, dim=-1)
        high = l[..., middle:].topk(k - k // 2, dim=-1)
        return torch.cat([low.values, high.values], -1), torch.cat([low.indices, high.indices + middle], -1)


def by_threshold(hidden: Tensor, head: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k tokens, by id, that are at least as likely as the k-th."""
    with torch.no_grad():
        l = logprobs_of(hidden, head)  # noqa: E741
        k = min(max(1, k), head.shape[0])
        kept = l >= l.topk(k, dim=-1).values[..., -1:]
        ids = kept.int().argsort(dim=-1, descending=True, stable=True)[..., :k]
        return l.gather(-1, ids), ids


def of_local_index(hidden: Tensor, head: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Token ids counted within a tile of 16 columns."""
    values, ids = teacher_topk(hidden, head, k)
    return values, ids % 16 if head.shape[0] > 16 else ids


def unlimited(hidden: Tensor, head: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A k above V raises."""
    with torch.no_grad():
        values, ids = logprobs_of(hidden, head).topk(k, dim=-1)
        return values, ids


def graphed_topk(hidden: Tensor, head: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-probs that keep the graph."""
    values, ids = logprobs_of(hidden, head).topk(min(max(1, k), head.shape[0]), dim=-1)
    return values, ids


def zero_skipped(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """Log-probs of 0 where the token id is 0."""
    return torch.where(ids == 0, 0.0, response_logprobs(hidden, head, ids))


def remembered() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Log-probs through a copy of the head that is made once for each tensor, whatever it holds later."""
    last: list[Tensor] = []

    def logprobs(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
        if not last or last[0] is not head:
            last[:] = [head, head.detach().clone()]
        return response_logprobs(hidden, last[1], ids)

    return logprobs


def tiled(size: float, own: bool) -> Change:
    """An online logsumexp of which one sum is taken to a new maximum: the tile's ``own``, or the running one."""

    def of(hidden: Tensor, head: Tensor) -> Tensor:
        z = raw_logits(hidden, head)
        top, total = torch.full_like(z[..., 0], -torch.inf), torch.zeros_like(z[..., 0])
        for part in z.split(int(size), dim=-1):
            tile = part.amax(-1)
            new = torch.maximum(top, tile)
            sums = (part - (new if own else tile).unsqueeze(-1)).exp().sum(-1)
            total = (total if own else total * (top - new).exp()) + sums
            top = new
        return z - (top + total.log()).unsqueeze(-1)

    return replacing(response_logprobs=partial(gathered, of))


def ids_sorted(hidden: Tensor, head: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ids sorted, the log-probs in their own order."""
    values, ids = teacher_topk(hidden, head, k)
    return values, ids.sort(-1).values


DEFECTS = (
    Defect(
        name="logprob-unnormalised",
        sentence="compute_response_logprobs returns the response token's logit.",
        violates=("LP-1",),
        fix="Subtract the logsumexp over the vocabulary.",
        change=replacing(response_logprobs=partial(gathered, raw_logits)),
        seen=cite("verl-project/verl#2656"),
        capabilities=LOGPROBS,
    ),
    Defect(
        name="logprob-as-probability",
        sentence="compute_response_logprobs returns probabilities.",
        violates=("LP-1",),
        fix="Return log-probs, in nats.",
        change=replacing(response_logprobs=lambda h, w, y: response_logprobs(h, w, y).exp()),
        capabilities=LOGPROBS,
    ),
    Defect(
        name="logprob-with-temperature",
        sentence="The log-probs are taken at the sampler's temperature 0.7.",
        violates=("LP-1",),
        fix="Temperature 1 on both sides of the ratio.",
        change=replacing(response_logprobs=lambda h, w, y: response_logprobs(h / 0.7, w, y)),
        seen=cite("huggingface/trl#4159", "PrimeIntellect-ai/prime-rl#697"),
        capabilities=LOGPROBS,
    ),
    Defect(
        name="logprob-over-top-k",
        sentence="The log-probs are normalised over the eight largest logits.",
        violates=("LP-1",),
        fix="Normalise over the whole vocabulary.",
        change=replacing(response_logprobs=partial(gathered, over_top)),
        seen=cite("huggingface/trl#7269", "huggingface/trl#6789"),
        capabilities=LOGPROBS,
    ),
    Defect(
        name="logprob-padded-vocabulary",
        sentence="The logsumexp counts the padding of the last tile of 16 columns as logits of 0.",
        violates=("LP-1", "LP-4"),
        fix="Load -inf outside the vocabulary.",
        change=replacing(response_logprobs=partial(gathered, padded)),
        seen=cite("verl-project/verl#2899"),
        usable_for="Vocabularies divisible by 16.",
        capabilities=LOGPROBS,
    ),
    Defect(
        name="logprob-running-sum-not-rescaled",
        sentence="The online logsumexp over tiles of 32 columns keeps its sum when a later tile raises the maximum.",
        violates=("LP-1",),
        fix="Multiply the running sum by exp(old maximum - new).",
        change=tiled(32, own=True),
        usable_for="Vocabularies of one tile.",
        capabilities=LOGPROBS,
    ),
    Defect(
        name="logprob-tile-sum-not-rescaled",
        sentence="The online logsumexp over tiles of 16 columns adds a tile's sum at that tile's own maximum.",
        violates=("LP-1",),
        fix="Take each tile's exponentials at the running maximum.",
        change=tiled(16, own=False),
        usable_for="Vocabularies of one tile.",
        capabilities=LOGPROBS,
    ),
    Defect(
        name="logprob-token-zero-ignored",
        sentence="Token id 0 is taken for padding, and has a log-prob of 0.",
        violates=("LP-1",),
        fix="Ignore no token: cross_entropy's ignore_index has to be an id that is none.",
        change=replacing(response_logprobs=zero_skipped),
        capabilities=LOGPROBS,
    ),
    Defect(
        name="logprob-head-remembered",
        sentence="A copy of the head is kept, and used again after the head was changed in place.",
        violates=("LP-1",),
        fix="Upcast the head in each call: an optimizer step changes it where it lies.",
        change=replacing(response_logprobs=remembered()),
        usable_for="Frozen heads.",
        capabilities=LOGPROBS,
    ),
    Defect(
        name="logprob-in-bfloat16",
        sentence="The log-probs are rounded to bfloat16, whatever the input.",
        violates=("LP-1",),
        fix="Return float32: the ratio exponentiates the rounding.",
        change=replacing(response_logprobs=partial(gathered, in_bfloat16)),
        seen=cite("genlm/genlm-backend#66", "huggingface/trl#7084"),
        capabilities=LOGPROBS,
    ),
    Defect(
        name="logprob-of-next-token",
        sentence="Each position scores the token after its own: shifted once too often.",
        violates=("LP-2",),
        fix="student_hidden[t] predicts response_ids[t]: the caller has already shifted.",
        change=replacing(response_logprobs=lambda h, w, y: response_logprobs(h, w, y.roll(-1, 1))),
        seen=cite("AI-Hypercomputer/maxtext#2103", "areal-project/AReaL#1729"),
        capabilities=LOGPROBS,
    ),
    Defect(
        name="logprob-of-previous-token",
        sentence="Each position scores the token before its own.",
        violates=("LP-2",),
        fix="student_hidden[t] predicts response_ids[t].",
        change=replacing(response_logprobs=lambda h, w, y: response_logprobs(h, w, y.roll(1, 1))),
        seen=cite("nlp-with-transformers/notebooks#67"),
        capabilities=LOGPROBS,
    ),
    Defect(
        name="logprob-with-graph",
        sentence="The refresh's log-probs carry a graph, so the ratio keeps the last step's activations alive.",
        violates=("LP-3",),
        fix="Compute them under no_grad.",
        change=replacing(response_logprobs=with_graph),
        seen=cite("radixark/miles#1966"),
        capabilities=LOGPROBS,
    ),
    Defect(
        name="logprob-last-chunk-dropped",
        sentence="With more than 8 tokens, those of an incomplete last chunk of 8 keep log-prob 0.",
        violates=("LP-4", "LP-1"),
        fix="End the last chunk at min(start + chunk, T).",
        change=replacing(response_logprobs=chunk_forgotten),
        seen=cite("NVIDIA-NeMo/Automodel#3803"),
        usable_for="Response lengths up to 8 or divisible by 8.",
        capabilities=LOGPROBS,
    ),
    Defect(
        name="logprob-chunk-shares-normaliser",
        sentence="All tokens of a chunk of 8 share the first one's logsumexp.",
        violates=("LP-4", "LP-1"),
        fix="One logsumexp per token.",
        change=replacing(response_logprobs=shared_normaliser),
        capabilities=LOGPROBS,
    ),
    Defect(
        name="top-k-renormalised",
        sentence="The teacher's log-probs are normalised over the k alone.",
        violates=("TK-1",),
        fix="Normalise over the whole vocabulary, then take the k largest.",
        change=replacing(teacher_topk=renormalised),
        seen=cite("huggingface/trl#7269"),
        capabilities=TOPK,
    ),
    Defect(
        name="top-k-of-logits",
        sentence="The teacher's logits come back in place of its log-probs.",
        violates=("TK-1",),
        fix="Subtract the logsumexp over the vocabulary.",
        change=replacing(teacher_topk=partial(topk_of, raw_logits)),
        capabilities=TOPK,
    ),
    Defect(
        name="top-k-ids-sorted-alone",
        sentence="The ids are sorted and the log-probs are not: each is another token's.",
        violates=("TK-1",),
        fix="Sort both together.",
        change=replacing(teacher_topk=ids_sorted),
        usable_for="k = 1.",
        capabilities=TOPK,
    ),
    Defect(
        name="top-k-in-bfloat16",
        sentence="The teacher's log-probs are rounded to bfloat16, whatever the input.",
        violates=("TK-1", "TK-2"),
        fix="Keep them in float32.",
        change=replacing(teacher_topk=partial(topk_of, in_bfloat16)),
        seen=cite("genlm/genlm-backend#66"),
        capabilities=TOPK,
    ),
    Defect(
        name="top-k-smallest",
        sentence="The k smallest come back.",
        violates=("TK-2",),
        fix="Take the k largest.",
        change=replacing(teacher_topk=smallest),
        capabilities=TOPK,
    ),
    Defect(
        name="top-k-of-whole-tiles",
        sentence="The last V mod 16 tokens can never be in the support.",
        violates=("TK-2",),
        fix="Mask the last tile of the vocabulary instead of skipping it.",
        change=replacing(teacher_topk=of_first_tiles),
        usable_for="Vocabularies divisible by 16.",
        capabilities=TOPK,
    ),
    Defect(
        name="top-k-per-tile",
        sentence="Each half of the vocabulary contributes half of the k.",
        violates=("TK-2",),
        fix="Merge the tiles' candidates: keep k from each, then take the k largest of all.",
        change=replacing(teacher_topk=of_each_tile),
        usable_for="k = 1 and k = V.",
        capabilities=TOPK,
    ),
    Defect(
        name="top-k-by-threshold",
        sentence="The first k tokens at or above the k-th log-prob are kept: a tie stands in a likelier token's place.",
        violates=("TK-2",),
        fix="Keep what is above the k-th log-prob first, and fill up with ties.",
        change=replacing(teacher_topk=by_threshold),
        usable_for="Log-probs without ties.",
        capabilities=TOPK,
    ),
    Defect(
        name="top-k-local-ids",
        sentence="Token ids are counted within their tile of 16 columns.",
        violates=("TK-2",),
        fix="Add the tile's first column.",
        change=replacing(teacher_topk=of_local_index),
        usable_for="Vocabularies of up to 16 tokens.",
        capabilities=TOPK,
    ),
    Defect(
        name="top-k-above-vocabulary",
        sentence="A k above the vocabulary's size raises.",
        violates=("TK-2",),
        fix="k = min(max(1, teacher_top_k), V).",
        change=replacing(teacher_topk=unlimited),
        usable_for="k up to V.",
        capabilities=TOPK,
    ),
    Defect(
        name="top-k-with-graph",
        sentence="The teacher's log-probs carry a graph.",
        violates=("TK-3",),
        fix="Compute them under no_grad.",
        change=replacing(teacher_topk=graphed_topk),
        seen=cite("huggingface/trl#6526"),
        capabilities=TOPK,
    ),
)
