"""No misses: each fault on its own is found, named, and told apart from the others."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpo_conformance.audit import audit_run
from sdpo_conformance.audit.findings import Finding, Severity

from .parts import FROM_BASE, SOUND, adapter, altered, moved

WriteRun = Callable[..., Path]
NAN = float("nan")


def findings(folder: Path, **named: Any) -> dict[str, Finding]:
    return {finding.id: finding for finding in audit_run(folder, **named).findings}


def trained(write_run: WriteRun, rows: Any, **named: Any) -> Path:
    return write_run(rows, before=adapter(), after=moved(adapter()), **named)


def still(row: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    """The sound steps with step 4 a copy of step 3, changed as said."""
    return [*map(dict, SOUND[:3]), {**row, "step": 4, **changes}]


# --- metrics that stand still -------------------------------------------------------------------------------


def test_identical_steps_while_the_weights_moved(write_run: WriteRun) -> None:
    found = findings(trained(write_run, still(SOUND[2])))
    assert set(found) == {"stale-metrics"}
    assert found["stale-metrics"].severity is Severity.ERROR
    assert "bit-identical between step 3 and step 4" in found["stale-metrics"].statement
    assert found["stale-metrics"].data["pairs"][0]["steps"] == ["step 3", "step 4"]


def test_identical_rounded_steps_are_found_when_steps_usually_move_far(write_run: WriteRun) -> None:
    rows = [{k: round(v, 4) for k, v in row.items()} for row in still(SOUND[2])]
    assert findings(trained(write_run, rows))["stale-metrics"].severity is Severity.ERROR


@pytest.mark.parametrize("fields", [("distill_loss",), ("kl_reg",), ("distill_loss", "grad_norm")])
def test_only_some_fields_stand_still(write_run: WriteRun, fields: tuple[str, ...]) -> None:
    rows = altered(**{name: [row[name] for row in (*SOUND[:3], SOUND[2])] for name in fields})
    rows[3]["total_loss"] = rows[3]["distill_loss"] + 0.1 * rows[3]["kl_reg"]
    finding = findings(trained(write_run, rows))["stale-metrics"]
    assert finding.severity is Severity.ERROR
    assert set(finding.data["pairs"][0]["fields"]) == set(fields)
    assert "moved" in finding.evidence[0]


def test_steps_that_differ_in_rounding_alone(write_run: WriteRun) -> None:
    rows = still({k: v * (1 + 2e-8) if k != "step" else v for k, v in SOUND[2].items()})
    finding = findings(trained(write_run, rows))["stale-metrics"]
    assert finding.severity is Severity.ERROR
    assert "float32 rounding" in finding.statement


def test_steps_that_hardly_move(write_run: WriteRun) -> None:
    rows = still({k: v * (1 + 2e-6) if k not in ("step", "mean_is_ratio") else v for k, v in SOUND[2].items()})
    finding = findings(trained(write_run, rows))["stale-metrics"]
    assert finding.severity is Severity.WARNING
    assert "nearly identical" in finding.statement


def test_a_step_that_comes_back(write_run: WriteRun) -> None:
    rows = [*map(dict, SOUND[:3]), {**SOUND[1], "step": 4}]
    assert findings(trained(write_run, rows))["stale-metrics"].data["pairs"][0]["steps"] == [
        "step 2",
        "step 4",
    ]


def test_one_sample_of_two_stands_still(write_run: WriteRun) -> None:
    rows = []
    for number, row in enumerate(SOUND):
        own, frozen = 2 * row["distill_loss"] - 0.0123456789, 0.0123456789
        rows.append(
            {
                **row,
                "per_sample_metrics": [{"distill_loss": own}, {"distill_loss": frozen}],
                "step": number + 1,
            }
        )
    finding = findings(trained(write_run, rows))["stale-metrics"]
    assert "of sample 2" in finding.statement


def test_per_sample_files(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    for name, rows in (("sample_1", SOUND), ("sample_2", still(SOUND[2]))):
        (tmp_path / "metrics" / f"{name}.json").write_text(json.dumps(rows))
    report = audit_run(tmp_path)
    assert report.evidence.metrics is not None
    assert len(report.evidence.metrics.steps) == 4
    assert [f.id for f in report.findings] == ["stale-metrics"]
    assert "sample_2" in report.findings[0].statement


def test_identical_steps_of_weights_that_stood_still_have_another_cause(write_run: WriteRun) -> None:
    found = findings(write_run(still(SOUND[2]), before=adapter(), after=adapter()))
    assert set(found) == {"weights-unchanged"}
    assert "while the metrics moved" in found["weights-unchanged"].statement


def test_weight_decay_alone_is_no_movement(write_run: WriteRun) -> None:
    before = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in adapter().items()}
    after = {k: v * (1 - 1e-6) for k, v in before.items()}
    rows = [{**FROM_BASE[0], "step": n, "mean_is_ratio": 1.0} for n in (1, 2)]
    assert set(findings(write_run(rows, before=before, after=after))) == {"lora-b-zero"}


# --- the ratio ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "severity"),
    [
        ((1.0, 1.03, 1.07, 1.12), Severity.ERROR),
        ((1.0, 0.97, 0.93, 0.90), Severity.ERROR),
        ((1.3, 1.29, 1.31, 1.28), Severity.ERROR),
        ((1.0000001, 1.0004, 1.0009, 1.0013), Severity.WARNING),
        ((1.0, 1.002, 1.003, 1.002), Severity.WARNING),
        ((1.3, 1.0011, 1.0021, 1.0033), Severity.WARNING),
        ((1.0191, 1.0193, 1.0190, 1.0194), Severity.WARNING),
    ],
)
def test_ratio_that_drifts(write_run: WriteRun, ratios: tuple[float, ...], severity: Severity) -> None:
    found = findings(trained(write_run, altered(mean_is_ratio=ratios)))
    assert {id_: f.severity for id_, f in found.items()} == {"behaviour-not-refreshed": severity}


def test_slow_drift_over_two_steps_is_seen_from_an_exact_start(write_run: WriteRun) -> None:
    rows = altered(mean_is_ratio=(1.0000000313, 1.0007, 1.0, 1.0))[:2]
    assert findings(trained(write_run, rows))["behaviour-not-refreshed"].severity is Severity.WARNING


def test_half_precision_noise_is_a_note(write_run: WriteRun) -> None:
    report = audit_run(trained(write_run, altered(mean_is_ratio=(1.004, 0.998, 1.003, 0.9991))))
    assert [(f.id, f.severity) for f in report.findings] == [("behaviour-not-refreshed", Severity.NOTE)]
    assert report.exit_status == 0


def test_dropout_explains_noise_but_not_drift(write_run: WriteRun) -> None:
    folder = trained(write_run, altered(mean_is_ratio=(1.0, 0.96, 1.03, 0.98)))
    (folder / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8, "lora_dropout": 0.05}')
    assert findings(folder)["behaviour-not-refreshed"].severity is Severity.NOTE
    folder = trained(write_run, altered(mean_is_ratio=(1.0, 1.03, 1.06, 1.09)))
    assert findings(folder)["behaviour-not-refreshed"].severity is not Severity.NOTE


def test_clipping_after_the_refresh(write_run: WriteRun) -> None:
    rows = altered(clip_fraction=(0.1, 0.0, 0.05, 0.05))
    found = findings(trained(write_run, rows, training={"is_clip": 5.0}))
    assert found["behaviour-not-refreshed"].severity is Severity.ERROR


def test_drift_in_the_second_batch_of_responses(tmp_path: Path) -> None:
    batches = [altered(), altered(mean_is_ratio=(1.0, 1.1, 1.2, 1.3))]
    for row in batches[1]:
        row.update({k: v * 0.9 for k, v in row.items() if k in ("total_loss", "distill_loss", "kl_reg", "grad_norm")})
    lines = [{"metadata": {"per_step_metrics": rows}} for rows in batches]
    (tmp_path / "responses.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = findings(tmp_path)
    assert set(found) == {"behaviour-not-refreshed"}
    assert "batch 2 step 4" in " ".join(found["behaviour-not-refreshed"].evidence)


def test_ratio_dropped_when_the_sampler_is_known_to_differ(write_run: WriteRun) -> None:
    folder = trained(write_run, altered(mean_is_ratio=[1.0] * 4))
    assert findings(folder, sampler="differs")["ratio-dropped"].severity is Severity.ERROR
    assert findings(folder, sampler="same") == {}


def test_ratio_not_reported(write_run: WriteRun) -> None:
    rows = [{k: v for k, v in row.items() if k != "mean_is_ratio"} for row in SOUND]
    assert findings(trained(write_run, rows))["ratio-not-reported"].severity is Severity.WARNING
    assert "ratio-not-reported" not in findings(trained(write_run, rows[:1]))


@pytest.mark.parametrize(
    ("clip", "ratio", "severity"),
    [(0.4, 2.6, Severity.WARNING), (1.0, 5.0, Severity.ERROR), (0.1, 1.3, None)],
)
def test_clip_saturated(write_run: WriteRun, clip: float, ratio: float, severity: Severity | None) -> None:
    rows = altered(clip_fraction=(clip, 0.0, 0.0, 0.0), mean_is_ratio=(ratio, 1.0, 1.0, 1.0))
    for training in (None, {"is_clip": 5.0}):
        found = findings(trained(write_run, rows, training=training))
        assert (found["clip-saturated"].severity if found else None) is severity


# --- the losses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", [None, "NaN", "nan", "inf", "-Infinity", NAN, 10**400])
@pytest.mark.parametrize("name", ["total_loss", "kl_reg"])
def test_what_is_not_finite_however_it_is_spelt(write_run: WriteRun, name: str, spelling: Any) -> None:
    found = findings(trained(write_run, altered(**{name: [*(row[name] for row in SOUND[:3]), spelling]})))
    assert found["metrics-nonfinite"].severity is Severity.ERROR
    assert name in found["metrics-nonfinite"].statement
    assert "step 4" in found["metrics-nonfinite"].evidence[0]


def test_nan_of_one_sample(write_run: WriteRun) -> None:
    rows = [{**row, "per_sample_metrics": [{"kl_reg": 0.1 * n}, {"kl_reg": "nan"}]} for n, row in enumerate(SOUND, 1)]
    assert "sample 2" in findings(trained(write_run, rows))["metrics-nonfinite"].evidence[0]


@pytest.mark.parametrize(
    ("total", "words"),
    [
        (lambda d, k: d, "left out"),
        (lambda d, k: d - 0.1 * k, "subtracted"),
        (lambda d, k: d + 0.2 * k, "another weight"),
    ],
)
def test_total_against_a_known_weight(write_run: WriteRun, total: Any, words: str) -> None:
    rows = altered(total_loss=[total(row["distill_loss"], row["kl_reg"]) for row in SOUND])
    finding = findings(trained(write_run, rows, training={"kl_reg_weight": 0.1}))["loss-not-sum"]
    assert finding.severity is Severity.ERROR
    assert words in finding.cause


def test_total_against_a_weight_that_nobody_states(write_run: WriteRun) -> None:
    assert findings(trained(write_run, SOUND)) == {}
    flipped = altered(total_loss=[row["distill_loss"] - 0.1 * row["kl_reg"] for row in SOUND])
    assert "subtracted" in findings(trained(write_run, flipped))["loss-not-sum"].cause
    odd = altered(total_loss=[*(row["total_loss"] for row in SOUND[:3]), SOUND[3]["total_loss"] * 1.01])
    finding = findings(trained(write_run, odd))["loss-not-sum"]
    assert finding.evidence[0].startswith("step 4")
    assert finding.data["weight"] == pytest.approx(0.1, rel=1e-4)


def test_a_mean_ratio_above_the_cap(write_run: WriteRun) -> None:
    def with_ratios(*ratios: float) -> Path:
        return trained(write_run, altered(mean_is_ratio=ratios), training={"is_clip": 2.0})

    assert "ratio-above-cap" not in findings(with_ratios(2.000004, 1.0, 1.0, 1.0))
    finding = findings(with_ratios(2.4, 1.0, 1.0, 1.0))["ratio-above-cap"]
    assert finding.evidence == ("step 1: mean_is_ratio 2.4, is_clip 2",)
    (with_ratios(2.4, 1.0, 1.0, 1.0) / "training.json").rename(write_run() / "config.json")
    assert "ratio-above-cap" in findings(write_run())
    (write_run() / "config.json").write_text('{"model_type": "qwen3", "alpha": 2}')
    assert "ratio-above-cap" not in findings(write_run())


def test_kl_negative(write_run: WriteRun) -> None:
    def with_kl(kl: tuple[float, ...]) -> list[dict[str, Any]]:
        return altered(kl_reg=kl, total_loss=[r["distill_loss"] + 0.1 * k for r, k in zip(SOUND, kl, strict=True)])

    assert findings(trained(write_run, with_kl((0.3, 0.02, -0.04, 0.1))))["kl-negative"].severity is Severity.ERROR
    assert findings(trained(write_run, with_kl((0.3, 0.02, -4e-4, 0.1))))["kl-negative"].severity is Severity.NOTE


def test_kl_growing(write_run: WriteRun) -> None:
    def with_kl(kl: tuple[float, ...], weight: float) -> list[dict[str, Any]]:
        return altered(kl_reg=kl, total_loss=[r["distill_loss"] + weight * k for r, k in zip(SOUND, kl, strict=True)])

    assert set(findings(trained(write_run, with_kl((0.01, 0.4, 1.9, 6.0), 0.0)))) == {"kl-growing"}
    held = trained(write_run, with_kl((0.02, 0.1, 0.3, 0.7), 0.1), training={"kl_reg_weight": 0.1})
    assert "wrong sign" in findings(held)["kl-growing"].cause
    (held / "training.json").unlink()
    assert findings(trained(write_run, with_kl((0.15, 0.19, 0.46, 0.42), 0.0))) == {}


def test_distill_range(write_run: WriteRun) -> None:
    training = {"alpha": 0.5}
    for value in (-0.02, 0.75):
        rows = altered(distill_loss=[value, *(r["distill_loss"] for r in SOUND[1:])])
        rows[0]["total_loss"] = value + 0.1 * rows[0]["kl_reg"]
        assert set(findings(trained(write_run, rows, training=training))) == {"distill-range"}
    zero = altered(distill_loss=[0.0] * 4, total_loss=[0.1 * row["kl_reg"] for row in SOUND])
    assert "nothing was distilled" in findings(trained(write_run, zero))["distill-range"].statement


def test_grad_norm(write_run: WriteRun) -> None:
    assert set(findings(trained(write_run, altered(grad_norm=(0.2, 0.3, 0.25, 480.0))))) == {"grad-norm"}
    assert set(findings(trained(write_run, altered(grad_norm=(0.0, 0.0, 0.0, 0.0))))) == {"grad-norm"}
    assert findings(trained(write_run, altered(grad_norm=(2.0, 0.3, 0.02, 0.01)))) == {}


def test_lists_of_different_length(tmp_path: Path) -> None:
    columns = {"total_loss": [0.5, 0.4, 0.31], "distill_loss": [0.5, 0.4, 0.31], "kl_reg": [0.1, 0.2]}
    (tmp_path / "metrics.json").write_text(json.dumps(columns))
    evidence = " ".join(findings(tmp_path)["metrics-incomplete"].evidence)
    assert "different lengths: total_loss 3, distill_loss 3, kl_reg 2" in evidence
    assert "kl_reg is missing at step 3" in evidence


def test_a_response_that_contradicts_itself(tmp_path: Path) -> None:
    metadata = {"total_loss": 0.9, "steps_per_batch_applied": 8, "per_step_metrics": list(SOUND)}
    (tmp_path / "response.json").write_text(json.dumps({"metadata": metadata}))
    evidence = " ".join(findings(tmp_path)["metrics-incomplete"].evidence)
    assert "8 steps were declared and 4 reported" in evidence
    assert "total_loss is 0.9" in evidence


# --- the tensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tensor_that_is_not_finite(write_run: WriteRun, value: float) -> None:
    after = moved(adapter())
    key = next(iter(after))
    after[key][0, 0] = value
    finding = findings(write_run(SOUND, before=adapter(), after=after))["tensor-nonfinite"]
    assert finding.severity is Severity.ERROR
    assert f"{key}: 1 of 64 elements" in finding.evidence
    report = audit_run(write_run(SOUND, before=adapter(), after=after))
    assert report.evidence.change is not None
    assert report.evidence.change.max_abs_delta == pytest.approx(1e-4, rel=1e-2)


def test_keys_shapes_and_dtypes(write_run: WriteRun) -> None:
    before, after = adapter(), moved(adapter())
    keys = list(after)
    after["extra.lora_A.weight"] = after.pop(keys[0])
    after[keys[1]] = torch.ones(8, 4)
    finding = findings(write_run(before=before, after=after))["tensor-mismatch"]
    assert finding.data == {"only_before": 1, "only_after": 1, "shape": 1}
    narrow = {k: v.bfloat16() for k, v in moved(adapter()).items()}
    assert findings(write_run(SOUND, before=adapter(), after=narrow))["dtype-changed"].severity is Severity.WARNING


def test_adapter_names_do_not_count(write_run: WriteRun) -> None:
    renamed = {k.replace(".weight", ".default.weight"): v for k, v in moved(adapter()).items()}
    report = audit_run(write_run(SOUND, before=adapter(), after=renamed))
    assert report.findings == ()
    assert report.evidence.change is not None
    assert len(report.evidence.change.compared) == 8


def test_lora_b_still_zero_after(write_run: WriteRun) -> None:
    after = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in adapter().items()}
    assert findings(write_run(SOUND, after=after))["lora-b-zero"].severity is Severity.ERROR


def test_modules_that_no_gradient_reached(write_run: WriteRun) -> None:
    after = {k: v if "layers.1" in k else v + 1e-4 for k, v in adapter().items()}
    finding = findings(write_run(SOUND, before=adapter(), after=after))["modules-untouched"]
    assert finding.severity is Severity.WARNING
    assert "whole layers: model.layers.1" in finding.evidence


def test_step_too_large_for_adam(write_run: WriteRun) -> None:
    training = {"learning_rate": 3e-5}
    assert findings(trained(write_run, SOUND, training=training)) == {}
    finding = findings(write_run(SOUND, before=adapter(), after=moved(adapter(), 0.139), training=training))
    assert finding["step-too-large"].data["excess"] > 100
    assert finding["step-too-large"].severity is Severity.WARNING


def test_without_a_log_nothing_says_how_many_batches_there_were(write_run: WriteRun) -> None:
    training = {"learning_rate": 3e-5, "steps_per_batch": 4}
    finding = findings(write_run(before=adapter(), after=moved(adapter(), 0.139), training=training))
    assert finding["step-too-large"].severity is Severity.NOTE


def test_norm_explosion(write_run: WriteRun) -> None:
    after = {k: v * 30 if "lora_A" in k and "layers.0" in k else v * 1.01 for k, v in adapter().items()}
    assert set(findings(write_run(SOUND, before=adapter(), after=after))) == {"norm-explosion"}


# --- the optimizer's state ----------------------------------------------------------------------------------


def save_state(path: Path, tensors: dict[str, torch.Tensor], steps: int) -> None:
    parameters = [torch.nn.Parameter(t.clone()) for t in tensors.values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    torch.save(optimizer.state_dict(), path)


def peft_folders(tmp_path: Path) -> tuple[Path, Path]:
    from safetensors.torch import save_file

    for name, tensors in (("before", adapter()), ("after", moved(adapter()))):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
    (tmp_path / "metrics.json").write_text(json.dumps(SOUND))
    return tmp_path / "before", tmp_path / "after"


def test_optimizer_state_in_step(tmp_path: Path) -> None:
    before, after = peft_folders(tmp_path)
    save_state(before / "optimizer_state.pt", adapter(), 3)
    save_state(after / "optimizer_state.pt", adapter(), 7)
    report = audit_run(tmp_path)
    assert report.findings == ()
    assert report.evidence.optimizer_after is not None
    assert set(report.evidence.optimizer_after.steps) == {7.0}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("counter", "went from 3 to 4; 4 steps reported"),
        ("stale", "the same before and after"),
        ("foreign", "fit no"),
    ],
)
def test_optimizer_state_out_of_step(tmp_path: Path, fault: str, words: str) -> None:
    before, after = peft_folders(tmp_path)
    save_state(before / "optimizer_state.pt", adapter(), 3)
    if fault == "stale":
        (after / "optimizer_state.pt").write_bytes((before / "optimizer_state.pt").read_bytes())
    else:
        tensors = adapter() if fault == "counter" else {"x": torch.zeros(33, 7)}
        save_state(after / "optimizer_state.pt", tensors, 4 if fault == "counter" else 7)
    assert words in " ".join(findings(tmp_path)["optimizer-mismatch"].evidence)
