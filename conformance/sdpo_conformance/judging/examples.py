"""The implementation under test, one entry of it, and the engine that runs a requirement's check on it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import HypothesisException
from hypothesis.strategies import SearchStrategy

from sdpo_conformance.cases.case import Case, support_width
from sdpo_conformance.cases.precision import DTYPES
from sdpo_conformance.inputs.choices import SeededSource
from sdpo_conformance.judging.call import ImplementationError, Outcome, evaluate
from sdpo_conformance.judging.compare import Disagreement, compare
from sdpo_conformance.judging.expectation import Expectations
from sdpo_conformance.judging.profiles import Profile
from sdpo_conformance.protocol import Capability, Claims
from sdpo_conformance.specs import DEFAULT, find_spec
from sdpo_conformance.specs.requirement import Requirement
from sdpo_conformance.specs.spec import Parts, Spec

WIDEST_SUPPORT = 1024
"""An implementation may refuse a wider support than this with a clear error, but not answer it wrong."""

SECONDARY_ENOUGH = 5
"""After this many failures that all point to another rule, the search for one that does not is given up."""


class Enough(BaseException):
    """Stops Hypothesis from outside: the time for this requirement, or for shrinking, is spent.

    A BaseException because Hypothesis treats an Exception as one more failing example.
    """


@dataclass
class Tally:
    """What one requirement's run did: examples judged, examples that had to be rejected, and whether time
    ended it early; ``note``: what limits the verdict."""

    examples: int = 0
    rejected: int = 0
    recorded: int = 0
    seconds: float = 0.0
    out_of_time: bool = False
    note: str = ""


@dataclass
class Subject:
    """``function`` is the implementation's attribute for ``entry``; ``dtypes`` those this run judges it in.

    ``scratch``: where the case about to be run is kept, so that a crash can be reproduced; None: nowhere.
    """

    implementation: Any
    entry: Capability
    claims: Claims
    profile: Profile
    seed: int = 0
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("float32",)
    scratch: Path | None = None
    spec: Spec = field(default_factory=lambda: find_spec(DEFAULT))
    tally: Tally = field(default_factory=Tally)
    _smallest: tuple[tuple[int, ...], Exception] | None = None
    _first_failure: float = 0.0
    _visiting: bool = False
    _shrinks: int = 0
    _too_large: bool = False
    _secondary: int = 0
    _started: float = 0.0
    _requirement: int = 0

    @property
    def function(self) -> Callable[..., Any]:
        """The implementation's attribute for the entry."""
        found: Callable[..., Any] = getattr(self.implementation, self.entry.value)
        return found

    @property
    def torch_dtypes(self) -> list[torch.dtype]:
        """The dtypes this run judges."""
        return [DTYPES[name] for name in self.dtypes]

    @property
    def parts(self) -> Parts:
        """What the spec gives to judge by."""
        return self.spec.parts

    def narrowed(self, dtypes: tuple[str, ...]) -> Subject:
        """This subject with fewer dtypes, counting into the same tally."""
        return replace(self, dtypes=dtypes)

    def run(self, requirement: Requirement) -> None:
        """Run one requirement's check; what it raises is the verdict."""
        self._started, self._requirement = time.monotonic(), requirement.number
        self.tally = Tally()
        try:
            requirement.check(self)
        finally:
            self.tally.seconds = time.monotonic() - self._started

    # --- running examples ---

    def for_all(
        self,
        corner: Any,
        check: Callable[[Any], object],
        share: float = 1.0,
        shape_of: Callable[[Any], Any] | None = None,
    ) -> None:
        """Run ``check`` within ``corner``: on every recorded case, on a visit to each kind of each field, and on
        drawn cases, ``share`` of the profile's number. Raises the failure on the smallest example found, and one
        that is secondary only where the visits found none that is not."""
        self._smallest, self._shrinks, self._visiting, self._secondary = None, 0, True, 0
        dtypes, within = self.torch_dtypes, corner
        try:
            recorded = list(self.parts.recorded(corner, self.entry, tuple(dtypes)))
            step = math.ceil(len(recorded) / self.profile.recorded) or 1
            for case in recorded[self._requirement % step :: step]:
                self.tally.recorded += 1
                self._visit(check, case)
            for round_ in range(self.profile.visits):
                for number, visit in enumerate(self.parts.visits(corner, self.profile.costly)):
                    if (number + self._requirement) % self.profile.every:
                        continue
                    source = SeededSource(f"{self.seed}/{round_}/{number}")
                    within = visit
                    self._visit(check, self.parts.build(source, visit, self.entry, dtypes, shape_of))
            within = corner
        except (Disagreement, ImplementationError):
            pass
        except Enough:
            return self._raise_smallest()
        finally:
            self._visiting = False
        self._draw(self.parts.strategy(within, self.entry, dtypes, shape_of), check, share)

    def _visit(self, check: Callable[[Any], object], case: Case) -> None:
        """Attempt a case; a secondary failure is kept, and a few more visits may find one that is not."""
        try:
            self._attempt(check, case)
        except Disagreement as found:
            self._secondary += 1
            if not found.secondary or self._secondary == SECONDARY_ENOUGH:
                raise

    def each(self, cases: Iterable[Any], check: Callable[[Any], object]) -> None:
        """Run ``check`` on every one of ``cases``; raises the first failure."""
        self._smallest = None
        with suppress(Enough):
            for case in cases:
                self._attempt(check, case)

    def each_unless_refused(self, cases: Iterable[Any], check: Callable[[Any], object]) -> None:
        """``each`` for inputs that an implementation may refuse: an error is an answer, wrong numbers are not."""

        def attempt(case: Any) -> None:
            try:
                check(case)
            except ImplementationError as failure:
                if failure.device_lost or " raised " not in failure.summary:
                    raise

        self.each(cases, attempt)

    @property
    def widest(self) -> torch.dtype:
        """Of the dtypes that this run judges the one whose bounds hide least."""
        return min(self.torch_dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def given(self, strategy: SearchStrategy[Any], check: Callable[[Any], object], share: float = 1.0) -> None:
        """Run ``check`` on drawn examples and raise the failure on the smallest."""
        self._smallest, self._shrinks = None, 0
        self._draw(strategy, check, share)

    def _draw(self, strategy: SearchStrategy[Any], check: Callable[[Any], object], share: float) -> None:
        if not self.profile.examples:
            return self._raise_smallest()

        def attempt(case: Any) -> None:
            self._attempt(check, case)

        engine = settings(
            max_examples=max(5, int(self.profile.examples * share)),
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
            report_multiple_bugs=False,
            print_blob=False,
        )(given(strategy)(attempt))
        try:
            seed(self.seed)(engine)()
        except Enough:
            pass
        except (Disagreement, ImplementationError):
            pass
        except (HypothesisException, BaseExceptionGroup):
            # An implementation that is not repeatable: what it did wrong once stands.
            if self._smallest is None:
                raise
        self._raise_smallest()

    def _raise_smallest(self) -> None:
        if self._smallest is not None:
            raise self._smallest[1]

    def _attempt(self, check: Callable[[Any], object], case: Any) -> None:
        now = time.monotonic()
        if self._smallest is not None and not self._visiting:
            self._shrinks += 1
            if self._shrinks > self.profile.shrinks or now - self._first_failure > self.profile.shrink_seconds:
                raise Enough
            # where the smallest names its cause, a larger one is not asked for its own
            self._too_large = (0, *size_of(case)) > self._smallest[0]
        elif now - self._started > self.profile.requirement_seconds:
            self.tally.out_of_time = self._smallest is None
            raise Enough
        self.tally.examples += 1
        try:
            try:
                check(case)
            finally:
                self._too_large = False
        except (Disagreement, ImplementationError) as failure:
            if isinstance(failure, ImplementationError):
                if hasattr(case, "loss_input"):
                    failure.case = failure.case or case
                if refuses_support(failure):
                    self.tally.rejected += 1
                    return
            if self._smallest is None:
                self._first_failure = now
            size = (int(getattr(failure, "secondary", False)), *size_of(case))
            if self._smallest is None or size <= self._smallest[0]:
                self._smallest = (size, failure)
            if isinstance(failure, ImplementationError) and failure.device_lost:
                raise Enough from None
            raise

    # --- judging one case ---

    def evaluate(self, case: Case, gradient: bool = True) -> Outcome:
        """Call the entry on ``case``, having put the case where a crash leaves it; an error knows the case."""
        self.keep(case)
        try:
            return evaluate(self.function, self.entry, case, self.device, gradient)
        except ImplementationError as failure:
            failure.case = failure.case or case
            raise

    def keep(self, case: Case) -> None:
        """Write the case to ``scratch``."""
        if self.scratch is not None:
            case.save(self.scratch, scratch=True)

    def expectations(self, case: Case) -> Expectations | None:
        """Truth and bounds, or None where plain PyTorch is not finite either: no MUST may ask for it."""
        expected = self.parts.expectations(case, self.entry)
        if not expected.attainable:
            self.tally.rejected += 1
            return None
        return expected

    def agrees(
        self,
        case: Case,
        aspects: Sequence[str],
        control: Case | Sequence[Case] = (),
        control_aspects: Sequence[str] = (),
        per_token: bool = False,
    ) -> Outcome | None:
        """Judge ``aspects`` of the entry on ``case`` against the truth; raises Disagreement.

        A ``control`` is the same input with the rule under test made idle: where the entry is wrong there too
        (in ``control_aspects``, the same unless given), the failure is marked secondary, for the cause lies
        elsewhere. So it does where the rule is one of each token (``per_token``) and the entry is right on every
        token alone.
        """
        expected = self.expectations(case)
        if expected is None:
            return None
        outcome = self.evaluate(case, gradient="gradient" in aspects)
        found = compare(case, outcome, aspects, expected)
        if found is None:
            return outcome
        controls = control if isinstance(control, Sequence) else [control]
        found.secondary = any(self.wrong_on(one, control_aspects or aspects) for one in controls) or (
            per_token and self.right_alone(case, aspects)
        )
        raise found

    def wrong_on(self, control: Case, aspects: Sequence[str]) -> bool:
        """Whether the entry is wrong on a control input."""
        if self._too_large:
            return True
        expected = self.parts.expectations(control, self.entry)
        if not expected.attainable:
            return False
        try:
            outcome = evaluate(self.function, self.entry, control, self.device, "gradient" in aspects)
            return compare(control, outcome, aspects, expected) is not None
        except ImplementationError:
            return True

    def right_alone(self, case: Case, aspects: Sequence[str]) -> bool:
        """Whether a loss is right on each token alone: then what is wrong is how tokens are put together. A token
        that is left out alone, and not when there are three of it, was left out for its place."""
        if self.entry not in (Capability.LOSS, Capability.FUSED) or case.loss_input.response_mask.numel() == 1:
            return False
        return not any(
            self.wrong_on(token, aspects) and not (self.left_out(token) and not self.left_out(token.columns([0, 0, 0])))
            for token in case.tokens_alone()
        )

    def left_out(self, case: Case) -> bool:
        """Whether the tokens have no part in the loss: it is 0, and so is its gradient."""
        try:
            outcome = self.evaluate(case)
            return not outcome.number("loss").any() and not any(
                gradient is not None and gradient.any() for gradient in outcome.gradients.values()
            )
        except ImplementationError:
            return False

    def tells_apart(self, case: Case, other: Case, aspects: Sequence[str]) -> bool:
        """Whether the entry answers ``other`` differently though a rule says that it must not: it is right on
        ``case``, or one of its results is another by more than both bounds."""
        if not self.wrong_on(case, aspects):
            return True
        here, there = (self.parts.expectations(one, self.entry).results for one in (case, other))
        try:
            before, after = self.evaluate(case, gradient=False), self.evaluate(other, gradient=False)
            return any(
                not bool(((before.number(key) - after.number(key)).abs() <= here[key].bound + there[key].bound).all())
                for key in there
                if key in before.result and key in after.result
            )
        except ImplementationError:
            return True


def refuses_support(error: ImplementationError) -> bool:
    """Whether a kernel said that it takes no support this wide: an answer, past any top-k that is trained with."""
    case = error.case
    return (
        case is not None
        and hasattr(case, "tensors")
        and support_width(case) > WIDEST_SUPPORT
        and any(f"raised {kind}:" in error.summary for kind in ("ValueError", "NotImplementedError"))
    )


def size_of(case: Any) -> tuple[int, ...]:
    """What makes one failing example easier to read than another."""
    if not hasattr(case, "tensors"):
        return (0,)
    tokens = min((value.numel() for value in case.tensors().values() if value.dim() == 2), default=0)
    return (int(case.layout != "contiguous"), tokens, support_width(case), case.vocabulary)
