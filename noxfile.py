"""Every job of the project. ``nox --list`` shows them; ``nox --no-venv`` runs them in the environment at hand."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import nox
from nox.virtualenv import PassthroughEnv

nox.options.sessions = ["conformance"]
nox.options.reuse_venv = "yes"
nox.needs_version = ">=2024.3"

CONSTRAINTS = "constraints.txt"
SOURCES = ("conformance", "implementations")


def prepare(session: nox.Session, *requirements: str) -> dict[str, str]:
    """Install into the session's own environment; without one, run from the checkout."""
    if isinstance(session.virtualenv, PassthroughEnv):
        here = [str(Path(source).resolve()) for source in SOURCES]
        folders = [str(Path(name).resolve()) for name in requirements if Path(name).is_dir() and name != "."]
        existing = os.environ.get("PYTHONPATH")
        return {"PYTHONPATH": os.pathsep.join([*here, *folders, *([existing] if existing else [])])}
    session.install("-q", "-c", CONSTRAINTS, *requirements)
    return {}


def split_with(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Take ``--with=X`` and ``--with X`` out of the arguments."""
    extras, rest = [], []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if argument.startswith("--with="):
            extras.append(argument.removeprefix("--with="))
        elif argument == "--with":
            if not pending:
                raise SystemExit("nox: --with needs a path or a requirement, as in --with=./mypkg")
            extras.append(pending.pop(0))
        else:
            rest.append(argument)
    return extras, rest


def implementations(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Take ``--impl=X`` and ``--impl X`` out of the arguments."""
    found, rest = [], []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if argument.startswith("--impl="):
            found.append(argument.removeprefix("--impl="))
        elif argument == "--impl" and pending:
            found.append(pending.pop(0))
        else:
            rest.append(argument)
    return found, rest


def run(session: nox.Session, environment: dict[str, str], *arguments: str) -> None:
    """Run ``python -m sdpo_conformance`` and end with its exit status: 0, 1 or 2."""
    python = "python" if isinstance(session.virtualenv, PassthroughEnv) else str(Path(session.bin) / "python")
    status = subprocess.run(
        [python, "-m", "sdpo_conformance", *arguments],
        env={**os.environ, **environment},
        cwd=session.invoked_from,
        check=False,
    ).returncode
    if status:
        raise SystemExit(status)


@nox.session
def conformance(session: nox.Session) -> None:
    """Judge an implementation: nox -s conformance -- --impl=mypkg.loss --with=./mypkg [options of `run`]."""
    extras, rest = split_with(session.posargs)
    named, rest = implementations(rest)
    if len(named) > 1:
        raise SystemExit("nox: conformance judges one --impl; nox -s matrix takes several")
    target = named[0] if named else "reference"
    options = "trainer,triton" if target == "triton_fused" else "trainer"
    run(session, prepare(session, f".[{options}]", *extras), "run", target, *rest)


@nox.session
def tests(session: nox.Session) -> None:
    """The tests of the harness and of the bundled implementations: nox -s tests -- [pytest options]."""
    environment = {**prepare(session, "-e", ".[test]"), "PYTHONDONTWRITEBYTECODE": ""}  # many short processes
    # by the folder: a worker that goes on with its neighbours' models and cases need not make its own
    session.run("python", "-m", "pytest", "-n", "auto", "--dist", "worksteal", *session.posargs, env=environment)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and types."""
    environment = prepare(session, "-e", ".[test,lint]")
    session.run("ruff", "check", ".", env=environment)
    session.run("ruff", "format", "--check", ".", env=environment)
    session.run("mypy", env=environment)


@nox.session
def bench(session: nox.Session) -> None:
    """Compare speed: nox -s bench -- --impl=A --impl=B [options of `bench`]."""
    extras, rest = split_with(session.posargs)
    named, rest = implementations(rest)
    run(session, prepare(session, ".[trainer,bench,triton]", *extras), "bench", *(named or ["reference"]), *rest)


@nox.session
def matrix(session: nox.Session) -> None:
    """Every implementation against every requirement: nox -s matrix -- --impl=A --impl=B [options of `matrix`]."""
    extras, rest = split_with(session.posargs)
    named, rest = implementations(rest)
    run(session, prepare(session, ".[trainer,triton]", *extras), "matrix", *(named or ["reference"]), *rest)


@nox.session
def mutation(session: nox.Session) -> None:
    """Run every catalogued defect through the suite: nox -s mutation -- [options]."""
    environment = prepare(session, ".[trainer]")
    session.run("python", "-m", "tests.evidence.mutation", *session.posargs, env=environment)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation as a site in site/; a broken link fails."""
    environment = prepare(session, ".[docs]")
    session.run("python", "-m", "sphinx", "-W", "--keep-going", "-b", "html", "docs", "site", env=environment)
