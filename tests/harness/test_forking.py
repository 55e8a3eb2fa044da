"""Work that is shared out among processes."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from sdpo_conformance.judging import forking


@pytest.fixture(autouse=True)
def three_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking.SHARING, "processes", 3)
    monkeypatch.setattr(forking, "may_fork", lambda device: device == "cpu")


def test_every_item_is_worked_on_once_and_by_several_processes() -> None:
    found = forking.shared_out(lambda part: [(item, os.getpid()) for item in part], range(10))
    assert sorted(item for part in found for item, _ in part) == list(range(10))
    assert len({pid for part in found for _, pid in part}) == 3


def test_fewer_items_than_processes() -> None:
    assert forking.shared_out(list, range(2)) == [[0], [1]]
    assert forking.shared_out(list, range(0)) == [[]]


def test_the_part_of_a_process_that_dies_is_worked_on_here() -> None:
    here = os.getpid()

    def work(part: Sequence[int]) -> list[int]:
        if 1 in part and os.getpid() != here:
            os._exit(3)
        return list(part)

    assert sorted(item for part in forking.shared_out(work, range(7)) for item in part) == list(range(7))


def test_a_fault_is_raised_here() -> None:
    def work(part: Sequence[int]) -> int:
        return sum(1 // item for item in part)

    with pytest.raises(ZeroDivisionError):
        forking.shared_out(work, (1, 0, 1))
