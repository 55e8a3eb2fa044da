"""Files that are written before every call read back as the library's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sdpo_conformance.files import SAFETENSORS_NAMES, write_tensors


@pytest.mark.parametrize("name", SAFETENSORS_NAMES)
def test_scratch_reads_back(tmp_path: Path, name: str) -> None:
    dtype = getattr(torch, name)
    longer = {"a": torch.arange(12).reshape(3, 4).to(dtype), "empty": torch.zeros(0, 3).to(dtype)}
    shorter = {"a": torch.tensor(1).to(dtype), "view": torch.arange(6).reshape(2, 3).to(dtype).T}
    for tensors in (longer, shorter):
        write_tensors(tmp_path / "case.safetensors", tensors, {"name": "x"}, scratch=True)
        read = load_file(tmp_path / "case.safetensors")
        assert {key: (value.dtype, value.shape) for key, value in read.items()} == {
            key: (value.dtype, value.shape) for key, value in tensors.items()
        }
        assert all(torch.equal(read[key].double(), value.double()) for key, value in tensors.items())
        with safe_open(tmp_path / "case.safetensors", "pt") as file:
            assert file.metadata() == {"name": "x"}
