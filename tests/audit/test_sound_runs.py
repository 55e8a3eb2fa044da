"""No false alarms: everything that looks odd in a sound run, and is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sdpo_conformance.audit import audit_run
from sdpo_conformance.audit.findings import Evidence, Severity, judge
from sdpo_conformance.audit.metrics import Batch, RunMetrics, Step

from .parts import FROM_BASE, SOUND, adapter, altered, moved

WriteRun = Callable[..., Path]


def alarms(folder: Path, **named: Any) -> list[str]:
    report = audit_run(folder, **named)
    assert report.exit_status == bool(report.alarms)
    return [finding.id for finding in report.findings]


def test_upstreams_own_run(write_run: WriteRun) -> None:
    assert alarms(write_run(SOUND, before=adapter(), after=moved(adapter()), training={"kl_reg_weight": 0.1})) == []


def test_fresh_adapter_with_zero_lora_b_before(write_run: WriteRun) -> None:
    before = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in adapter().items()}
    after = {k: v + 1e-4 if "lora_B" in k else v for k, v in before.items()}  # A's first gradient is exactly 0
    assert alarms(write_run(FROM_BASE, before=before, after=after)) == []


def test_fresh_adapter_that_is_a_config_alone(write_run: WriteRun) -> None:
    folder = write_run(FROM_BASE, after=adapter())
    (folder / "before").mkdir()
    (folder / "before" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    report = audit_run(folder)
    assert report.findings == ()
    assert report.evidence.change is not None
    assert report.evidence.change.moved == 4  # the lora_B, against zero


@pytest.mark.parametrize(("clip", "ratio"), [(1.0, 0.8), (1.0, 1.0), (0.5, 0.99999997)])
def test_is_clip_of_at_most_one(write_run: WriteRun, clip: float, ratio: float) -> None:
    rows = altered(clip_fraction=[clip] * 4, mean_is_ratio=[ratio] * 4)
    training = {"is_clip": 1.0 if ratio > 0.9 else 0.8}
    assert alarms(write_run(rows, training=training)) == []
    assert alarms(write_run(rows)) == []


def test_one_step_with_a_ratio_of_exactly_one(write_run: WriteRun) -> None:
    folder = write_run([{**SOUND[0], "mean_is_ratio": 1.0}], before=adapter(), after=moved(adapter()))
    report = audit_run(folder)
    assert report.findings == ()
    assert "ratio-dropped" in {item.id for item in report.not_judged}
    assert audit_run(folder, sampler="same").findings == ()


def test_kl_reg_of_about_zero(write_run: WriteRun) -> None:
    kl = [0.0, 1.2e-9, 4.7e-9, -3.1e-9]
    rows = altered(kl_reg=kl, total_loss=[row["distill_loss"] + 0.1 * k for row, k in zip(SOUND, kl, strict=True)])
    assert alarms(write_run(rows, before=adapter(), after=moved(adapter()))) == []


def test_adapter_widened_from_half_precision_is_a_note(write_run: WriteRun) -> None:
    before = adapter(dtype=torch.bfloat16)
    report = audit_run(write_run(SOUND, before=before, after=moved({k: v.float() for k, v in before.items()})))
    assert [(f.id, f.severity) for f in report.findings] == [("dtype-changed", Severity.NOTE)]
    assert report.exit_status == 0


def test_every_batch_of_one_step(tmp_path: Path) -> None:
    """JSON lines of responses, one step each: every ratio is a first step's, and may be anything."""
    lines = [
        {"lora_id": "x", "metadata": {"per_step_metrics": [{**row, "step": 1, "mean_is_ratio": ratio}]}}
        for row, ratio in zip(SOUND, (1.02, 0.97, 1.05, 1.01), strict=True)
    ]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert alarms(tmp_path) == []


def test_rows_of_single_step_batches_once_the_settings_say_so(tmp_path: Path) -> None:
    rows = [{**row, "mean_is_ratio": r} for row, r in zip(SOUND, (1.05, 0.96, 1.04, 0.97), strict=True)]
    (tmp_path / "metrics.json").write_text(json.dumps(rows))
    report = audit_run(tmp_path)
    assert [(f.id, f.severity) for f in report.findings] == [("behaviour-not-refreshed", Severity.WARNING)]
    assert "steps_per_batch = 1" in report.findings[0].next_step
    (tmp_path / "training.json").write_text('{"steps_per_batch": 1}')
    assert alarms(tmp_path) == []


def test_trainer_state_with_mismatched_sampler_is_not_judged(tmp_path: Path) -> None:
    """Global steps of a run that samples anew each step; a transformers log does not say where batches end."""
    history = [
        {**row, "loss": row["total_loss"], "epoch": 0.1, "learning_rate": 1e-5, "mean_is_ratio": ratio}
        for row, ratio in zip(SOUND, (1.02, 0.97, 1.05, 1.01), strict=True)
    ]
    history.append({"step": 4, "train_loss": 0.05, "train_runtime": 3.0})
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 4}))
    report = audit_run(tmp_path)
    assert report.findings == ()
    assert "behaviour-not-refreshed" in {item.id for item in report.not_judged}


def test_learning_rate_of_zero_explains_equal_steps(tmp_path: Path) -> None:
    rows = [dict(SOUND[0], step=n, learning_rate=0.0 if n < 3 else 1e-5) for n in (1, 2)]
    rows += [dict(row, learning_rate=1e-5) for row in SOUND[2:]]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    assert alarms(tmp_path) == []


def test_experts_without_tokens_are_a_note(write_run: WriteRun) -> None:
    before = {k.replace("mlp.down_proj", "mlp.experts.3.down_proj"): v for k, v in adapter().items()}
    after = {k: v if "experts" in k else v + 1e-4 for k, v in before.items()}
    report = audit_run(write_run(SOUND, before=before, after=after))
    assert [(f.id, f.severity) for f in report.findings] == [("modules-untouched", Severity.NOTE)]
    assert report.exit_status == 0


def test_bfloat16_metrics_that_coincide(write_run: WriteRun) -> None:
    """Eight bits of mantissa: neighbours coincide by chance."""

    def half(x: float) -> float:
        return float(torch.tensor(x, dtype=torch.bfloat16))

    rows = altered(
        distill_loss=[half(x) for x in (0.0412, 0.0409, 0.0408, 0.0408)],
        kl_reg=[half(x) for x in (0.0211, 0.0212, 0.0213, 0.0213)],
        grad_norm=[half(x) for x in (0.102, 0.1015, 0.101, 0.101)],
        total_loss=[half(x) for x in (0.0433, 0.043, 0.0429, 0.0429)],
    )
    assert alarms(write_run(rows, before=adapter(), after=moved(adapter()))) == []


def test_plateau_of_a_converging_run(write_run: WriteRun) -> None:
    def approach(limit: float, gap: float) -> list[float]:
        return [limit + gap * 0.2**n for n in range(4)]

    distill, kl = approach(0.0312345678, 0.03), approach(0.0412345678, -0.01)
    rows = altered(distill_loss=distill, kl_reg=kl, grad_norm=approach(0.0512345678, 0.2),
                   total_loss=[d + 0.1 * k for d, k in zip(distill, kl, strict=True)])  # fmt: skip
    assert alarms(write_run(rows, before=adapter(), after=moved(adapter()))) == []


numbers = st.floats(1e-4, 0.6)


@settings(max_examples=150, deadline=None)
@given(
    start=st.tuples(numbers, st.floats(1e-6, 0.9), st.floats(1e-3, 5.0)),
    factors=st.lists(st.tuples(*[st.floats(0.3, 0.97)] * 3), min_size=1, max_size=7),
    first_ratio=st.floats(0.5, 2.5),
    noise=st.floats(-3e-6, 3e-6),
    weight=st.sampled_from([0.0, 0.01, 0.1, 1.0]),
    single=st.booleans(),
)
def test_any_refreshed_converging_run(
    start: tuple[float, float, float],
    factors: list[tuple[float, float, float]],
    first_ratio: float,
    noise: float,
    weight: float,
    single: bool,
) -> None:
    rows = [start]
    for factor in factors:
        rows.append(tuple(value * f for value, f in zip(rows[-1], factor, strict=True)))  # type: ignore[arg-type]
    steps = []
    for number, (distill, kl, grad) in enumerate(rows, start=1):
        values = {
            "total_loss": distill + weight * kl, "distill_loss": distill, "kl_reg": kl, "grad_norm": grad,
            "mean_is_ratio": first_ratio if number == 1 else 1.0 + noise, "clip_fraction": 0.0,
        }  # fmt: skip
        if single:  # float32 arithmetic rounds every column on its own
            values = {name: float(torch.tensor(value, dtype=torch.float32)) for name, value in values.items()}
        steps.append(Step(number, values))
    metrics = RunMetrics(Path("x"), "made", (Batch(tuple(steps)),), "explicit")
    findings, _ = judge(Evidence(metrics=metrics))
    assert findings == ()


def test_a_sample_without_a_counted_token_has_a_ratio_of_zero(write_run: WriteRun) -> None:
    """Its sums are 0 and its divisor is 1, so that the mean over four samples is three quarters."""
    rows = altered(mean_is_ratio=[0.7467, 0.75, 0.75, 0.75])
    for row in rows:
        row["per_sample_metrics"] = [
            {"sample": n, "mean_is_ratio": 0.0 if n == 2 else row["mean_is_ratio"] / 0.75} for n in range(4)
        ]
    assert alarms(write_run(rows)) == []
    stale = [{**row, "mean_is_ratio": 0.6, "per_sample_metrics": row["per_sample_metrics"]} for row in rows]
    assert "behaviour-not-refreshed" in alarms(write_run(stale))


def test_rows_of_micro_batches_have_no_rate_and_no_norm(tmp_path: Path) -> None:
    rows = [
        {"iter": n, "loss": 0.9 - 0.01 * n, "grad_norm": None if n % 4 else 0.5, "lr": None if n % 4 else 2e-5}
        for n in range(1, 17)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert alarms(tmp_path) == []
    rows[7]["grad_norm"] = None  # the rate is there: no norm is a NaN
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert alarms(tmp_path) == ["metrics-nonfinite"]


def test_a_spreadsheet_that_writes_commas(tmp_path: Path) -> None:
    rows = ["step;distill_loss;total_loss;mean_is_ratio"]
    rows += [f"{n};0,05419{n};0,05419{n};0,99818{n}" for n in range(1, 5)]
    (tmp_path / "verlauf.csv").write_text("\n".join(rows))
    report = audit_run(tmp_path, sampler="same")
    assert report.evidence.metrics is not None
    assert report.evidence.metrics.steps[0].values["distill_loss"] == 0.054191


def test_pissa_saved_as_plain_lora(tmp_path: Path) -> None:
    start, names = adapter(), {"A": 0, "B": 1}
    trained = moved(start)
    after = {
        key: torch.cat([trained[key], start[key] if "lora_A" in key else -start[key]], names[key.split("lora_")[1][0]])
        for key in start
    }
    for name, tensors, rank in (("before", start, 4), ("after", after, 8)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": rank}))
    (finding,) = audit_run(tmp_path).findings
    assert (finding.id, finding.severity) == ("tensor-mismatch", Severity.NOTE)
    after = {key: torch.cat([trained[key]] * 2, names[key.split("lora_")[1][0]]) for key in start}
    save_file(after, tmp_path / "after" / "adapter_model.safetensors")
    assert {"tensor-mismatch", "config-changed"} <= set(alarms(tmp_path))


@pytest.mark.parametrize("told", [True, False])
def test_a_batch_that_was_run_again(write_run: WriteRun, told: bool) -> None:
    """Put back and run again, its first steps are bit-identical; where the log does not say so, they are stale."""
    rows = [{**row, "batch": 0, "attempt": 1} for row in SOUND]
    rows = [*rows[:2], *({**row, "attempt": 2} if told else row for row in rows)]
    folder = write_run(rows, before=adapter(), after=moved(adapter()))
    report = audit_run(folder)
    found = [finding.id for finding in report.alarms]
    assert found == [] if told else "stale-metrics" in found
    assert len(report.evidence.metrics.steps) == len(SOUND) + 2 * (not told)  # type: ignore[union-attr]


def test_alpha_zero_distils_nothing(write_run: WriteRun) -> None:
    rows = [{**row, "distill_loss": 0.0, "total_loss": 0.1 * row["kl_reg"]} for row in SOUND]
    settings_ = {"kl_reg_weight": 0.1}
    folder = write_run(rows, before=adapter(), after=moved(adapter()), training={**settings_, "alpha": 0.0})
    assert [(f.id, f.severity) for f in audit_run(folder).findings] == [("distill-range", Severity.NOTE)]
    (folder / "training.json").write_text(json.dumps({**settings_, "alpha": 0.5}))
    assert alarms(folder) == ["distill-range"]


@pytest.mark.parametrize("kind", ["ADALORA", "LORA"])
def test_ranks_that_adalora_pruned(write_run: WriteRun, kind: str) -> None:
    before = adapter()
    after = moved(before)
    first = next(iter(after)).partition(".lora_")[0]
    for key, value in after.items():
        rank = 0 if key.startswith(first) else 2
        after[key] = value[:rank].clone() if "lora_A" in key else value[:, :rank].clone()
    folder = write_run(SOUND)
    for name, tensors in (("before", before), ("after", after)):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "adapter_model.safetensors")
        content = {"r": 4, "target_r": 2, "lora_alpha": 8, "peft_type": kind}
        (folder / name / "adapter_config.json").write_text(json.dumps(content))
    found = alarms(folder)
    assert found == [] if kind == "ADALORA" else "tensor-empty" in found
