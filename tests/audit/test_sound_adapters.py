"""A few kinds of the false alarm count (tests/evidence/audit_false_alarms.py): trained soundly, and not accused."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from ..evidence.audit_false_alarms import runs


@pytest.mark.parametrize("kind", ["lora", "loha", "vera", "embedding", "adalora"])
def test_a_sound_run_of_this_kind_is_not_accused(kind: str) -> None:
    told = list(runs(1, (kind,)))
    assert told
    assert [(name, said) for name, said, _ in told if said] == []
