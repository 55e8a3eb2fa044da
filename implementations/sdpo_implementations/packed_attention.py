"""Causal attention over sequences that lie one behind the other in one row, each seeing itself alone.

Registered with transformers as an attention of its own, which the decoder's layers call with the lengths that the
forward was given. On a GPU in half precision it is one call of PyTorch's variable-length attention
(``torch.nn.attention.varlen``, torch 2.11 and later); elsewhere each run of equal lengths is one call of its scaled
dot-product attention. Nothing of the size of a mask over all pairs is made. Without lengths it is transformers'
``sdpa``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from inspect import signature
from itertools import accumulate, groupby
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


@dataclass(frozen=True)
class SequenceLengths:
    """Lengths of the sequences of one row, in order."""

    each: tuple[int, ...]
    device: torch.device

    @cached_property
    def bounds(self) -> Tensor:
        """(sequences + 1,) int32 on the device: where each begins, and the end. Made once for all layers."""
        return torch.tensor([0, *accumulate(self.each)], dtype=torch.int32, device=self.device)

    @property
    def longest(self) -> int:
        return max(self.each)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequence_lengths: SequenceLengths | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """(1, heads, sum of lengths, D) -> (1, sum of lengths, heads, D); ``attention_mask`` is None."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if sequence_lengths is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
        return output, None
    lengths = sequence_lengths.each
    attend = variable_length_attention()
    one_run = len(set(lengths)) == 1
    if attend is not None and not one_run and in_one_call(query) and not arguments.get("dropout"):
        q, k, v = (tensor.transpose(1, 2)[0] for tensor in (query, key, value))
        output = attend(q, k, v, sequence_lengths.bounds, sequence_lengths.longest, arguments.get("scaling"))
        return output.unsqueeze(0), None
    parts: list[Tensor] = []
    start = 0
    for length, run in groupby(lengths):
        count = len(list(run))
        inside = slice(start, start + count * length)
        q, k, v = (_rows(tensor[:, :, inside], count) for tensor in (query, key, value))
        output, _ = sdpa_attention_forward(module, q, k, v, None, **arguments)
        parts.append(output.reshape(1, count * length, *output.shape[2:]))
        start = inside.stop
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], None


def in_one_call(query: Tensor) -> bool:
    """Whether PyTorch's variable-length attention takes such a query: its flash kernels, so half precision on Ampere
    or later, and heads of at most 256 in steps of 8."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device)[0] >= 8
    )


Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int, float | None], Tensor]


@cache
def variable_length_attention() -> Attend | None:
    """(query (T, heads, D), key and value (T, key heads, D), bounds, longest, scale) -> (T, heads, D), or None where
    this torch has none that is causal, takes a scale and takes fewer key heads than heads."""
    try:
        varlen_attn: Any = import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    known = signature(varlen_attn).parameters
    if "window_size" not in known or "scale" not in known:
        return None
    grouped = {"enable_gqa": True} if "enable_gqa" in known else {}

    def attend(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None) -> Tensor:
        output: Tensor = varlen_attn(
            query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), **grouped
        )
        return output

    return attend


def _rows(tensor: Tensor, count: int) -> Tensor:
    """(1, heads, count * L, D) -> (count, heads, L, D)."""
    tokens_first = tensor.transpose(1, 2)
    return tokens_first.reshape(count, -1, *tokens_first.shape[2:]).transpose(1, 2)
