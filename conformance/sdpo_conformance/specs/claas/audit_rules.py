"""Which requirements judge the code that a finding of the audit suspects."""

from collections.abc import Mapping

AUDIT_RULES: Mapping[str, tuple[str, ...]] = {
    "stale-metrics": ("STEP-2", "STEP-3", "STEP-6"),
    "behaviour-not-refreshed": ("STEP-2", "STEP-3"),
    "ratio-dropped": ("IS-2", "STEP-1"),
    "ratio-not-reported": ("IS-10",),
    "ratio-above-cap": ("IS-5", "IS-10"),
    "clip-saturated": ("LP-2", "STEP-1", "STEP-4"),
    "dead-run": ("NUM-3", "NUM-4", "NUM-5"),
    "metrics-nonfinite": ("NUM-3", "NUM-4", "NUM-5"),
    "tensor-nonfinite": ("NUM-3", "NUM-4", "NUM-5"),
    "loss-not-sum": ("KL-5",),
    "kl-negative": ("KL-1", "KL-2"),
    "kl-growing": ("KL-1", "KL-4", "KL-6"),
    "distill-range": ("GJS-1", "GJS-2", "GJS-6"),
    "grad-not-clipped": ("STEP-8",),
    "grad-accumulates": ("STEP-8",),
    "kl-at-start": ("KL-6", "STEP-5"),
    "anchor-restarts": ("KL-6", "STEP-5"),
    "token-weighted-mean": ("STEP-7",),
    "loss-uphill": ("GJS-9", "STEP-1"),
    "grad-norm": ("GJS-9", "GRAD-1", "KL-3", "IS-5"),
    "weights-unchanged": ("STEP-10",),
    "lora-b-zero": ("GJS-9", "STEP-9"),
    "norm-explosion": ("STEP-8",),
    "replay-ratio": ("IS-2", "STEP-1"),
    "replay-kl": ("KL-1", "KL-5", "KL-6"),
    "recorded-logprobs": ("LP-2", "STEP-1"),
}
