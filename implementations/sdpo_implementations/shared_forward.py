"""Sequences that share one forward of a decoder, and which of its states predict their responses.

Two layouts. Right-padded, (B, L): a causal decoder never looks ahead, so what fills a row's end changes nothing
before it and no padding mask is needed; positions count from 0 in every row, as each sample's own forward has
them. Padding-free, (1, sum of lengths): one sequence behind the other, where the attention keeps them apart
(``packed_attention``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdpo_implementations.packed_attention import SequenceLengths


@dataclass(frozen=True)
class SharedForward:
    """``input_ids`` (B, L). ``rows`` (N,): positions in the flattened batch whose states predict the N response
    tokens, one sequence's after the other. ``arguments``: what else the decoder is called with."""

    input_ids: Tensor
    rows: Tensor
    arguments: dict[str, Any] = field(default_factory=dict)

    def at_responses(self, states: Tensor) -> Tensor:
        """(B, L, X) -> (1, N, X)."""
        return states.flatten(0, 1).index_select(0, self.rows).unsqueeze(0)


def lay_out(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device, packed: bool = False
) -> SharedForward:
    """One forward of (prompt, response) pairs, none of them empty; ``packed``: without padding."""
    whole = [[*prompt, *response] for prompt, response in sequences]
    lengths = [len(tokens) for tokens in whole]
    if packed and len(whole) > 1:
        starts = [sum(lengths[:index]) for index in range(len(whole))]
        batch = [[token for tokens in whole for token in tokens]]
        positions = [[position for length in lengths for position in range(length)]]
        arguments = {
            "position_ids": torch.tensor(positions, device=device),
            "sequence_lengths": SequenceLengths(tuple(lengths), device),
        }
    else:
        longest = max(lengths)
        starts = [index * longest for index in range(len(whole))]
        # The row's own last token fills it: any id of the vocabulary would do.
        batch = [tokens + tokens[-1:] * (longest - len(tokens)) for tokens in whole]
        arguments = {}
    rows = [
        row
        for start, (prompt, response) in zip(starts, sequences, strict=True)
        for row in range(start + len(prompt) - 1, start + len(prompt) + len(response) - 1)
    ]
    return SharedForward(torch.tensor(batch, device=device), torch.tensor(rows, device=device), arguments)
