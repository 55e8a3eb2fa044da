"""The pytest plugin: ``pytest -p sdpo_conformance.running.plugin --pyargs <the rules of a spec> --impl=...``.

Loads the implementation, makes one test per requirement and entry, isolates crashes in worker processes (forked, or
pytest-xdist's), and leaves a record of each verdict in the run's folder. Not an entry point: it would put its options
into every run of a user's environment.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest

from sdpo_conformance.files import write_json, write_text
from sdpo_conformance.judging.forking import SHARING, may_fork
from sdpo_conformance.judging.records import (
    Record,
    Status,
    forget_record,
    names_a_rule,
    read_record,
    record_key,
    write_record,
)
from sdpo_conformance.protocol import Capability
from sdpo_conformance.running.folder import ERROR, start_afresh
from sdpo_conformance.running.forked import Everything, judge_in_forks
from sdpo_conformance.running.options import RunError, RunOptions, declare, expected_failures

if TYPE_CHECKING:
    from sdpo_conformance.cases.case import Case
    from sdpo_conformance.judging.implementation import Implementation

SESSION = pytest.StashKey["Session"]()

ASKED = 3
"""Rules that a check judges after its first failure, for one that names the cause better."""


class Session:
    """What one process knows of the run."""

    def __init__(self, config: pytest.Config) -> None:
        from sdpo_conformance.judging.implementation import LoadingError, load_implementation

        self.worker = hasattr(config, "workerinput")
        self.target: str = config.option.impl
        self.options = read_options(config)
        self.folder = self.options.folder(self.target)
        self.spec = self.options.found_spec
        self.profile = self.options.found_profile
        self.seed = self.options.seed
        self.device = self.options.device
        self.only = self.options.only
        self.started = time.time()
        self.dtypes: dict[Capability, tuple[tuple[str, ...], dict[str, str]]] = {}
        self.forks = 0
        self.crash_log: IO[str] | None = None
        self.asked: set[str] | None = None
        if not self.worker:
            try:
                start_afresh(self.folder)
            except ValueError as error:
                raise pytest.UsageError(str(error)) from None
        try:
            self.check_device()
            self.implementation = self.with_expected_failures(load_implementation(self.target, self.spec))
            self.check_claims()
        except LoadingError as error:
            write_text(self.folder / ERROR, f"{error}\n")
            raise pytest.UsageError(str(error)) from None

    def with_expected_failures(self, found: Implementation) -> Implementation:
        """The implementation with those of ``--xfails`` beside the expected failures that it claims itself."""
        if self.options.xfails is None:
            return found
        expected = {**found.claims.expected_failures, **expected_failures(self.options.xfails, self.spec)}
        return replace(found, claims=replace(found.claims, expected_failures=expected))

    def check_device(self) -> None:
        from sdpo_conformance.judging.implementation import LoadingError

        if not self.device.startswith("cuda"):
            return
        import torch

        if not torch.cuda.is_available():
            raise LoadingError("--device=cuda: torch sees no CUDA device here; use --device=cpu, or run on a GPU box")

    def check_claims(self) -> None:
        from sdpo_conformance.judging.implementation import LoadingError

        claims = self.implementation.claims
        kind = self.device.partition(":")[0]
        if claims.devices is not None and kind not in claims.devices:
            raise LoadingError(
                f"{self.target} claims the devices {', '.join(claims.devices)} in SDPO_CLAIMS; name one with --device"
            )
        if unknown := sorted(set(claims.expected_failures) - set(self.spec.requirements())):
            raise LoadingError(f"{self.target}: SDPO_CLAIMS expects failures of unknown requirements {unknown}")

    def arm(self) -> None:
        """Leave a trace of crashes and hangs; one thread, because workers share the cores."""
        import torch

        from sdpo_conformance.judging.call import WATCHDOG

        folder = self.folder / "crashes"
        folder.mkdir(parents=True, exist_ok=True)
        self.crash_log = (folder / f"{os.getpid()}.log").open("w", encoding="utf-8")
        faulthandler.enable(self.crash_log)
        WATCHDOG.seconds, WATCHDOG.log = self.options.call_timeout, self.crash_log
        torch.set_num_threads(1)

    def dtypes_of(self, entry: Capability, scratch: Path | None) -> tuple[tuple[str, ...], dict[str, str]]:
        """What to judge an entry in, and what it refused; ``scratch``: where a case is kept before it is tried."""
        from sdpo_conformance.judging.dtypes import dtypes_for

        def keep(case: Case) -> None:
            if scratch is not None:
                case.save(scratch, scratch=True)

        if entry not in self.dtypes:
            found = dtypes_for(self.implementation, self.spec, entry, self.device, self.options.dtypes, keep)
            write_json(self.folder / "dtypes" / f"{entry.value}.json", found)
            self.dtypes[entry] = found
        return self.dtypes[entry]


def pytest_addoption(parser: pytest.Parser) -> None:
    declare(parser.getgroup("sdpo-conformance"))


def read_options(config: pytest.Config) -> RunOptions:
    """The run's options; a bad one is a usage error of one line."""
    try:
        return RunOptions.read(config.option)
    except RunError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main(config: pytest.Config) -> Iterator[None]:
    """Ask xdist for workers before it looks at its options."""
    if config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput"):
        if getattr(config.option, "numprocesses", None) is None:
            options = read_options(config)
            config.option.numprocesses = 0 if options.first_cause and not may_fork(options.device) else options.workers
        if getattr(config.option, "maxworkerrestart", None) is None:
            config.option.maxworkerrestart = "1000"
    return (yield)


def pytest_configure(config: pytest.Config) -> None:
    session = Session(config)
    config.stash[SESSION] = session
    if session.worker or not getattr(config.option, "numprocesses", None):
        session.arm()
    elif may_fork(session.device):
        session.forks = SHARING.processes = config.option.numprocesses
        config.option.dist = "no"
    elif session.options.first_cause:
        config.option.dist = "no"  # the implementation has started threads: one process, as the order counts
        session.arm()


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    run = session.config.stash[SESSION]
    if not run.forks or session.config.option.collectonly:
        return None
    preload()
    if run.options.first_cause:
        judge_in_forks(session, FirstCause(run, session.items), run.forks, run.arm)
        return True
    batches = [[item] for item in session.items if not of_trainer(item)]
    if trainers := [item for item in session.items if of_trainer(item)]:
        batches.insert(0, trainers)
    judge_in_forks(session, Judged(batches), run.forks, run.arm)
    return True


def of_trainer(item: pytest.Item) -> bool:
    """Whether a rule is about a trainer. These look at the same runs of it, which a process remembers: they are one
    batch."""
    return entry_of_item(item) is Capability.DISTILL


class Judged(Everything):
    """Every batch of a run, in order."""

    def put_back(self, batch: deque[pytest.Item]) -> None:
        preload_models(batch)
        super().put_back(batch)


class FirstCause:
    """The items of a check, for several workers: what one process finds that judges them in order (``follow``)."""

    def __init__(self, run: Session, items: Sequence[pytest.Item]) -> None:
        self.run = run
        self.left = deque(items)
        self.taken: list[pytest.Item] = []
        self.begun: deque[pytest.Item] = deque()
        self.failed = False
        self.following = False

    def take(self, idle: bool) -> deque[pytest.Item] | None:
        if self.failed and idle:
            self.ask_further()
        if self.failed or not self.left:
            return None
        batch = deque([self.left.popleft()])
        if of_trainer(batch[0]):
            batch.extend(item for item in self.left if of_trainer(item))
            self.left = deque(item for item in self.left if not of_trainer(item))
            self.begun = batch
        self.taken += batch
        return batch

    def put_back(self, batch: deque[pytest.Item]) -> None:
        self.taken = [item for item in self.taken if item not in batch]
        self.left.extendleft(reversed(batch))
        batch.clear()

    def judged(self, item: pytest.Item) -> None:
        self.failed = self.failed or self.ends(item)
        if self.failed and self.begun:
            self.put_back(self.begun)

    def ends(self, item: pytest.Item) -> bool:
        """Whether the item is a failure that names a rule; a crash is one."""
        record = self.record_of(item)
        return record is None or names_a_rule(record, self.run.spec.sweeps)

    def record_of(self, item: pytest.Item) -> Record | None:
        return read_record(self.run.folder, record_key_of(item))

    def ask_further(self) -> None:
        """Forget what was judged after the first failure; after the very first one, go on with the rules that may name
        its cause better."""
        first = next(index for index, item in enumerate(self.taken) if self.ends(item))
        for item in self.taken[first + 1 :]:
            forget_record(self.run.folder, record_key_of(item))
            (self.run.folder / "running" / f"{record_key_of(item)}.json").unlink(missing_ok=True)
        record = self.record_of(self.taken[first])
        if self.following or record is None:
            return
        self.following = True
        asked = asked_after(record, self.run)
        later = [*self.taken[first + 1 :], *self.left]
        self.left = deque(item for item in later if record_key_of(item) in asked)
        self.taken, self.failed = [], not self.left


def preload() -> None:
    """Import what every worker would import later."""
    # torch's first gradient of a given incoming one needs it
    importlib.import_module("torch.fx.experimental.symbolic_shapes")


def preload_models(left: Iterable[pytest.Item]) -> None:
    """Import what models need, where rules about a trainer are left of a batch whose worker died. The first worker
    imports it for itself, beside the others; each that takes its place would again."""
    if any(of_trainer(item) for item in left):
        for name in ("transformers", "peft"):
            with suppress(ImportError):
                importlib.import_module(name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = getattr(metafunc.function, "requirement", None)
    if found is None or "subject" not in metafunc.fixturenames:
        return
    offered = metafunc.config.stash[SESSION].implementation.offered
    entries = [entry for entry in found.capabilities if entry in offered]
    metafunc.parametrize("subject", entries or [None], ids=[e.value for e in entries] or ["absent"], indirect=True)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from sdpo_conformance.specs.requirement import selected

    session = config.stash[SESSION]
    try:
        wanted = selected(session.spec.requirements(), session.only)
    except ValueError as error:
        write_text(session.folder / ERROR, f"{error}\n")
        raise pytest.UsageError(str(error)) from None
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        found = requirement_of(item)
        absent = item.name.endswith("[absent]")
        (kept if found is not None and found.id in wanted and not absent else dropped).append(item)
    if session.options.first_cause:
        sweeps, families = session.spec.sweeps, list(session.spec.families)
        kept.sort(
            key=lambda item: (
                requirement_of(item).id in sweeps,
                families.index(requirement_of(item).family),
                requirement_of(item).number,
            )
        )
    items[:] = kept
    if dropped:
        config.hook.pytest_deselected(items=dropped)
    plan = [{"requirement": requirement_of(item).id, "entry": entry_of_item(item).value} for item in kept]
    write_json(session.folder / "plan.json", plan)


def requirement_of(item: pytest.Item) -> Any:
    return getattr(getattr(item, "function", None), "requirement", None)


def entry_of_item(item: Any) -> Capability:
    return Capability(item.callspec.params["subject"])


def record_key_of(item: Any) -> str:
    return record_key(requirement_of(item).id, entry_of_item(item).value)


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Any:
    """The implementation's entry that this test judges."""
    from sdpo_conformance.judging.examples import Subject

    session = request.config.stash[SESSION]
    entry = Capability(request.param)
    key = record_key(requirement_of(request.node).id, entry.value)
    running = session.folder / "running"
    running.mkdir(parents=True, exist_ok=True)
    write_json(running / f"{key}.json", {"pid": os.getpid()})
    # a crash during a check without forks is judged anew, apart
    scratch = None if session.options.first_cause and not session.forks else running / f"{key}.safetensors"
    dtypes, _ = session.dtypes_of(entry, scratch)
    return Subject(
        implementation=session.implementation.object,
        entry=entry,
        claims=session.implementation.claims,
        profile=session.profile,
        seed=session.seed,
        device=session.device,
        dtypes=dtypes,
        scratch=scratch,
        spec=session.spec,
    )


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Turn what the check did into a record."""
    found = requirement_of(pyfuncitem)
    if found is None:
        return (yield)
    from sdpo_conformance.judging.call import WATCHDOG, ImplementationError
    from sdpo_conformance.judging.compare import Disagreement
    from sdpo_conformance.reproduction.failure import failure_of

    session = pyfuncitem.config.stash[SESSION]
    subject: Any = pyfuncitem.funcargs["subject"]
    expected = session.implementation.claims.expected_failures.get(found.id, "")
    status, reason = Status.PASSED, ""
    failure: dict[str, Any] = {}
    error: BaseException | None = None
    try:
        try:
            result = yield
        finally:
            WATCHDOG.rest()
        if expected:
            status, reason = Status.UNEXPECTED_PASS, f"claimed to fail: {expected}"
    except (Disagreement, ImplementationError) as raised:
        error = raised
        failure = failure_of(session.folder, session.target, session.device, session.spec, found, subject.entry, raised)
        status, reason = (Status.EXPECTED_FAILURE, expected) if expected else (Status.FAILED, "")
    except pytest.skip.Exception as skipped:
        status, reason, error = Status.NOT_JUDGED, str(skipped.msg), skipped
    except Exception as bug:
        status, error = Status.INTERNAL_ERROR, bug
        reason = f"{type(bug).__name__}: {bug}"[:500]
    tally = subject.tally
    record = Record(
        requirement=found.id,
        entry=subject.entry.value,
        level=found.level,
        status=status,
        reason=reason or tally.note,
        examples=tally.examples,
        rejected=tally.rejected,
        recorded=tally.recorded,
        seconds=round(tally.seconds, 3),
        out_of_time=tally.out_of_time,
        failure=failure,
    )
    write_record(session.folder, record)
    if session.options.first_cause and not session.forks and names_a_rule(record, session.spec.sweeps):
        follow(pyfuncitem, record, session)
    for suffix in (".json", ".safetensors"):
        (session.folder / "running" / f"{record.key}{suffix}").unlink(missing_ok=True)
    if isinstance(error, ImplementationError) and error.device_lost:
        os._exit(70)
    if status is Status.EXPECTED_FAILURE:
        pytest.xfail(reason)
    if status is Status.UNEXPECTED_PASS:
        pytest.fail(f"{found.id} passed, but SDPO_CLAIMS says: {expected}", pytrace=False)
    if isinstance(error, pytest.skip.Exception) or status is Status.INTERNAL_ERROR:
        assert error is not None
        raise error
    if error is not None:
        pytest.fail(f"{found.id}: {found.statement}\n{failure['summary']}", pytrace=False)
    return result


def follow(item: pytest.Function, record: Record, session: Session) -> None:
    """After the first failure: judge the rules that may name its cause better, and no others; stop at the first that
    fails."""
    session.asked = asked_after(record, session) if session.asked is None else set()
    if not session.asked:
        item.session.shouldstop = f"{record.requirement} failed"


def asked_after(record: Record, session: Session) -> set[str]:
    """The keys of the records that may name the cause of a first failure better."""
    wanted: list[str] = []
    with suppress(Exception):  # a fault of the diagnosis costs no verdict
        wanted = list(session.spec.parts.asked_next(session.folder, record))[:ASKED]
    return {record_key(name, record.entry) for name in wanted}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """After the first failure of a check, pass over what was not asked for."""
    asked = item.config.stash[SESSION].asked
    if asked is not None and record_key_of(item) not in asked:
        pytest.skip("another rule names the cause")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In the controlling process, put the records together."""
    run = session.config.stash.get(SESSION, None)
    if run is None or run.worker or session.config.option.collectonly or not (run.folder / "plan.json").exists():
        return
    from sdpo_conformance.running.collecting import collect

    collect(run)
