"""What judged code leaves changed in the process is given back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from sdpo_conformance.judging.settings import process_settings, restore_settings, settings_restored

Change = Callable[[], object]

CHANGES: Mapping[str, Change] = {
    "grad mode off": lambda: torch.set_grad_enabled(False),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "deterministic algorithms, to warn": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "deterministic algorithms, to raise": lambda: torch.use_deterministic_algorithms(True),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "matmul precision": lambda: torch.set_float32_matmul_precision("medium"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_left_changed_is_said_and_given_back(name: str) -> None:
    before, changed = process_settings(), list[str]()
    with settings_restored(changed):
        CHANGES[name]()
    assert len(changed) == 1
    assert process_settings() == before


@pytest.mark.parametrize("warn_only", [True, False])
def test_deterministic_algorithms_that_were_on_come_back_as_they_were(warn_only: bool) -> None:
    outside = process_settings()
    try:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
        before, changed = process_settings(), list[str]()
        with settings_restored(changed):
            torch.use_deterministic_algorithms(False)
        assert changed == ["torch.get_deterministic_debug_mode() is 0"]
        assert process_settings() == before
        assert torch.is_deterministic_algorithms_warn_only_enabled() is warn_only
    finally:
        restore_settings(outside)
