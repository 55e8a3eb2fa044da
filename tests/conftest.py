"""What every test of the project shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from tests.programs import TORCH, Programs

settings.register_profile("same-each-time", derandomize=True)
settings.register_profile("explore")
settings.load_profile("same-each-time")
"""A test says something of the change at hand, not of the day; ``--hypothesis-profile=explore`` looks further."""


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    """Runs the programs that failures leave."""
    running = Programs(tmp_path_factory.mktemp("programs"), *TORCH)
    yield running
    running.end()
