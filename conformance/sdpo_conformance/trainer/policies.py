"""What the policies say about a sample: the student (adapter on), the base and the teacher (adapter off).

A model here is a causal language model wrapped by PEFT: called with ``input_ids`` (1, L) it returns an object
with ``logits`` (1, L, V); its ``disable_adapter()`` is a context manager. Position t of the logits predicts
token t + 1, so the response is read at positions start-1 .. -2 of prompt + response.

Source: claas/training/distillation.py, DistillationTrainer.distill, _build_self_teacher_topk and
_compute_student_response_logprobs, kfallah/CLaaS at e2331f7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.protocol import Sample


@dataclass(frozen=True)
class PreparedSample:
    """What is computed once per sample, before the first step: response_ids and ``base_logprobs`` (1, T),
    ``teacher_logprobs`` and ``teacher_indices`` (1, T, K)."""

    sample: Sample
    response_ids: Tensor
    base_logprobs: Tensor
    teacher_logprobs: Tensor
    teacher_indices: Tensor


def response_logits(model: Any, prompt_token_ids: Sequence[int], response_token_ids: Sequence[int]) -> Tensor:
    """(1, T, V): the logits that predict the response after this prompt."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt_token_ids, *response_token_ids]], dtype=torch.int64, device=device)
    return model(input_ids=ids, use_cache=False).logits[:, len(prompt_token_ids) - 1 : -1, :]


def chosen(logits: Tensor, response_ids: Tensor) -> Tensor:
    """(1, T): l[y] of the response."""
    return torch.log_softmax(logits, dim=-1).gather(-1, response_ids.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def student_logprobs(model: Any, sample: Sample) -> Tensor:
    """(1, T): the response's log-probs under the model as it stands."""
    logits = response_logits(model, sample.prompt_token_ids, sample.response_token_ids)
    return chosen(logits, torch.tensor([list(sample.response_token_ids)], device=logits.device))


@torch.no_grad()
def prepare(model: Any, samples: Sequence[Sample], top_k: int) -> list[PreparedSample]:
    """Everything about the samples that no step changes, with the adapter disabled: once for all, for disabling takes
    longer than a forward. K = min(max(1, top_k), V); the teacher's log-probs are normalised over the vocabulary."""
    prepared = []
    with model.disable_adapter():
        for sample in samples:
            logits = response_logits(model, sample.teacher_prompt_token_ids, sample.response_token_ids)
            logprobs = torch.log_softmax(logits, dim=-1)
            values, indices = logprobs.topk(min(max(1, top_k), logprobs.shape[-1]), dim=-1)
            prepared.append(
                PreparedSample(
                    sample=sample,
                    response_ids=torch.tensor([list(sample.response_token_ids)], device=indices.device),
                    base_logprobs=student_logprobs(model, sample),
                    teacher_logprobs=values,
                    teacher_indices=indices,
                )
            )
    return prepared


def recorded_logprobs(model: Any, sample: Sample) -> Tensor:
    """(1, T): behaviour log-probs of step 1: what the sampler recorded, as float32; the starting policy's
    where it recorded nothing."""
    if sample.response_logprobs is None:
        return student_logprobs(model, sample)
    device = next(model.parameters()).device
    return torch.tensor([list(sample.response_logprobs)], dtype=torch.float32, device=device).double()
