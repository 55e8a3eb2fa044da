"""``run --mesh``: every sharded requirement judged on a pool of ranks, and the document that says what came out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdpo_conformance.files import write_json
from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.judging.dtypes import DEFAULT, is_refusal
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.judging.implementation import Implementation
from sdpo_conformance.judging.profiles import Profile
from sdpo_conformance.judging.records import Record, Status, record_key, write_record
from sdpo_conformance.protocol import Capability
from sdpo_conformance.report.results import FORMAT, verdict
from sdpo_conformance.report.watcher import Watcher
from sdpo_conformance.running.children import Interrupted
from sdpo_conformance.running.collecting import device_name, versions
from sdpo_conformance.running.folder import RESULTS, default_folder, start_afresh
from sdpo_conformance.running.options import RunError, RunOptions
from sdpo_conformance.running.process import Progress, Report
from sdpo_conformance.sharded.mesh import MeshShape
from sdpo_conformance.sharded.pool import Pool, PoolError
from sdpo_conformance.sharded.rank import Ready
from sdpo_conformance.sharded.rule_on_ranks import ShardedRule
from sdpo_conformance.specs import specs
from sdpo_conformance.specs.spec import OnRanks, Spec

PER_TOKEN = (Capability.DIVERGENCE, Capability.RESPONSE_LOGPROBS, Capability.TEACHER_TOPK)


def run_on_mesh(target: str, mesh: str, options: RunOptions, progress: Progress | None = None) -> Report:
    """Judge ``target`` on the ranks of ``mesh`` ("tp=2,dp=2"); raises RunError where that cannot be done."""
    started = time.time()
    spec = options.found_spec
    asked = spec.parts.on_ranks
    if asked is None:
        having = ", ".join(one.name for one in specs() if one.parts.on_ranks)
        raise RunError(f"--mesh {mesh}: the requirements on ranks are those of {having}, not of --spec {spec.name}")
    on_ranks = asked()
    try:
        shape = MeshShape.parse(mesh)
        rules = on_ranks.selected(shape, options.only)
    except ValueError as error:
        raise RunError(str(error)) from None
    if not rules:
        raise RunError(f"--only {', '.join(options.only)}: none of it is about what --mesh {mesh} cuts")
    device = options.device
    check_device(device)
    folder = options.out or default_folder(target).with_name(f"{default_folder(target).name}-{shape}")
    try:
        start_afresh(folder)
    except ValueError as error:
        raise RunError(str(error)) from None
    with Pool(target, shape, device, options.call_timeout, spec.name) as pool:
        try:
            ready = pool.start()
            check_claims(target, shape, ready)
            records, judged, refused = judge(
                on_ranks, pool, rules, options.found_profile, options.seed, options.dtypes, folder, progress
            )
        except PoolError as error:
            raise RunError(str(error)) from None
        run = {
            "device": device,
            "device_name": device_name(device),
            "dtypes": list(judged),
            "refused_dtypes": refused,
            "profile": options.profile,
            "seed": options.seed,
            "only": list(options.only),
            "seconds": round(time.time() - started, 2),
            "versions": versions(),
            "mesh": str(shape),
            "backend": pool.backend,
            "pool_starts": pool.starts,
        }
    results = document(target, ready, records, rules, run, spec, on_ranks.families)
    write_json(folder / RESULTS, results)
    return Report(results, folder)


def check_device(device: str) -> None:
    """Raise RunError for a device that is not there."""
    if device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            raise RunError("--device=cuda: torch sees no CUDA device here; use --device=cpu, or run on a GPU box")


def check_claims(target: str, mesh: MeshShape, ready: Ready) -> None:
    """Raise RunError where the implementation says that it cannot be cut this way, or offers nothing on a mesh."""
    claimed = ready.claims.mesh
    if claimed is not None and not mesh.shared <= set(claimed):
        rest = ", ".join(sorted(mesh.shared - set(claimed)))
        takes = f"the axes {', '.join(claimed)}" if claimed else "no axis"
        raise RunError(f"{target} claims {takes} in SDPO_CLAIMS['mesh'], --mesh {mesh} cuts {rest}: judge it on others")
    if not ready.offered:
        raise RunError(
            f"{target} offers nothing that can be called on a mesh: compute_sdpo_loss or compute_fused_sdpo_loss, "
            "which read loss_input.mesh, or another entry that takes mesh= as a keyword"
        )


def judge(
    on_ranks: OnRanks,
    pool: Pool,
    rules: Sequence[ShardedRule],
    profile: Profile,
    seed: int,
    asked: tuple[str, ...],
    folder: Path,
    progress: Progress | None,
) -> tuple[list[Record], tuple[str, ...], dict[str, str]]:
    """Every rule through every entry: the records, the dtypes judged, and those refused with the reason."""
    offered = [Capability(name) for name in pool.ready.offered]
    work = [(rule, entry) for rule in rules for entry in rule.capabilities if entry in offered]
    kept: dict[Capability, tuple[tuple[str, ...], dict[str, str]]] = {}
    records: list[Record] = []
    if isinstance(progress, Watcher):
        progress.phase("judging")
    for rule, entry in work:
        if progress is not None:
            progress(len(records), len(work))
        subject = on_ranks.subject(pool, entry, profile, seed)
        if entry not in kept:
            kept[entry] = dtypes_on_ranks(on_ranks, subject, asked)
        subject.dtypes = kept[entry][0]
        try:
            record = judged(on_ranks, pool, subject, rule, folder, records)
        except Interrupted as signalled:
            signalled.judged_so_far([asdict(one) for one in records], len(work))
            raise
        write_record(folder, record)
        records.append(record)
        if isinstance(progress, Watcher):
            progress.verdict(asdict(record))
    if progress is not None:
        progress(len(records), len(work))
    every = [name for name in (*DEFAULT, "float64") if any(name in names for names, _ in kept.values())]
    return records, tuple(every), {name: why for _, refused in kept.values() for name, why in refused.items()}


def dtypes_on_ranks(
    on_ranks: OnRanks, subject: Subject, asked: tuple[str, ...]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """As ``judging.dtypes``: asked for, claimed, or offered without complaint."""
    if asked:
        return asked, {}
    if subject.claims.dtypes is not None:
        return tuple(name for name in subject.claims.dtypes if name in DEFAULT) or subject.claims.dtypes, {}
    refused: dict[str, str] = {}
    for name in DEFAULT:
        try:
            on_ranks.try_dtype(subject, name)
        except ImplementationError as error:
            if is_refusal(error, name):
                refused[name] = error.summary
    names = tuple(name for name in DEFAULT if name not in refused)
    return (names, refused) if names else (DEFAULT, {})


def judged(
    on_ranks: OnRanks, pool: Pool, subject: Subject, rule: ShardedRule, folder: Path, before: Sequence[Record]
) -> Record:
    """One rule through one entry."""
    expected = subject.claims.expected_failures.get(rule.id, "")
    status, reason, failure = Status.PASSED, "", {}
    try:
        subject.run(rule)
        if expected:
            status, reason = Status.UNEXPECTED_PASS, f"claimed to fail: {expected}"
    except (Disagreement, ImplementationError) as error:
        status, reason = (Status.EXPECTED_FAILURE, expected) if expected else (Status.FAILED, "")
        failure = failure_on_ranks(on_ranks, subject, rule, folder, error)
        failed = {r.requirement for r in before if r.status is Status.FAILED and r.entry == subject.entry.value}
        failure["secondary"] = failure["secondary"] or bool(failed & set(rule.rests_on))
    except PoolError as error:
        status, reason = Status.INTERNAL_ERROR, f"the ranks could not be started again: {error}"
    except Exception as error:
        status, reason = Status.INTERNAL_ERROR, f"{type(error).__name__}: {error}"[:500]
        pool.close()
    tally = subject.tally
    return Record(
        requirement=rule.id,
        entry=subject.entry.value,
        level=rule.level,
        status=status,
        reason=reason or tally.note,
        examples=tally.examples,
        rejected=tally.rejected,
        seconds=round(tally.seconds, 3),
        out_of_time=tally.out_of_time,
        failure=failure,
    )


def failure_on_ranks(
    on_ranks: OnRanks, subject: Subject, rule: ShardedRule, folder: Path, error: Disagreement | ImplementationError
) -> dict[str, Any]:
    """The record's failure entry, and the program that reproduces it."""
    if isinstance(error, Disagreement):
        found: dict[str, Any] = {
            "kind": "disagreement", "summary": str(error), "aspect": error.aspect, "expected": error.expected,
            "got": error.got, "detail": error.detail, "probe": error.probe, "secondary": error.secondary,
        }  # fmt: skip
        found["words"] = error.extra.get("words", "")
    else:
        found = {
            "kind": "error", "summary": error.summary, "aspect": subject.entry.value, "expected": "a result",
            "got": error.summary, "detail": error.details, "probe": "raises", "secondary": False, "words": "",
            "where": error.where,
        }  # fmt: skip
    case = error.case
    if case is not None:
        found["words"] = on_ranks.describe(case)
        key = record_key(rule.id, subject.entry.value)
        found["reproduction"] = on_ranks.write_program(folder, key, subject, rule, found, case)
    return found


def document(
    target: str,
    ready: Ready,
    records: Sequence[Record],
    rules: Sequence[ShardedRule],
    run: Mapping[str, Any],
    spec: Spec,
    families: Mapping[str, str],
) -> dict[str, Any]:
    """results.json of a run on a mesh, in the format of every run."""
    known = {rule.id: rule for rule in rules}
    offered = tuple(Capability(name) for name in ready.offered)
    implementation = Implementation(target, None, offered, ready.claims)
    described = [
        {
            **asdict(record),
            "family": families[known[record.requirement].family],
            "statement": known[record.requirement].statement,
            "source": known[record.requirement].source,
        }
        for record in records
    ]
    return {
        "format": FORMAT,
        "implementation": target,
        "spec": {"name": spec.name, "version": spec.version, "title": spec.title},
        "offered": list(ready.offered),
        "places": dict(ready.places),
        "claims": asdict(ready.claims),
        "run": dict(run),
        "records": described,
        "diagnosis": None,
        "verdict": verdict(implementation, spec, records, None, run),
    }
