"""Whatever the bytes: a report or an AuditError, nothing else."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from sdpo_conformance.audit import AuditError, audit_run
from sdpo_conformance.audit.metrics import FIELDS
from sdpo_conformance.audit.reporting.audit_document import document, schema
from sdpo_conformance.audit.reporting.html import page

from .parts import SOUND, adapter, moved

GOOD = save(moved(adapter(1)))
HEADER = 8 + int.from_bytes(GOOD[:8], "little")

numbers = (
    st.floats()
    | st.integers()
    | st.sampled_from([0.0, 1.0, 1e308, -1e308, 5e-324, 10**400, "nan", "1e999", None, True])
)
rows = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(FIELDS, numbers),
        "step": st.integers(0, 6) | numbers,
        "sample": st.integers(0, 2),
    },
)
anything = st.recursive(
    numbers | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from([*FIELDS, "metadata", "per_step_metrics", "log_history", "x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)
documents = (
    st.lists(rows, max_size=8)
    | st.fixed_dictionaries({"log_history": st.lists(rows, max_size=8)})
    | st.fixed_dictionaries({"metadata": st.fixed_dictionaries({"per_step_metrics": st.lists(rows, max_size=8)})})
    | anything
)
training = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("alpha", "is_clip", "kl_reg_weight", "learning_rate", "steps_per_batch"), numbers),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz")
    save_file(adapter(1), path / "before.safetensors")
    (path / "after.safetensors").write_bytes(GOOD)
    return path


def look(folder: Path) -> None:
    report = audit_run(folder)
    jsonschema.validate(json.loads(json.dumps(document(report), allow_nan=False)), schema())
    page(report)


@settings(max_examples=150, deadline=None)
@given(metrics=documents, asked=training)
def test_any_metrics_and_settings(folder: Path, metrics: Any, asked: Any) -> None:
    (folder / "after.safetensors").write_bytes(GOOD)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "training.json").write_text(json.dumps(asked))
    with contextlib.suppress(AuditError):
        look(folder)


@settings(max_examples=100, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, HEADER + 40), st.integers(0, 255)), min_size=1, max_size=3),
    cut=st.none() | st.integers(0, len(GOOD)),
)
def test_any_damage_to_an_adapter(folder: Path, changes: list[tuple[int, int]], cut: int | None) -> None:
    data = bytearray(GOOD)
    for position, value in changes:
        data[position] = value
    (folder / "after.safetensors").write_bytes(data[:cut])
    (folder / "metrics.json").write_text(json.dumps(SOUND))
    (folder / "training.json").write_text("{}")
    with contextlib.suppress(AuditError):
        look(folder)
