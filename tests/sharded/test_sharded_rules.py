"""Rules on a mesh: a few defects of each axis are caught, and right losses of other methods are not accused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.sharded.sharded_kills import judge

from sdpo_conformance.judging.profiles import PROFILES
from sdpo_conformance.protocol import Capability
from sdpo_conformance.sharded.mesh import MeshShape
from sdpo_conformance.sharded.pool import Pool
from sdpo_conformance.specs.claas.sharded.defects import sharded_catalogue
from sdpo_conformance.specs.claas.sharded.sharded_rule import sharded_rules

RIGHT = Path(__file__).parent / "right"
SAMPLE = (
    "local-logsumexp",
    "padding-adds-exp-0",
    "picks-summed-again",
    "hidden-gradient-not-summed",
    "top-k-ids-local",
    "mean-of-rank-means",
    "empty-rank-raises",
    "metrics-reduced-twice",
    "factor-of-cp-twice",
    "mask-cut-otherwise",
)


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[str, Pool]]:
    found = {mesh: Pool("reference", MeshShape.parse(mesh)) for mesh in ("tp=2", "dp=2", "cp=2")}
    yield found
    for pool in found.values():
        pool.close()


def test_every_defect_names_a_rule_that_is_judged_on_its_mesh() -> None:
    rules = sharded_rules()
    assert len(sharded_catalogue()) >= 60
    for defect in sharded_catalogue().values():
        rule = rules[defect.violates[0]]
        assert rule.applies(MeshShape.parse(defect.mesh)), defect
        assert set(defect.capabilities) & set(rule.capabilities), defect


@pytest.mark.parametrize("name", SAMPLE)
def test_a_defect_is_caught_by_its_rule(name: str, pools: dict[str, Pool]) -> None:
    defect = sharded_catalogue()[name]
    rule = sharded_rules()[defect.violates[0]]
    assert judge(pools[defect.mesh], f"defect:{name}", rule, defect.capabilities[0])


def test_log_probs_with_a_graph_are_refused(pools: dict[str, Pool]) -> None:
    target = f"{Path(__file__).with_name('unruly.py')}:keeps_a_graph"
    assert "graph" in judge(pools["tp=2"], target, sharded_rules()["VP-10"], Capability.RESPONSE_LOGPROBS)


@pytest.mark.parametrize(
    ("name", "mesh", "rule"),
    [
        ("all_gather", "tp=2", "VP-2"),
        ("one_all_reduce", "tp=2", "VP-3"),
        ("reduce_scatter", "tp=2", "VP-3"),
        ("dtensor", "tp=2", "VP-2"),
        ("differentiable_reduce", "dp=2", "DP-1"),
        ("triton_fused", "tp=2", "VP-9"),
    ],
)
def test_right_by_another_method(name: str, mesh: str, rule: str, pools: dict[str, Pool]) -> None:
    target = name if name == "triton_fused" else str(RIGHT / f"{name}.py")
    assert not judge(pools[mesh], target, sharded_rules()[rule], Capability.FUSED, PROFILES["check"])
