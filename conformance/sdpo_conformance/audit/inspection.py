"""The audit itself: read what a run left behind, make every check, hand back one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdpo_conformance.audit.adapter import Adapter, open_adapter
from sdpo_conformance.audit.adapter_change import AdapterChange, compare_adapters
from sdpo_conformance.audit.best_checkpoint import find_best
from sdpo_conformance.audit.checkpoint_falls import find_fall
from sdpo_conformance.audit.checkpoints import folder_of, identical_checkpoints
from sdpo_conformance.audit.config import NO_REQUEST, RequestSample, engine_beside, read_request
from sdpo_conformance.audit.declared import read_declared
from sdpo_conformance.audit.discovery import RunFiles, discover
from sdpo_conformance.audit.errors import AuditError, NoStepsError, PickledError, shown
from sdpo_conformance.audit.findings import Evidence, Finding, NotJudged, Severity, judge
from sdpo_conformance.audit.findings.model import SamplerKnowledge
from sdpo_conformance.audit.generation import GenerationResult, generate
from sdpo_conformance.audit.loss_replay import SAMPLER_DIFFERS, ReplayResult, replay_first_step
from sdpo_conformance.audit.merged_model import find_merged
from sdpo_conformance.audit.metrics import RunMetrics, read_metrics
from sdpo_conformance.audit.model_loading import load_adapted_model
from sdpo_conformance.audit.optimizer_state import (
    OptimizerState,
    find_optimizer_state,
    read_optimizer_state,
    saved_counters,
)
from sdpo_conformance.audit.prompts import Prompt, read_prompts
from sdpo_conformance.audit.rank_copies import find_rank_copies
from sdpo_conformance.audit.sampler_fit import SamplerFit, fit_sampler
from sdpo_conformance.audit.teachers import find_teachers

#: CLaaS's default (claas/core/types.py, TrainingConfig), for the replay alone, where the settings name none.
_DEFAULT_IS_CLIP = 5.0


@dataclass(frozen=True)
class AuditReport:
    """What was looked at, what was found, and what could not be judged."""

    files: RunFiles
    evidence: Evidence
    findings: tuple[Finding, ...]
    not_judged: tuple[NotJudged, ...]

    @property
    def alarms(self) -> tuple[Finding, ...]:
        """The findings that make the exit status 1: errors and warnings."""
        return tuple(f for f in self.findings if f.severity is not Severity.NOTE)

    @property
    def verdict(self) -> str:
        """One line for a person in a hurry."""
        errors = sum(f.severity is Severity.ERROR for f in self.findings)
        if errors:
            return f"DO NOT TRUST THIS RUN: {_count(errors, 'error')}, {_count(len(self.alarms) - errors, 'warning')}"
        if self.alarms:
            return f"LOOK CLOSER: {_count(len(self.alarms), 'warning')}"
        return "nothing found"

    @property
    def exit_status(self) -> int:
        """0 nothing found, 1 findings."""
        return 1 if self.alarms else 0


def audit_run(
    run: Path | None = None,
    *,
    metrics: Path | None = None,
    before: Path | None = None,
    after: Path | None = None,
    config: Path | None = None,
    sampler: SamplerKnowledge = "unknown",
    model: Path | None = None,
    prompts: Path | None = None,
    max_new_tokens: int = 256,
    device: str = "auto",
) -> AuditReport:
    """Audit a run's folder, or the parts named. Reads only; raises AuditError when it cannot look."""
    files = discover(run, metrics=metrics, before=before, after=after, request=config, prompts=prompts)
    request = read_request(files.request) if files.request else NO_REQUEST
    if run is not None and not request.engine:
        request = replace(request, engine=engine_beside(run) if run.is_dir() else "")
    run_metrics, refused, empty = _metrics(files)
    if run_metrics is not None and request.training.steps_per_batch is not None:
        run_metrics = run_metrics.split(request.training.steps_per_batch)
    old, new, pickled = _adapters(files, run_metrics is not None, named=after is not None or before is not None)
    if new is not None and new.fresh:
        raise AuditError(f"{shown(new.path)}: has adapter_config.json but no weights: not a finished adapter")
    asked = read_prompts(files.prompts) if files.prompts and (model or prompts) else ()
    generation, replay, fit = None, None, None
    if model is not None:
        asked = asked or tuple(Prompt(ids=sample.prompt_token_ids) for sample in request.samples)
        generation, replay, fit = _with_model(
            model, old, new, asked, request.samples, request.training.is_clip, max_new_tokens, device
        )
    elif prompts is not None:
        raise AuditError("--prompts without --model: name the model to generate with")
    if sampler == "unknown" and replay is not None and replay.sampler_gap is not None and not (fit and fit.processed):
        sampler = "differs" if replay.sampler_gap > SAMPLER_DIFFERS else "same"
    settings = read_declared(files.run, *(folder_of(path).parent for path in files.checkpoints[-1:]))
    evidence = Evidence(
        metrics=run_metrics,
        change=compare_adapters(old, new) if new is not None else None,
        request=request,
        sampler=sampler,
        optimizer_before=_optimizer(old),
        optimizer_after=_optimizer(new),
        generation=generation,
        replay=replay,
        sampler_fit=fit,
        identical_checkpoints=identical_checkpoints(files.checkpoints),
        settings=settings,
        teachers=find_teachers(files.checkpoints),
        counters=saved_counters(files.checkpoints),
        delivered=_delivered(files, new),
        merged=find_merged(files.run, new),
        best=find_best(files.run, files.checkpoints, settings),
        fall=find_fall(files.checkpoints),
        rank_copies=find_rank_copies(files.run, files.checkpoints, old, new),
        metrics_refused=refused,
        adapter_refused=pickled,
    )
    findings, not_judged = judge(evidence)
    if refused and not empty and not any(f.severity is not Severity.NOTE for f in findings):
        raise AuditError(refused)  # a log of which nothing was understood is not a run in which nothing was found
    return AuditReport(files, evidence, findings, not_judged)


def _adapters(files: RunFiles, metrics: bool, *, named: bool) -> tuple[Adapter | None, Adapter | None, str]:
    """Both adapters; or why they are not read, where they are pickles that nobody named and metrics can be judged."""
    try:
        old = open_adapter(files.before) if files.before else None
        return old, open_adapter(files.after) if files.after else None, ""
    except PickledError as error:
        if named or not metrics:
            raise
        return None, None, str(error)


def _delivered(files: RunFiles, last: Adapter | None) -> AdapterChange | None:
    """The adapter in RUN itself against the last checkpoint, where both are there and can be read."""
    try:
        adapter = open_adapter(files.delivered) if files.delivered is not None else None
        return compare_adapters(last, adapter) if adapter and last is not None and not adapter.fresh else None
    except AuditError:
        return None


def _metrics(files: RunFiles) -> tuple[RunMetrics | None, str, bool]:
    """The run's metrics; or, where there is an adapter to judge all the same, why there are none, and whether that is
    because nothing was logged.
    """
    if files.metrics is None:
        return None, "", True
    try:
        return read_metrics(files.metrics), "", False
    except AuditError as error:
        if files.after is None or files.run is None:
            raise
        return None, str(error), isinstance(error, NoStepsError)


def _with_model(
    path: Path,
    before: Adapter | None,
    after: Adapter | None,
    prompts: Sequence[Prompt],
    samples: Sequence[RequestSample],
    is_clip: float | None,
    max_new_tokens: int,
    device: str,
) -> tuple[GenerationResult | None, ReplayResult | None, SamplerFit | None]:
    if after is None:
        raise AuditError("--model needs a finished adapter: name it with --after")
    if not prompts and not samples:
        raise AuditError("--model needs prompts: name a file with --prompts")
    adapted = load_adapted_model(path, before, after, device)
    generation = generate(adapted, prompts, max_new_tokens) if prompts else None
    # Without the adapter from before the run there is no step 1 to repeat.
    replay, fit = None, None
    if samples and before is not None:
        fit = fit_sampler(adapted, samples)
        replay = replay_first_step(adapted, samples, _DEFAULT_IS_CLIP if is_clip is None else is_clip)
    return generation, replay, fit


def _optimizer(adapter: Adapter | None) -> OptimizerState | None:
    """The state in the adapter's folder; a bare file's neighbours may belong to any other adapter."""
    path = find_optimizer_state(adapter.path) if adapter is not None and adapter.path.is_dir() else None
    return read_optimizer_state(path) if path else None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
