"""lasgroup/SDPO: the loss of ``compute_self_distillation_loss`` in its verl tree. Imports no torch."""

from sdpo_conformance.specs.spec import Spec

SPEC = Spec(
    name="lasgroup",
    version="1.0",
    title="lasgroup",
    source="lasgroup/SDPO at 0e6d510",
    package="sdpo_conformance.specs.lasgroup",
    families={
        "LAS-SUP": "support",
        "LAS-TAIL": "tail",
        "LAS-DIV": "divergence",
        "LAS-TOK": "sampled token",
        "LAS-TEMP": "temperature",
        "LAS-IS": "importance sampling",
        "LAS-W": "rollout weight",
        "LAS-RED": "reduction",
        "LAS-AGG": "micro-batches",
        "LAS-MET": "logged loss",
        "LAS-EMA": "teacher",
        "LAS-GRAD": "autograd",
        "LAS-NUM": "numerics",
    },
    entries=("compute_sdpo_loss", "update_teacher"),
    own_entries={"LAS-EMA": "update_teacher"},
    sweeps=("LAS-NUM-1", "LAS-NUM-2"),
    bundled={
        "reference": "sdpo_implementations.reference.lasgroup",
        "triton_fused": "sdpo_implementations.triton_fused.lasgroup",
    },
    dtypes=("float32", "float64", "bfloat16", "float16"),
)
