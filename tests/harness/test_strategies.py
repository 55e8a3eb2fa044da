"""The strategies reach the corners often, not by luck, and seldom ask for what plain PyTorch cannot do."""

from __future__ import annotations

import collections

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from sdpo_conformance.cases.precision import DTYPES
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.bounds import expectations
from sdpo_conformance.specs.claas.corners import EVERYTHING
from sdpo_conformance.specs.claas.inputs.losses import loss_cases
from sdpo_conformance.specs.claas.loss_case import LossCase
from sdpo_conformance.specs.claas.oracle.loss import upcast

EXAMPLES = 600
SEEDS = (0, 1, 2, 3, 4, 5)
"""Examples of one run resemble each other; those of several do not."""
SHARE = {
    "response inside": 0.5,
    "response outside": 0.4,
    "ratio above cap": 0.2,
    "all tokens above cap": 0.02,
    "ratio below": 0.2,
    "clamp high": 0.08,
    "clamp low": 0.08,
    "all tokens clamped low": 0.01,
    "one token apart": 0.05,
    "alpha 0": 0.08,
    "alpha 1": 0.08,
    "alpha next to 0": 0.08,
    "alpha next to 1": 0.08,
    "is_clip below 1": 0.08,
    "is_clip beyond e^20": 0.05,
    "mask fractional": 0.08,
    "mask below 1": 0.08,
    "mask integer or bool": 0.1,
    "student on the floor": 0.05,
    "teacher on the floor": 0.05,
    "K = 1": 0.08,
    "K = V": 0.05,
    "K > 64": 0.05,
    "V in the thousands": 0.05,
    "T > 16": 0.08,
    "T > 128": 0.02,
    "B > 1": 0.3,
    "token 0": 0.2,
    "token V - 1": 0.2,
    "int32": 0.15,
    "not contiguous": 0.2,
    "anchored": 0.3,
    "drift clamped": 0.08,
    "upstream's dtype mix": 0.05,
}


def features(case: LossCase) -> set[str]:
    fields, training, truth = case.loss_input, case.training, case.truth
    b, t = fields.response_ids.shape
    k, v = fields.teacher_indices.shape[-1], case.vocabulary
    mask = upcast(fields.response_mask)
    inside = (fields.teacher_indices.long() == fields.response_ids.long().unsqueeze(-1)).any(-1)
    log_ratio = truth.chosen - upcast(fields.old_student_logprobs)
    drift = truth.chosen - upcast(fields.base_logprobs)
    capped = truth.ratio >= training.is_clip
    tensors = case.tensors()
    leading = tensors["student_logits"]
    checks = {
        "response inside": inside.any(),
        "response outside": (~inside).any(),
        "ratio above cap": capped.any(),
        "all tokens above cap": capped.all(),
        "ratio below": (log_ratio < -1).any(),
        "clamp high": (log_ratio > 20).any(),
        "clamp low": (log_ratio < -20).any(),
        "all tokens clamped low": (log_ratio < -20).all(),
        "one token apart": b * t > 2 and int((log_ratio.abs() > 20).sum()) == 1,
        "alpha 0": training.alpha == 0,
        "alpha 1": training.alpha == 1,
        "alpha next to 0": 0 < training.alpha < 0.05,
        "alpha next to 1": 0.95 < training.alpha < 1,
        "is_clip below 1": training.is_clip < 1,
        "is_clip beyond e^20": training.is_clip > 4.9e8,
        "mask fractional": ((mask != 0) & (mask != 1)).any(),
        "mask below 1": 0 < float(mask.sum()) < 1,
        "mask integer or bool": not fields.response_mask.is_floating_point(),
        "student on the floor": truth.divergence is not None and truth.divergence.on_floor.any(),
        "teacher on the floor": (upcast(fields.teacher_logprobs).logsumexp(-1) < -18.42).any(),
        "K = 1": k == 1,
        "K = V": k == v,
        "K > 64": k > 64,
        "V in the thousands": v >= 1000,
        "T > 16": t > 16,
        "T > 128": t > 128,
        "B > 1": b > 1,
        "token 0": (fields.response_ids == 0).any(),
        "token V - 1": (fields.response_ids == v - 1).any(),
        "int32": fields.teacher_indices.dtype == torch.int32,
        "not contiguous": case.layout != "contiguous",
        "anchored": training.kl_reg_weight > 0,
        "drift clamped": (drift.abs() > 20).any(),
        "upstream's dtype mix": leading.dtype == tensors["base_logprobs"].dtype == torch.bfloat16
        and fields.old_student_logprobs.dtype == torch.float32,
    }
    return {name for name, holds in checks.items() if bool(holds)}


@pytest.fixture(scope="module")
def seen() -> tuple[collections.Counter, int, int]:
    counter: collections.Counter = collections.Counter()
    totals = [0, 0]
    dtypes = [DTYPES[name] for name in ("float32", "bfloat16", "float16")]

    for start in SEEDS:

        @seed(start)
        @settings(
            max_examples=EXAMPLES // len(SEEDS),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(loss_cases(EVERYTHING, Capability.LOSS, dtypes))
        def collect(case: LossCase) -> None:
            totals[0] += 1
            totals[1] += not expectations(case, Capability.LOSS).attainable
            counter.update(features(case))

        collect()
    return counter, totals[0], totals[1]


@pytest.mark.parametrize("feature", SHARE)
def test_corner_is_visited_often(seen: tuple[collections.Counter, int, int], feature: str) -> None:
    counter, examples, _ = seen
    assert counter[feature] >= SHARE[feature] * examples, f"{feature}: {counter[feature]} of {examples}"


def test_few_examples_are_rejected(seen: tuple[collections.Counter, int, int]) -> None:
    _, examples, rejected = seen
    assert rejected <= 0.05 * examples
