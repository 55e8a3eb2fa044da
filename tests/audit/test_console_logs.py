"""What a terminal saw: metrics are read from it, and nothing that it does not show is held against the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdpo_conformance.audit import AuditError, audit_run

RAY = "\x1b[36m(TaskRunner pid=87031)\x1b[0m "
VERL = (
    "step:{0} - global_seqlen/mean:355023.750 - actor/kl_loss:0.024 - actor/pg_loss:0.000 - actor/ppo_kl:0.000"
    " - actor/grad_norm:0.0{0} - actor/lr:0.000 - training/global_step:{0}.000 - critic/score/mean:0.906"
)
NUMPY = (
    "step:{0} - actor/pg_loss:np.float64(5.4{0}e-05) - actor/grad_norm:np.float64(0.2{0})"
    " - critic/vf_var:np.float64(nan)"
)
MEGATRON = (
    " [2026-11-20 10:00:04] iteration        {0}/      60 | consumed samples:          128 | elapsed time per"
    " iteration (ms): 814.9 | learning rate: 2.000000E-06 | lm loss: 1.9{0}E+00 | loss scale: 65536.0 | grad norm:"
    " 0.7{0} | number of nan iterations:   0 |"
)
TRAINER = (
    "\r {0}0%|█   | {0}/9 [00:0{0}<00:09,  1.01it/s]\r      \r"
    "{{'loss': '0.5{0}', 'grad_norm': '1.2{0}', 'learning_rate': '2e-05', 'epoch': '0.{0}'}}\n"
)
OLDER = "{{'loss': 0.5{0}3, 'grad_norm': 1.2{0}, 'learning_rate': 2e-05, 'epoch': 0.{0}}}"
TORCHTUNE = "Step {0} | loss:1.379{0} lr:0.0003 tokens_per_second_per_gpu:2051.0 grad_norm:0.83{0} "
OWN = "[2026-11-20 09:13:03,146][INFO] step {0}/400 | loss 0.10{0}8 | kl_reg 0.000 | is_ratio 0.99 | grad_norm 0.8{0}"
NEMO = (
    "Training epoch 0, iteration {0}/59 | lr: 1.{0}00e-05 | global_batch_size: 8 | global_step: {0} | "
    "reduced_train_loss: 2.{0}759 | train_step_timing in s: 1.768"
)


@pytest.mark.parametrize(
    ("line", "fields", "tool"),
    [
        (RAY + VERL, {"kl_reg", "grad_norm"}, "verl"),
        (RAY + NUMPY, {"total_loss", "grad_norm"}, "verl"),
        (MEGATRON, {"total_loss", "grad_norm", "learning_rate"}, "another tool"),
        (TRAINER, {"total_loss", "grad_norm", "learning_rate"}, "transformers"),
        (OLDER, {"total_loss", "grad_norm", "learning_rate"}, "transformers"),
        (TORCHTUNE, {"total_loss", "grad_norm", "learning_rate"}, "another tool"),
        (NEMO, {"total_loss", "learning_rate"}, "another tool"),
        (OWN, {"total_loss", "grad_norm"}, "another tool"),
    ],
)
def test_sound_output_is_read_and_accused_of_nothing(tmp_path: Path, line: str, fields: set[str], tool: str) -> None:
    head = "args: {'learning_rate': 3e-05, 'alpha': 0.5}\nloading base (bf16)\nstep 0 eval loss: 9.0\n"
    (tmp_path / "train.log").write_text(head + "\n".join(line.format(number) for number in range(1, 9)) + "\n")
    report = audit_run(tmp_path)
    metrics = report.evidence.metrics
    assert metrics is not None
    assert [step.number for step in metrics.steps] == list(range(1, 9))
    assert {name for step in metrics.steps for name in step.values} == fields
    assert metrics.tool == tool
    assert report.findings == ()


def test_faults_show_in_output_too(tmp_path: Path) -> None:
    rows = [f"{{'loss': {0.5 - 0.01 * n:.4f}, 'grad_norm': 1.{n}, 'epoch': 0.{n}}}" for n in range(1, 6)]
    rows += [f"{{'loss': 0.0, 'grad_norm': nan, 'epoch': 0.{n}}}" for n in range(6, 10)]
    (tmp_path / "nohup.out").write_text("\n".join(rows))
    assert "dead-run" in {finding.id for finding in audit_run(tmp_path).findings}


def test_a_ratio_printed_as_1_is_not_exactly_1(tmp_path: Path) -> None:
    rows = [f"step={n} loss=0.12{n} distill_loss=0.12{n} mean_is_ratio=1.0000 grad_norm=0.3{n}" for n in range(1, 5)]
    (tmp_path / "train.log").write_text("\n".join(rows))
    report = audit_run(tmp_path, sampler="differs")
    assert report.findings == ()
    assert "ratio-dropped" in {one.id for one in report.not_judged}


def test_a_drift_in_output_is_a_drift(tmp_path: Path) -> None:
    ratios = (1.0, 1.021, 1.048, 1.082, 1.131)
    rows = [f"step: {n} loss: 0.12{n} mean_is_ratio: {ratio} grad_norm: 0.3{n}" for n, ratio in enumerate(ratios, 1)]
    (tmp_path / "train.log").write_text("\n".join(rows))
    (tmp_path / "training.json").write_text('{"steps_per_batch": 5}')
    assert {finding.id for finding in audit_run(tmp_path).findings} == {"behaviour-not-refreshed"}


def test_lines_without_a_step_are_no_steps_of_a_batch(tmp_path: Path) -> None:
    rows = [f"{{'loss': 0.5{n}, 'mean_is_ratio': {1 + 0.03 * n}, 'epoch': 0.{n}}}" for n in range(1, 9)]
    (tmp_path / "train.log").write_text("\n".join(rows))
    (tmp_path / "training.json").write_text('{"steps_per_batch": 4}')
    report = audit_run(tmp_path)
    assert report.findings == ()
    assert "behaviour-not-refreshed" in {one.id for one in report.not_judged}


def test_lines_printed_twice_are_one_and_parts_of_a_step_too(tmp_path: Path) -> None:
    rows = []
    for n in range(1, 4):
        rows += [f"step {n} loss=0.5{n}"] * 2 + [f"step {n} grad_norm=1.{n}"]
    (tmp_path / "out.txt").write_text("\n".join(rows))
    metrics = audit_run(tmp_path).evidence.metrics
    assert metrics is not None
    assert [dict(step.values) for step in metrics.steps] == [
        {"total_loss": 0.5 + n / 100, "grad_norm": 1 + n / 10} for n in range(1, 4)
    ]


def test_json_lines_under_the_name_of_a_log_are_json_lines(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text(
        '{"step": 1, "data": {"actor/pg_loss": 0.5}}\n{"step": 2, "data": {"actor/pg_loss": 0.4}}\n'
    )
    metrics = audit_run(tmp_path / "train.log").evidence.metrics
    assert metrics is not None
    assert metrics.kind.startswith("JSON lines")


def test_a_log_comes_before_output(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text("step 1 loss=9.0\nstep 2 loss=9.5\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n')
    report = audit_run(tmp_path)
    assert report.files.metrics == tmp_path / "metrics.jsonl"


def test_output_without_metrics_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text("loading\nall 7 done\n")
    with pytest.raises(AuditError, match="holds no line of metrics"):
        audit_run(tmp_path / "train.log")
    with pytest.raises(AuditError, match="nothing to look at"):
        audit_run(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "step 1 loss=" + "1" * 500_000 + "x",
        "step 1 loss" + " " * 500_000 + "x",
        "step" + " " * 500_000 + "x",
        "step 1 np.a(" + "x" * 500_000,
        "step 1 {" + " " * 500_000 + "'",
        "{'" * 200_000,
        "step 1 " + "a." * 250_000,
        "\x1b[" + "0;" * 250_000,
        "|" + " " * 500_000 + "1",
    ],
)
def test_lines_made_to_take_for_ever_do_not(tmp_path: Path, line: str) -> None:
    (tmp_path / "train.log").write_text(f"{line}\nstep 2 loss=0.5\nstep 3 loss=0.4\n")
    metrics = audit_run(tmp_path).evidence.metrics
    assert metrics is not None
    assert [step.number for step in metrics.steps][-2:] == [2, 3]
