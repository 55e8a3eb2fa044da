"""What a log says over its whole length: anchors, rewards, samplers and answers, in other tools' names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpo_conformance.audit import audit_run

from .parts import adapter, moved
from .test_run_layouts import put

Column = Callable[[int], float]


def found(folder: Path) -> list[str]:
    return sorted({finding.id for finding in audit_run(folder).alarms})


def log(folder: Path, count: int = 40, rate: Column = lambda n: 1e-3, **columns: Column) -> Path:
    """A TRL-like log with these columns beside a noisy loss and norm; `__` stands for /."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(count, 2, generator=generator, dtype=torch.float64).tolist()
    rows = [
        {"step": n, "loss": a, "grad_norm": b + 0.1, "learning_rate": rate(n), "frac_reward_zero_std": 0.0}
        | {name.replace("__", "/"): column(n) for name, column in columns.items()}
        for n, (a, b) in enumerate(noise, 1)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def wobble(n: int, size: float = 0.05) -> float:
    return size * math.sin(7.0 * n)


@pytest.mark.parametrize(
    ("kl", "settings", "by", "expected"),
    [
        (0.0, {"beta": 0.04}, 2e-2, ["kl-always-zero"]),
        (0.0, {"kl_loss_coef": 0.001}, 2e-2, ["kl-always-zero"]),
        (1e-6, {"beta": 0.04}, 2e-2, []),
        (0.0, {"beta": 0.0}, 2e-2, []),
        (0.0, {}, 2e-2, []),
        (0.0, {"beta": 0.04}, 1e-4, []),  # too little for half precision to see
        (0.0, {"beta": 0.04, "sync_ref_model": True}, 2e-2, []),
        (0.0, {"kl_coef": 0.001, "use_kl_in_reward": False}, 2e-2, []),
    ],
)
def test_an_anchor_of_exactly_zero(
    kl: float, settings: dict[str, Any], by: float, expected: Sequence[str], tmp_path: Path
) -> None:
    put(tmp_path / "before", adapter())
    put(tmp_path / "after", moved(adapter(), by))
    (tmp_path / "args.json").write_text(json.dumps(settings))
    assert found(log(tmp_path, 24, kl=lambda n: kl)) == expected


def test_another_kl_that_is_zero_as_often_as_not(tmp_path: Path) -> None:
    """KTO's is clamped at 0; a first row or two says nothing."""
    put(tmp_path / "after", moved(adapter(), 2e-2))
    (tmp_path / "args.json").write_text('{"beta": 0.1}')
    assert found(log(tmp_path, 24, kl=lambda n: 0.0, rewards__chosen=lambda n: wobble(n))) == []
    assert found(log(tmp_path, 5, kl=lambda n: 0.0)) == []


@pytest.mark.parametrize(
    ("accuracy", "style", "expected"),
    [
        (lambda n: 0.3 / n, lambda n: 1 + 0.02 * n, ["reward-traded"]),
        (lambda n: 0.3 + 0.01 * n, lambda n: 1 + 0.02 * n, []),
        (lambda n: 0.3 - 0.003 * n, lambda n: 1 + 0.02 * n, []),  # a harder curriculum
        (lambda n: 0.3 / n, lambda n: 1 - 0.01 * n, []),  # all falls: no hacking
        (lambda n: 0.001 / n, lambda n: 1 + 0.02 * n, []),  # it was luck
    ],
)
def test_rewards_that_are_traded(accuracy: Column, style: Column, expected: Sequence[str], tmp_path: Path) -> None:
    columns = {"rewards__accuracy_reward__mean": accuracy, "rewards__format_reward__mean": style}
    assert found(log(tmp_path, reward=lambda n: accuracy(n) + style(n), **columns)) == expected


@pytest.mark.parametrize("name", ["length_penalty", "answer_format_reward"])
def test_a_penalty_that_falls_is_no_trade(name: str, tmp_path: Path) -> None:
    columns = {f"rewards__{name}__mean": lambda n: 0.5 / n, "rewards__brevity__mean": lambda n: 1.0 + n}
    assert found(log(tmp_path, reward=lambda n: 1.5 + n, **columns)) == []


@pytest.mark.parametrize(
    ("kl", "rate", "expected"),
    [
        (lambda n: 2e-5 * n * n + 1e-4 * abs(wobble(n)), lambda n: 1e-3, ["sampler-gap"]),
        (lambda n: 2e-3 + wobble(n, 5e-4), lambda n: 1e-3, []),  # kernels
        (lambda n: 2e-5 * n * n, lambda n: 2.5e-5 * n, []),  # a sampler one step behind in a long warmup
        (lambda n: 1e-6 * n * n, lambda n: 1e-3, []),
        (lambda n: 0.05 + wobble(n, 0.04), lambda n: 1e-3, []),
        (lambda n: 0.02 + 1e-3 * n, lambda n: 1e-3, []),  # a gap from the start is another one
    ],
)
def test_a_sampler_that_stays_behind(kl: Column, rate: Column, expected: Sequence[str], tmp_path: Path) -> None:
    probability = {"training__rollout_probs_diff_mean": lambda n: 1e-2 * kl(n)}  # which moves less
    assert found(log(tmp_path / "verl", rate=rate, rollout_corr__k3_kl=kl, **probability)) == expected
    assert found(log(tmp_path / "tinker", rate=rate, optim__kl_sample_train_v2=kl)) == expected


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (lambda n: min(1.0, 0.2 + 0.3 * n), ["completions-cut"]),
        (lambda n: 0.995 if n > 5 else 0.8, ["completions-cut"]),
        (lambda n: 0.75 + wobble(n, 0.2), []),
        (lambda n: 1.0, []),  # answers of a fixed length
        (lambda n: 0.97, []),
    ],
)
def test_a_policy_that_stops_stopping_early_on(cut: Column, expected: Sequence[str], tmp_path: Path) -> None:
    assert found(log(tmp_path, completions__clipped_ratio=cut)) == expected
