"""The requirements as tests of a user's own pytest: an id is a test, with -k, -x and --lf.

from sdpo_conformance import parametrize_with_requirements

@parametrize_with_requirements("mypkg.loss", profile="quick")
def test_sdpo(requirement):
    requirement.check()
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from sdpo_conformance.running.options import RunError, RunOptions
from sdpo_conformance.running.process import Report, run_with
from sdpo_conformance.specs import DEFAULT
from sdpo_conformance.specs.rule_index import rule_index

if TYPE_CHECKING:
    import pytest


class Shared:
    """One run for all tests: made by the first, of just the requirements that pytest selected."""

    def __init__(self, implementation: str, options: RunOptions) -> None:
        self.implementation, self.options = implementation, options
        self.wanted: tuple[str, ...] = ()
        self.report: Report | None = None
        self.error: Exception | None = None

    def records(self, id: str) -> list[dict[str, Any]]:
        """What the run found about a requirement."""
        if self.error is not None:
            raise self.error
        if self.report is None:
            chosen = tuple(dict.fromkeys([*self.wanted, id])) if self.wanted else (id,)
            try:
                self.report = run_with(self.implementation, replace(self.options, only=chosen))
            except Exception as error:
                self.error = error
                raise
        return [one for one in self.report.results["records"] if one["requirement"] == id]


@dataclass(frozen=True)
class RequirementTest:
    """One requirement of one implementation; ``check`` passes, fails, skips or xfails the test around it."""

    id: str
    statement: str
    shared: Shared

    def __repr__(self) -> str:
        return self.id

    def check(self) -> None:
        """Judge it: fails with expected, got and the reproduction; an expected failure is an xfail."""
        import pytest

        try:
            records = self.shared.records(self.id)
        except RunError as error:
            pytest.fail(f"the run could not happen: {error}", pytrace=False)
        if not records:
            pytest.skip(f"{self.id}: the implementation offers no entry that it is tested through")
        for record in records:
            status, reason = record["status"], record["reason"]
            if status == "failed":
                found = record["failure"]
                assert self.shared.report is not None
                program = found.get("reproduction")
                again = f"\nreproduce: python {self.shared.report.folder / program}" if program else ""
                said = f"{found.get('summary', '')}\non {found['words']}" if found.get("words") else found["summary"]
                pytest.fail(f"{self.id}: {self.statement}\n{said}{again}", pytrace=False)
            if status == "unexpected pass":
                pytest.fail(f"{self.id} passed although a failure is expected: {reason}", pytrace=False)
            if status == "internal error":
                pytest.fail(f"the suite itself failed on {self.id}: {reason}; please report it", pytrace=False)
        expected = [record for record in records if record["status"] == "expected failure"]
        if expected:
            pytest.xfail(expected[0]["reason"])
        if all(record["status"] == "not judged" for record in records):
            pytest.skip(f"{self.id}: {records[0]['reason']}")


def parametrize_with_requirements(
    implementation: str,
    *,
    spec: str = DEFAULT,
    profile: str = "quick",
    seed: int = 0,
    device: str = "cpu",
    dtypes: Sequence[str] = (),
    only: Sequence[str] = (),
    jobs: int = 0,
    call_timeout: float = 120.0,
    out: str | Path | None = None,
    xfails: str | Path | None = None,
) -> Callable[[Callable[..., Any]], pytest.MarkDecorator]:
    """A decorator: the test gets one ``requirement`` after the other and calls ``requirement.check()``. Ids are the
    spec's, so ``-k ID`` judges that one alone; all that were selected are judged in one run.

    Raises RunError for an option that no run can have.
    """
    import pytest

    options = RunOptions(
        spec=spec, profile=profile, seed=seed, device=device, dtypes=tuple(dtypes), only=tuple(only), jobs=jobs,
        call_timeout=call_timeout, out=Path(out) if out else Path(mkdtemp(prefix="sdpo-")) / "run",
        xfails=Path(xfails) if xfails else None,
    )  # fmt: skip
    names = {name.strip().upper() for name in only}
    rules = [rule for rule in rule_index(options.found_spec) if not names or {rule.id, rule.family} & names]
    shared = Shared(implementation, options)

    def decorate(test: Callable[..., Any]) -> Any:
        @functools.wraps(test)
        def with_selection(requirement: RequirementTest, request: pytest.FixtureRequest, **others: Any) -> Any:
            shared.wanted = shared.wanted or selected_ids(request, with_selection)
            return test(requirement=requirement, **({"request": request} if "request" in wanted else {}), **others)

        signature = inspect.signature(test)
        wanted = signature.parameters
        if "requirement" not in wanted:
            raise TypeError(f"{test.__name__} needs an argument named requirement")
        extra = [] if "request" in wanted else [inspect.Parameter("request", inspect.Parameter.KEYWORD_ONLY)]
        with_selection.__signature__ = signature.replace(parameters=[*wanted.values(), *extra])  # type: ignore[attr-defined]
        cases = [RequirementTest(rule.id, rule.statement, shared) for rule in rules]
        return pytest.mark.parametrize("requirement", cases, ids=[case.id for case in cases])(with_selection)

    return decorate


def selected_ids(request: Any, test: Callable[..., Any]) -> tuple[str, ...]:
    """The requirements that this pytest will run through ``test``, after -k and --lf."""
    found = [
        item.callspec.params["requirement"].id
        for item in request.session.items
        if getattr(getattr(item, "function", None), "__func__", getattr(item, "function", None)) is test
    ]
    return tuple(dict.fromkeys(found))
