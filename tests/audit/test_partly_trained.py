"""Tensors that no gradient reached beside those that were trained, and who leaves them so on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdpo_conformance.audit import audit_run

from .parts import adapter
from .test_run_layouts import put

Change = Callable[[str, torch.Tensor], torch.Tensor]


def trained(key: str, value: torch.Tensor, by: float = 1e-3) -> torch.Tensor:
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(len(key) + int(key.split(".")[4])))
    return (value.float() + by * noise).to(value.dtype)


def run(folder: Path, change: Change, dtype: torch.dtype = torch.float32, start: Change | None = None) -> Path:
    before = {k: start(k, v) if start else v for k, v in adapter(dtype=dtype).items()}
    put(folder / "before", before)
    put(folder / "after", {k: change(k, v) for k, v in before.items()})
    return folder


def found(folder: Path) -> dict[str, str]:
    return {finding.id: finding.severity.value for finding in audit_run(folder).findings}


def without(part: str) -> Change:
    return lambda key, value: value if part in key else trained(key, value)


def decayed_but(part: str) -> Change:
    return lambda key, value: 0.995 * value if part in key else trained(key, value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (trained, {}),
        (without("lora_B"), {"factor-untouched": "warning"}),
        (decayed_but("lora_B"), {"factor-untouched": "warning"}),
        (without("lora_A"), {"factor-untouched": "note"}),
        (without("0.self_attn.q_proj.lora_A"), {"factor-untouched": "warning"}),
        (without("0.self_attn.q_proj.lora_B"), {"factor-untouched": "warning"}),
        (decayed_but("lora_"), {"only-decayed": "error"}),
        (decayed_but("layers.0"), {"only-decayed": "warning"}),
        (lambda k, v: 0.995 * trained(k, v, 1e-2), {}),  # decay beside training
        (lambda k, v: 1.005 * v, {}),  # no decay makes a tensor larger
        (lambda k, v: (0.995 if "lora_A" in k else 0.9) * v, {}),  # two factors: not one rate and decay
    ],
)
def test_factors_and_decay(change: Change, expected: dict[str, str], tmp_path: Path) -> None:
    assert found(run(tmp_path, change)) == expected


@pytest.mark.parametrize(
    ("name", "text", "severity"),
    [
        ("args.json", '{"optim": "adamw_torch"}', "warning"),
        ("args.json", '{"optim": "lora_fa"}', "note"),
        ("README.md", "lora_A is frozen at its random start", "note"),
        ("train.yaml", "optimizer: adamw\nfreeze_A: true\n", "note"),
    ],
)
def test_lora_a_frozen_on_purpose(name: str, text: str, severity: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert found(run(tmp_path, without("lora_A"))) == {"factor-untouched": severity}


def test_first_updates_of_a_fresh_adapter(tmp_path: Path) -> None:
    """With lora_B at zero lora_A has no gradient: it is unchanged, or only decayed."""
    (tmp_path / "args.json").write_text('{"optim": "adamw_torch"}')
    zero = lambda k, v: v * 0 if "lora_B" in k else v  # noqa: E731
    assert found(run(tmp_path / "a", without("lora_A"), start=zero)) == {}
    assert found(run(tmp_path / "b", decayed_but("lora_A"), start=zero)) == {}


def test_plain_sgd_beside_a_lora_b_next_to_zero(tmp_path: Path) -> None:
    """lora_A's gradient is in proportion to lora_B: below the spacing of lora_A."""
    (tmp_path / "args.json").write_text('{"optim": "sgd"}')
    small = lambda k, v: 1e-5 * v if "lora_B" in k else v  # noqa: E731
    change = lambda k, v: v if "lora_A" in k else trained(k, v, 5e-6)  # noqa: E731
    assert found(run(tmp_path, change, start=small)) == {}


def test_half_precision_rounds_lora_a_away(tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text('{"optim": "adamw_torch"}')
    change = lambda k, v: v if "lora_A" in k else trained(k, v, 5e-4)  # noqa: E731
    assert found(run(tmp_path, change, torch.bfloat16)) == {}


def test_experts_that_rest_and_decay(tmp_path: Path) -> None:
    before = {k.replace("mlp.down_proj", "mlp.experts.3.down_proj"): v for k, v in adapter().items()}
    put(tmp_path / "before", before)
    put(tmp_path / "after", {k: 0.995 * v if "experts" in k else trained(k, v) for k, v in before.items()})
    assert found(tmp_path) == {}
