"""Runs to audit: written by hand from metrics and tensors, or trained with a fault built in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

Rows = Sequence[Mapping[str, Any]]
WriteRun = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """write_run(rows, before=tensors, after=tensors, training={...}): the folder of such a run."""

    def write(
        rows: Rows | None = None,
        *,
        before: Mapping[str, torch.Tensor] | None = None,
        after: Mapping[str, torch.Tensor] | None = None,
        training: Mapping[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        if rows is not None:
            response = {"lora_id": "x", "metadata": {"per_step_metrics": list(rows)}}
            (folder / "distill_response.json").write_text(json.dumps(response))
        if training is not None:
            (folder / "training.json").write_text(json.dumps(training))
        for name, tensors in (("before", before), ("after", after)):
            if tensors is not None:
                save_file(dict(tensors), folder / f"{name}.safetensors")
        return folder

    return write
