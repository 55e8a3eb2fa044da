"""docs/adapters.md runs as it stands: its files are written, its other Python blocks are executed."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# file: (\S+)\.py\n")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files in a folder, and beside them page.py with its remaining blocks."""
    folder = tmp_path_factory.mktemp("page")
    loose = []
    for block in BLOCK.findall(TEXT):
        if named := FILE.match(block):
            (folder / f"{named[1]}.py").write_text(block, encoding="utf-8")
        else:
            loose.append(block)
    assert len(loose) >= 2, "the page has lost its examples"
    (folder / "page.py").write_text("\n".join(loose), encoding="utf-8")
    return folder


@pytest.fixture
def modules(program: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The page's files as modules, forgotten afterwards."""
    monkeypatch.syspath_prepend(str(program))
    names = FILE.findall(TEXT)
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


def table_row(label: str) -> list[str]:
    """The cells of the page's table after ``label``."""
    (row,) = re.findall(rf"^\| {re.escape(label)} \|(.*)\|$", TEXT, re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


def test_the_page_runs(program: Path, modules: dict[str, ModuleType]) -> None:
    runpy.run_path(str(program / "page.py"))


def test_the_adapter_in_ten_lines_is_right(modules: dict[str, ModuleType]) -> None:
    import torch

    hidden, head, ids = torch.randn(2, 3, 5), torch.randn(7, 5), torch.randint(7, (2, 3))
    got = modules["my_adapter"].compute_response_logprobs(hidden, head, ids)
    want = (hidden @ head.T).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(got, want)


def test_the_table_of_the_steps(modules: dict[str, ModuleType], repeat: Any, run_named: Any) -> None:
    """The page's kernels in the bundled loop on upstream's run: right, and with one half missing."""
    trainer, mended, broken = modules["trainer"], modules["mended"], modules["broken"]
    recorded = run_named("four_steps_sampler_mismatch")
    losses = {
        "right": mended.compute_fused_sdpo_loss,
        "without the ratio": broken.without_ratio,
        "without the refresh": broken.WithoutRefresh(),
    }
    for label, loss in losses.items():
        kernels = trainer.Kernels.from_hidden_states(
            loss, mended.compute_response_logprobs, trainer.compute_teacher_topk
        )
        steps = repeat(partial(trainer.step_loop, kernels=kernels), recorded)
        assert [f"{step['total_loss']:.6f}" for step in steps] == table_row(label)
    right = [f"{step['total_loss']:.6f}" for step in recorded["expected"]["per_step_metrics"]]
    assert table_row("right") == right
