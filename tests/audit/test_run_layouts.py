"""Folders as tools leave them: found and read, not refused, and what several runs share is asked for."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdpo_conformance.audit import AuditError, audit_run

from .parts import adapter, moved
from .test_tool_logs import LOSS, NORM, each, hf, lines

WANDB = lines(each(lambda n, a, b: {"_step": n, "train/loss": a, "train/grad_norm": b, "train/global_step": n}))
VERL = lines(each(lambda n, a, b: {"step": n, "data": {"actor/pg_loss": a, "actor/grad_norm": b}}))
MLX = {"fine_tune_type": "lora", "model": "m", "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 20.0}}


def put(folder: Path, tensors: Mapping[str, torch.Tensor], config: Any = None, name: str = "adapter_model") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config or {"peft_type": "LORA", "r": 4, "lora_alpha": 8}))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def checkpoints(folder: Path, names: Sequence[str], inner: str = "") -> None:
    for number, name in enumerate(names, 1):
        put(folder / name / inner, moved(adapter(), number * 1e-4))


def mlx(folder: Path, count: int = 2, by: float = 1e-4) -> None:
    tensors = {
        key.replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b"): value.T
        for key, value in adapter().items()
    }
    for number in range(1, count + 1):
        put(folder, moved(tensors, by * number), MLX, f"{100 * number:07d}_adapters")
    put(folder, moved(tensors, by * count), MLX, "adapters")


LAYOUTS: dict[str, tuple[Callable[[Path], None], bool]] = {
    # name: (what writes it, whether there are checkpoints to compare)
    "mlx-lm": (mlx, True),
    "verl": (lambda f: checkpoints(f, ["global_step_9", "global_step_10"], "actor/lora_adapter"), True),
    "verl, nested": (
        lambda f: checkpoints(f / "checkpoints" / "project" / "run", ["global_step_9", "global_step_10"],
                              "actor/lora_adapter"), True,
    ),
    "ms-swift": (lambda f: checkpoints(f / "v0-20251126", ["checkpoint-2", "checkpoint-4"]), True),
    "Automodel": (lambda f: checkpoints(f, ["epoch_0_step_9", "epoch_0_step_19"], "model"), True),
    "torchtune": (lambda f: checkpoints(f, ["epoch_0", "epoch_1"]), True),
    "PEFT's named adapters": (lambda f: checkpoints(f, ["checkpoint-2", "checkpoint-4"], "policy"), True),
    "verl's log of any name": (lambda f: write(f / "project" / "experiment.jsonl", VERL), False),
    "a packed log": (lambda f: (f / "metrics.jsonl.gz").write_bytes(gzip.compress(WANDB.encode())) and None, False),
    "wandb's export": (
        lambda f: write(f / "wandb_export.csv", '"train/global_step","run - train/loss","run - train/loss__MIN"\n'
                        + "".join(each(lambda n, a, b: f'"{n}","{a}","{a}"\n'))), False,
    ),
    "semicolons": (
        lambda f: write(f / "metrics.csv", "step;loss\n" + "".join(each(lambda n, a, b: f"{n};{a}\n"))), False,
    ),
    "a long table": (
        lambda f: write(f / "metrics.csv", "step,metric,value\n"
                        + "".join(each(lambda n, a, b: f"{n},loss,{a}\n{n},grad_norm,{b}\n"))), False,
    ),
    "an evaluation's row of nan": (
        lambda f: write(f / "metrics.csv", "step,loss,eval_loss\n"
                        + "".join(each(lambda n, a, b: f"{n},{a},nan\n")) + "6,nan,0.5\n"), False,
    ),
    "Lightning": (
        lambda f: write(f / "lightning_logs" / "version_0" / "metrics.csv", "epoch,step,train_loss,val_loss\n"
                        + "".join(each(lambda n, a, b: f"0,{n},{a},\n"))), False,
    ),
    "MLflow": (
        lambda f: write(f / "mlruns" / "1" / "abc" / "metrics" / "loss",
                        "".join(each(lambda n, a, b: f"{1700000000000 + n} {a} {n}\n"))), False,
    ),
    "tensors as text": (lambda f: write(f / "metrics.jsonl", lines(each(
        lambda n, a, b: {"step": n, "loss": f"tensor({a}, device='cuda:0')"}))), False),
    "a null that is no number anywhere": (lambda f: write(f / "metrics.jsonl", lines(each(
        lambda n, a, b: {"step": n, "loss": a, "kl": None}))), False),
    "a trainer_state cut off": (lambda f: write(f / "trainer_state.json", hf()[:-150]), False),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_sound_folder_is_read(name: str, tmp_path: Path) -> None:
    make, compared = LAYOUTS[name]
    make(tmp_path)
    report = audit_run(tmp_path)
    assert report.findings == ()
    if compared:
        assert report.evidence.change is not None
        assert report.evidence.change.moved == len(report.evidence.change.compared) > 0
    else:
        assert report.evidence.metrics is not None
        values = [step.values["total_loss"] for step in report.evidence.metrics.steps]
        assert values == LOSS[: len(values)]
        assert len(values) >= 4


def test_checkpoints_that_are_equal_are_named(tmp_path: Path) -> None:
    mlx(tmp_path, by=0.0)
    found = {finding.id: finding for finding in audit_run(tmp_path).findings}
    assert "0000100_adapters.safetensors and 0000200_adapters.safetensors" in found["checkpoints-identical"].statement


def test_the_same_tensors_under_another_metadata_are_equal(tmp_path: Path) -> None:
    for step in (2, 4):
        put(tmp_path / f"checkpoint-{step}", adapter())
        save_file(adapter(), tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors", {"step": "0" * step})
    assert "checkpoints-identical" in {finding.id for finding in audit_run(tmp_path).findings}


def test_mlx_ranks_and_scales_are_held_against_the_tensors(tmp_path: Path) -> None:
    mlx(tmp_path / "before")
    mlx(tmp_path / "after", 3)
    wrong = {**MLX, "lora_parameters": {"rank": 8, "scale": 2.0}}
    (tmp_path / "after" / "adapter_config.json").write_text(json.dumps(wrong))
    assert {finding.id for finding in audit_run(tmp_path).findings} == {"config-mismatch", "config-changed"}


def test_several_runs_in_one_folder_are_asked_about(tmp_path: Path) -> None:
    for name in ("v0", "v1"):
        write(tmp_path / name / "logging.jsonl", WANDB)
    with pytest.raises(AuditError, match=r"several runs \(v0, v1\); name the folder of one"):
        audit_run(tmp_path)


def test_a_missing_shard_is_asked_for(tmp_path: Path) -> None:
    put(tmp_path / "after", adapter(), None, "adapter_model-00001-of-00002")
    with pytest.raises(AuditError, match="1 of 2 shards"):
        audit_run(tmp_path)
    put(tmp_path / "after", moved(adapter(3), 0.1), None, "adapter_model-00002-of-00002")
    with pytest.raises(AuditError, match="for two adapters"):
        audit_run(tmp_path)


def field(number: int, content: bytes | float | int) -> bytes:
    """One field in protobuf's wire format: bytes, a float or a whole number below 128."""
    if isinstance(content, bytes):
        return bytes([number << 3 | 2, len(content)]) + content
    return (
        bytes([number << 3 | 5]) + struct.pack("<f", content)
        if isinstance(content, float)
        else bytes([number << 3, content])
    )


def record(event: bytes) -> bytes:
    return struct.pack("<Q", len(event)) + b"\0" * 4 + event + b"\0" * 4


def scalar(tag: str, value: float, step: int, tensor: bool = False) -> bytes:
    """A scalar as torch's SummaryWriter writes it, or as TensorFlow 2's does."""
    number = field(8, field(1, 1) + field(4, struct.pack("<f", value))) if tensor else field(2, value)
    time = bytes([1 << 3 | 1]) + struct.pack("<d", 1.7e9)
    return record(time + field(2, step) + field(5, field(1, field(1, tag.encode()) + number)))


def event_files(folder: Path, tensor: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, steps in (("1.host.1.0", range(4)), ("2.host.1.0", range(3, 6))):  # a resumed run writes a second file
        content = record(field(3, b"brain.Event:2"))
        for n in steps:
            content += scalar("train/loss", LOSS[n], n + 1, tensor) + scalar("train/grad_norm", NORM[n], n + 1, tensor)
        (folder / f"events.out.tfevents.{part}").write_bytes(content + scalar("train/loss", 0.0, 9)[:-9])
    return folder


@pytest.mark.parametrize("tensor", [False, True])
def test_event_files_are_read(tensor: bool, tmp_path: Path) -> None:
    event_files(tmp_path / "runs" / "now", tensor)
    report = audit_run(tmp_path)
    assert report.findings == ()
    assert report.evidence.metrics is not None
    assert [s.values["total_loss"] for s in report.evidence.metrics.steps] == pytest.approx(LOSS, rel=1e-6)
    assert [s.values["grad_norm"] for s in report.evidence.metrics.steps] == pytest.approx(NORM, rel=1e-6)


def test_event_files_as_tensorboard_writes_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path / "runs" / "now"))
    for number, (loss, norm) in enumerate(zip(LOSS, NORM, strict=True), 1):
        writer.add_scalar("train/loss", loss, number)
        writer.add_scalar("train/grad_norm", norm, number)
        writer.add_text("note", "x" * 300, number)
    writer.close()
    report = audit_run(tmp_path)
    assert report.evidence.metrics is not None
    assert [s.values["total_loss"] for s in report.evidence.metrics.steps] == pytest.approx(LOSS, rel=1e-6)


@pytest.mark.parametrize("content", [b"x", b"\xff" * 64, record(b"\x0f\x01"), record(field(5, b"\x0a\x7f"))])
def test_event_files_that_are_none_have_one_clear_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "runs" / "now").mkdir(parents=True)
    (tmp_path / "runs" / "now" / "events.out.tfevents.1.host").write_bytes(content)
    with pytest.raises(AuditError, match="is not an event file that can be read"):
        audit_run(tmp_path)


def test_checkpoints_without_one_adapter_still_have_a_record(tmp_path: Path) -> None:
    for number in (5, 10):
        for name in ("code", "math"):
            put(tmp_path / f"checkpoint-{number}" / name, moved(adapter(), number * 1e-4))
        state = {"log_history": [{"step": step, "loss": 2.0 / step} for step in range(1, number + 1)]}
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(json.dumps(state))
    report = audit_run(tmp_path)
    assert report.evidence.metrics is not None
    assert len(report.evidence.metrics.steps) == 10
    assert report.findings == ()
