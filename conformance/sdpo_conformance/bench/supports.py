"""Teacher supports as text has them: a Zipf-like prior over the ids, or recorded ones from a file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

CONSTANT_FEATURE = 8.0
"""What every hidden state holds in its first feature under a prior: the head's first column makes it a bias."""


def zipf_prior(vocabulary: int) -> Tensor:
    """log 1 / (v + 1) of every id, (V,) float32."""
    return -torch.arange(1, vocabulary + 1, dtype=torch.float32).log()


@lru_cache(maxsize=1)
def recorded_support(path: str, tokens: int, top_k: int, vocabulary: int) -> Tensor:
    """(tokens, K) int64 of a safetensors file's ``teacher_indices`` (rows, K or more), rows repeated in order.

    Raises ValueError in one line: a file that is not there or holds something else, ids outside the vocabulary,
    fewer than K ids in a row, an id twice in a row.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; expected uniform, zipf or a .safetensors file with teacher_indices")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    ids = tensors.get("teacher_indices")
    if ids is None or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or not len(ids):
        raise ValueError(f"{path}: needs teacher_indices, a (rows, K) tensor of int64 or int32")
    if ids.shape[1] < top_k:
        raise ValueError(f"{path}: teacher_indices has {ids.shape[1]} ids a row, the work asks for {top_k}")
    ids = ids[:, :top_k].long()
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(f"{path}: teacher_indices must lie in [0, {vocabulary}), the workload's vocabulary")
    if bool((ids.sort(1).values.diff(dim=1) == 0).any()):
        raise ValueError(f"{path}: teacher_indices has an id twice in a row")
    return ids[torch.arange(tokens) % len(ids)]
