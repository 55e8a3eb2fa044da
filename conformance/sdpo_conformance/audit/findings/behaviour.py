"""Findings that need the model: what it does now, and what its first step should have reported."""

from __future__ import annotations

import math

from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, NotJudged, Severity, Verdicts
from sdpo_conformance.audit.model_loading import AFTER, BEFORE

#: Upstream's own collapse alert (claas/eval/metrics/collapse.py): a mean log-prob moved by more than 2 nats.
_LARGE_DRIFT = 2.0
_REPETITIVE = 0.5
_RATIO_TOLERANCE = 0.05
_KL_TOLERANCE = 0.02


def stopping_lost(evidence: Evidence) -> Verdicts:
    """Fewer prompts reach an end token after the run than before it."""
    result = evidence.generation
    if result is None:
        yield NotJudged(
            "stopping-lost", "no generation: it needs --model and prompts (--prompts, or the run's samples)"
        )
        return
    total = len(result.prompts)
    before, after = result.stopped(BEFORE), result.stopped(AFTER)
    if before == 0:
        yield NotJudged(
            "stopping-lost",
            f"nothing stopped before the run within {result.max_new_tokens} tokens; raise --max-new-tokens",
        )
        return
    lost = before - after
    if lost <= 0:
        return
    ends = [(r.end_before, r.end_after) for r in result.prompts if r.end_before is not None and r.end_after is not None]
    start = "the base model" if result.before_is_base else "before"
    told = [f"{start} {before}/{total} stopped within {result.max_new_tokens} tokens, after {after}/{total}"]
    if ends:
        was = math.fsum(b for b, _ in ends) / len(ends)
        now = math.fsum(a for _, a in ends) / len(ends)
        told.append(f"log-prob of the end token where the output ended before: {was:.3g}, after {now:.3g} (mean)")
    if result.loops(AFTER) > result.loops(BEFORE):
        told.append(f"{result.loops(AFTER)} of {total} outputs end in a cycle, before {result.loops(BEFORE)}")
    severity = Severity.ERROR if lost * 2 >= before and total > 1 else Severity.WARNING
    if lost == 1 and before > 3:
        severity = Severity.NOTE  # one long answer is no hang
    yield Finding(
        id="stopping-lost",
        severity=severity,
        statement=(f"{start} {before}/{total} stopped, after {after}/{total}: the model forgets to end its answer"),
        evidence=tuple(told),
        cause=("the update moved probability away from the end token, as off-policy steps without the ratio can"),
        next_step=("do not serve this adapter; go back to the one before and train with the ratio and the refresh"),
        data={"before": before, "after": after, "prompts": total, "max_new_tokens": result.max_new_tokens},
    )


def repetitive(evidence: Evidence) -> Verdicts:
    """Outputs that repeat themselves, and did not before."""
    result = evidence.generation
    if result is None:
        return
    before, after = result.repetition(BEFORE), result.repetition(AFTER)
    if after > _REPETITIVE and after > before + 0.25:
        yield Finding(
            id="repetitive",
            severity=Severity.WARNING,
            statement=f"{after:.0%} of the output's 4-grams are repeats, before {before:.0%}",
            evidence=(
                (
                    f"{result.loops(AFTER)} of {len(result.prompts)} outputs end in a cycle, before"
                    f" {result.loops(BEFORE)}"
                ),
            ),
            cause="the policy has collapsed onto few continuations",
            next_step="read a few outputs; lower the learning rate or give the anchor weight",
            data={"before": before, "after": after},
        )


def logprob_drift(evidence: Evidence) -> Verdicts:
    """The log-probs of what the model said before have moved far."""
    result = evidence.generation
    if result is None or result.drift is None or result.drift <= _LARGE_DRIFT:
        return
    yield Finding(
        id="logprob-drift",
        severity=Severity.WARNING,
        statement=f"the model's own earlier outputs moved by {result.drift:.3g} nats per token",
        evidence=(
            (
                f"mean |change| of the mean log-prob over {len(result.prompts)} output(s); the alarm is at"
                f" {_LARGE_DRIFT:g}"
            ),
        ),
        cause="the adapter moved the policy much further than a batch of feedback should",
        next_step="lower the learning rate, give the anchor weight, or stop earlier",
        data={"drift": result.drift},
    )


def replay_ratio(evidence: Evidence) -> Verdicts:
    """The first step's mean_is_ratio against the one recomputed from the samples."""
    replay, reported = evidence.replay, _first(evidence, "mean_is_ratio")
    if replay is None or replay.mean_is_ratio is None or reported is None:
        if evidence.replay is not None:
            yield NotJudged("replay-ratio", "the samples carry no recorded log-probs, or mean_is_ratio is not reported")
        return
    if evidence.sampler_fit is not None and evidence.sampler_fit.processed:
        yield NotJudged("replay-ratio", "the records are of another temperature or top-p; the trainer may score alike")
        return
    expected = replay.mean_is_ratio
    if abs(reported - expected) <= _RATIO_TOLERANCE * max(1.0, expected):
        return
    yield Finding(
        id="replay-ratio",
        severity=Severity.ERROR,
        statement=(
            f"step 1 reports mean_is_ratio {reported:.5g}; its samples and starting adapter give {expected:.5g}"
        ),
        evidence=(f"{replay.samples} sample(s), sampler and trainer {replay.sampler_gap:.3g} nats per token apart",),
        cause=(
            "the recorded log-probs are not what the loss used: overwritten, dropped, shifted, or of another"
            " sample; or 'before' is not the start"
        ),
        next_step="follow the recorded log-probs into the loss; name the right start with --before",
        data={"reported": reported, "recomputed": expected, "sampler_gap": replay.sampler_gap},
    )


def replay_kl(evidence: Evidence) -> Verdicts:
    """The first step's kl_reg against the one recomputed against the base model."""
    replay, reported = evidence.replay, _first(evidence, "kl_reg")
    if replay is None or reported is None:
        return
    expected = replay.kl_reg
    if abs(reported - expected) <= _KL_TOLERANCE + 0.1 * abs(expected):
        return
    yield Finding(
        id="replay-kl",
        severity=Severity.ERROR,
        statement=f"step 1 reports kl_reg {reported:.5g}; k3 against the base model gives {expected:.5g}",
        evidence=(f"{replay.samples} sample(s), adapter before the run against the same model without it",),
        cause=(
            "anchored to something else than the base policy, another sign or estimator, or a weight already"
            " multiplied in"
        ),
        next_step="compare the anchor with exp(d) - 1 - d of the policy and the model without its adapter",
        data={"reported": reported, "recomputed": expected},
    )


def _first(evidence: Evidence, name: str) -> float | None:
    """The value at the first step, where the run has one batch, the one the samples belong to."""
    metrics = evidence.metrics
    if metrics is None or len(metrics.batches) != 1:
        return None
    value = metrics.steps[0].values.get(name, math.nan)
    return value if math.isfinite(value) else None


CHECKS = (
    Check("stopping-lost", "fewer prompts reach an end token than before the run", stopping_lost),
    Check("repetitive", "outputs that repeat themselves", repetitive),
    Check("logprob-drift", "the policy moved far on its own earlier outputs", logprob_drift),
    Check("replay-ratio", "step 1's ratio is not what its samples give", replay_ratio),
    Check("replay-kl", "step 1's kl_reg is not what the base model gives", replay_kl),
)
