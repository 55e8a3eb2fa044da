"""Where an adapter tensor sits in the model, read off its name."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LORA_PART = re.compile(r"\.(lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(?:\.(?P<adapter>[^.]+))?")
_NUMBERED = re.compile(r"^(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<rest>.+)$")
#: Modules that a sound run need not reach: experts no token was routed to, towers the batch had no input for.
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

    @property
    def optional(self) -> bool:
        """Whether a sound run may leave it untouched (an expert, a tower of another modality)."""
        return bool(_OPTIONAL.search(self.module.lower()))


def canonical_key(key: str) -> str:
    """The tensor's name without the adapter's: PEFT keeps `.default` in memory and drops it on disk."""
    return re.sub(r"\.(lora_\w+)\.(?!weight$|bias$)[^.]+(?=\.weight$|$)", r".\1", key)


def place_of(key: str) -> TensorPlace:
    """Parse a (canonical) tensor name."""
    match = _LORA_PART.search(key)
    if match:
        module = key[: match.start()]
        part = {
            "lora_A": "A",
            "lora_B": "B",
            "lora_embedding_A": "embedding A",
            "lora_embedding_B": "embedding B",
        }.get(match.group(1), "magnitude")
    else:
        module, _, part = key.rpartition(".")
        module = module or key
    module = module.removeprefix("base_model.model.")
    numbered = _NUMBERED.match(module)
    if numbered is None:
        return TensorPlace(module, "", None, module, part)
    kind = re.sub(r"\.\d+(?=\.|$)", ".*", numbered["rest"])
    return TensorPlace(module, numbered["stack"], int(numbered["layer"]), kind, part)
