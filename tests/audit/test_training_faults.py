"""Faults that one number tells of another, and their sound neighbours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpo_conformance.audit import audit_run

from .parts import FROM_BASE, SOUND, adapter, moved
from .test_run_layouts import put

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}


def found(folder: Path) -> dict[str, str]:
    return {finding.id: finding.severity.value for finding in audit_run(folder).findings}


def lines(folder: Path, rows: list[dict[str, Any]], training: dict[str, Any] | None = None) -> Path:
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "training.json").write_text(json.dumps(training or {}))
    return folder


def batches(folder: Path, batches_: list[list[dict[str, Any]]], training: dict[str, Any] | None = None) -> Path:
    responses = [{"metadata": {"per_step_metrics": steps}} for steps in batches_]
    (folder / "responses.jsonl").write_text("\n".join(map(json.dumps, responses)))
    (folder / "training.json").write_text(json.dumps(training or {}))
    return folder


@pytest.mark.parametrize(
    ("clipped", "before", "most", "severity"),
    [
        ((2.2, 1.6), (2.2, 1.6), 1.0, "error"),
        ((0.8, 0.9), (0.8, 0.9), 0.5, "error"),
        ((1.0, 1.0), (2.2, 1.6), 1.0, None),
        ((1.0, 1.0), (2.2, 1.6), 0.5, None),  # a switch: was it clipped?
        ((2.2, 1.6), (2.2, 1.6), 0.0, None),  # no clipping
        ((2.2, 1.6), (2.2, 1.6), 3.0, None),
    ],
)
def test_a_norm_after_clipping(
    tmp_path: Path, clipped: tuple[float, ...], before: tuple[float, ...], most: float, severity: str | None
) -> None:
    rows = [
        {"step": n, "total_loss": 0.1 / n, "mean_is_ratio": 1.0, "grad_norm": b, "grad_norm_clipped": c}
        for n, (b, c) in enumerate(zip(before, clipped, strict=True), start=1)
    ]
    assert found(lines(tmp_path, rows, {"max_grad_norm": most})).get("grad-not-clipped") == severity


def test_a_norm_before_clipping_may_be_any(tmp_path: Path) -> None:
    rows = [{"step": n, "total_loss": 0.1 / n, "mean_is_ratio": 1.0, "grad_norm": 7.0 + n} for n in range(1, 4)]
    assert "grad-not-clipped" not in found(lines(tmp_path, rows, {"max_grad_norm": 1.0}))


@pytest.mark.parametrize(("kl", "severity"), [(0.83, "error"), (0.3, "warning"), (0.02, None)])
def test_the_anchor_of_a_fresh_adapter(tmp_path: Path, kl: float, severity: str | None) -> None:
    before = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in adapter().items()}
    rows = [{**row, "kl_reg": kl, "total_loss": row["distill_loss"]} for row in FROM_BASE]
    put(tmp_path / "before", before, LORA)
    put(tmp_path / "after", {k: v + 1e-4 if "lora_B" in k else v for k, v in before.items()}, LORA)
    assert found(lines(tmp_path, rows)).get("kl-at-start") == severity
    late = [{**row, "step": row["step"] + 40} for row in rows]  # a log that begins later
    assert "kl-at-start" not in found(lines(tmp_path, late))


@pytest.mark.parametrize("start", [1e-9, 0.02])
def test_an_anchor_to_the_behaviour_policy(tmp_path: Path, start: float) -> None:
    steps = [[{**row, "kl_reg": kl} for row, kl in zip(SOUND, (start, 2e-3, 5e-3, 9e-3), strict=True)] for _ in "abc"]
    put(tmp_path / "before", adapter(), LORA)
    put(tmp_path / "after", moved(adapter()), LORA)
    assert found(batches(tmp_path, steps)).get("anchor-restarts") == ("error" if start < 1e-3 else None)


@pytest.mark.parametrize("slope", [1, -1])
def test_a_loss_that_rises_on_its_own_batch(tmp_path: Path, slope: int) -> None:
    steps = [
        [
            {**row, "distill_loss": 0.3 + slope * 0.01 * (4 * b + n), "kl_reg": 0.0, "total_loss": None}
            for n, row in rows
        ]
        for b, rows in enumerate([list(enumerate(SOUND))] * 6)
    ]
    for batch in steps:
        for row in batch:
            row["total_loss"] = row["distill_loss"]
    assert ("loss-uphill" in found(batches(tmp_path, steps, {"alpha": 0.5}))) == (slope > 0)
    assert "loss-uphill" not in found(batches(tmp_path, steps, {"alpha": 1.0}))


def test_gradients_that_add_up(tmp_path: Path) -> None:
    def rows(norms: list[float]) -> list[dict[str, Any]]:
        return [
            {"step": n, "total_loss": 0.1 / n, "mean_is_ratio": 1.0, "grad_norm": norm}
            for n, norm in enumerate(norms, 1)
        ]

    assert found(lines(tmp_path, rows([0.17 * n * (1 + 0.01 * (n % 3)) for n in range(1, 13)])))["grad-accumulates"]
    assert "grad-accumulates" not in found(lines(tmp_path, rows([0.5 + 0.17 * n for n in range(1, 13)])))


def test_a_mean_over_all_tokens(tmp_path: Path) -> None:
    counts = (12, 480, 96)

    def rows(weights: tuple[int, ...]) -> list[dict[str, Any]]:
        found = []
        for row in SOUND:
            values = [row["distill_loss"] * share for share in (3.0, 0.5, 1.0)]
            mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
            samples = [
                {"sample": n, "response_tokens": count, "distill_loss": value}
                for n, (count, value) in enumerate(zip(counts, values, strict=True))
            ]
            found.append({"step": row["step"], "distill_loss": mean, "per_sample_metrics": samples})
        return found

    assert found(lines(tmp_path, rows(counts)))["token-weighted-mean"] == "error"
    assert "token-weighted-mean" not in found(lines(tmp_path, rows((1, 1, 1))))


def test_a_sample_that_is_not_refreshed(tmp_path: Path) -> None:
    def batch(*drifts: float) -> list[dict[str, Any]]:
        steps = []
        for n, row in enumerate(SOUND):
            ratios = [1 + drift * n for drift in drifts]
            samples = [{"sample": k, "mean_is_ratio": ratio} for k, ratio in enumerate(ratios)]
            steps.append({**row, "mean_is_ratio": sum(ratios) / len(ratios), "per_sample_metrics": samples})
        return steps

    assert found(batches(tmp_path, [batch(0.0, 0.018, -0.018)] * 3))["behaviour-not-refreshed"] == "error"
    assert "behaviour-not-refreshed" not in found(batches(tmp_path, [batch(0.0, 0.0, 0.0)] * 3))


@pytest.mark.parametrize(("loss", "frozen"), [(0.8123456789, True), (0.812, False)])
def test_an_evaluation_that_nothing_changes(tmp_path: Path, loss: float, frozen: bool) -> None:
    rows: list[dict[str, Any]] = []
    for step in range(10, 50, 10):
        rows += [
            {"step": step, "loss": 0.9 - 0.01 * step, "epoch": 0.1},
            {"step": step, "eval_loss": loss, "epoch": 0.1},
        ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows, "global_step": 40}))
    assert ("eval-frozen" in found(tmp_path)) == frozen


@pytest.mark.parametrize(("start", "cut"), [(0.1, True), (1.0, False)])
def test_completions_that_no_longer_end(tmp_path: Path, start: float, cut: bool) -> None:
    rows = [
        {"step": n, "loss": 0.1 + 0.01 * (n % 5), "epoch": 0.1, "completions/clipped_ratio": start if n < 12 else 1.0}
        for n in range(1, 21)
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows, "global_step": 20}))
    assert ("completions-cut" in found(tmp_path)) == cut


@pytest.mark.parametrize(("before", "severity"), [(False, "error"), (True, "warning")])
def test_names_of_the_live_model(tmp_path: Path, before: bool, severity: str) -> None:
    live = {key.replace(".weight", ".default.weight"): value for key, value in adapter().items()}
    put(tmp_path / "before", live if before else adapter(), LORA)
    put(tmp_path / "after", moved(live), LORA)
    assert found(tmp_path) == {"adapter-name-in-keys": severity}


@pytest.mark.parametrize(("old", "severity"), [(["q_proj", "down_proj"], "error"), (["q_proj"], "warning")])
def test_tensors_that_the_config_does_not_target(tmp_path: Path, old: list[str], severity: str) -> None:
    put(tmp_path / "before", adapter(), {**LORA, "target_modules": old})
    put(tmp_path / "after", moved(adapter()), {**LORA, "target_modules": ["q_proj"]})
    assert found(tmp_path) == {"config-mismatch": severity}


def test_one_layer_written_for_all(tmp_path: Path) -> None:
    first = moved(adapter(layers=3))
    copied = {key: first[key.replace(".1.", ".0.").replace(".2.", ".0.")].clone() for key in first}
    put(tmp_path / "before", adapter(layers=3), LORA)
    put(tmp_path / "after", copied, LORA)
    assert found(tmp_path)["layers-identical"] == "error"
    put(tmp_path / "before", adapter(layers=3) | {k: v - 1e-4 for k, v in copied.items()}, LORA)  # tied before as well
    assert "layers-identical" not in found(tmp_path)


def test_an_adapter_drawn_anew(tmp_path: Path) -> None:
    put(tmp_path / "before", adapter(layers=12), LORA)
    put(tmp_path / "after", adapter(layers=12, seed=1), LORA)
    assert found(tmp_path)["adapter-restarted"] == "warning"
    put(tmp_path / "after", moved(adapter(layers=12), 0.05), LORA)
    assert "adapter-restarted" not in found(tmp_path)


@pytest.mark.parametrize(("engine", "severity"), [("vllm 0.15.1", "warning"), ("transformers", None)])
def test_a_ratio_of_one_beside_another_engines_log_probs(tmp_path: Path, engine: str, severity: str | None) -> None:
    sample = {"prompt_token_ids": [1, 2], "response_token_ids": [3, 4], "response_logprobs": [-0.5, -1.25]}
    (tmp_path / "distill_request.json").write_text(json.dumps({"training": {}, "samples": [sample]}))
    (tmp_path / "serving.json").write_text(json.dumps({"engine": engine}))
    rows = [{**row, "mean_is_ratio": 1.0} for row in SOUND]
    (tmp_path / "distill_response.json").write_text(json.dumps({"metadata": {"per_step_metrics": rows}}))
    assert found(tmp_path).get("ratio-dropped") == severity
    sample["response_logprobs"] = None  # the starting policy's own stand in
    (tmp_path / "distill_request.json").write_text(json.dumps({"training": {}, "samples": [sample]}))
    assert "ratio-dropped" not in found(tmp_path)
