"""Failures are explained by the defect that was planted, by pairs, by dialects, or not at all."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from tests.evidence.diagnosis_score import measure, random_pairs

from sdpo_conformance.judging.call import ImplementationError, evaluate
from sdpo_conformance.judging.compare import Disagreement, compare
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.judging.profiles import PROFILES
from sdpo_conformance.judging.records import Record, Status
from sdpo_conformance.protocol import Capability, Claims
from sdpo_conformance.report.terminal import led
from sdpo_conformance.reproduction.failure import failure_of, save_observed
from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.claas import defects
from sdpo_conformance.specs.claas.bounds import expectations
from sdpo_conformance.specs.claas.defects.defect import Defect, ExecutableDefect, entries, replacing
from sdpo_conformance.specs.claas.defects.loss_parts import Parts, jensen_shannon
from sdpo_conformance.specs.claas.diagnosis import diagnose, diagnose_run
from sdpo_conformance.specs.claas.diagnosis.observed import Observed, ObservedLoss, values_of
from sdpo_conformance.specs.claas.diagnosis.run import NO_MATCH, quality
from sdpo_conformance.specs.claas.loss_case import LossCase, recorded_cases
from sdpo_conformance.specs.claas.rules.aspects import ALL
from sdpo_conformance.specs.requirement import Level

LOSS = Capability.LOSS


def failures(defect: Defect, dtype: torch.dtype = torch.float32) -> list[Observed]:
    """Recorded cases, every fourth, on which a defect disagrees with the oracle."""
    function = getattr(defect.implementation(), LOSS.value)
    found = []
    for case, _ in islice(recorded_cases(), 5, None, 4):
        floats = {k: v.to(dtype) for k, v in case.tensors().items() if v.is_floating_point()}
        case = LossCase(replace(case.loss_input, **floats))
        outcome = evaluate(function, LOSS, case)
        if compare(case, outcome, ALL, expectations(case, LOSS)) is not None:
            found.append(ObservedLoss("GJS-1", LOSS, case, values_of(outcome)))
    return found


@pytest.mark.parametrize(
    "name",
    ["dropped-importance-sampling", "tail-bucket", "anchor-sign-flipped", "ratio-undetached", "row-mean"],
)
def test_a_planted_defect_is_named(name: str) -> None:
    observed = failures(defects.find(name))
    answer = diagnose(observed)
    assert answer is not None
    assert answer.complete
    assert name in {defect.name for defect in (*answer.defects, *answer.equivalent)}
    assert answer.error < 1e-5


def test_an_independent_implementation_of_a_defect_is_named() -> None:
    """Not the catalogue's own arithmetic: probabilities in place of logarithms."""

    def by_probabilities(w: object) -> torch.Tensor:
        p, q = w.log_p.exp(), w.log_q.exp()  # type: ignore[attr-defined]
        m = (p + q) / 2
        safe = torch.finfo(p.dtype).tiny
        on_teacher = (p * ((p + safe) / (m + safe)).log()).sum(-1)
        on_student = (q * ((q + safe) / (m + safe)).log()).sum(-1)
        return w.alpha * on_teacher + (1 - w.alpha) * on_student  # type: ignore[attr-defined]

    planted = Defect("planted", "", ("GJS-3",), "", change=replacing(jensen_shannon=by_probabilities))
    answer = diagnose(failures(planted))
    assert answer is not None
    assert answer.name == "mixture-half-and-half"
    assert answer.complete


def test_a_pair_is_named_when_one_does_not_explain_everything() -> None:
    answer = diagnose(failures(defects.find("dropped-importance-sampling+anchor-k2")))
    assert answer is not None
    assert answer.complete
    assert {defect.name for defect in answer.defects} == {"dropped-importance-sampling", "anchor-k2"}


def test_a_neighbour_that_the_bounds_let_pass_is_not_the_name() -> None:
    """On one on-policy case an offset of the divergence comes as near as the bound allows, and its own rule failed."""
    case = next(case for case, _ in recorded_cases() if case.name == "on_policy_alpha_0.3")
    outcome = evaluate(getattr(defects.find("terms-summed-in-float16").implementation(), LOSS.value), LOSS, case)
    answer = diagnose([ObservedLoss(rule, LOSS, case, values_of(outcome)) for rule in ("GJS-1", "GJS-6")])
    assert answer is not None
    assert answer.name == "terms-summed-in-float16"
    assert not answer.equivalent


@pytest.mark.parametrize("name", ["lasgroup-sdpo", "trl-sdpo", "gkd"])
def test_dialects_are_recognised(name: str) -> None:
    answer = diagnose(failures(defects.find(name)))
    assert answer is not None
    assert answer.kind == "dialect"
    assert name in {defect.name for defect in (*answer.defects, *answer.equivalent)}


def test_what_is_not_in_the_catalogue_is_not_matched() -> None:
    unknown = Defect("unknown", "", ("GJS-1",), "", change=replacing(jensen_shannon=lambda w: jensen_shannon(w).sin()))
    found = diagnose(failures(unknown))
    assert found is None or 2 * len(found.explained) < found.total


def test_the_number_in_a_defect_is_fitted() -> None:
    scaled = Defect("scaled", "", ("GJS-1",), "", change=replacing(jensen_shannon=lambda w: jensen_shannon(w) * 1.37))
    found = diagnose([one for one in failures(scaled) if one.case.loss_input.training.alpha < 1][:3])
    assert found is not None
    assert found.complete
    assert "divergence-scaled" in {defect.name for defect in (*found.defects, *found.equivalent)}
    assert any(defect.value == pytest.approx(1.37, rel=1e-4) for defect in found.defects)


def test_nothing_failed_nothing_diagnosed(tmp_path: Path) -> None:
    assert diagnose([]) is None
    assert diagnose_run(tmp_path, [], (LOSS,)) is None


def record(tmp_path: Path, observed: Observed, index: int) -> Record:
    """A failed record whose observation lies in a run's folder."""
    function = getattr(defects.load("dropped-importance-sampling"), LOSS.value)
    outcome = evaluate(function, LOSS, observed.case)
    name = save_observed(tmp_path, f"IS-{index}", observed.case, outcome)
    failure = {"observed": name, "probe": "values", "aspect": "loss", "got": "1", "secondary": False}
    return Record(f"IS-{index}", LOSS.value, Level.MUST, Status.FAILED, failure=failure)


def test_a_run_folder_is_diagnosed_in_words(tmp_path: Path) -> None:
    observed = failures(defects.find("dropped-importance-sampling"))
    (tmp_path / "records").mkdir()
    failed = [record(tmp_path, one, index) for index, one in enumerate(observed[:3], start=2)]
    found = diagnose_run(tmp_path, failed, (LOSS,))
    assert found is not None
    assert found["lines"][0].startswith("dropped-importance-sampling: explains 3 of 3 failures to 1e-")
    assert found["usable_for"] == "", "a ratio against the base returns the same on these, and is usable for nothing"
    assert found["matches"][0]["kind"] == "defect"
    assert found["first"][0] == "IS-2"
    assert set(found["because"]) == {"IS-3", "IS-4"} - set(found["first"])


def test_the_requirement_that_names_the_cause_leads_the_report() -> None:
    groups = [[{"requirement": name}] for name in ("GJS-1", "IS-1", "NUM-3", "IS-2")]
    shown, aside, caused = led(groups[:3], groups[3:], ["IS-2", "IS-1"], ["GJS-1"])
    assert [group[0]["requirement"] for group in shown] == ["IS-2", "IS-1", "NUM-3"]
    assert (aside, caused) == ([], ["GJS-1"])
    assert led(groups[:3], groups[3:], [], []) == (groups[:3], groups[3:], [])


@pytest.mark.parametrize("name", ["divided-by-constant", "divergence-divided-by-constant"])
def test_a_constant_count_is_wrong_on_the_control_too(name: str) -> None:
    """The rule about the count fails for another's sake, by its control; the catalogue lets it lead all the same."""
    rule = find_spec("claas").requirements()["RED-4"]
    subject = Subject(defects.find(name).implementation(), LOSS, Claims(), PROFILES["quick"])
    with pytest.raises(Disagreement) as caught:
        subject.run(rule)
    assert caught.value.secondary
    assert defects.find(name).violates[0] == rule.id


def test_no_match_is_said_plainly(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    failed = [Record("FUS-5", LOSS.value, Level.SHOULD, Status.FAILED, failure={})]
    found = diagnose_run(tmp_path, failed, (LOSS,))
    assert found is not None
    assert found["lines"] == [NO_MATCH]


@pytest.mark.parametrize("name", ["loss-as-float", "old-overwritten", "buffer-shared-between-calls"])
def test_failures_that_are_no_numbers_are_replayed(name: str) -> None:
    assert measure(name, LOSS, seed=0).right


BEFORE_A_HEAD = {
    one.name: one.capabilities[0]
    for one in defects.catalogue().values()
    if one.capabilities[0] in (Capability.RESPONSE_LOGPROBS, Capability.TEACHER_TOPK)
}


@pytest.mark.parametrize("name", BEFORE_A_HEAD)
def test_failures_before_a_head_are_named(name: str) -> None:
    found = measure(name, BEFORE_A_HEAD[name], seed=0)
    assert found.right
    assert found.explained == found.failures > 0


def test_an_entry_before_a_head_that_raises_leaves_its_input(tmp_path: Path) -> None:
    defect, rule = defects.find("top-k-above-vocabulary"), find_spec("claas").requirements()["TK-2"]
    subject = Subject(defect.implementation(), Capability.TEACHER_TOPK, Claims(), PROFILES["check"])
    with pytest.raises(ImplementationError) as caught:
        subject.run(rule)
    found = failure_of(
        tmp_path, "defect:top-k-above-vocabulary", "cpu", find_spec("claas"), rule, subject.entry, caught.value
    )
    assert found["words"].startswith("B=")
    assert (tmp_path / found["reproduction"]).is_file()
    assert (tmp_path / found["observed_head"]).is_file()


def test_pairs_are_drawn_by_seed() -> None:
    assert random_pairs(5, 3) == random_pairs(5, 3)
    assert random_pairs(5, 3) != random_pairs(5, 4)


@pytest.mark.parametrize(("error", "words"), [(0.0, "the last bit"), (3e-8, "1e-7"), (1e-7, "1e-7"), (0.4, "1")])
def test_errors_are_rounded_up_to_a_power_of_ten(error: float, words: str) -> None:
    assert quality(error) == words


def test_the_unchanged_parts_fail_nowhere() -> None:
    right = ExecutableDefect("right", entries(Parts(), (LOSS,)))
    for case, _ in recorded_cases():
        assert compare(case, evaluate(getattr(right, LOSS.value), LOSS, case), ALL, expectations(case, LOSS)) is None
