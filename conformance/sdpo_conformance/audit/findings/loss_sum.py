"""Whether the loss is the sum of its parts."""

from __future__ import annotations

import math
import statistics

from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, NotJudged, Severity, Verdicts
from sdpo_conformance.audit.findings.resolution import resolution
from sdpo_conformance.audit.metrics import labelled_steps

_RELATIVE = 1e-5
_SHOWN = 5


def loss_not_sum(evidence: Evidence) -> Verdicts:
    """total_loss that is not distill_loss + weight * kl_reg, with the weight from the settings or fitted."""
    metrics = evidence.metrics
    if metrics is None:
        return
    rows = [
        (label, step.values["total_loss"], step.values["distill_loss"], step.values["kl_reg"])
        for label, step in labelled_steps(metrics)
        if all(math.isfinite(step.values.get(n, math.nan)) for n in ("total_loss", "distill_loss", "kl_reg"))
    ]
    if not rows:
        yield NotJudged("loss-not-sum", "total_loss, distill_loss and kl_reg are not all reported")
        return
    # Each number may be off by half of what its column resolves: a rounded log is no contradiction.
    columns = ([t for _, t, _, _ in rows], [d for _, _, d, _ in rows], [k for *_, k in rows])
    finest = [resolution(column) / 2 for column in columns]
    fitted = _fit(rows)
    stated = evidence.request.training.kl_reg_weight
    weight = stated if stated is not None else max(fitted, 0.0)
    wrong = [
        (abs(total - distill - weight * kl), label, total, distill + weight * kl)
        for label, total, distill, kl in rows
        if abs(total - distill - weight * kl)
        > _RELATIVE * (abs(total) + abs(distill) + abs(weight * kl)) + finest[0] + finest[1] + abs(weight) * finest[2]
    ]
    if not wrong:
        if stated is None and len(rows) == 1 and rows[0][3]:
            yield NotJudged(
                "loss-not-sum",
                f"one step fits any weight ({fitted:.3g} here); --config can name the real one",
            )
        return
    wrong.sort(reverse=True)
    how = f"kl_reg_weight {weight:g} from the settings" if stated is not None else f"the best weight, {weight:.3g}"
    flipped = stated is not None and stated > 0 and math.isclose(fitted, -stated, rel_tol=1e-2)
    dropped = stated is not None and stated > 0 and abs(fitted) < 1e-3 * stated
    # A transformers log averages its loss since the last entry; the parts beside it may not be averaged.
    averaged = metrics.batching == "unknown" or not metrics.native
    yield Finding(
        id="loss-not-sum",
        severity=Severity.NOTE if averaged else Severity.ERROR,
        statement=f"total_loss is not distill_loss + weight * kl_reg, with {how}",
        evidence=(
            *(
                f"{label}: total_loss {total:.8g}, expected {expected:.8g}"
                for _, label, total, expected in wrong[:_SHOWN]
            ),
            f"the steps' own best fit is a weight of {fitted:.4g}",
        ),
        cause=(
            "the anchor is subtracted where it should be added"
            if flipped or (stated is None and fitted < 0)
            else (
                "the anchor is left out of the loss"
                if dropped
                else (
                    "another weight than the configured one, a term that is not reported, or parts of different steps"
                )
            )
        ),
        next_step="check the loss, and that its parts are reported from the same forward as the total",
        data={"weight": weight, "fitted_weight": fitted, "stated": stated is not None},
    )


def _fit(rows: list[tuple[str, float, float, float]]) -> float:
    """The weight that total - distill = w * kl asks for: the median over steps, so that one odd step stands
    out.
    """
    largest = max(abs(kl) for *_, kl in rows)
    weights = [(total - distill) / kl for _, total, distill, kl in rows if abs(kl) > 1e-3 * largest]
    return statistics.median(weights) if weights else 0.0


CHECKS = (Check("loss-not-sum", "total_loss is not distill_loss + weight * kl_reg", loss_not_sum),)
