"""Tiny causal language models with a LoRA adapter, built from config: nothing is fetched.

The weights are random but large, so that predictions are peaked and base, teacher and student differ: on the
flat predictions of an untrained model most mistakes of a trainer cannot be told from rounding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from sdpo_conformance.cases.precision import DTYPES

Family = Literal["qwen3", "llama", "gpt2", "gemma2", "cohere", "phi"]
Head = Literal["frozen", "lora", "saved"]
Attention = Literal["eager", "sdpa"]
Embedding = Literal["frozen", "lora", "tokens"]

VOCABULARY = 67
HIDDEN = 32
LAYERS = 2
HEADS = 4
POSITIONS = 96

LOGIT_SCALE = 2.5
"""Standard deviation of the logits: final hidden states are normalised to unit mean square."""

SOFTCAP = 4.0
"""What gemma2's logits are capped at: of the size of the logits, so that it bends them."""

MULTIPLIER = 0.5
"""What cohere's logits are multiplied by."""

TRAINABLE_TOKENS = (0, 3, 5, 8, 13, 21, 34)
"""Rows of the embedding that are trained where some are."""

BESIDE = ("earlier", "later")
"""The names of the adapters that are loaded and not active, before and after the active one."""

CHECKPOINTING = {"use_reentrant": False}
"""What gradient checkpointing is turned on with: the kind that needs no input that asks for a gradient."""

NEXT_TO_ZERO = 1e-20
"""Size of B in a fresh adapter: it adds nothing, and yet each weight's copies are known by their values."""

LORA_RANK = 4
LORA_ALPHA = 8
LORA_B_SCALE = 0.02
"""The adapter starts away from zero: at B = 0 the student is the base and A has no gradient."""


@dataclass(frozen=True)
class ModelSpec:
    """One model: architecture, whether head and embedding share their weight, dtype of the base, seed, size of
    the vocabulary, ``hidden`` size, ``layers``, ``positions``.

    gemma2 caps its logits, cohere scales them, the head of phi has a bias. ``head``: "frozen", with "lora" of its
    own, or a trainable copy "saved" with the adapter (``modules_to_save``). ``dora``: the adapter learns magnitudes
    too. ``lora_alpha`` scales what the adapter adds, over the rank, or with ``rslora`` its root. ``gain``: both factors
    are this many times larger and their product's scaling is smaller by its square, so that the adapter adds the same
    and every gradient is this many times smaller; a power of two changes no rounding. ``embedding``:
    "frozen", with "lora" of its own, or with a few trainable rows, "tokens". ``fresh``: B is next to 0, as every
    adapter begins. ``beside``: the model holds two more adapters, which are not active. ``adapter``: the active one's
    name. ``attention``: transformers' implementation; eager has the same sums whatever kernels a machine has.
    ``checkpointing``: gradient checkpointing is on when the model comes, as upstream has it. ``bos``, ``eos``
    (one or several, as Llama 3 has them), ``pad``: special tokens in the configs of the model and of its generation.

    peft keeps the adapter of a half-precision base in float32.
    """

    family: Family
    tied: bool
    seed: int
    dtype: str = "float32"
    vocabulary: int = VOCABULARY
    hidden: int = HIDDEN
    layers: int = LAYERS
    positions: int = POSITIONS
    head: Head = "frozen"
    dora: bool = False
    lora_alpha: int = LORA_ALPHA
    gain: int = 1
    rslora: bool = False
    embedding: Embedding = "frozen"
    fresh: bool = False
    beside: bool = False
    adapter: str = "default"
    attention: Attention = "eager"
    checkpointing: bool = False
    bos: int | None = None
    eos: int | tuple[int, ...] | None = None
    pad: int | None = None

    def __str__(self) -> str:
        more = {"lora": ", LoRA on the head", "saved": ", a trainable head", "frozen": ""}[self.head]
        more += ", DoRA" if self.dora else ""
        more += ", rsLoRA" if self.rslora else ""
        more += f", LoRA's factors {self.gain} times larger" if self.gain != 1 else ""
        more += {"lora": ", LoRA on the embedding", "tokens": ", trainable token rows", "frozen": ""}[self.embedding]
        more += ", B next to 0" if self.fresh else ""
        more += ", two more adapters beside" if self.beside else ""
        more += f", the adapter called {self.adapter}" if self.adapter != "default" else ""
        more += f", {self.attention} attention" if self.attention != "eager" else ""
        more += ", gradient checkpointing" if self.checkpointing else ""
        more += f", eos {self.eos} and pad {self.pad}" if self.eos is not None else ""
        head = "tied" if self.tied else "untied"
        return f"{self.family}, {head} head, V = {self.vocabulary}, {self.dtype}{more}"

    @property
    def plainer(self) -> ModelSpec | None:
        """The model without an adapter on its embedding, and of the commonest architecture: what a trainer is run on
        that does not know this one. None where it is that already."""
        if self.embedding != "frozen":
            return replace(self, embedding="frozen")
        return replace(self, family="llama") if self.family == "gpt2" else None

    @property
    def with_sdpa(self) -> ModelSpec:
        """The model with PyTorch's attention. Gemma 2 has none in transformers: Llama stands in for it."""
        return replace(self, attention="sdpa", family="llama" if self.family == "gemma2" else self.family)

    @property
    def unusual_head(self) -> str:
        """What a trainer that computes ``hidden @ head.T`` may refuse by name, or an empty string."""
        if self.family == "gemma2":
            return "softcap"
        if self.head != "frozen":
            return "adapter on the head"
        return {"phi": "bias", "cohere": "scaled logits"}.get(self.family, "")


def config_arguments(spec: ModelSpec) -> dict[str, Any]:
    """Keyword arguments of the family's config class in transformers. No dropout."""
    shared: dict[str, Any] = {
        "vocab_size": spec.vocabulary,
        "tie_word_embeddings": spec.tied,
        "bos_token_id": spec.bos,
        "eos_token_id": list(spec.eos) if isinstance(spec.eos, tuple) else spec.eos,
        "pad_token_id": spec.pad,
    }
    if spec.family == "gpt2":
        return shared | {
            "n_positions": spec.positions,
            "n_embd": spec.hidden,
            "n_layer": spec.layers,
            "n_head": HEADS,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    shared |= {
        "hidden_size": spec.hidden,
        "intermediate_size": 3 * spec.hidden // 2,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": spec.positions,
    }
    more: Mapping[str, Mapping[str, Any]] = {
        "qwen3": {"head_dim": spec.hidden // HEADS},
        "gemma2": {
            "head_dim": spec.hidden // HEADS,
            "query_pre_attn_scalar": spec.hidden // HEADS,
            "final_logit_softcapping": SOFTCAP,
        },
        "cohere": {"logit_scale": MULTIPLIER},
        "phi": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0, "partial_rotary_factor": 1.0},
    }
    return {**shared, **more.get(spec.family, {})}


def lora_arguments(spec: ModelSpec) -> dict[str, Any]:
    """Keyword arguments of peft's LoraConfig: attention and MLP, no dropout."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if spec.family == "gpt2":
        modules = ["c_attn", "c_proj", "c_fc"]
    elif spec.family == "phi":
        modules = ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]
    modules += ["lm_head"] if spec.head == "lora" else []
    modules += ["embed_tokens"] if spec.embedding == "lora" else []
    arguments: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": LORA_RANK,
        "lora_alpha": spec.lora_alpha / spec.gain**2 if spec.gain != 1 else spec.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "fan_in_fan_out": spec.family == "gpt2",
    }
    if spec.head == "saved":
        arguments["modules_to_save"] = ["lm_head"]
    if spec.rslora:
        arguments["use_rslora"] = True
    if spec.dora:
        arguments["use_dora"] = True
    if spec.embedding == "tokens":
        arguments["trainable_token_indices"] = {"embed_tokens": list(TRAINABLE_TOKENS)}
    return arguments


def adapters_of(spec: ModelSpec) -> dict[str, dict[str, Any]]:
    """Name of an adapter -> keyword arguments of its LoraConfig, in the order in which they are loaded."""
    active = lora_arguments(spec)
    if not spec.beside:
        return {spec.adapter: active}
    other = {**active, "target_modules": active["target_modules"][:2]}
    earlier, later = BESIDE
    return {earlier: other, spec.adapter: active, later: other}


CLASSES: Mapping[Family, tuple[str, str]] = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "cohere": ("CohereConfig", "CohereForCausalLM"),
    "phi": ("PhiConfig", "PhiForCausalLM"),
}
"""Family -> class names in transformers."""


def build(spec: ModelSpec, device: str = "cpu") -> Any:
    """A fresh ``PeftModel`` with the spec's weights, the same on every machine, in training mode."""
    return copy.deepcopy(pristine(spec)).to(device)


@lru_cache(maxsize=64)
def pristine(spec: ModelSpec) -> Any:
    """What ``build`` copies, on the CPU: making a model takes longer than copying it."""
    import peft
    import transformers

    config_name, model_name = CLASSES[spec.family]
    config = getattr(transformers, config_name)(**config_arguments(spec))
    config._attn_implementation = spec.attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        base = getattr(transformers, model_name)(config)
        base.to(DTYPES[spec.dtype])
        for name, token in (("bos", spec.bos), ("eos", spec.eos), ("pad", spec.pad)):
            setattr(base.generation_config, f"{name}_token_id", list(token) if isinstance(token, tuple) else token)
        (first, arguments), *more = adapters_of(spec).items()
        model = peft.get_peft_model(base, peft.LoraConfig(**arguments), adapter_name=first)
        for name, arguments in more:
            model.add_adapter(name, peft.LoraConfig(**arguments))
        model.set_adapter(spec.adapter)
    generator = torch.Generator().manual_seed(spec.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(scaled(name, draw, spec))
            if ".modules_to_save.default." in name:
                original = model.get_parameter(name.replace(".modules_to_save.default.", ".original_module."))
                parameter.mul_(0.1).add_(original)
            if "trainable_tokens_delta" in name:  # whole rows, in spite of the name
                rows = model.get_input_embeddings().weight[list(TRAINABLE_TOKENS)]
                parameter.mul_(0.1).add_(rows)
        for module in model.modules():
            if getattr(module, "lora_magnitude_vector", None):
                set_magnitudes(module)
    if spec.checkpointing:
        # transformers 5 has another name for it
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(CHECKPOINTING)
    return model.train()


def scaled(name: str, draw: Tensor, spec: ModelSpec) -> Tensor:
    """Standard normal draws, scaled to what the parameter of this name is for."""
    if "lora_B" in name or "lora_embedding_B" in name:
        return spec.gain * (NEXT_TO_ZERO if spec.fresh else LORA_B_SCALE) * LORA_ALPHA / spec.lora_alpha * draw
    if draw.dim() == 1:
        return 1 + 0.1 * draw if "norm" in name or "ln_" in name else 0.1 * draw
    if "lm_head" in name or "embed" in name or "wte" in name or "wpe" in name:
        return LOGIT_SCALE / math.sqrt(spec.hidden) * draw
    return (spec.gain if "lora_A" in name else 1) * 1.5 / math.sqrt(spec.hidden) * draw


def set_magnitudes(module: Any) -> None:
    """DoRA's magnitudes: the norms of the weight's rows with the adapter added, a little off so that they matter."""
    added = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
    magnitude = module.lora_magnitude_vector["default"].weight
    norms = (module.get_base_layer().weight + added).norm(dim=1)
    magnitude.copy_(norms * torch.linspace(0.9, 1.1, norms.numel(), dtype=norms.dtype))


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
    """A copy on the CPU with every weight upcast exactly, without dropout or gradient checkpointing. It is asked often:
    its ``disable_adapter`` spares PEFT's survey of all layers, and ``adapter_is_off`` says where one is inside it."""
    twin = copy.deepcopy(model).to(device="cpu", dtype=torch.float64).eval()
    twin.zero_grad(set_to_none=True)
    twin.adapter_is_off = False
    # a property of PEFT's layers; of a transformers model the name is a method's
    layers = [module for module in twin.modules() if isinstance(getattr(type(module), "disable_adapters", 0), property)]
    twin.disable_adapter = partial(adapter_off, twin, layers)
    return twin


@contextmanager
def adapter_off(model: Any, layers: Sequence[Any]) -> Iterator[None]:
    """The base model, as inside PEFT's ``disable_adapter``; ``layers``: those that have an adapter."""
    before = model.adapter_is_off
    try:
        for layer in layers:
            layer.enable_adapters(False)
        model.adapter_is_off = True
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(not before)
        model.adapter_is_off = before
