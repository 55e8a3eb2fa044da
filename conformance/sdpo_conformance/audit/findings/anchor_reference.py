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
#: Rows from which on an exact 0 in each is no matter of first steps, and the weights' names in the tools' settings.
_FEWEST_ROWS = 8
_WEIGHTS = (
    "beta",
    "kl_coef",
    "kl_loss_coef",
    "kl_reg_weight",
    "init_kl_coef",
    "kl_penalty_coef",
    "reference_policy_kl_penalty",
)
#: Fields of losses over preferences, whose kl is another quantity, clamped at 0 (KTO).
_PREFERENCES = frozenset(("chosen", "rejected"))
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


def kl_always_zero(evidence: Evidence) -> Verdicts:
    """kl exactly 0 in every row although the settings weigh it and the policy moved."""
    metrics, change, settings = evidence.metrics, evidence.change, evidence.settings
    if metrics is None or metrics.digits is not None or change is None:
        return  # a printed 0.000 may be anything that small
    weight = settings.number(*_WEIGHTS)
    if not weight or weight < 0 or settings.true("sync_ref_model") or settings.false("use_kl_loss", "use_kl_in_reward"):
        return
    values = [step.values["kl_reg"] for step in metrics.steps if "kl_reg" in step.values]
    pairwise_loss = any(name.rsplit("/", 1)[-1] in _PREFERENCES for name in metrics.names)
    if len(values) < _FEWEST_ROWS or len(values) < len(metrics.steps) or any(values) or pairwise_loss:
        return
    moves = [t.norm_after if t.norm_delta is None else t.norm_delta for t in change.tensors if t.place.part == "B"]
    if max(moves, default=0.0) < _FAR or not change.matters:
        return
    yield Finding(
        id="kl-always-zero",
        severity=Severity.WARNING,
        statement=f"kl is exactly 0 in all {len(values)} rows although lora_B moved: nothing holds the policy",
        evidence=(
            f"the settings weigh it by {weight:g}",
            f"the norm of a lora_B changed by up to {max(moves):.3g}, which shows in any log-prob",
        ),
        cause="the reference is the policy itself: its log-probs are taken with the adapter on",
        next_step="take the reference's log-probs with the adapter disabled, and compare them with the policy's",
        data={"rows": len(values), "weight": weight},
    )


CHECKS = (
    Check("kl-at-start", "kl_reg above 0 where the policy still is the base policy", kl_at_the_start),
    Check("kl-always-zero", "kl of exactly 0 although the policy moved", kl_always_zero),
    Check("anchor-restarts", "kl_reg that begins at 0 in every batch", anchor_restarts),
)
