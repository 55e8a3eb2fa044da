"""The implementation under test on the ranks of a mesh, one entry of it, and the engine that runs a check on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sdpo_conformance.cases.case import divergence_incoming
from sdpo_conformance.judging.call import ImplementationError, Outcome
from sdpo_conformance.judging.compare import Disagreement, scalar_disagreement
from sdpo_conformance.judging.examples import Enough, Subject
from sdpo_conformance.judging.expectation import Expectation
from sdpo_conformance.sharded.mesh import MeshShape
from sdpo_conformance.sharded.pool import Pool
from sdpo_conformance.sharded.rank import Answer, Request
from sdpo_conformance.specs.claas.corners import Corner
from sdpo_conformance.specs.claas.sharded.compare_ranks import compare_ranks, complaints, expected_of
from sdpo_conformance.specs.claas.sharded.cut import ShardedCase, part_of, tokens_of
from sdpo_conformance.specs.claas.sharded.draw import PLAIN, Cuts, sharded_cases, sharded_visits

Change = Callable[[ShardedCase], ShardedCase | None]
"""What a rule does to a drawn case before it is judged; None: nothing to judge."""


@dataclass
class ShardedSubject(Subject):
    """A ``Subject`` whose calls go to every rank of ``pool``; ``target``: another implementation than the pool's."""

    pool: Pool = field(kw_only=True)
    target: str = ""

    @property
    def mesh(self) -> MeshShape:
        return self.pool.mesh

    def for_all_cuts(
        self, corner: Corner, check: Callable[[ShardedCase], object], cuts: Cuts = PLAIN, share: float = 1.0
    ) -> None:
        """Run ``check`` on a visit to each kind of case and of cut, and on drawn ones; the smallest failure found is
        raised. Rounds of visits and examples are the profile's; a lost rank ends it at once."""
        self._smallest = None
        dtypes = self.torch_dtypes
        check = self.as_claimed(check)
        try:
            for round_ in range(max(1, round(self.profile.visits * share))):
                seed = f"{self.seed}/{self._requirement}/{round_}"
                for case in sharded_visits(seed, corner, self.entry, dtypes, self.mesh, cuts):
                    self._attempt(check, case)
        except (Disagreement, ImplementationError):
            pass
        except Enough:
            return self._raise_smallest()
        if self.lost_rank:
            return self._raise_smallest()
        return self._draw(sharded_cases(corner, self.entry, dtypes, self.mesh, cuts), check, share)

    def as_claimed(self, check: Callable[[ShardedCase], object]) -> Callable[[ShardedCase], object]:
        """``check`` on cases that lie as a DTensor can, where the implementation takes those."""
        if not self.claims.dtensor:
            return check
        return lambda case: check(replace(case, cut=case.laid.as_dtensor(case.vocabulary)))

    @property
    def lost_rank(self) -> bool:
        """Whether the failure at hand cost a rank: each further example would cost another."""
        return self._smallest is not None and costs_ranks(self._smallest[1])

    def _attempt(self, check: Callable[[Any], object], case: Any) -> None:
        if self.lost_rank:
            raise Enough
        super()._attempt(check, case)

    # --- judging one case ---

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """One request per rank."""
        return self.pool.call([replace(request, target=self.target) for request in requests])

    def answers(self, case: ShardedCase, backward: int = 1, **options: Any) -> list[Answer]:
        """What every rank returns on its part of ``case``."""
        self.keep(case)
        parts = [part_of(case, rank) for rank in range(self.mesh.ranks)]
        return self.ask([Request(self.entry.value, part, backward, **options) for part in parts])

    def agrees_on_ranks(self, case: ShardedCase, aspects: Sequence[str], **options: Any) -> list[Answer] | None:
        """Judge ``aspects`` on every rank against the truth about the whole batch; raises Disagreement."""
        expected = expected_of(case, self.entry)
        if not expected.attainable:
            self.tally.rejected += 1
            return None
        answers = self.answers(case, int("gradient" in aspects), **options)
        if "gradient" in aspects:
            complaints(answers, "gradient")
        found = compare_ranks(case, self.entry, answers, aspects, expected)
        if found is not None:
            raise found
        return answers

    def judge_divergence(self, case: ShardedCase) -> None:
        """Judge the divergence of each rank's tokens, and the gradient of what differs from token to token."""
        expected = expected_of(case, self.entry)
        if not expected.attainable:
            self.tally.rejected += 1
            return
        self.keep(case)
        arriving, requests = divergence_incoming(case), []
        for rank in range(self.mesh.ranks):
            part = part_of(case, rank)
            tensors = {**part.tensors, "incoming": tokens_of(case.laid, rank, arriving)}
            real = tokens_of(case.laid, rank, torch.ones_like(arriving), masked=True)
            tensors["incoming"] = tensors["incoming"] * real
            requests.append(Request(self.entry.value, replace(part, tensors=tensors)))
        answers = self.ask(requests)
        complaints(answers)
        truth = expected.results["divergence"]
        for rank, answer in enumerate(answers):
            here = Expectation(tokens_of(case.laid, rank, truth.value), tokens_of(case.laid, rank, truth.bound))
            wrong = scalar_disagreement("divergence", here, Outcome(answer.result, {}))
            if wrong is not None:
                wrong.aspect, wrong.case = f"{wrong.aspect} on rank {rank}", case
                raise wrong
        found = compare_ranks(case, self.entry, answers, ("gradient",), expected, added=True)
        if found is not None:
            raise found

    def wrong_on_ranks(self, case: ShardedCase, aspects: Sequence[str]) -> bool:
        """Whether the entry is wrong on a control input."""
        try:
            self.agrees_on_ranks(case, aspects)
        except (Disagreement, ImplementationError):
            return True
        return False

    def narrowed(self, dtypes: tuple[str, ...]) -> ShardedSubject:
        return replace(self, dtypes=dtypes)


def costs_ranks(failure: Exception) -> bool:
    """Whether the ranks had to be replaced because of it."""
    return isinstance(failure, ImplementationError) and any(
        words in failure.summary for words in ("hangs", " died ", " alone: ")
    )
