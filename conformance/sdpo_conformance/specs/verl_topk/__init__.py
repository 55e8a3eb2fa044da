"""verl's ``forward_kl_topk`` distillation loss, in its supervised form. Imports no torch."""

from sdpo_conformance.specs.spec import Spec

SPEC = Spec(
    name="verl-topk",
    version="1.0",
    title="verl-topk",
    source="verl 0.9.1, verl/trainer/distillation, forward_kl_topk",
    package="sdpo_conformance.specs.verl_topk",
    families={
        "VTK-SUP": "support",
        "VTK-DIV": "divergence",
        "VTK-CLAMP": "log-prob clamp",
        "VTK-FLOOR": "floor at 0",
        "VTK-CAP": "cap",
        "VTK-TEMP": "temperature",
        "VTK-RED": "reduction",
        "VTK-AGG": "micro-batches",
        "VTK-MET": "metrics",
        "VTK-GRAD": "autograd",
        "VTK-NUM": "numerics",
    },
    entries=("compute_sdpo_loss",),
    sweeps=("VTK-NUM-1", "VTK-NUM-2"),
    bundled={
        "reference": "sdpo_implementations.reference.verl_topk",
        "triton_fused": "sdpo_implementations.triton_fused.verl_topk",
    },
    dtypes=("float32", "float64", "bfloat16", "float16"),
)
