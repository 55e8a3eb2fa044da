"""Upstream's own trainer passes every MUST: a MUST that it fails is a wrong MUST."""

from __future__ import annotations

import pytest
from test_requirements import failures, subject_of

pytest.importorskip(
    "claas.training.distillation",
    reason="needs upstream's own code on PYTHONPATH: kfallah/CLaaS at e2331f7",
    exc_type=ImportError,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_upstream_trainer_passes(dtype: str) -> None:
    from sdpo_implementations.adapters.claas_trainer import distill

    assert failures(subject_of(distill, dtype=dtype)) == {}
