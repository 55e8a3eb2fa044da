"""Finding an implementation: one line for every way to fail, exit status 2, nothing written elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sdpo_conformance import RunError, run
from sdpo_conformance.judging.implementation import LoadingError, load_implementation
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs import find_spec


def test_the_bundled_reference_offers_everything() -> None:
    found = load_implementation("reference", find_spec("claas"))
    assert set(found.offered) == {Capability(name) for name in find_spec("claas").entries}


def test_an_object_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "class Loss:\n    @staticmethod\n    def compute_sdpo_loss(i): return {}\nloss = Loss()\n"
    )
    assert load_implementation(f"{tmp_path / 'mine.py'}:loss", find_spec("claas")).offered == (Capability.LOSS,)


def test_a_file_may_import_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("def compute_sdpo_loss(i): return {}\n")
    (tmp_path / "mine.py").write_text("from neighbour_of_mine import compute_sdpo_loss\n")
    assert load_implementation(str(tmp_path / "mine.py"), find_spec("claas")).offered == (Capability.LOSS,)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise RuntimeError('no GPU driver')", r"raised RuntimeError at mine.py:1: no GPU driver"),
        ("import sys; sys.exit(4)", r"raised SystemExit at mine.py:1: 4"),
        ("def f(:", r"raised SyntaxError at mine.py:1"),
        ("import no_such_dependency", r"raised ModuleNotFoundError at mine.py:1: No module named"),
        ("x = 1", r"offers nothing that the CLaaS spec can call: looked for compute_sdpo_loss.*sdpo-conformance init"),
        ("def compute_spdo_loss(i): ...", r"its compute_spdo_loss: did you mean compute_sdpo_loss\?"),
        ("compute_sdpo_loss = {}", r"its compute_sdpo_loss is a dict, expected a function"),
        ("def update_teacher(t, s, rate): ...", r"its update_teacher is an entry of another spec: --spec"),
        (
            "class Mine:\n    def compute_sdpo_loss(self, i): ...\nmine = Mine()",
            r"its mine has compute_sdpo_loss: name \S+mine.py:mine$",
        ),
        ("from . import neighbour", r"attempted relative import"),
        ("def compute_sdpo_loss(i): ...\nSDPO_CLAIMS = {'dtypes': 'float32'}", r"must be a list, as in \['float32'\]"),
        ("def compute_sdpo_loss(i): ...\nSDPO_CLAIMS = {'devices': 'cuda'}", r"must be a list, as in \['cuda'\]"),
        ("def compute_sdpo_loss(i): ...\nSDPO_CLAIMS = {'mesh': 2}", r"must be a list"),
        ("def compute_sdpo_loss(i): ...\nSDPO_CLAIMS = {'dtype': 1}", r"unknown entries \['dtype'\]"),
        ("def compute_sdpo_loss(i): ...\nSDPO_CLAIMS = {'dtypes': ['float8']}", r"must name some of"),
        ("def compute_sdpo_loss(i): ...\nSDPO_CLAIMS = {'max_steps_per_batch': 0}", r"positive integer"),
        ("def compute_sdpo_loss(i): ...\nSDPO_CLAIMS = {'expected_failures': {'IS-2': ''}}", r"non-empty reasons"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, source: str, words: str) -> None:
    (tmp_path / "mine.py").write_text(source + "\n")
    with pytest.raises(LoadingError, match=words) as raised:
        load_implementation(str(tmp_path / "mine.py"), find_spec("claas"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ("compute_sdpo_loss", r"mine.py:compute_sdpo_loss is a function: name \S+mine.py alone$"),
        ("other", r"is a function: name \S+mine.py alone, with other under one of these names"),
        ("Mine", r"mine.py:Mine is a class whose compute_sdpo_loss needs an instance"),
    ],
)
def test_what_is_wrong_with_an_object(tmp_path: Path, attribute: str, words: str) -> None:
    functions = "def compute_sdpo_loss(i): ...\nother = compute_sdpo_loss\n"
    (tmp_path / "mine.py").write_text(functions + "class Mine:\n    def compute_sdpo_loss(self, i): ...\n")
    with pytest.raises(LoadingError, match=words):
        load_implementation(f"{tmp_path / 'mine.py'}:{attribute}", find_spec("claas"))


def test_a_file_of_a_package_is_told_its_name(tmp_path: Path) -> None:
    (tmp_path / "mypkg").mkdir()
    (tmp_path / "mypkg" / "__init__.py").touch()
    (tmp_path / "mypkg" / "loss.py").write_text("from .kernels import compute_sdpo_loss\n")
    with pytest.raises(LoadingError, match=r"part of a package: name the module mypkg\.loss, in "):
        load_implementation(str(tmp_path / "mypkg" / "loss.py"), find_spec("claas"))


def test_a_module_that_changes_the_folder_is_brought_back(here: Path) -> None:
    (here / "mine.py").write_text("import os\nos.chdir('/')\ndef compute_sdpo_loss(i): ...\n")
    load_implementation("mine.py", find_spec("claas"))
    assert Path.cwd() == here


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("no_such_module.loss", "no module 'no_such_module'.*searched"),
        ("json:nothing", "has no attribute 'nothing'"),
        ("nowhere/loss.py", r"nowhere/loss.py does not exist \(looked in"),
        ("defect:no-such-defect", "no defect is called .no-such-defect."),
        ("", "no implementation was named"),
        (".relative", "relative"),
    ],
)
def test_what_is_wrong_with_a_name(target: str, words: str) -> None:
    with pytest.raises(LoadingError, match=words) as raised:
        load_implementation(target, find_spec("claas"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("target", "spec", "words"),
    [
        ("sdpo_implementations.triton_fused", "trl", r"computes CLaaS's loss, not TRL's; bundled for the spec trl: .*"),
        (
            "sdpo_implementations.reference.trl",
            "claas",
            r"computes TRL's loss, not CLaaS's; bundled for the spec claas",
        ),
        (
            "sdpo_implementations.reference.trl",
            "lasgroup",
            r"computes TRL's loss, not lasgroup's; .*reference.lasgroup",
        ),
    ],
)
def test_what_is_bundled_for_another_spec(target: str, spec: str, words: str) -> None:
    """By its full path too: it would fail rule by rule at the first field that it does not know."""
    with pytest.raises(LoadingError, match=words) as raised:
        load_implementation(target, find_spec(spec))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["reference", "triton_fused"])
@pytest.mark.parametrize("spec", ["claas", "lasgroup", "trl", "ms-swift", "verl-topk"])
def test_each_spec_has_both_bundled(name: str, spec: str) -> None:
    pytest.importorskip("triton")
    assert Capability.LOSS in load_implementation(name, find_spec(spec)).offered


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(LoadingError, match=r"is a folder, expected a \.py file"):
        load_implementation(f"{tmp_path}/", find_spec("claas"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_that_cannot_happen_says_why(here: Path) -> None:
    with pytest.raises(RunError, match="no module 'no_such_module'"):
        run("no_such_module.loss")
    with pytest.raises(RunError, match="no requirement or family 'IZ'"):
        run("reference", only=["IZ"])
    with pytest.raises(RunError, match="no profile 'slow'"):
        run("reference", profile="slow")
    with pytest.raises(RunError, match="no dtype 'int8'"):
        run("reference", dtypes=["int8"])


def test_an_import_that_crashes_is_said_to(here: Path) -> None:
    (here / "mine.py").write_text("import ctypes; ctypes.string_at(0)\n")
    with pytest.raises(RunError, match="crashed the process \\(SIGSEGV\\)"):
        run("mine.py")


def test_a_foreign_folder_is_left_alone(here: Path) -> None:
    (here / "results").mkdir()
    (here / "results" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(RunError, match="holds files that no run of this suite wrote"):
        run("reference", out="results")
    assert (here / "results" / "thesis.txt").read_text() == "irreplaceable"


@pytest.mark.skipif("torch" in sys.modules and __import__("torch").cuda.is_available(), reason="has a GPU")
def test_cuda_without_a_gpu(here: Path) -> None:
    with pytest.raises(RunError, match="torch sees no CUDA device"):
        run("reference", device="cuda")
