"""Adapters and step metrics to make runs of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def adapter(layers: int = 2, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """A rank-4 adapter of two module kinds per layer, lora_B away from zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for kind in ("self_attn.q_proj", "mlp.down_proj"):
            stem = f"base_model.model.model.layers.{layer}.{kind}"
            tensors[f"{stem}.lora_A.weight"] = torch.rand(4, 16, generator=generator) - 0.5
            tensors[f"{stem}.lora_B.weight"] = 0.1 * (torch.rand(16, 4, generator=generator) - 0.5)
    return {key: tensor.to(dtype) for key, tensor in tensors.items()}


def moved(tensors: Mapping[str, torch.Tensor], by: float = 1e-4) -> dict[str, torch.Tensor]:
    """The same adapter after a step that moved every element."""
    return {key: tensor + by for key, tensor in tensors.items()}


SOUND = (
    {
        "step": 1, "total_loss": 0.09415575053437258, "distill_loss": 0.06355424930883145,
        "kl_reg": 0.3060150122554112, "mean_is_ratio": 1.0450911975060824, "clip_fraction": 0.0,
        "grad_norm": 0.27109644962494917,
    },
    {
        "step": 2, "total_loss": 0.05943397234992985, "distill_loss": 0.05169112066943375,
        "kl_reg": 0.07742851680496102, "mean_is_ratio": 0.999999976725662, "clip_fraction": 0.0,
        "grad_norm": 0.13917280139187183,
    },
    {
        "step": 3, "total_loss": 0.04562320256644055, "distill_loss": 0.04189931963530935,
        "kl_reg": 0.037238829311311956, "mean_is_ratio": 0.9999999793832162, "clip_fraction": 0.0,
        "grad_norm": 0.09668428925138546,
    },
    {
        "step": 4, "total_loss": 0.03982411413477226, "distill_loss": 0.03553050808639005,
        "kl_reg": 0.04293606048382202, "mean_is_ratio": 1.0000000336049415, "clip_fraction": 0.0,
        "grad_norm": 0.10443122513560596,
    },
)  # fmt: skip
"""per_step_metrics of upstream's own run four_steps_two_samples_kl, kl_reg_weight 0.1."""


FROM_BASE = tuple({**row, "kl_reg": 0.0, "total_loss": row["distill_loss"]} for row in SOUND)
"""The same of an adapter that is fresh: its policy is the base policy at first."""


def altered(**columns: Sequence[Any]) -> list[dict[str, Any]]:
    """The sound steps with columns replaced."""
    rows = [dict(row) for row in SOUND]
    for name, column_values in columns.items():
        for row, value in zip(rows, column_values, strict=True):
            row[name] = value
    return rows
