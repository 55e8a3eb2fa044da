"""The catalogue is complete in itself: words, requirements, citations, executable forms."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.claas import defects
from sdpo_conformance.specs.claas.defects.dialects import DIALECTS
from sdpo_conformance.specs.claas.sharded.defects import sharded_catalogue

CATALOGUE = defects.catalogue()
EVERY = (*CATALOGUE.values(), *DIALECTS)


def test_it_holds_enough_of_each_kind() -> None:
    trainers = [one for one in CATALOGUE.values() if Capability.DISTILL in one.capabilities]
    assert len(trainers) >= 25
    assert sum(Capability.FUSED in one.capabilities for one in CATALOGUE.values()) >= 60
    assert len(CATALOGUE) == sum(len(defects.of_family(family)) for family in defects.FAMILIES), "a name twice"
    assert not set(CATALOGUE) & set(sharded_catalogue()), "a name means one defect, on a mesh or off it"


def test_the_words_are_sentences() -> None:
    def is_sentence(words: str) -> bool:
        return words.endswith(".") and words == words.strip()

    assert [one.name for one in EVERY if not (is_sentence(one.sentence) and is_sentence(one.fix))] == []
    assert [one.name for one in EVERY if one.usable_for and not one.usable_for.endswith(".")] == []


def test_each_violates_known_requirements() -> None:
    known = find_spec("claas").requirements()
    assert [one.name for one in EVERY if not one.violates or not set(one.violates) <= set(known)] == []
    for defect in EVERY:
        judged = {capability for requirement in defect.violates for capability in known[requirement].capabilities}
        assert set(defect.capabilities) <= judged, f"{defect.name}: none of its requirements is tested through an entry"


def test_each_offers_its_capabilities_and_no_others() -> None:
    for defect in EVERY:
        implementation = defect.implementation()
        offered = {capability for capability in Capability if callable(getattr(implementation, capability.value, None))}
        assert offered == set(defect.capabilities), defect.name


def test_each_differs_from_a_right_implementation() -> None:
    assert [one.name for one in EVERY if not one.touched] == []


def test_every_source_is_cited_by_a_defect() -> None:
    cited = {citation.reference for one in EVERY for citation in one.seen}
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
