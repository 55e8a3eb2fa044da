"""Logs in the shapes that public tools write: read as what they are, and sound ones never accused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from sdpo_conformance.audit import AuditError, audit_run
from sdpo_conformance.audit.metrics import read_metrics

LOSS = [0.0475614712, 0.0452418709, 0.0430353988, 0.0409365377, 0.0389400392, 0.0370409110]
NORM = [0.3077052313, 0.3053961745, 0.3086028978, 0.3023217610, 0.3141592654, 0.2998877665]


def lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def hf(every: int = 1, **more: Any) -> str:
    rows = [
        {"epoch": 0.1 * n, "step": n * every, "loss": a, "grad_norm": b, "learning_rate": 1e-5, **more}
        for n, (a, b) in enumerate(zip(LOSS, NORM, strict=True), 1)
    ]
    rows.insert(3, {"epoch": 0.3, "step": 3 * every, "eval_loss": 0.7, "eval_runtime": 1.0})
    rows.append({"epoch": 1.0, "step": 6 * every, "train_loss": 0.05, "train_runtime": 3.0, "total_flos": 1e9})
    return json.dumps({"global_step": 6 * every, "logging_steps": every, "log_history": rows})


def each(row: Any) -> list[Any]:
    return [row(n, a, b) for n, (a, b) in enumerate(zip(LOSS, NORM, strict=True), 1)]


SOUND: dict[str, tuple[str, str, str]] = {
    "transformers": ("trainer_state.json", hf(), "transformers"),
    "TRL": (
        "trainer_state.json",
        hf(**{"sampling/importance_sampling_ratio/mean": 0.99, "clip_ratio/region_mean": 0.0, "kl": 0.01}),
        "TRL",
    ),
    "verl": (
        "metrics.jsonl",
        lines(each(lambda n, a, b: {"step": n, "data": {
            "training/global_step": n, "actor/pg_loss": a, "actor/grad_norm": b, "actor/ppo_kl": -1e-5,
            "actor/lr": 1e-6, "critic/rewards/mean": 0.4, "val-core/gsm8k/acc/mean": 0.5,
        }})),
        "verl",
    ),
    "ms-swift": (
        "logging.jsonl",
        lines([
            *each(lambda n, a, b: {"loss": a, "grad_norm": b, "epoch": n / 6, "global_step/max_steps": f"{n}/6"}),
            {"train_runtime": 1.0, "train_loss": 0.04, "global_step/max_steps": "6/6"},
        ]),
        "ms-swift",
    ),
    "LLaMA-Factory": (
        "trainer_log.jsonl",
        lines([
            *each(lambda n, a, b: {"current_steps": n, "total_steps": 6, "loss": a, "lr": 1e-5, "epoch": n / 6}),
            {"current_steps": 6, "total_steps": 6, "eval_loss": 0.6, "epoch": 1.0},
            {"current_steps": 6, "total_steps": 6, "epoch": 1.0, "elapsed_time": "0:00:01"},
        ]),
        "LLaMA-Factory",
    ),
    "NeMo-RL": (
        "metrics.jsonl",
        lines(each(lambda n, a, b: {
            "_step": n, "train/loss": a, "train/grad_norm": b, "train/probs_ratio": 1.0, "train/lr": 1e-6,
            "validation/accuracy": 0.2,
        })),
        "NeMo-RL",
    ),
    "tinker": (
        "metrics.jsonl",
        lines(each(lambda n, a, b: {
            "step": n - 1, "progress/batch": n - 1, "train_mean_nll": a, "optim/lr": 1e-4, "time/total": 3.0,
            "optim/kl_sample_train_v1": 1e-3,
        })),
        "tinker",
    ),
    "wandb": (
        "history.jsonl",
        lines([
            *each(lambda n, a, b: {"_step": n, "_runtime": 1.0, "train/loss": a, "train/grad_norm": b,
                                   "train/global_step": 10 * n}),
            {"_step": 99, "eval/loss": 0.7, "train/global_step": 60},
        ]),
        "wandb",
    ),
    "CSV": (
        "metrics.csv",
        "step,loss,grad_norm,eval_loss\n" + "".join(each(lambda n, a, b: f"{n}.0,{a},{b},\n")),
        "another tool",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_log_is_read_and_not_accused(name: str, tmp_path: Path) -> None:
    file, text, tool = SOUND[name]
    (tmp_path / file).write_text(text)
    report = audit_run(tmp_path)
    assert report.findings == ()
    assert report.evidence.metrics is not None
    assert len(report.evidence.metrics.steps) == 6
    assert [step.values["total_loss"] for step in report.evidence.metrics.steps] == LOSS
    assert report.evidence.metrics.tool == tool
    assert report.evidence.metrics.unknown_fields == ()


@pytest.mark.parametrize("name", ["verl", "ms-swift", "tinker", "wandb"])
def test_a_cut_last_line_keeps_the_rest(name: str, tmp_path: Path) -> None:
    file, text, _ = SOUND[name]
    (tmp_path / file).write_text(text + text.splitlines()[0][:-20])
    report = audit_run(tmp_path)
    assert report.findings == ()
    assert any("cut off" in item.reason for item in report.not_judged)


def test_rows_of_ten_steps_are_no_steps(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(hf(10, mean_is_ratio=0.965))
    (tmp_path / "training.json").write_text('{"steps_per_batch": 4}')
    report = audit_run(tmp_path)
    assert report.findings == ()
    assert any("average over batches" in item.reason for item in report.not_judged)


def test_a_resumed_log_counts_its_last_account(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in SOUND["wandb"][1].splitlines()]
    (tmp_path / "history.jsonl").write_text(lines([*rows[:4], *rows[2:]]))
    report = audit_run(tmp_path)
    assert report.findings == ()
    assert report.evidence.metrics is not None
    assert len(report.evidence.metrics.steps) == 6


def test_what_is_not_understood_is_said(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines([{"foo": 1.0, "bar": n} for n in range(3)]))
    with pytest.raises(AuditError, match="2 fields, none known: bar, foo"):
        audit_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(lines([{"step": n, "loss": 1 / n, "zorp": 1.0} for n in range(1, 4)]))
    assert any("zorp" in item.reason for item in audit_run(tmp_path).not_judged)


def test_a_dead_run_is_named(tmp_path: Path) -> None:
    rows = [{"step": n, "loss": 0.0 if n > 2 else 0.1 * n, "grad_norm": float("nan" if n > 2 else "1")}
            for n in range(1, 8)]  # fmt: skip
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    found = {f.id: f for f in audit_run(tmp_path).findings}
    assert "dead from step 3 on" in found["dead-run"].statement
    assert "logging_nan_inf_filter" in found["dead-run"].cause


def test_a_sampler_that_never_gets_the_adapter(tmp_path: Path) -> None:
    sound, grown = [0.02 + 0.005 * (n % 3) for n in range(12)], [0.02 * 1.4**n for n in range(12)]
    for gaps, expected in ((sound, []), (grown, ["sampler-gap"])):
        rows = [{"step": n, "loss": 1 / n, "grad_norm": 1 + 1 / n, "sampling/sampling_logp_difference/mean": gap}
                for n, gap in enumerate(gaps, 1)]  # fmt: skip
        (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
        assert [f.id for f in audit_run(tmp_path).findings] == expected


def test_a_loss_that_is_suddenly_nothing(tmp_path: Path) -> None:
    for values, expected in (([0.5, 0.4, 0.0, 0.0, 0.0], ["dead-run"]), ([0.5, 0.001, 0.0, 0.0, 0.0], [])):
        (tmp_path / "trainer_log.jsonl").write_text(
            lines([{"current_steps": n, "total_steps": 5, "loss": value} for n, value in enumerate(values, 1)])
        )
        assert [f.id for f in audit_run(tmp_path).findings] == expected


def test_a_loss_scaler_may_skip_its_first_step(tmp_path: Path) -> None:
    rows = [{"step": n, "loss": a, "grad_norm": b if n > 1 else float("inf")}
            for n, (a, b) in enumerate(zip(LOSS, NORM, strict=True), 1)]  # fmt: skip
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    report = audit_run(tmp_path)
    assert [(f.id, f.severity.value) for f in report.findings] == [("metrics-nonfinite", "note")]


def test_the_ratio_is_found_under_the_tools_own_name(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(hf(**{"sampling/importance_sampling_ratio/mean": 0.99}))
    reasons = [item.reason for item in audit_run(tmp_path).not_judged if item.id == "behaviour-not-refreshed"]
    assert "TRL reports its ratio as sampling/importance_sampling_ratio/mean" in reasons[0]


def test_a_constant_ratio_off_one(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(hf(**{"sampling/importance_sampling_ratio/mean": 0.895}))
    assert [f.id for f in audit_run(tmp_path).findings] == ["sampler-ratio"]


def test_wandbs_binary_log_has_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "run-x.wandb").write_bytes(b":W&B" + b"\0" * 20)
    with pytest.raises(AuditError, match="scan_history"):
        read_metrics(tmp_path / "run-x.wandb")
