"""Settings as tools leave them in a run's folder, and files that were made to be hard to read."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from sdpo_conformance.audit.declared import read_declared


@pytest.mark.parametrize(
    ("name", "text", "key", "value"),
    [
        ("args.json", '{"a": {"Learning-Rate": 1e-3}}', "learning_rate", 1e-3),
        ("config.yaml", "optim:\n  lr: 1.0e-3  # peak\n", "lr", 1e-3),
        ("wandb.json", '{"beta": {"desc": null, "value": 0.04}}', "beta", 0.04),
        ("pyproject.toml", "[train]\nbeta = 0.04\n", "beta", 0.04),
        ("run.sh", "python -m verl.main \\\n  actor.optim.lr=3e-3 +x.y=1\n", "lr", 3e-3),
        ("run.sh", 'torchrun train.py --beta 0.04 --flag --name "a b"', "beta", 0.04),
        ("run.sh", "train --learning-rate=0.002", "learning_rate", 0.002),
        ("mlruns/1/a/params/beta", "0.04", "beta", 0.04),
    ],
)
def test_a_number_is_found(name: str, text: str, key: str, value: float, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    assert read_declared(tmp_path).number(key) == value


def test_two_values_are_none_and_words_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"beta": 0.04, "optim": "AdamW", "use_kl_loss": false, "sync_ref_model": true}')
    (tmp_path / "b.yaml").write_text("beta: 0.1\n")
    (tmp_path / "README.md").write_text("We FREEZE lora_A.")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    found = read_declared(tmp_path, tmp_path, None)
    assert found.number("beta") is None
    assert found.words("optim") == {"adamw"}
    assert found.false("use_kl_loss")
    assert found.true("sync_ref_model")
    assert found.says("freez")
    assert "lora_alpha" not in found.values


@pytest.mark.parametrize(
    "text",
    [
        " " * 200_000,
        "\n" * 200_000,
        "a" * 200_000,
        "ema" * 60_000 + ": 1",
        "- " * 100_000,
        "--" * 100_000,
        "[" * 100_000,
        json.dumps({"teacher" * 20_000: 1}),
        '{"beta": ' + "9" * 4000 + "}",
        "\0\x1b[2J: 1",
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.yaml", "a.sh", "README.md"])
def test_files_that_are_hard_to_read(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    begin = time.monotonic()
    found = read_declared(tmp_path)
    found.given(r"(teacher|ema).*(interval|freq)")
    found.number("beta")
    assert time.monotonic() - begin < 5
