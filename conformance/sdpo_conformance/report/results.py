"""The results of a run as one JSON document (``results.schema.json``), and its verdict."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdpo_conformance.judging.implementation import Implementation
from sdpo_conformance.judging.records import Record, Status
from sdpo_conformance.protocol import DTYPE_NAMES, ENTRIES, Capability
from sdpo_conformance.specs.requirement import Level
from sdpo_conformance.specs.spec import Spec

FORMAT = 1


def results_of(
    implementation: Implementation, spec: Spec, records: Sequence[Record], run: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """The whole document; runs the diagnosis on the failures kept in ``folder``."""
    failed = [record for record in records if record.status is Status.FAILED]
    diagnosis = diagnosed(folder, failed, implementation, spec) if failed else None
    if diagnosis is not None and not shown_usable(diagnosis["usable_for"], records, run):
        kept = [{**match, "usable_for": ""} for match in diagnosis["matches"]]
        diagnosis = {**diagnosis, "usable_for": "", "matches": kept}
    return {
        "format": FORMAT,
        "implementation": implementation.target,
        "spec": {"name": spec.name, "version": spec.version, "title": spec.title},
        "offered": [capability.value for capability in implementation.offered],
        "claims": asdict(implementation.claims),
        "run": dict(run),
        "records": [described(record, spec) for record in records],
        "diagnosis": diagnosis,
        "verdict": verdict(implementation, spec, records, diagnosis, run),
    }


def shown_usable(words: str, records: Sequence[Record], run: Mapping[str, Any]) -> bool:
    """Whether a run showed what it would say an implementation is usable for: every rule was asked, to its end, and the
    dtypes in the words were judged."""
    if run.get("only") or run.get("first_cause") or run.get("profile") == "check":
        return False
    if any(record.status is Status.INTERNAL_ERROR or record.out_of_time for record in records):
        return False
    return all(name in run.get("dtypes", ()) for name in DTYPE_NAMES if re.search(rf"\b{name}\b", words))


def diagnosed(
    folder: Path, failed: Sequence[Record], implementation: Implementation, spec: Spec
) -> Mapping[str, Any] | None:
    """The diagnosis; a fault of its own costs the diagnosis, not the verdicts."""
    from sdpo_conformance.judging.rounding import rounding_in_words

    try:
        if lines := rounding_in_words(folder, failed, spec.parts):
            return {"lines": lines, "usable_for": "", "matches": []}
        return spec.parts.diagnose(folder, failed, implementation.offered)
    except Exception as error:
        line = f"the diagnosis itself failed ({type(error).__name__}: {error}); please report it"
        return {"lines": [line[:300]], "usable_for": "", "matches": []}


def described(record: Record, spec: Spec) -> dict[str, Any]:
    """A record with the requirement's own words."""
    found = spec.requirements()[record.requirement]
    return {
        **asdict(record),
        "family": spec.families[found.family],
        "statement": found.statement,
        "source": found.source,
    }


def verdict(
    implementation: Implementation,
    spec: Spec,
    records: Sequence[Record],
    diagnosis: Mapping[str, Any] | None,
    run: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``scope``: what was judged where that is not all of a loss or a trainer, empty where it is.

    ``conforming``: no MUST fails, expected or not. ``passed``: nothing but what was claimed to fail fails.
    ``text``: one line for people."""
    unjudged = (Status.NOT_JUDGED, Status.INTERNAL_ERROR)
    must = [record for record in records if record.level is Level.MUST and record.status not in unjudged]
    internal = [record for record in records if record.status is Status.INTERNAL_ERROR]
    met = [record for record in must if record.status in (Status.PASSED, Status.UNEXPECTED_PASS)]
    expected = [record for record in records if record.status is Status.EXPECTED_FAILURE]
    surprising = [record for record in records if record.status is Status.UNEXPECTED_PASS]
    should = [record for record in records if record.level is Level.SHOULD and record.status is Status.FAILED]
    broken = [record for record in must if record.status is Status.FAILED]
    conforming = len(met) == len(must) and bool(must) and not internal
    passed = not broken and not surprising and bool(must) and not internal

    scope = scope_of(implementation.offered, {**(run or {}), "only": names_judged(run or {}, records)})
    if not must:
        text = f"NOTHING JUDGED: {why_nothing(records)}"
    elif len(met) == len(must) and scope:
        text = f"{scope[0].upper()}{scope[1:]} of {spec.label} holds: {tallies(must, met)}. Nothing else was judged."
    elif len(met) == len(must):
        text = f"CONFORMING to {spec.label}: {tallies(must, met)}."
    elif not broken:
        claimed = ", ".join(sorted({record.requirement for record in expected}))
        text = f"FAILS ONLY WHAT IT CLAIMS TO FAIL ({claimed}): {tallies(must, met)}."
    else:
        text = f"NOT CONFORMING to {spec.label}: {tallies(must, met)}."
    if surprising:
        names = ", ".join(sorted({record.requirement for record in surprising}))
        text += f" UNEXPECTED PASS: {names} passed although a failure is expected; remove the expectation."
    if should:
        text += f" SHOULD not met: {', '.join(dict.fromkeys(record.requirement for record in should))}."
    if must:
        text += unjudged_in_words(records)
    if internal:
        names = ", ".join(dict.fromkeys(record.requirement for record in internal))
        text = f"NO VERDICT: the suite itself failed on {names} ({internal[0].reason[:99]}); please report it. {text}"
    text += remarks(implementation, diagnosis)
    return {
        "conforming": conforming,
        "passed": passed,
        "must_met": len(met),
        "must_judged": len(must),
        "should_not_met": sorted({record.requirement for record in should}),
        "scope": scope,
        "text": text,
    }


def scope_of(offered: Sequence[Capability], run: Mapping[str, Any]) -> str:
    """What alone was judged; empty for all rules of an implementation with a loss or a trainer."""
    only = f"only {', '.join(run['only'])}" if run.get("only") else ""
    if run.get("mesh"):
        return f"sharding on {run['mesh']}, {only}," if only else f"sharding on {run['mesh']}"
    if only:
        return only
    if run.get("first_cause") or run.get("profile") == "check":
        return "the check, not the whole suite,"
    whole = {Capability.LOSS, Capability.FUSED, Capability.DISTILL}
    if not whole & set(offered):
        return f"{' and '.join(ENTRIES[entry].label for entry in offered)} alone"
    return ""


def names_judged(run: Mapping[str, Any], records: Sequence[Record]) -> list[str]:
    """Of the names that ``--only`` gave, those of which something was judged; all of them where nothing was."""
    judged = {record.requirement for record in records if record.status is not Status.NOT_JUDGED}
    known = judged | {id.rsplit("-", 1)[0] for id in judged}
    return [name for name in run.get("only", ()) if name.strip().upper() in known] or list(run.get("only", ()))


def unjudged_in_words(records: Sequence[Record]) -> str:
    """Which MUSTs were selected and could not be judged, and why; empty where there is none."""
    reasons: dict[str, list[str]] = {}
    for record in records:
        if record.level is Level.MUST and record.status is Status.NOT_JUDGED:
            reasons.setdefault(record.reason, []).append(record.requirement)
    told = [f"{ids[0]}{f' and {len(ids) - 1} more' if ids[1:] else ''} ({why})" for why, ids in reasons.items()]
    return f" Not judged: {', '.join(told)}." if told else ""


def why_nothing(records: Sequence[Record]) -> str:
    """Why no MUST was judged: the reasons of the records, or that there were none."""
    reasons = dict.fromkeys(record.reason for record in records if record.status is Status.NOT_JUDGED and record.reason)
    return "; ".join(reasons) or "no MUST was selected for what this implementation offers."


def tallies(must: Sequence[Record], met: Sequence[Record]) -> str:
    """``loss 34/42 MUST, trainer 9/11 MUST``."""
    parts = []
    for entry, row in ENTRIES.items():
        judged = [record for record in must if record.entry == entry]
        if judged:
            parts.append(f"{row.label} {sum(record in met for record in judged)}/{len(judged)} MUST")
    return ", ".join(parts)


def remarks(implementation: Implementation, diagnosis: Mapping[str, Any] | None) -> str:
    """What the implementation may be used for, beyond the tally."""
    text = ""
    if diagnosis and diagnosis.get("usable_for"):
        text += f" {diagnosis['usable_for']}"
    offered = implementation.offered
    if Capability.DIVERGENCE in offered and not {Capability.LOSS, Capability.FUSED} & set(offered):
        text += (
            " A divergence alone is not SDPO: the wrapper owes the importance ratio per token, and the trainer the "
            "refresh of the behaviour log-probs."
        )
    if implementation.claims.max_steps_per_batch == 1:
        text += " Claims max_steps_per_batch = 1: for on-policy single steps only."
    return text
