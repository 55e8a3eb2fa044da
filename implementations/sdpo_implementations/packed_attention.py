"""Causal attention over sequences that lie one behind the other in one row, each seeing itself alone.

Registered with transformers as an attention of its own, which the decoder's layers call with the lengths that the
forward was given. Each run of equal lengths is one call of PyTorch's scaled dot-product attention; nothing of the
size of a mask over all pairs is made. Without lengths it is transformers' ``sdpa``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

NAME = "sdpo_packed"

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt2")
"""Model types whose layers hand the lengths on to the attention and mix tokens nowhere else. Others (convolutions,
state spaces, attention of their own) are padded."""


def can_pack(model: Any) -> bool:
    """Whether every layer of a ``PeftModel`` is plain causal attention of transformers' ``sdpa``."""
    config = model.get_base_model().config
    return (
        config.model_type in FAMILIES
        and config._attn_implementation in ("sdpa", NAME)
        and getattr(config, "sliding_window", None) is None
        and all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
    )


@contextmanager
def packing(model: Any, packed: bool) -> Iterator[None]:
    """The model's attention is this one inside, also for what a backward computes again."""
    config = model.get_base_model().config
    if not packed:
        yield
        return
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequence_lengths: tuple[int, ...] | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """(1, heads, sum of lengths, D) -> (1, sum of lengths, heads, D); ``attention_mask`` is None."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if sequence_lengths is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
        return output, None
    parts: list[Tensor] = []
    start = 0
    for length, run in groupby(sequence_lengths):
        count = len(list(run))
        inside = slice(start, start + count * length)
        q, k, v = (_rows(tensor[:, :, inside], count) for tensor in (query, key, value))
        output, _ = sdpa_attention_forward(module, q, k, v, None, **arguments)
        parts.append(output.reshape(1, count * length, *output.shape[2:]))
        start = inside.stop
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], None


def _rows(tensor: Tensor, count: int) -> Tensor:
    """(1, heads, count * L, D) -> (count, heads, L, D)."""
    tokens_first = tensor.transpose(1, 2)
    return tokens_first.reshape(count, -1, *tokens_first.shape[2:]).transpose(1, 2)
