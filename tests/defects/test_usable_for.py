"""Usable for: said only where inputs of that kind were judged, and right."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.defects.test_diagnosis import LOSS, failures, record
from tests.defects.usable_kinds import KINDS
from tests.evidence.spec_scores import known_defects
from tests.evidence.usable_for import ENOUGH, ENTRIES, shown

from sdpo_conformance.inputs.choices import SeededSource
from sdpo_conformance.judging.call import evaluate
from sdpo_conformance.judging.compare import compare
from sdpo_conformance.judging.records import Record, Status
from sdpo_conformance.protocol import Capability
from sdpo_conformance.report.results import shown_usable
from sdpo_conformance.reproduction.failure import save_observed
from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.claas import defects
from sdpo_conformance.specs.claas.diagnosis.diagnose import Diagnosis
from sdpo_conformance.specs.claas.diagnosis.run import described, diagnose_run, of_trainer
from sdpo_conformance.specs.requirement import Level
from sdpo_conformance.specs.shared.rule import ALL

WHOLE: dict[str, Any] = {"only": [], "first_cause": False, "profile": "quick", "dtypes": ["float32"]}


def usable(diagnosis: Diagnosis) -> str:
    """The line that a diagnosis of as many failures gives."""
    _, match = described(diagnosis, diagnosis.total, "")
    assert match is not None
    return str(match["usable_for"])


def test_every_line_about_a_loss_names_a_kind_of_input() -> None:
    known = defects.catalogue().values()
    lines = {one.usable_for for one in known if set(ENTRIES) & set(one.capabilities) and one.usable_for}
    assert lines == set(KINDS)


@pytest.mark.parametrize("name", ["denominator-floor-missing", "dropped-importance-sampling", "row-mean"])
def test_inputs_of_the_kind_are_judged(name: str) -> None:
    assert shown(defects.find(name), LOSS) == ENOUGH


def test_another_number_is_not_usable_for_the_usual_one() -> None:
    hard_coded = defects.find("ratio-cap-hard-coded")
    whole = frozenset({0})
    assert usable(Diagnosis((hard_coded,), (), whole, 1, 0.0)) == "Usable for: is_clip = 5.0, the default."
    assert usable(Diagnosis((hard_coded.at(5.0),), (), whole, 1, 0.0)) == "Usable for: is_clip = 5.0, the default."
    assert usable(Diagnosis((hard_coded.at(3.0),), (), whole, 1, 0.0)) == ""
    assert defects.find("ratio-ppo-clip").at(0.3).usable_for


def test_what_cannot_be_told_apart_has_to_agree() -> None:
    one, other = defects.find("reverse-kl-floor-missing"), defects.find("alpha-one-limit")
    assert one.usable_for != other.usable_for
    assert usable(Diagnosis((one,), (), frozenset({0}), 1, 0.0))
    assert usable(Diagnosis((one,), (other,), frozenset({0}), 1, 0.0)) == ""


def test_another_entry_that_fails_otherwise_is_not_usable(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    observed = failures(defects.find("dropped-importance-sampling"))
    failed = [record(tmp_path, one, index) for index, one in enumerate(observed, start=2)]
    assert diagnose_run(tmp_path, failed, (LOSS,))["usable_for"]  # type: ignore[index]
    failed.append(Record("STEP-9", Capability.DISTILL.value, Level.MUST, Status.FAILED, failure={"shows": "state"}))
    assert diagnose_run(tmp_path, failed, (LOSS, Capability.DISTILL))["usable_for"] == ""  # type: ignore[index]


def test_a_trainer_with_another_fault_is_not_usable() -> None:
    evidence = {"wrong": 4, "explained": 4, "nearly": 0, "alike": [], "located": {}}
    evidence["mistake"] = {"name": "no-refresh", "value": None, "in_loss": False}

    def failure(requirement: str, shows: str) -> Record:
        found = {"evidence": evidence, "shows": shows}
        return Record(requirement, Capability.DISTILL.value, Level.MUST, Status.FAILED, failure=found)

    _, match = of_trainer([failure("STEP-2", "gradient"), failure("STEP-8", "gradient")], "")
    assert match is not None
    assert match["usable_for"] == "Usable for: steps_per_batch = 1."
    _, match = of_trainer([failure("STEP-2", "gradient"), failure("STEP-9", "state")], "")
    assert match is not None
    assert match["usable_for"] == ""


def test_another_spec_is_not_usable_beside_an_unexplained_fault(tmp_path: Path) -> None:
    spec = find_spec("lasgroup")
    wrong = known_defects(spec)["lasgroup-always-token-mean"].wrong
    corners, case = (importlib.import_module(f"{spec.package}.{name}") for name in ("corners", "case"))
    failed: list[Record] = []
    for seed in range(20):
        drawn = case.build(SeededSource(str(seed)), corners.EVERYTHING, [torch.float32])
        outcome = evaluate(wrong, LOSS, drawn)
        if compare(drawn, outcome, ALL, drawn.expectations) is not None:
            found = {"observed": save_observed(tmp_path, str(seed), drawn, outcome), "kind": "disagreement"}
            failed.append(Record("LAS-RED-6", LOSS.value, Level.MUST, Status.FAILED, failure=found))
    assert spec.parts.diagnose(tmp_path, failed, (LOSS,))["usable_for"] == "Usable for: loss_agg_mode = token-mean."  # type: ignore[index]
    beside = {"kind": "disagreement", "probe": "unmodified"}
    failed.append(Record("LAS-GRAD-3", LOSS.value, Level.MUST, Status.FAILED, failure=beside))
    assert spec.parts.diagnose(tmp_path, failed, (LOSS,))["usable_for"] == ""  # type: ignore[index]


@pytest.mark.parametrize(
    ("words", "changed", "said"),
    [
        ("Usable for: alpha < 1.", {}, True),
        ("Usable for: alpha < 1.", {"only": ["RKL-1"]}, False),
        ("Usable for: alpha < 1.", {"first_cause": True}, False),
        ("Usable for: alpha < 1.", {"profile": "check"}, False),
        ("Usable for: float32 input.", {}, True),
        ("Usable for: bfloat16 input.", {}, False),
        ("Usable for: bfloat16 input.", {"dtypes": ["float32", "bfloat16"]}, True),
    ],
)
def test_a_run_of_less_does_not_show_it(words: str, changed: dict[str, Any], said: bool) -> None:
    assert shown_usable(words, [], {**WHOLE, **changed}) is said


def test_rules_out_of_time_do_not_show_it() -> None:
    late = Record("GJS-1", LOSS.value, Level.MUST, Status.PASSED, out_of_time=True)
    assert not shown_usable("Usable for: alpha < 1.", [late], WHOLE)
