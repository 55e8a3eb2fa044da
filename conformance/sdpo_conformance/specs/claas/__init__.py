"""CLaaS SDPO: the spec of kfallah/CLaaS as requirements, oracle, bounds and catalogue. Imports no torch."""

from sdpo_conformance.specs.claas.audit_rules import AUDIT_RULES
from sdpo_conformance.specs.spec import Spec

SPEC = Spec(
    name="claas",
    version="1.0",
    title="CLaaS",
    source="kfallah/CLaaS, branch feature/multi-step-training at e2331f7",
    package="sdpo_conformance.specs.claas",
    families={
        "GJS": "divergence",
        "RKL": "reverse KL",
        "IS": "importance sampling",
        "KL": "anchor",
        "RED": "reduction",
        "GRAD": "autograd",
        "NUM": "numerics",
        "FUS": "fused",
        "LP": "response log-probs",
        "TK": "teacher top-k",
        "STEP": "trainer",
    },
    entries=(
        "compute_sdpo_loss",
        "compute_fused_sdpo_loss",
        "compute_divergence",
        "compute_response_logprobs",
        "compute_teacher_topk",
        "distill",
    ),
    own_entries={"LP": "compute_response_logprobs", "TK": "compute_teacher_topk", "STEP": "distill"},
    sweeps=("NUM-1", "NUM-2", "FUS-1", "FUS-2", "FUS-4", "FUS-6", "MESH-1"),
    audit_rules=AUDIT_RULES,
)
