"""The diagnosis of a run's folder, in the words that a report prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdpo_conformance.diagnosis.diagnose import Diagnosis, diagnose
from sdpo_conformance.diagnosis.observed import Observed
from sdpo_conformance.judging.records import Record, Status, read_records
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.defects import catalogue
from sdpo_conformance.specs.claas.defects.dialects import Dialect

MOST_EQUIVALENTS = 3
"""How many indistinguishable defects a line names."""

NO_MATCH = "no catalogued defect, pair of defects or dialect returns what this implementation returned"


def diagnose_run(folder: Path, failed: Sequence[Record], offered: Sequence[Capability]) -> Mapping[str, Any] | None:
    """``lines`` for the terminal, ``matches`` for machines, ``usable_for`` for the verdict, one diagnosis for
    each entry that failed; None where nothing failed. ``folder`` holds what was observed."""
    if not failed:
        return None
    passed = {
        (record.entry, record.requirement) for record in read_records(folder).values() if record.status is Status.PASSED
    }
    lines: list[str] = []
    matches: list[dict[str, Any]] = []
    usable: list[str] = []
    for entry in Capability:
        records = [record for record in failed if record.entry == entry]
        if not records:
            continue
        observed = [
            Observed.load(folder / record.failure["observed"], record.requirement, entry, record.failure)
            for record in records
            if record.failure.get("observed")
        ]
        held = [requirement for of, requirement in passed if of == entry]
        where = f" ({entry.value})" if len(offered) > 1 else ""
        if observed:
            found = diagnose(observed, held)
            words, match = described(found, len(records), where)
        else:
            words, match = by_requirement(entry, [record.requirement for record in records], where)
        lines.extend(line for line in words if line not in lines)
        if match is not None:
            matches.append({"entry": entry.value, **match})
            if match["usable_for"] and match["usable_for"] not in usable:
                usable.append(match["usable_for"])
    return {"lines": lines, "usable_for": " ".join(usable), "matches": matches}


def described(found: Diagnosis | None, failures: int, where: str) -> tuple[list[str], dict[str, Any] | None]:
    """A diagnosis as lines and as an entry of ``matches``."""
    if found is None:
        return [f"{NO_MATCH}{where}"], None
    of = max(failures, found.total)
    explains = f"explains {len(found.explained)} of {of} failures to {quality(found.error)}"
    first = found.defects[0]
    if isinstance(first, Dialect):
        lines = [f"this computes {first.whose} ({first.convention}), not CLaaS's: {explains}{where}"]
    else:
        lines = [f"{found.name}: {explains}{where}"]
    lines.extend(f"{defect.sentence} Fix: {defect.fix}" for defect in found.defects)
    if found.equivalent:
        names = ", ".join(defect.name for defect in found.equivalent[:MOST_EQUIVALENTS])
        rest = len(found.equivalent) - MOST_EQUIVALENTS
        more = f" and {rest} more" if rest > 0 else ""
        lines.append(f"not to be told apart on these inputs: {names}{more}")
    if len(found.explained) < of:
        lines.append(f"{of - len(found.explained)} failures remain unexplained: there is more wrong than this")
    usable = first.usable_for if len(found.defects) == 1 and len(found.explained) == of else ""
    return lines, {
        "name": found.name,
        "kind": found.kind,
        "quality": found.error,
        "explained": len(found.explained),
        "of": of,
        "fix": " ".join(defect.fix for defect in found.defects),
        "usable_for": usability(usable),
        "equivalent": [defect.name for defect in found.equivalent],
        "seen": [citation.url for defect in found.defects for citation in defect.seen],
    }


def usability(words: str) -> str:
    """A sentence for the verdict."""
    if not words:
        return ""
    first = words.split()[0]
    is_name = sum(letter.isupper() for letter in first) > 1  # as in "TRL's"
    return f"Usable for: {words if is_name else words[0].lower() + words[1:]}"


def quality(error: float) -> str:
    """A relative error as a power of ten, rounded up."""
    if error == 0:
        return "the last bit"
    exponent = 0
    while 10.0**exponent < error:
        exponent += 1
    while exponent > -17 and 10.0 ** (exponent - 1) >= error:
        exponent -= 1
    return f"1e{exponent}" if exponent else "1"


def by_requirement(entry: Capability, broken: Sequence[str], where: str) -> tuple[list[str], dict[str, Any] | None]:
    """Without recorded numbers: the defects that the broken requirements name, said to be no more than that."""
    named = [
        defect
        for defect in catalogue().values()
        if entry in defect.capabilities and defect.violates[0] in broken and set(defect.violates) <= set(broken)
    ]
    if not named:
        return [f"{NO_MATCH}{where}"], None
    named.sort(key=lambda defect: -len(defect.violates))
    names = ", ".join(defect.name for defect in named[: 2 * MOST_EQUIVALENTS])
    return [f"by the requirements that fail alone, not by values, it may be one of: {names}{where}"], None
