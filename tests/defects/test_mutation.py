"""The mutation score counts what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.evidence.mutation import Score, Task, main, named_requirement, score, summarise, tasks

from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas import defects

ONE_OF_EACH_FAMILY = (
    "tail-bucket",
    "reverse-kl-floor-missing",
    "dropped-importance-sampling",
    "anchor-sign-flipped",
    "row-mean",
    "incoming-gradient-ignored",
    "gradient-through-bfloat16",
)


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_a_defect_is_caught_by_the_requirement_that_names_it(name: str) -> None:
    found = score(Task(name, Capability.LOSS, seed=0, profile="quick", everything=False))
    assert found.by_named
    assert found.caught[found.named] >= 1


def test_the_naming_requirement_is_the_first_that_the_entry_is_tested_through() -> None:
    defect = defects.find("support-past-64-dropped")
    assert named_requirement(defect, Capability.LOSS) == "GJS-1"
    assert named_requirement(defects.find("hidden-remainder-dropped"), Capability.FUSED) == "FUS-6"
    assert named_requirement(defects.find("loss-as-float"), Capability.DIVERGENCE) is None


def test_the_first_seed_is_judged_by_everything_and_the_others_by_the_naming_requirement() -> None:
    work = tasks(["alpha-swapped"], [Capability.LOSS], "quick", 3)
    assert [(task.seed, task.everything) for task in work] == [(0, True), (1, False), (2, False)]


def test_one_entry_of_a_defect_is_judged_by_everything() -> None:
    work = tasks(["alpha-swapped"], list(Capability), "quick", 1)
    assert [task.entry for task in work if task.everything] == [Capability.LOSS]
    assert len(work) > 1


def test_a_miss_is_told_with_its_seeds() -> None:
    caught = Score("a", "compute_sdpo_loss", 0, "IS-2", True, {"IS-2": 3}, (), 0.1)
    missed = Score("a", "compute_sdpo_loss", 1, "IS-2", True, {"IS-3": 3}, (), 0.1)
    blamed_elsewhere = Score("a", "compute_sdpo_loss", 2, "IS-2", True, {"IS-2": 3}, ("IS-2",), 0.1)
    summary = summarise([caught, missed, blamed_elsewhere])
    assert (summary.runs, summary.caught, summary.named) == (3, 3, 1)
    assert summary.missed == ("a through compute_sdpo_loss, IS-2: seeds 1, 2",)


def test_the_command_writes_its_scores(tmp_path: Path) -> None:
    target = tmp_path / "scores.json"
    options = ["--profile", "quick", "--jobs", "1", "--named-only", "--entry", "compute_sdpo_loss"]
    assert main([*options, "--only", "row-mean", "--json", str(target)]) == 0
    content = json.loads(target.read_text())
    assert content["summary"]["named"] == content["summary"]["runs"] == 1
    assert content["scores"][0]["caught"]["RED-1"] >= 1


def test_an_unknown_defect_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--only", "row-meen"])
    assert caught.value.code == 2
    assert "did you mean row-mean" in capsys.readouterr().err
