"""Whether a step's numbers are the mean over its samples, each of which counts alike."""

from __future__ import annotations

import math
from collections.abc import Iterator

from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, Severity, Verdicts
from sdpo_conformance.audit.metrics import RunMetrics, labelled_steps

_NAMES = ("distill_loss", "kl_reg", "mean_is_ratio")
#: How near the mean over tokens has to be, and how far the mean over samples.
_SAME = 1e-5
_OTHER = 1e-3
_FEWEST = 2
_SHOWN = 5


def token_weighted_mean(evidence: Evidence) -> Verdicts:
    """A step's numbers that are the mean over all tokens: long responses outweigh short ones."""
    metrics = evidence.metrics
    if metrics is None or not metrics.native:
        return
    told = []
    for label, name, value, by_token, by_sample in _compared(metrics):
        if abs(by_token - by_sample) <= _OTHER * abs(by_sample):
            continue  # the two cannot be told apart here
        if abs(value - by_token) > _SAME * max(abs(by_token), 1e-8):
            return
        told.append(
            f"{label}: {name} {value:.6g}, mean over the samples {by_sample:.6g}, over the tokens {by_token:.6g}"
        )
    if len(told) < _FEWEST:
        return
    yield Finding(
        id="token-weighted-mean",
        severity=Severity.ERROR,
        statement="the steps' numbers are means over all tokens, not the mean of the samples' means",
        evidence=tuple(told[:_SHOWN]),
        cause="samples are packed or padded into one batch whose loss is divided by all its tokens",
        next_step="take the mean of each sample over its own tokens, then the mean over the samples",
        data={"numbers": len(told)},
    )


def _compared(metrics: RunMetrics) -> Iterator[tuple[str, str, float, float, float]]:
    for label, step in labelled_steps(metrics):
        for name in _NAMES:
            rows = [(s.get("tokens", math.nan), s.get(name, math.nan)) for s in step.samples.values()]
            value = step.values.get(name, math.nan)
            tokens = sum(count for count, _ in rows)
            if len(rows) > 1 and tokens > 0 and all(map(math.isfinite, (value, tokens, sum(v for _, v in rows)))):
                by_token = sum(count * v for count, v in rows) / tokens
                yield label, name, value, by_token, sum(v for _, v in rows) / len(rows)


CHECKS = (Check("token-weighted-mean", "means over all tokens in place of samples", token_weighted_mean),)
