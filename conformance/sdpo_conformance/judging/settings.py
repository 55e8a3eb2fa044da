"""What holds for all of torch in this process, and giving it back after code that is judged."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy
import torch


def process_settings() -> dict[str, object]:
    """The settings that a call must leave as they were, by the name that reads them."""
    return {
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.is_inference_mode_enabled()": torch.is_inference_mode_enabled(),
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.is_autocast_enabled()": torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
        "torch.is_anomaly_enabled()": torch.is_anomaly_enabled(),
        "torch.get_deterministic_debug_mode()": torch.get_deterministic_debug_mode(),
        "torch.get_float32_matmul_precision()": matmul_precision(),
        "torch.get_num_threads()": torch.get_num_threads(),
    }


def matmul_precision() -> str:
    """How products of float32 are taken; "mixed" where torch's newer settings, by backend, say more than one word."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "mixed"


def restore_settings(settings: Mapping[str, object]) -> None:
    """Give the process back what was taken, so that what is judged next is not judged under it."""
    torch.set_grad_enabled(bool(settings["torch.is_grad_enabled()"]))
    torch.set_default_dtype(settings["torch.get_default_dtype()"])  # type: ignore[arg-type]
    torch.set_autocast_enabled("cpu", False)
    torch.set_autocast_enabled("cuda", False)
    torch.autograd.set_detect_anomaly(bool(settings["torch.is_anomaly_enabled()"]))
    # off, to warn, or to raise: the mode says which
    torch.set_deterministic_debug_mode(settings["torch.get_deterministic_debug_mode()"])  # type: ignore[arg-type]
    if (threads := int(str(settings["torch.get_num_threads()"]))) != torch.get_num_threads():
        torch.set_num_threads(threads)
    if (precision := str(settings["torch.get_float32_matmul_precision()"])) not in ("mixed", matmul_precision()):
        torch.set_float32_matmul_precision(precision)


@contextmanager
def settings_restored(changed: list[str]) -> Iterator[None]:
    """Restore what the body left changed, and say so in ``changed``: ``torch.is_grad_enabled() is False``."""
    before = process_settings()
    try:
        yield
    finally:
        after = process_settings()
        if after != before:
            changed += [f"{name} is {value}" for name, value in after.items() if value != before[name]]
            restore_settings(before)


def random_state() -> Mapping[str, bytes]:
    """Of every generator that the process shares."""
    return {
        "torch": torch.random.get_rng_state().numpy().tobytes(),
        "numpy": repr(numpy.random.get_state(legacy=False)).encode(),
        "Python": repr(random.getstate()).encode(),
    }


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global random states fixed inside and as found afterwards."""
    states = torch.random.get_rng_state(), numpy.random.get_state(), random.getstate()
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(states[0])
        numpy.random.set_state(states[1])
        random.setstate(states[2])
