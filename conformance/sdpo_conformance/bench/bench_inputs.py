"""The tensors of a workload, drawn on the device they are timed on, and the rotation of copies.

Logits have the spread of a trained model's; teacher, base and sampler are neighbours of the student, so that the
divergence is small, the ratio scatters around 1 and some ratios are capped. With uniform supports tokens share
ids by chance only, which is the worst case for kernels that gather rows of the head; real text repeats itself, as
zipf and recorded supports do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch
from torch import Tensor

from sdpo_conformance.bench.supports import CONSTANT_FEATURE, recorded_support, zipf_prior
from sdpo_conformance.bench.workloads import HEADS, SUPPORTS, UNIFORM, ZIPF
from sdpo_conformance.cases.precision import DTYPES

LOGIT_SCALE = 4.0
"""Standard deviation of the logits."""

TEACHER_NOISE, BASE_NOISE, SAMPLER_NOISE = 0.3, 0.1, 0.5
"""How far teacher and base states lie from the student's (relative), and the sampler's log-probs (nats)."""

CHUNK_ELEMENTS = 2**28
"""Logits held at a time while inputs are made: 1 GiB of float32."""

MOST_COPIES = 8


@dataclass(frozen=True)
class Inputs:
    """hidden, teacher_hidden (1, N, H), head (V, H) in the work's dtype; teacher_logprobs (1, N, K) float32 and
    teacher_indices int64; base_logprobs, old_student_logprobs, response_mask (1, N) float32; response_ids int64.
    ``hidden`` is a leaf that asks for a gradient."""

    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_logprobs: Tensor
    teacher_indices: Tensor
    base_logprobs: Tensor
    response_mask: Tensor
    old_student_logprobs: Tensor
    response_ids: Tensor

    def tokens(self, keep: Tensor) -> Inputs:
        """The same for the tokens ``keep`` (int64) alone."""
        changes = {
            field.name: getattr(self, field.name).detach()[:, keep].contiguous()
            for field in fields(self)
            if field.name != "head"
        }
        changes["hidden"].requires_grad_()
        return replace(self, **changes)

    def copy(self, head: Tensor) -> Inputs:
        """The same tokens in another order and in other memory."""
        order = torch.arange(self.hidden.shape[1], device=self.hidden.device).roll(self.hidden.shape[1] // 2)
        return replace(self.tokens(order), head=head)

    @property
    def bytes_per_token_tensors(self) -> int:
        """Memory of everything but the head."""
        tensors = [getattr(self, field.name) for field in fields(self) if field.name != "head"]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@lru_cache(maxsize=1)
def head_of(workload: str, dtype: str, device: str, prior: bool) -> Tensor:
    """The head's weight (V, H); the last one asked for is kept. ``prior``: its first column is the Zipf prior over
    CONSTANT_FEATURE."""
    head = HEADS[workload]
    generator = torch.Generator(device).manual_seed(1)
    weight = torch.empty(head.vocabulary, head.hidden, dtype=DTYPES[dtype], device=device)
    scale = LOGIT_SCALE / head.hidden**0.5
    for part in weight.split(16384):
        part.copy_(torch.randn(part.shape, generator=generator, device=device) * scale)
    if prior:
        weight[:, 0] = (zipf_prior(head.vocabulary) / CONSTANT_FEATURE).to(weight)
    return weight


@lru_cache(maxsize=1)
def inputs_of(workload: str, tokens: int, top_k: int, dtype: str, device: str, support: str = UNIFORM) -> Inputs:
    """The inputs of a work; the last ones asked for are kept."""
    weight = head_of(workload, dtype, device, support == ZIPF)
    generator = torch.Generator(device).manual_seed(2)

    def states(around: Tensor | None = None, noise: float = 0.0) -> Tensor:
        drawn = torch.randn(tokens, weight.shape[1], generator=generator, device=device)
        if around is not None:
            drawn = (around.float() + noise * drawn) / (1 + noise**2) ** 0.5
        if support == ZIPF:
            drawn[:, 0] = CONSTANT_FEATURE
        return drawn.to(weight.dtype)

    hidden = states()
    teacher, base = states(hidden, TEACHER_NOISE), states(hidden, BASE_NOISE)
    k = min(top_k, weight.shape[0])
    recorded = None if support in SUPPORTS else recorded_support(support, tokens, k, weight.shape[0])
    columns: dict[str, list[Tensor]] = {key: [] for key in ("tau", "support", "base", "student", "ids")}
    for part in chunks(tokens, weight.shape[0]):
        student = (hidden[part] @ weight.T).float().log_softmax(-1)
        ids = sampled(student, generator)
        columns["student"].append(student.gather(-1, ids.unsqueeze(-1)).squeeze(-1))
        columns["ids"].append(ids)
        del student
        at_teacher = (teacher[part] @ weight.T).float().log_softmax(-1)
        if recorded is None:
            values, indices = at_teacher.topk(k, dim=-1)
        else:
            indices = recorded[part].to(device)
            values = at_teacher.gather(-1, indices)
        del at_teacher
        columns["tau"].append(values)
        columns["support"].append(indices)
        at_base = (base[part] @ weight.T).float().log_softmax(-1)
        columns["base"].append(at_base.gather(-1, ids.unsqueeze(-1)).squeeze(-1))
        del at_base
    joined = {key: torch.cat(parts).unsqueeze(0) for key, parts in columns.items()}
    noise = torch.randn(1, tokens, generator=generator, device=device)
    return Inputs(
        hidden=hidden.unsqueeze(0).requires_grad_(),
        head=weight,
        teacher_hidden=teacher.unsqueeze(0),
        teacher_logprobs=joined["tau"],
        teacher_indices=joined["support"],
        base_logprobs=joined["base"],
        response_mask=torch.ones(1, tokens, device=device),
        old_student_logprobs=joined["student"] + SAMPLER_NOISE * noise,
        response_ids=joined["ids"],
    )


def chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Stretches of tokens whose logits fit ``CHUNK_ELEMENTS``."""
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    return (slice(start, start + step) for start in range(0, tokens, step))


def sampled(logprobs: Tensor, generator: torch.Generator) -> Tensor:
    """One token id a row, (rows,) int64, drawn from softmax: the largest of log-probs plus Gumbel noise."""
    uniform = torch.rand(logprobs.shape, generator=generator, device=logprobs.device).clamp(min=1e-20)
    return (logprobs - uniform.log().neg().clamp(min=1e-20).log()).argmax(-1)


def rotation(inputs: Inputs) -> list[Inputs]:
    """Copies to take turns, so that no round finds its inputs in the cache that the round before filled.

    A head larger than twice the cache is shared: reading it whole evicts everything else.
    """
    cache = cache_bytes(inputs.hidden.device)
    head_bytes = inputs.head.numel() * inputs.head.element_size()
    shared = head_bytes > 2 * cache
    per_copy = inputs.bytes_per_token_tensors + (0 if shared else head_bytes)
    copies = min(MOST_COPIES, max(2, -(-2 * cache // max(per_copy, 1)))) if not shared else 2
    return [inputs, *(inputs.copy(inputs.head if shared else inputs.head.clone()) for _ in range(copies - 1))]


def cache_bytes(device: torch.device) -> int:
    """The last-level cache of the device: L2 of a GPU, the largest the system reports for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        return max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), os.sysconf("SC_LEVEL2_CACHE_SIZE"), 2**20)
    except (ValueError, OSError):
        return 32 * 2**20


def forget() -> None:
    """Drop the kept inputs."""
    inputs_of.cache_clear()
    head_of.cache_clear()
