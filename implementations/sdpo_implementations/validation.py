"""What ``distill`` refuses, before it touches anything: one ValueError that says what was wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def validate_training(training: Any) -> None:
    """Raise ValueError for hyperparameters outside their range."""
    steps = training.steps_per_batch
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"training.steps_per_batch must be an integer of at least 1, got {steps!r}")
    if not 0 <= training.alpha <= 1:
        raise ValueError(f"training.alpha must lie in [0, 1], got {training.alpha!r}")
    for name in ("is_clip", "max_grad_norm"):
        if not getattr(training, name) > 0:
            raise ValueError(f"training.{name} must be above 0, got {getattr(training, name)!r}")
    for name in ("learning_rate", "kl_reg_weight"):
        if not 0 <= getattr(training, name) < math.inf:
            raise ValueError(f"training.{name} must be finite and at least 0, got {getattr(training, name)!r}")


def validate_samples(samples: Sequence[Any], vocabulary: int) -> None:
    """Raise ValueError unless there is a sample and every sample is usable.

    A sample needs at least one prompt, teacher prompt and response token, each in [0, vocabulary), and, where
    the sampler recorded log-probs, one per response token, none of them NaN (-inf is a sampler's way to say
    that it masked a token out, and the clamps deal with it).
    """
    if len(samples) == 0:
        raise ValueError("samples must contain at least one sample, got none")
    for index, sample in enumerate(samples):
        for name in ("prompt_token_ids", "teacher_prompt_token_ids", "response_token_ids"):
            ids = getattr(sample, name)
            if len(ids) == 0:
                raise ValueError(f"samples[{index}].{name} must not be empty")
            if bad := [token for token in ids if not 0 <= token < vocabulary]:
                raise ValueError(
                    f"samples[{index}].{name} has token id {bad[0]}, outside the vocabulary [0, {vocabulary})"
                )
        recorded, length = sample.response_logprobs, len(sample.response_token_ids)
        if recorded is None:
            continue
        if len(recorded) != length:
            raise ValueError(
                f"samples[{index}].response_logprobs must have one entry per response token: "
                f"{length}, got {len(recorded)}"
            )
        if any(math.isnan(value) for value in recorded):
            raise ValueError(f"samples[{index}].response_logprobs has a NaN")
