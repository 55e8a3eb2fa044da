"""The completion of a teacher that is known on its top-k alone."""

from __future__ import annotations

import pytest
import torch

from sdpo_implementations.adapters.teacher import complete_teacher


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keeps_the_top_k_and_shares_the_rest_equally(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    teacher = torch.log_softmax(torch.randn(2, 3, 11, dtype=torch.float64), -1).to(dtype)
    known, where = teacher.topk(4, dim=-1)
    full = complete_teacher(known, where, 11)
    assert full.dtype == dtype
    assert full.gather(-1, where).equal(known)
    outside = full.scatter(-1, where, -torch.inf)
    outside = outside.masked_select(outside.isfinite()).reshape(2, 3, 7)
    assert outside.equal(outside[..., :1].expand_as(outside))
    mass = full.double().exp().sum(-1)
    assert (mass - 1).abs().max() <= 20 * torch.finfo(dtype).eps


def test_a_teacher_known_everywhere_is_itself() -> None:
    teacher = torch.log_softmax(torch.randn(1, 2, 5), -1)
    known, where = teacher.topk(5, dim=-1)
    assert complete_teacher(known, where, 5).equal(teacher)


def test_nothing_left_is_finite() -> None:
    known = torch.zeros(1, 1, 1)
    assert complete_teacher(known, torch.zeros(1, 1, 1, dtype=torch.int64), 3).isfinite().all()
