"""ms-swift's GKD and OPSD: a divergence over the teacher's renormalised top-k. Imports no torch."""

from sdpo_conformance.specs.spec import Spec

SPEC = Spec(
    name="ms-swift",
    version="1.0",
    title="ms-swift",
    source="ms-swift 4.6.0, swift/rlhf_trainers",
    package="sdpo_conformance.specs.ms_swift",
    families={
        "MSS-POS": "positions",
        "MSS-SUP": "support",
        "MSS-DIV": "divergence",
        "MSS-TEMP": "temperature",
        "MSS-VOC": "two vocabularies",
        "MSS-COV": "cover",
        "MSS-RED": "reduction",
        "MSS-AGG": "micro-batches",
        "MSS-MET": "metrics",
        "MSS-GRAD": "autograd",
        "MSS-NUM": "numerics",
    },
    entries=("compute_sdpo_loss",),
    sweeps=("MSS-NUM-1", "MSS-NUM-2"),
    bundled={
        "reference": "sdpo_implementations.reference.ms_swift",
        "triton_fused": "sdpo_implementations.triton_fused.ms_swift",
    },
    dtypes=("float32", "float64", "bfloat16", "float16"),
)
