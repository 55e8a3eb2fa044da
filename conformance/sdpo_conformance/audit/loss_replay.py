"""Step 1 again: the ratio and the anchor that the run should have reported, from its samples and its start.

What the settings leave open (alpha, the teacher) is not needed: mean_is_ratio and kl_reg of a batch's first
step
follow from the adapter before, the base model and the recorded log-probs alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdpo_conformance.audit.config import RequestSample
from sdpo_conformance.audit.errors import AuditError
from sdpo_conformance.audit.generation import response_logprobs
from sdpo_conformance.audit.model_loading import BEFORE, AdaptedModel

_CLAMP = 20.0
#: Mean |log-prob difference| above which sampler and trainer are two: half precision alone stays below.
SAMPLER_DIFFERS = 0.02


@dataclass(frozen=True)
class ReplayResult:
    """Means over samples of token means, as step 1 reports them.

    `sampler_gap` is the mean |recorded - recomputed| log-prob in nats; it and `mean_is_ratio` are None where
    the
    samples carry no recorded log-probs.
    """

    samples: int
    mean_is_ratio: float | None
    sampler_gap: float | None
    kl_reg: float


def replay_first_step(adapted: AdaptedModel, samples: Sequence[RequestSample], is_clip: float) -> ReplayResult:
    """Recompute step 1's mean_is_ratio and kl_reg under the adapter before the run."""
    import torch

    size = int(adapted.model.get_input_embeddings().weight.shape[0])
    ratios, gaps, anchors = [], [], []
    for number, sample in enumerate(samples, start=1):
        if max(*sample.prompt_token_ids, *sample.response_token_ids) >= size:
            raise AuditError(f"sample {number} has token ids outside the model's vocabulary of {size}")
        new = response_logprobs(adapted, BEFORE, sample.prompt_token_ids, sample.response_token_ids)
        base = response_logprobs(adapted, None, sample.prompt_token_ids, sample.response_token_ids)
        d = (new - base).clamp(-_CLAMP, _CLAMP)
        anchors.append(float((d.exp() - 1 - d).mean()))
        if sample.response_logprobs is not None:
            old = torch.tensor(sample.response_logprobs, dtype=torch.float64)
            ratios.append(float((new - old).clamp(-_CLAMP, _CLAMP).exp().clamp(max=is_clip).mean()))
            gaps.append(float((new - old).abs().mean()))
    recorded = len(ratios) == len(samples)
    return ReplayResult(
        samples=len(samples),
        mean_is_ratio=math.fsum(ratios) / len(ratios) if recorded else None,
        sampler_gap=math.fsum(gaps) / len(gaps) if recorded else None,
        kl_reg=math.fsum(anchors) / len(anchors),
    )
