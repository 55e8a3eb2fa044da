"""Whether the anchor refers to the base policy, as far as kl_reg where a batch begins shows it."""

from __future__ import annotations

import math

from sdpo_conformance.audit.adapter_change import AdapterChange
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, Severity, Verdicts

#: bfloat16 log-probs of two forwards differ by some hundredths of a nat, under a base model's own dropout by more.
_NOISE = 0.1
_DROPOUT = 0.5
#: kl_reg where a batch ends, and how far it falls to the next one's start, that no other samples explain.
_VISIBLE = 1e-4
_FALL = 1e-3
_FEWEST_BATCHES = 3
#: The Frobenius norm of a lora_B from which on the start shows in the log-probs.
_FAR = 1e-2
_PLAIN_STARTS = (True, "gaussian", "kaiming", "orthogonal")


def kl_at_the_start(evidence: Evidence) -> Verdicts:
    """kl_reg far above 0 in the first step of a fresh adapter, whose policy is the base policy."""
    metrics, change = evidence.metrics, evidence.change
    if metrics is None or not metrics.native or metrics.averaged_over > 1 or not metrics.steps or change is None:
        return
    first = metrics.steps[0]
    value = first.values.get("kl_reg", math.nan)
    if first.number > 1 or not _NOISE < value < math.inf or not _starts_at_base(change):
        return
    yield Finding(
        id="kl-at-start",
        severity=Severity.ERROR if value > _DROPOUT else Severity.WARNING,
        statement=f"kl_reg is {value:.3g} at the first step, where the adapter is fresh and the policy the base policy",
        evidence=("every lora_B is zero before the run: k3 of equal log-probs is 0",),
        cause=(
            "the base log-probs are of something else: shifted by a token, of another temperature or model, or taken"
            " with another adapter on"
        ),
        next_step="compare base log-probs and the starting policy's own on one sample: they are the same numbers",
        data={"kl_reg": value},
    )


def _starts_at_base(change: AdapterChange) -> bool:
    """Whether the adapter before the run does nothing: plain LoRA whose every lora_B is zero."""
    if change.before is None:
        return False
    if change.before.fresh:
        return change.before.config.get("init_lora_weights", True) in _PLAIN_STARTS
    zero = [tensor.norm_before == 0 for tensor in change.tensors if tensor.place.part == "B"]
    return bool(zero) and all(zero)


def anchor_restarts(evidence: Evidence) -> Verdicts:
    """kl_reg that is 0 in each batch's first step and grows within the batch: it is measured from there."""
    metrics, change = evidence.metrics, evidence.change
    if metrics is None or not metrics.native or metrics.batching != "explicit":
        return
    ends, starts = [], []
    for batch in metrics.batches:
        values = [step.values.get("kl_reg", math.nan) for step in batch.steps]
        if len(values) < 2 or not all(map(math.isfinite, values)):
            return
        starts.append(values[0])
        ends.append(max(values[1:]))
    if len(starts) < _FEWEST_BATCHES or min(ends) < _VISIBLE or max(map(abs, starts)) > _FALL * min(ends):
        return
    trained = change.tensors if change is not None and change.before is not None and not change.before.fresh else ()
    moved = any((tensor.norm_before or 0.0) > _FAR for tensor in trained if tensor.place.part == "B")
    yield Finding(
        id="anchor-restarts",
        severity=Severity.ERROR if moved else Severity.WARNING,
        statement=f"kl_reg is 0 at the first step of each of {len(starts)} batches and grows within each",
        evidence=(
            f"first steps at most {max(map(abs, starts)):.2g}, later ones from {min(ends):.2g} on",
            *(("the adapter was trained before the run: its policy is not the base policy",) if moved else ()),
        ),
        cause=(
            "the anchor is the behaviour policy of the batch, not the base policy"
            + ("" if moved else "; or each batch is another adapter's first")
        ),
        next_step="take the base log-probs with the adapter disabled",
        data={"batches": len(starts)},
    )


CHECKS = (
    Check("kl-at-start", "kl_reg above 0 where the policy still is the base policy", kl_at_the_start),
    Check("anchor-restarts", "kl_reg that begins at 0 in every batch", anchor_restarts),
)
