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

SAMPLES = 2
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


def step_batch(work: Workload) -> list[Sample]:
    """``SAMPLES`` samples that share ``work.tokens`` response tokens; the sampler's log-probs are those of a
    uniform distribution, which an untrained model is near."""
    generator = torch.Generator().manual_seed(4)
    length = max(1, work.tokens // SAMPLES)
    uniform = -float(torch.tensor(float(work.head.vocabulary)).log())

    def ids(count: int) -> list[int]:
        found: list[int] = torch.randint(work.head.vocabulary, (count,), generator=generator).tolist()
        return found

    return [Sample(ids(PROMPT), ids(length), ids(TEACHER_PROMPT), [uniform] * length) for _ in range(SAMPLES)]
