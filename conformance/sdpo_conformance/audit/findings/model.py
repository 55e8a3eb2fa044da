"""What a finding is, and what the checks look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from sdpo_conformance.audit.adapter_change import AdapterChange
from sdpo_conformance.audit.best_checkpoint import BestCheckpoint
from sdpo_conformance.audit.checkpoint_falls import Fall
from sdpo_conformance.audit.config import NO_REQUEST, RunRequest
from sdpo_conformance.audit.declared import Declared
from sdpo_conformance.audit.merged_model import MergedModel
from sdpo_conformance.audit.metrics import RunMetrics
from sdpo_conformance.audit.optimizer_state import OptimizerState, SavedCounter
from sdpo_conformance.audit.rank_copies import RankCopies
from sdpo_conformance.audit.teachers import Teachers

if TYPE_CHECKING:
    from sdpo_conformance.audit.generation import GenerationResult
    from sdpo_conformance.audit.loss_replay import ReplayResult
    from sdpo_conformance.audit.sampler_fit import SamplerFit

SamplerKnowledge = Literal["unknown", "differs", "same"]


class Severity(StrEnum):
    """error: the run did not do what it says. warning: look before trusting it. note: worth knowing, no
    alarm.
    """

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with the run. `evidence` is numbers in sentences; `data` the same for
    programs.
    """

    id: str
    severity: Severity
    statement: str
    evidence: tuple[str, ...]
    cause: str
    next_step: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NotJudged:
    """A check that could not be made, why, and what would let it be made."""

    id: str
    reason: str


@dataclass(frozen=True)
class Evidence:
    """Everything read from the run. None is a part that is not there."""

    metrics: RunMetrics | None = None
    change: AdapterChange | None = None
    request: RunRequest = NO_REQUEST
    sampler: SamplerKnowledge = "unknown"
    optimizer_before: OptimizerState | None = None
    optimizer_after: OptimizerState | None = None
    generation: GenerationResult | None = None
    replay: ReplayResult | None = None
    sampler_fit: SamplerFit | None = None
    identical_checkpoints: tuple[tuple[str, str], ...] = ()
    settings: Declared = field(default_factory=Declared)
    teachers: Teachers = field(default_factory=Teachers)
    counters: tuple[SavedCounter, ...] = ()
    delivered: AdapterChange | None = None
    merged: MergedModel | None = None
    best: BestCheckpoint | None = None
    fall: Fall | None = None
    rank_copies: RankCopies | None = None
    metrics_refused: str = ""
    adapter_refused: str = ""

    @property
    def weights_moved(self) -> bool | None:
        """Whether the adapter changed in a way that can change the model; None where nothing tells."""
        if self.change is None or not self.change.compared:
            return None
        return self.change.moved > 0 and self.change.matters


Verdicts = Iterator[Finding | NotJudged]


@dataclass(frozen=True)
class Check:
    """One finding's id, what it says in a line, and the function that looks for it."""

    id: str
    title: str
    judge: Callable[[Evidence], Verdicts]
