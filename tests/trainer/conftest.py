"""The trainer tests need transformers and peft; their helpers lie beside them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.programs import TORCH, Programs

pytest.importorskip("transformers")
pytest.importorskip("peft")

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def trainer_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    """Runs the programs that failures of trainers leave."""
    running = Programs(tmp_path_factory.mktemp("programs"), *TORCH, "transformers", "peft")
    yield running
    running.end()
