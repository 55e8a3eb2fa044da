"""Wrong input gets a ValueError that names the field, what was expected and what came."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdpo_implementations import triton_fused

from .truth import Batch, make_batch


def meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


@pytest.mark.parametrize(
    ("field", "change", "says"),
    [
        ("student_hidden", lambda x: x[0], r"student_hidden must have shape \(B, T, width\)"),
        (
            "student_hidden",
            lambda x: x.double(),
            "student_hidden must be float32, bfloat16 or float16, got torch.float64",
        ),
        ("lm_head_weight", lambda x: x.bfloat16(), "both must have the same dtype"),
        ("lm_head_weight", lambda x: x[:, :-1], r"lm_head_weight must have shape \(V, 20\)"),
        ("lm_head_weight", meta, "lm_head_weight is on meta"),
        ("teacher_indices", lambda x: x.float(), "teacher_indices must be int64 or int32"),
        ("teacher_indices", lambda x: x[:, :4], "teacher_indices must have shape"),
        ("teacher_indices", meta, "teacher_indices is on meta"),
        ("teacher_logprobs", lambda x: x[..., :3], "teacher_logprobs must have shape"),
        ("teacher_logprobs", lambda x: x.long(), "teacher_logprobs must be floating point"),
        ("response_ids", lambda x: x[..., None], "response_ids must have shape"),
        ("old_student_logprobs", lambda x: x[:, :2], "old_student_logprobs must have shape"),
        ("base_logprobs", lambda x: None, "base_logprobs must be a tensor, got NoneType"),
        ("response_mask", lambda x: x[:1, :2], "response_mask must have shape"),
    ],
)
def test_wrong_fields(device: torch.device, field: str, change: Callable[[Any], Any], says: str) -> None:
    batch = make_batch((2, 5), 90, 20, 6).to(device)
    setattr(batch, field, change(getattr(batch, field)))
    with pytest.raises(ValueError, match=says):
        triton_fused.compute_fused_sdpo_loss(batch)


@pytest.mark.parametrize(("name", "value"), [("alpha", -0.1), ("alpha", float("nan")), ("is_clip", None)])
def test_wrong_hyperparameters(device: torch.device, name: str, value: Any) -> None:
    batch = make_batch((2, 5), 90, 20, 6).to(device)
    batch.training = SimpleNamespace(**{**vars(batch.training), name: value})
    with pytest.raises(ValueError, match=f"training.{name}"):
        triton_fused.compute_fused_sdpo_loss(batch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the check would wait for the device")
@pytest.mark.parametrize("field", ["teacher_indices", "response_ids"])
def test_ids_out_of_range_on_the_cpu(field: str) -> None:
    batch = make_batch((2, 5), 90, 20, 6)
    batch.response_mask.fill_(1.0)
    getattr(batch, field)[0, 0] = 90
    with pytest.raises(ValueError, match=rf"{field} must lie in \[0, 90\), got 90"):
        triton_fused.compute_fused_sdpo_loss(batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ids_out_of_range_on_a_gpu_make_the_loss_nan(device: torch.device) -> None:
    batch = make_batch((2, 5), 90, 20, 6).to(device)
    batch.response_mask.fill_(1.0)
    batch.teacher_indices[0, 0, 0] = 90
    assert bool(triton_fused.compute_fused_sdpo_loss(batch)["loss"].isnan())


def test_divergence_refuses_the_surrogate(device: torch.device) -> None:
    batch: Batch = make_batch((2, 5), 90, 20, 6).to(device)
    with pytest.raises(ValueError, match="alpha must be in"):
        triton_fused.compute_divergence(
            batch.student_hidden, batch.lm_head_weight, batch.teacher_logprobs, batch.teacher_indices, 1.0
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is chosen where there is no GPU")
def test_triton_imported_before_the_package() -> None:
    """As transformers and peft do: the kernels must be interpreted all the same."""
    program = (
        "import triton, triton.language, torch\n"
        "from sdpo_implementations import triton_fused\n"
        "h, w = torch.randn(1, 3, 8), torch.randn(20, 8)\n"
        "ids = torch.tensor([[1, 2, 3]])\n"
        "got = triton_fused.compute_response_logprobs(h, w, ids)\n"
        "true = (h @ w.T).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)\n"
        "assert torch.allclose(got, true, atol=1e-5), (got, true)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("cap", [0.3, 0.7, 1.1, 5.0])
def test_ratios_at_the_cap_are_clipped(device: torch.device, cap: float) -> None:
    """Whether float32 rounds the cap up or down: two kernels compare with it."""
    batch = make_batch((2, 5), 90, 20, 6).to(device)
    batch.training = SimpleNamespace(**{**vars(batch.training), "is_clip": cap})
    batch.old_student_logprobs.fill_(-30.0)
    metrics = triton_fused.compute_fused_sdpo_loss(batch)
    assert float(metrics["clip_fraction"]) == 1.0
    assert float(metrics["mean_is_ratio"]) == pytest.approx(cap)


def test_before_triton_3_3_the_import_says_what_is_needed() -> None:
    program = "import triton\ntriton.__version__ = '3.2.0'\nfrom sdpo_implementations import triton_fused\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "ImportError: triton_fused needs Triton 3.3 or later, found 3.2.0" in done.stderr
