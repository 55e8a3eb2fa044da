"""TRL's experimental SDPO trainer: the loss of its local path and of its teacher-server path. Imports no torch."""

from sdpo_conformance.specs.spec import Spec

SPEC = Spec(
    name="trl",
    version="1.0",
    title="TRL",
    source="trl 1.16.0, trl/experimental/sdpo",
    package="sdpo_conformance.specs.trl",
    families={
        "TRL-SUP": "support",
        "TRL-TAIL": "tail",
        "TRL-DIV": "divergence",
        "TRL-TOK": "sampled token",
        "TRL-TEMP": "temperature",
        "TRL-IS": "importance sampling",
        "TRL-SRV": "served teacher",
        "TRL-RED": "reduction",
        "TRL-AGG": "micro-batches",
        "TRL-MET": "metrics",
        "TRL-EMA": "teacher",
        "TRL-GRAD": "autograd",
        "TRL-NUM": "numerics",
    },
    entries=("compute_sdpo_loss", "update_teacher"),
    own_entries={"TRL-EMA": "update_teacher"},
    sweeps=("TRL-NUM-1", "TRL-NUM-2"),
    bundled={
        "reference": "sdpo_implementations.reference.trl",
        "triton_fused": "sdpo_implementations.triton_fused.trl",
    },
    dtypes=("float32", "float64", "bfloat16", "float16"),
)
