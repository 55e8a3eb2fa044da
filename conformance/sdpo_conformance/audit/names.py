"""Where an adapter tensor sits in the model, read off its name."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LORA_PART = re.compile(r"\.(lora_(?:A|B|a|b|embedding_A|embedding_B|magnitude_vector|up|down))(?=\.|$)")
#: Experts' tensors held together, (experts, in, rank) and (experts, rank, out): `experts.lora_gate_and_up_A`.
_GROUPED = re.compile(r"\.lora_(?P<kind>\w+)_(?P<part>[AB])(?:\.weight)?$")
_MEGATRON = re.compile(r"\.(?:adapter\.)?linear_(?P<way>in|out)(?:\.weight)?$")
_PARTS = {
    "lora_A": "A", "lora_a": "A", "lora_down": "A", "lora_B": "B", "lora_b": "B", "lora_up": "B",
    "lora_embedding_A": "embedding A", "lora_embedding_B": "embedding B",
}  # fmt: skip
#: Parts that PEFT starts at zero besides lora_B (peft/tuners/*/layer.py at 0.21; oft_r and bone_block of older ones).
_ZERO_AT_START = frozenset((
    "hada_w2_b", "lokr_w1", "lokr_w1_a", "vera_lambda_b", "lora_E", "oft_R", "oft_r", "boft_R", "shira_weight",
    "miss_block", "bone_block", "randlora_lambda", "waveft_spectrum", "delora_B", "gralora_B", "poly_lora_B",
))  # fmt: skip
#: Parts besides these that the update is a product of. Implementations differ in which of them starts at zero
#: (LyCORIS: hada_w2_a, lokr_w2_b), but zeros in any of them leave the base model as it is.
_OTHER_FACTORS = frozenset((
    "A", "embedding B", "hada_w1_a", "hada_w1_b", "hada_w2_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
    "vera_lambda_d", "randlora_gamma", "delora_A", "delora_lambda", "gralora_A", "poly_lora_A",
))  # fmt: skip
_OTHER_KIND = re.compile(
    r"\.((?:hada|lokr|vera|oft|boft|shira|miss|bone|randlora|waveft|fourierft|delora|gralora|poly_lora|vblora|ia3|hra|"
    r"c3a|road)_\w+)(?=\.|$)"
)
#: What a wrapper leaves in a name when the wrapped module is saved in place of its inside.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WRAPPED_BY = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "module": "DistributedDataParallel",
}
_NUMBERED = re.compile(r"^(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<rest>.+)$")
#: Modules that a sound run need not reach: experts no token was routed to, towers the batch had no input for.
_TOWER = re.compile(r"(?:^|[._])(vision|visual|image|audio|speech)(?:[._]|$)")
_OPTIONAL = re.compile(r"(?:^|[._])(experts?|vision|visual|image|audio|speech)(?:[._]|$)")


@dataclass(frozen=True)
class TensorPlace:
    """`module` is the full path, `stack` and `layer` its layer, `kind` the module within a layer.

    In `model.layers.3.mlp.experts.17.down_proj` the kind is `mlp.experts.*.down_proj`: experts share a kind.
    `part` is "A", "B", or the tensor's own suffix where it is no LoRA matrix.
    """

    module: str
    stack: str
    layer: int | None
    kind: str
    part: str
    grouped: bool = False

    @property
    def starts_at_zero(self) -> bool:
        """Whether an untrained adapter has only zeros here, and so does nothing."""
        return self.part in ("B", "embedding A") or self.part in _ZERO_AT_START

    @property
    def factor(self) -> bool:
        """Whether the module's update is a product with this part, so that zeros here make it do nothing."""
        return self.starts_at_zero or self.part in _OTHER_FACTORS

    @property
    def frozen(self) -> bool:
        """Whether the part is never trained: VeRA's and RandLoRA's random projections, SHiRA's places."""
        return self.part in ("vera_A", "vera_B", "randlora_A", "randlora_B", "shira_indices", "alpha")

    @property
    def optional(self) -> bool:
        """Whether a sound run may leave it untouched (an expert, a tower of another modality)."""
        return bool(_OPTIONAL.search(self.module.lower()))

    @property
    def tower(self) -> bool:
        """Whether it is in a tower of another modality, which a batch of text does not reach."""
        return bool(_TOWER.search(self.module.lower()))

    @property
    def expert(self) -> bool:
        """Whether it is one expert among several, in a tensor of its own."""
        return bool(re.search(r"(?:^|[._])experts?\.\*", self.kind.lower()))


def canonical_key(key: str) -> str:
    """The tensor's name without the adapter's: PEFT keeps `.default` in memory and drops it on disk."""
    return re.sub(r"\.(lora_\w+)\.(?!weight$|bias$)[^.]+(?=\.weight$|$)", r".\1", key)


def holds_adapter_name(key: str) -> bool:
    """Whether a tensor's name holds the adapter's, as PEFT's does in memory: `lora_A.default.weight`."""
    return bool(re.search(r"\.lora_[AB]\.(?!weight$|bias$)[^.]+\.weight$", key))


def unwrapped(key: str) -> tuple[str, tuple[str, ...]]:
    """The name without the wrappers' parts, and those parts."""
    parts = key.split(".")
    found = [part for part in parts if part in _WRAPPERS]
    kept = [part for part in parts if part not in _WRAPPERS]
    if kept and kept[0] == "module":  # DistributedDataParallel's, always outermost
        found.append("module")
        kept = kept[1:]
    return ".".join(kept), tuple(found)


def place_of(key: str) -> TensorPlace:
    """Parse a (canonical) tensor name."""
    match, grouped, megatron = _LORA_PART.search(key), _GROUPED.search(key), _MEGATRON.search(key)
    other = _OTHER_KIND.search(key)
    if match:
        module = key[: match.start()]
        part = "bias" if key.endswith(".bias") else _PARTS.get(match.group(1), "magnitude")
    elif grouped:
        module, part = f"{key[: grouped.start()]}.{grouped['kind']}", grouped["part"]
    elif megatron:
        module, part = key[: megatron.start()], "A" if megatron["way"] == "in" else "B"
    elif other:
        module, part = key[: other.start()], other.group(1)
    else:
        module, _, part = key.rpartition(".")
        module = module or key
    module = module.removeprefix("base_model.model.")
    numbered = _NUMBERED.match(module)
    together = bool(grouped) and not match
    if numbered is None:
        return TensorPlace(module, "", None, module, part, together)
    kind = re.sub(r"\.\d+(?=\.|$)", ".*", numbered["rest"])
    return TensorPlace(module, numbered["stack"], int(numbered["layer"]), kind, part, together)


def shared_rank(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> set[int]:
    """The rank that lora_A's and lora_B's shapes have in common, empty where they have none.

    `name` is lora_A's as saved. PEFT: (r, in) and (out, r), a convolution's further axes behind; mlx-lm's lora_a:
    (in, r) and (r, out), or as PEFT's once converted. Experts held together are laid out in several ways: there any
    size in common may be the rank.
    """
    if min(len(a), len(b)) < 2:
        return set()
    if len(a) == 3 or len(b) == 3:
        return set(a) & set(b)
    converted = {a[0]} & {b[1]}
    return converted | ({a[1]} & {b[0]}) if ".lora_a" in name else converted
