"""The catalogue is complete in itself: words, requirements, citations, executable forms."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.claas import defects
from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.defects.dialects import DIALECTS
from sdpo_conformance.specs.claas.sharded.defects import sharded_catalogue

CATALOGUE = defects.catalogue()
by_name = pytest.mark.parametrize("defect", [*CATALOGUE.values(), *DIALECTS], ids=lambda defect: defect.name)


def test_it_holds_enough_of_each_kind() -> None:
    trainers = [one for one in CATALOGUE.values() if Capability.DISTILL in one.capabilities]
    assert len(trainers) >= 25
    assert sum(Capability.FUSED in one.capabilities for one in CATALOGUE.values()) >= 60
    assert len(CATALOGUE) == sum(len(defects.of_family(family)) for family in defects.FAMILIES), "a name twice"
    assert not set(CATALOGUE) & set(sharded_catalogue()), "a name means one defect, on a mesh or off it"


@by_name
def test_the_words_are_sentences(defect: Defect) -> None:
    for words in (defect.sentence, defect.fix):
        assert words.endswith(".")
        assert words == words.strip()
    assert defect.usable_for == "" or defect.usable_for.endswith(".")


@by_name
def test_it_violates_known_requirements(defect: Defect) -> None:
    known = find_spec("claas").requirements()
    assert defect.violates
    for requirement in defect.violates:
        assert requirement in known, requirement
    judged = {capability for requirement in defect.violates for capability in known[requirement].capabilities}
    assert set(defect.capabilities) <= judged, "an entry that none of its requirements is tested through"


@by_name
def test_it_offers_its_capabilities_and_no_others(defect: Defect) -> None:
    implementation = defect.implementation()
    offered = {capability for capability in Capability if callable(getattr(implementation, capability.value, None))}
    assert offered == set(defect.capabilities)


@by_name
def test_it_differs_from_a_right_implementation(defect: Defect) -> None:
    assert defect.touched


def test_every_source_is_cited_by_a_defect() -> None:
    cited = {citation.reference for one in (*CATALOGUE.values(), *DIALECTS) for citation in one.seen}
    known = json.loads((files("sdpo_conformance.specs.claas.defects") / "sources.json").read_text(encoding="utf-8"))
    assert cited == set(known)
    for reference, entry in known.items():
        repository, number = reference.split("#")
        assert entry["url"] in {f"https://github.com/{repository}/{kind}/{number}" for kind in ("issues", "pull")}
        assert entry["title"]


def test_an_unknown_name_is_answered_with_a_near_one() -> None:
    with pytest.raises(KeyError) as caught:
        defects.load("droped-importance-sampling")
    assert "did you mean dropped-importance-sampling" in str(caught.value)


def test_two_defects_of_different_parts_combine() -> None:
    both = defects.find("alpha-swapped+dropped-importance-sampling")
    assert both.touched == {"mixture", "jensen_shannon", "ratio"}
    assert both.violates[0] == "GJS-3"
    assert "IS-2" in both.violates


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("alpha-swapped", "alpha-swapped-in-mixture"),
        ("logprob-unnormalised", "top-k-of-logits"),
        ("no-refresh", "dropped-importance-sampling"),
    ],
)
def test_defects_that_are_not_independent_do_not_combine(first: str, second: str) -> None:
    with pytest.raises(ValueError, match=first):
        defects.find(f"{first}+{second}")
