"""Tiny causal language models with a LoRA adapter, built from config: nothing is fetched.

The weights are random but large, so that predictions are peaked and base, teacher and student differ: on the
flat predictions of an untrained model most mistakes of a trainer cannot be told from rounding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sdpo_conformance.cases.precision import DTYPES

Family = Literal["qwen3", "llama", "gpt2"]

VOCABULARY = 67
HIDDEN = 32
LAYERS = 2
HEADS = 4
POSITIONS = 96

LOGIT_SCALE = 2.5
"""Standard deviation of the logits: final hidden states are normalised to unit mean square."""

LORA_RANK = 4
LORA_ALPHA = 8
LORA_B_SCALE = 0.02
"""The adapter starts away from zero: at B = 0 the student is the base and A has no gradient."""


@dataclass(frozen=True)
class ModelSpec:
    """One model: architecture, whether head and embedding share their weight, dtype of the base, seed, size of
    the vocabulary.

    peft keeps the adapter of a half-precision base in float32.
    """

    family: Family
    tied: bool
    seed: int
    dtype: str = "float32"
    vocabulary: int = VOCABULARY

    def __str__(self) -> str:
        return f"{self.family}, {'tied' if self.tied else 'untied'} head, V = {self.vocabulary}, {self.dtype}"


def config_arguments(spec: ModelSpec) -> dict[str, Any]:
    """Keyword arguments of the family's config class in transformers. No dropout."""
    shared: dict[str, Any] = {
        "vocab_size": spec.vocabulary,
        "tie_word_embeddings": spec.tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if spec.family == "gpt2":
        return shared | {
            "n_positions": POSITIONS,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    shared |= {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
    }
    return shared | {"head_dim": HIDDEN // HEADS} if spec.family == "qwen3" else shared


def lora_arguments(spec: ModelSpec) -> dict[str, Any]:
    """Keyword arguments of peft's LoraConfig: attention and MLP, no dropout."""
    if spec.family == "gpt2":
        modules = ["c_attn", "c_proj", "c_fc"]
    else:
        modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return {
        "task_type": "CAUSAL_LM",
        "r": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "fan_in_fan_out": spec.family == "gpt2",
    }


CLASSES: Mapping[Family, tuple[str, str]] = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
}
"""Family -> class names in transformers."""


def build(spec: ModelSpec, device: str = "cpu") -> Any:
    """A fresh ``PeftModel`` with the spec's weights, the same on every machine, in training mode."""
    import peft
    import transformers

    config_name, model_name = CLASSES[spec.family]
    config = getattr(transformers, config_name)(**config_arguments(spec))
    # eager attention: the same sums whatever kernels a machine has
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        base = getattr(transformers, model_name)(config)
        base.to(DTYPES[spec.dtype])
        model = peft.get_peft_model(base, peft.LoraConfig(**lora_arguments(spec)))
    generator = torch.Generator().manual_seed(spec.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(scaled(name, draw))
    return model.to(device).train()


def scaled(name: str, draw: Tensor) -> Tensor:
    """Standard normal draws, scaled to what the parameter of this name is for."""
    if "lora_B" in name:
        return LORA_B_SCALE * draw
    if draw.dim() == 1:
        return 1 + 0.1 * draw if "norm" in name or "ln_" in name else 0.1 * draw
    if "lm_head" in name or "embed" in name or "wte" in name or "wpe" in name:
        return LOGIT_SCALE / math.sqrt(HIDDEN) * draw
    return 1.5 / math.sqrt(HIDDEN) * draw


def adapter_weights(model: Any) -> dict[str, Tensor]:
    """Copies of the trainable parameters, by name, on the CPU in their own dtype."""
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def frozen_weights(model: Any) -> dict[str, Tensor]:
    """Copies of everything else the model holds: frozen parameters and buffers."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t.detach().to("cpu", copy=True) for name, t in (*frozen.items(), *model.named_buffers())}


def float64_copy(model: Any) -> Any:
    """A copy on the CPU with every weight upcast exactly, without dropout or gradient checkpointing."""
    twin = copy.deepcopy(model).to(device="cpu", dtype=torch.float64).eval()
    twin.zero_grad(set_to_none=True)
    return twin
