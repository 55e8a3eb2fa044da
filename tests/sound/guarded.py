"""Settings of its own while it works: one thread, no autocast, a seeded generator; as before on return."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from . import sparse_support


@contextmanager
def own_settings() -> Iterator[None]:
    threads, precision, state = torch.get_num_threads(), torch.get_float32_matmul_precision(), random.getstate()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    random.seed(0)
    try:
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        random.setstate(state)


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    with own_settings():
        return sparse_support.compute_sdpo_loss(loss_input)


def compute_fused_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    with own_settings():
        return sparse_support.compute_fused_sdpo_loss(loss_input)
