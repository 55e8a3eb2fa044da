"""A reproduction really reproduces: without the harness, on the defect; and no longer once it is mended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DEFECTS = {
    "values": ("IS-2", "    i.old_student_logprobs = chosen(i)\n    return right(i)\n"),
    "unmodified": ("GRAD-3", "    result = right(i)\n    i.base_logprobs.add_(1)\n    return result\n"),
    "types": ("RED-6", "    return {**right(i), 'kl_reg': None}\n"),
    "raises": ("RED-3", "    assert i.response_mask.double().sum() > 0, 'empty'\n    return right(i)\n"),
    "old_gradient": (
        "IS-7",
        "    result = right(i)\n    result['loss'] = result['loss'] + 0 * i.old_student_logprobs.sum() + "
        "(i.old_student_logprobs.sum() - i.old_student_logprobs.detach().sum())\n    return result\n",
    ),
    "no_grad": (
        "GRAD-6",
        "    result = right(i)\n    if not torch.is_grad_enabled():\n        result['loss'] = result['loss'] * 2 + 1\n"
        "    return result\n",
    ),
    "two_graphs": (
        "GRAD-5",
        "    result = right(i)\n    return {**result, 'kl_reg': BUFFER.copy_(result['kl_reg'])}\n",
    ),
    "repeat": (
        "GRAD-7",
        "    result = right(i)\n    return {**result, 'loss': result['loss'] * (1 + 1e-3 * torch.rand(()))}\n",
    ),
}
PRELUDE = """
import torch
BUFFER = torch.zeros(())
def chosen(i):
    return i.student_logits.detach().float().log_softmax(-1).gather(-1, i.response_ids.long()[..., None])[..., 0]
def compute_sdpo_loss(i):
"""


def run_program(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("probe", DEFECTS)
def test_reproduces_and_is_silent_once_mended(judge: Any, probe: str, tmp_path: Path) -> None:
    requirement, body = DEFECTS[probe]
    report = judge(PRELUDE + body, only=[requirement])
    (record,) = report.failures
    assert record["failure"]["probe"] in (probe, "inference_mode")
    program = report.folder / record["failure"]["reproduction"]
    assert "sdpo_conformance" not in program.read_text().replace("sdpo_conformance import", "")
    shown = run_program(program)
    assert shown.returncode == 1, shown.stdout + shown.stderr
    assert shown.stdout.strip()
    (tmp_path / "mine.py").write_text("from sdpo_implementations.reference.loss import compute_sdpo_loss\n")
    mended = run_program(program)
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert "the defect is gone" in mended.stdout
