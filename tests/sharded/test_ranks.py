"""What becomes of a run when a rank raises, hangs or dies, and of the ranks when the run ends."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from sdpo_conformance.inputs.choices import SeededSource
from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.protocol import Capability, Claims
from sdpo_conformance.running.mesh_run import check_claims, run_on_mesh
from sdpo_conformance.running.options import RunError, RunOptions
from sdpo_conformance.sharded import pool as pools
from sdpo_conformance.sharded.mesh import MeshShape
from sdpo_conformance.sharded.pool import Pool, PoolError
from sdpo_conformance.sharded.rank import Answer, Ready, Request
from sdpo_conformance.specs.claas.corners import NEUTRAL
from sdpo_conformance.specs.claas.sharded.cut import part_of
from sdpo_conformance.specs.claas.sharded.draw import PLAIN, build_sharded

TP2 = MeshShape.parse("tp=2")
UNRULY = str(Path(__file__).with_name("unruly.py"))


def requests() -> list[Request]:
    case = build_sharded(SeededSource("1"), NEUTRAL, Capability.LOSS, [torch.float32], TP2, PLAIN)
    return [Request("compute_sdpo_loss", part_of(case, rank)) for rank in range(2)]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", ("RuntimeError on rank 1", "had enough")),
        ("leaves_early", ("hangs", "rank 0", "all_reduce")),
        ("dies", ("rank 1 died", "exit status 3", "rank 0 waited in all_reduce")),
        ("sleeps", ("hangs", "rank 1 waits in")),
    ],
)
def test_a_lost_rank_is_named_and_replaced(name: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "COLLECTIVE_SECONDS", 2.0)
    with Pool(f"{UNRULY}:{name}", TP2, call_seconds=4.0) as pool:
        pool.start()
        first = [member.process.pid for member in pool._members]
        with pytest.raises(ImplementationError) as caught:
            pool.call(requests())
        text = f"{caught.value.summary}\n{caught.value.details}"
        assert all(word in text for word in words), text
        assert not any(alive(pid) for pid in first)
        pool.target = "reference"
        assert all(isinstance(answer, Answer) for answer in pool.call(requests()))
        last = [member.process.pid for member in pool._members]
    time.sleep(0.2)
    assert not any(alive(pid) for pid in last)


def test_an_implementation_that_cannot_be_loaded_is_one_line() -> None:
    with Pool("nowhere.to.be.found", TP2) as pool, pytest.raises(PoolError, match="no module 'nowhere'"):
        pool.start()


@pytest.mark.parametrize("text", ["tp", "tp=0", "tp=1", "pp=2", "tp=2,tp=2", "tp=64", "", "tp=two"])
def test_a_mesh_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--mesh"):
        MeshShape.parse(text)


def test_another_spec_has_no_requirements_on_ranks() -> None:
    with pytest.raises(RunError, match="those of claas, not of --spec trl"):
        run_on_mesh("reference", "tp=2", RunOptions(spec="trl"))


@pytest.mark.parametrize(("claimed", "words"), [((), "no axis"), (("dp", "cp"), "the axes dp, cp")])
def test_an_axis_that_is_not_claimed_is_one_line(claimed: tuple[str, ...], words: str) -> None:
    with pytest.raises(RunError, match=f"loss claims {words} in .*, --mesh tp=2 cuts tp"):
        check_claims("loss", TP2, Ready(("compute_sdpo_loss",), Claims(mesh=claimed)))


def test_where_ranks_stand() -> None:
    mesh = MeshShape.parse("tp=2,dp=2")
    assert str(mesh) == "dp=2,tp=2"
    assert [(mesh.coordinate(r, "dp"), mesh.coordinate(r, "tp")) for r in range(4)] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_who_raises_on_the_ranks_is_shown_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def compute_sdpo_loss(i):\n    i.mesh\n    raise RuntimeError('no')\n")
    report = run_on_mesh("mine.py", "tp=2", RunOptions(mesh="tp=2", profile="quick", only=("VP-1",)))
    assert report.results["places"] == {"compute_sdpo_loss": "mine.py:1"}
    assert report.failures[0]["failure"]["where"] == "mine.py:3"
