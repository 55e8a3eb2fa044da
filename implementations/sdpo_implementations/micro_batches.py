"""Which samples share a forward, and how many tokens one may have.

The memory of a step is that of its largest forward: docs/trainer.md states it as the formula that
``activation_bytes_per_token`` computes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

MOST_VALUES, MOST_TOKENS = 2**24, 16384
"""No forward has more tokens, nor more hidden values (tokens times hidden size), unless the caller asks: a GPU is busy
long before, and the memory is spent for nothing."""

MORE_BYTES = 3
"""Beside its dtype's own, per value that a product keeps. Measured on an H100 with rank 16 on seven modules: 2.2 in
bfloat16 on the Qwen3 0.6B and 8B shapes."""

SHARE_OF_FREE = 0.7
"""Of the free memory: the rest is for the loss, the gradients, AdamW's moments and the allocator's gaps."""


def micro_batches(lengths: Sequence[int], budget: int, packed: bool) -> list[list[int]]:
    """Indices of the sequences of each forward, longest first: padded to the longest, or packed, none has more
    than ``budget`` tokens, but for a sequence that is longer alone.

    No more forwards than one after the other filled up to the budget would make, and the largest of them as small as
    that allows: a step's memory is that of its largest.
    """
    groups = _filled(lengths, budget, packed)
    least, most = 1, budget
    while least < most:
        middle = (least + most) // 2
        smaller = _filled(lengths, middle, packed)
        if len(smaller) <= len(groups):
            groups, most = smaller, middle
        else:
            least = middle + 1
    return groups


def _filled(lengths: Sequence[int], budget: int, packed: bool) -> list[list[int]]:
    """One forward after the other, each filled up to the budget."""
    groups: list[list[int]] = []
    used = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if groups:
            grown = used + lengths[index] if packed else lengths[groups[-1][0]] * (len(groups[-1]) + 1)
            if grown <= budget:
                groups[-1].append(index)
                used = grown
                continue
        groups.append([index])
        used = lengths[index]
    return groups


def validate_budget(token_budget: int | None) -> None:
    """Raise ValueError unless it is None or a positive integer."""
    whole = isinstance(token_budget, int) and not isinstance(token_budget, bool)
    if token_budget is not None and (not whole or token_budget < 1):
        raise ValueError(f"token_budget must be an integer of at least 1, or None, got {token_budget!r}")


def fitting_budget(model: Any, longest: int) -> int:
    """Tokens of one forward with gradient that fit into the free memory of the model's device; ``longest`` is
    the longest sequence's length. Asks the allocator; allocates nothing."""
    device = next(model.parameters()).device
    tokens = int(SHARE_OF_FREE * free_bytes(device) / activation_bytes_per_token(model, longest))
    hidden = model.get_base_model().config.get_text_config().hidden_size
    return max(1, min(MOST_TOKENS, MOST_VALUES // hidden, tokens))


def free_bytes(device: torch.device) -> int:
    """What could still be allocated: on CUDA with what PyTorch's allocator keeps for reuse."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def activation_bytes_per_token(model: Any, longest: int) -> int:
    """What one token of a forward keeps for the backward, an upper estimate from the model's shapes.

    A product with a matrix (in, out) keeps in + out values: in the model's dtype, and some of them once more in
    float32, for an adapter in float32, a norm or the rotary embedding. Eager attention keeps ``longest``
    probabilities a head. Under gradient checkpointing: each layer's input, and one layer in full, with its gradients.
    """
    language_model = model.get_base_model()
    config = language_model.config.get_text_config()
    element = language_model.get_input_embeddings().weight.element_size()
    layers, hidden = config.num_hidden_layers, config.hidden_size
    head = language_model.get_output_embeddings()
    widths = (sum(module.weight.shape) for module in _products(language_model) if module is not head)
    in_full = sum(widths) * (element + MORE_BYTES)
    if config._attn_implementation == "eager":
        in_full += layers * config.num_attention_heads * longest * (2 * element + 4)
    if language_model.is_gradient_checkpointing:
        return layers * hidden * element + 2 * in_full // layers
    return in_full


def _products(model: Any) -> Iterator[Any]:
    """The model's own matrices: no embedding, no adapter, and of an adapted layer the layer beneath."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        plain = not hasattr(module, "base_layer") and "lora_" not in name
        if plain and getattr(weight, "ndim", 0) == 2 and not isinstance(module, torch.nn.Embedding):
            yield module
