"""A whole distill step: the model, from its published config with random weights, and the batch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from sdpo_conformance.bench.workloads import Workload
from sdpo_conformance.cases.precision import DTYPES
from sdpo_conformance.protocol import Sample

STEPS = 2
"""Optimizer steps of one timed call, so that the refresh between them is part of it."""

PROMPT, TEACHER_PROMPT = 64, 192
LORA_RANK = 16

QWEN3 = {"head_dim": 128, "num_key_value_heads": 8}
CONFIGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen3-0.6b": (
        "Qwen3",
        {
            **QWEN3,
            "num_hidden_layers": 28,
            "intermediate_size": 3072,
            "num_attention_heads": 16,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-8b": (
        "Qwen3",
        {
            **QWEN3,
            "num_hidden_layers": 36,
            "intermediate_size": 12288,
            "num_attention_heads": 32,
            "tie_word_embeddings": False,
        },
    ),
    "llama-3.2-1b": (
        "Llama",
        {
            "num_hidden_layers": 16,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
    "32b": (
        "Qwen3",
        {
            **QWEN3,
            "num_hidden_layers": 64,
            "intermediate_size": 25600,
            "num_attention_heads": 64,
            "tie_word_embeddings": False,
        },
    ),
    "laptop": (
        "Qwen3",
        {
            "num_hidden_layers": 2,
            "intermediate_size": 512,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
    ),
}
"""Family in transformers and what its config needs beside the head's two sizes."""


@lru_cache(maxsize=1)
def step_model(work: Workload) -> Any:
    """A PeftModel with LoRA on attention and MLP, in training mode; the last one asked for is kept, so that
    every implementation of a work goes on from the same kind of model."""
    import peft
    import transformers

    family, arguments = CONFIGS[work.workload]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=work.head.vocabulary,
        hidden_size=work.head.hidden,
        max_position_embeddings=TEACHER_PROMPT + work.tokens + 1,
        bos_token_id=None,
        eos_token_id=None,
        **arguments,
    )
    torch.manual_seed(3)
    with torch.device(work.device):
        base = getattr(transformers, f"{family}ForCausalLM")._from_config(config, dtype=DTYPES[work.dtype])
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    return peft.get_peft_model(base, lora).to(work.device).train()


def response_lengths(work: Workload) -> list[int]:
    """``work.samples`` lengths that add up to ``work.tokens``, from about a quarter to seven quarters of their mean,
    in an order that mixes them."""
    count, mean = work.samples, work.tokens / work.samples
    ends = [mean * (i + 1) * (0.25 + 0.75 * (i + 1) / count) for i in range(count)]  # where the i-th response ends
    whole = [round(end * work.tokens / ends[-1]) for end in ends]
    lengths = [max(1, end - start) for start, end in zip([0, *whole], whole, strict=False)]
    return [lengths[index] for index in sorted(range(count), key=lambda i: (i * 5) % count * count + i)]


def step_batch(work: Workload) -> list[Sample]:
    """``work.samples`` samples that share ``work.tokens`` response tokens unevenly; the sampler's log-probs are those
    of a uniform distribution, which an untrained model is near."""
    generator = torch.Generator().manual_seed(4)
    uniform = -float(torch.tensor(float(work.head.vocabulary)).log())

    def ids(count: int) -> list[int]:
        found: list[int] = torch.randint(work.head.vocabulary, (count,), generator=generator).tolist()
        return found

    lengths = response_lengths(work)
    return [Sample(ids(PROMPT), ids(length), ids(TEACHER_PROMPT), [uniform] * length) for length in lengths]


def step_flops(work: Workload, model: Any) -> float:
    """Floating-point operations that a call cannot do without: two for each weight and token.

    Base and teacher take one forward each, every step a forward and a backward to the inputs (the weights are frozen;
    LoRA is left out); the head reads response tokens alone, causal attention half of its square. The refresh is free:
    the next step's forward has it.
    """
    config = model.get_base_model().config
    head = config.hidden_size * config.vocab_size
    weights = sum(
        module.weight.numel() for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and module.weight.numel() != head
    )  # fmt: skip
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    student = teacher = 0.0
    for length in response_lengths(work):
        student += 2 * weights * (PROMPT + length) + attention * (PROMPT + length) ** 2
        teacher += 2 * weights * (TEACHER_PROMPT + length) + attention * (TEACHER_PROMPT + length) ** 2
    heads = 2 * head * work.tokens
    return student + teacher + 2 * heads + STEPS * (2 * student + 2 * heads)
