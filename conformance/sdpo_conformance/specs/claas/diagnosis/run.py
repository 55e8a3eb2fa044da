"""The diagnosis of a run's folder, in the words that a report prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdpo_conformance.judging.cross_check import SURE, breaks_what_held, judged_in, left_standing
from sdpo_conformance.judging.records import Record, Status, read_records
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.claas.defects import catalogue
from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.defects.dialects import Dialect
from sdpo_conformance.specs.claas.diagnosis.diagnose import Diagnosis, diagnose, rules_behind
from sdpo_conformance.specs.claas.diagnosis.heads import ObservedHead
from sdpo_conformance.specs.claas.diagnosis.locating import located
from sdpo_conformance.specs.claas.diagnosis.observed import Observed, ObservedLoss
from sdpo_conformance.specs.claas.diagnosis.trainers import NamedMetrics, gathered, reported, stated, updated
from sdpo_conformance.specs.claas.step_loop.update_mistakes import STRUCTURAL
from sdpo_conformance.specs.requirement import Level

LEADING = 2
"""So many requirements may lead a report: those that the defect's entry names first."""

ENOUGH = 0.9
"""Share of the failures from which on a loss's defect is named. Chosen on fifty wrong losses, where what fitted fewer
was mostly a neighbour of the cause."""

MOST_EQUIVALENTS = 3
"""How many indistinguishable defects a line names."""

NO_MATCH = "no catalogued cause fits"

LIMITS_OF_PYTORCH = ("NUM-3", "NUM-4", "NUM-5")
"""SHOULDs that the formulas miss as well where plain PyTorch evaluates them: 0 log 0, infinite logits, NaN times 0."""


def diagnose_run(folder: Path, failed: Sequence[Record], offered: Sequence[Capability]) -> Mapping[str, Any] | None:
    """``lines`` for the terminal, ``matches`` for machines, ``usable_for`` for the verdict, one diagnosis for
    each entry that failed; ``first`` and ``because``: failed requirements that name a cause, and those that fail
    because of it; None where nothing failed. ``folder`` holds what was observed."""
    if not failed:
        return None
    passed = {
        (record.entry, record.requirement) for record in read_records(folder).values() if record.status is Status.PASSED
    }
    lines: list[str] = []
    matches: list[dict[str, Any]] = []
    usable: list[str] = []
    first: list[str] = []
    because: list[str] = []
    for entry in Capability:
        records = [record for record in failed if record.entry == entry]
        if not records:
            continue
        observed = [observed_of(folder, record) for record in records if observed_in(record)]
        held = [requirement for of, requirement in passed if of == entry]
        where = f" ({entry.value})" if len(offered) > 1 else ""
        if entry is Capability.DISTILL:
            words, match = of_trainer(records, where)
        else:
            words, match = of_loss(observed, held, records, where)
        leading, following = led_by(match, records)
        first += [one for one in leading if one not in first]
        because += [one for one in following if one not in because]
        lines.extend(line for line in words if line not in lines)
        if match is not None:
            matches.append({"entry": entry.value, **match})
        if any(record.level is Level.MUST for record in records):
            usable.append(match["usable_for"] if match else "")
    because = [one for one in because if one not in first]
    return {
        "lines": lines,
        "usable_for": usable[0] if len(set(usable)) == 1 else "",
        "matches": matches,
        **({"first": first, "because": because} if first else {}),
    }


def asked_next(folder: Path, failed: Record) -> Sequence[str]:
    """The requirements that may name the cause of a run's first failure better than its own, likeliest first."""
    if not observed_in(failed) or failed.entry == Capability.DISTILL:
        return ()
    passed = [one.requirement for one in read_records(folder).values() if one.status is Status.PASSED]
    observed = observed_of(folder, failed)
    _FIRST[written(folder, failed)] = observed
    return rules_behind(observed, passed)


_FIRST: dict[tuple[Path, int], Observed] = {}
"""The first failure of a check, until its diagnosis: all of the catalogue was tried on it already."""


def observed_of(folder: Path, failed: Record) -> Observed:
    """What is known of a failure."""
    if (found := _FIRST.pop(written(folder, failed), None)) is not None:
        return found
    kind = ObservedLoss if failed.failure.get("observed") else ObservedHead
    return kind.load(folder / observed_in(failed), failed.requirement, Capability(failed.entry), failed.failure)


def observed_in(failed: Record) -> str:
    """The file of what was observed of a failure, or nothing."""
    return str(failed.failure.get("observed") or failed.failure.get("observed_head") or "")


def written(folder: Path, failed: Record) -> tuple[Path, int]:
    """The file of what was observed, and when it was written."""
    path = folder / observed_in(failed)
    return path, path.stat().st_mtime_ns


def led_by(match: Mapping[str, Any] | None, failed: Sequence[Record]) -> tuple[list[str], list[str]]:
    """The failed requirements that the named defects violate, and, where these explain every failure, the other MUSTs
    that failed; of a trainer's, those that fail by its gradients, for nothing else was explained. A dialect breaks many
    rules at once: none of them leads."""
    if match is None or match["kind"] == "dialect":
        return [], []
    ids = [record.requirement for record in failed if record.level is Level.MUST]
    violated = [id_ for name in str(match["name"]).split(" + ") for id_ in catalogue()[name].violates]
    first = [one for one in dict.fromkeys(violated) if one in ids][:LEADING]
    whole = match["explained"] == match["of"]
    apart = {
        one.requirement for one in failed if one.entry == Capability.DISTILL and one.failure.get("shows") != "gradient"
    }
    return first, [one for one in ids if one not in first and one not in apart] if first and whole else []


def of_loss(
    observed: Sequence[Observed], held: Sequence[str], failed: Sequence[Record], where: str
) -> tuple[list[str], dict[str, Any] | None]:
    """A loss's, divergence's or kernel's diagnosis. What plain PyTorch misses as well counts neither for nor against
    a name."""
    beside = [record for record in failed if record.requirement in LIMITS_OF_PYTORCH]
    counted = [record for record in failed if record not in beside]
    if not counted:
        ids = ", ".join(dict.fromkeys(record.requirement for record in beside))
        return [f"no MUST fails; {ids}: plain PyTorch does not meet it either{where}"], None
    names = {record.requirement for record in counted}
    telling = [one for one in observed if one.requirement in names]
    found = diagnose(telling, held) if telling else None
    if found is not None and len(found.explained) >= ENOUGH * len(telling):
        found = standing(found, telling, held)
    else:
        found = None
    if found is None:
        where_wrong = located(telling, held)
        return [f"{NO_MATCH}{where}", *([where_wrong] if where_wrong else [])], None
    return described(found, len(counted), where)


def standing(found: Diagnosis, observed: Sequence[Observed], held: Sequence[str]) -> Diagnosis | None:
    """The diagnosis without what breaks a rule that the implementation held; None where nothing is left. Asked where
    few failures speak for it, or several names do."""
    if found.complete and not found.equivalent and found.total >= SURE:
        return found
    entry, spec, dtype = observed[0].entry, find_spec("claas"), judged_in([one.case for one in observed])

    def stands(defect: Defect) -> bool:
        suspect = defect.implementation()
        return breaks_what_held(suspect, defect.violates, entry, spec, held, dtype) is None

    first = found.defects[0]
    # Something else than numbers tells as little of how mild it is as many failures do.
    many = (found.complete and found.total >= SURE) or not any(observed[index].numeric for index in found.explained)
    if len(found.defects) > 1:
        alike = tuple(one for one in found.equivalent if stands(one))
        return replace(found, equivalent=alike) if many or all(stands(one) for one in found.defects) else None
    left = left_standing((first, *found.equivalent), stands, many)
    if left and left[0] is first:
        return replace(found, equivalent=tuple(left[1:]))
    if left:
        return replace(found, defects=(left[0],), equivalent=tuple(left[1:]))
    return found if many else None


def described(found: Diagnosis, failures: int, where: str) -> tuple[list[str], dict[str, Any] | None]:
    """A diagnosis as lines and as an entry of ``matches``."""
    of = max(failures, found.total)
    explains = f"explains {len(found.explained)} of {of} failures to {quality(found.error)}"
    first = found.defects[0]
    if isinstance(first, Dialect):
        lines = [f"this computes {first.whose} ({first.convention}), not CLaaS's: {explains}{where}"]
    else:
        shown = " + ".join(defect.shown for defect in found.defects)
        lines = [f"{shown}: {explains}{where}"]
    lines.extend(f"{defect.sentence} Fix: {defect.fix}" for defect in found.defects)
    if found.equivalent:
        lines.append(not_apart([defect.name for defect in found.equivalent]))
    if len(found.explained) < of:
        lines.append(f"{of - len(found.explained)} failures remain unexplained: there is more wrong than this")
    alone = len(found.defects) == 1 and all(one.usable_for == first.usable_for for one in found.equivalent)
    usable = first.usable_for if alone and len(found.explained) == of else ""
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


def of_trainer(failed: Sequence[Record], where: str) -> tuple[list[str], dict[str, Any] | None]:
    """A trainer's diagnosis: the mistake that its gradients equal; where none explains half of the wrong steps, what
    is wrong where."""
    found, update = gathered(failed), updated(failed)
    if found.defect is not None and update is not None and {found.defect.name, update.name} <= set(STRUCTURAL):
        # plain LoRA's every second parameter is its lora_A: what the optimizer got is the better name
        same = dict.fromkeys((found.defect.name, *found.alike))
        found = replace(found, defect=update, alike=tuple(one for one in same if one != update.name))
    if found.defect is None:
        loop = stated(failed)
        if loop is not None:
            what = "kl_reg is the one" if loop.name.startswith("base-") else "metrics are those"
            return [f"{loop.name}: its {what} reported{where}", f"{loop.sentence} Fix: {loop.fix}"], None
        if update is not None and (not found.wrong or update.name in STRUCTURAL):
            must = sum(one.level is Level.MUST for one in failed)
            named = sum(one.failure.get("mistake") == update.name for one in failed)
            lines = [f"{update.name}: it is what every run shows{where}", f"{update.sentence} Fix: {update.fix}"]
            match = of_defect(update, named, must, 0.0, ())
            return lines, match if follows(update, failed, "update") else {**match, "usable_for": ""}
        metrics, others = reported(failed)
        if metrics and not found.wrong:
            return of_metrics(metrics, others, failed, where)
        lines = [f"no catalogued cause fits{where}"] if found.wrong else []
        lines += found.located
        first = next((one for one in failed if one.level is Level.MUST), None)
        if not found.wrong and first is not None:
            said = first.failure
            lines.append(
                f"{first.requirement}: {said.get('aspect')}: expected {said.get('expected')}, got {said.get('got')}"
            )
        return lines, None
    inside = ", in the loss of the loop" if found.in_loss else ""
    shown = f"{found.defect.shown}{inside}"
    lines = [f"{shown}: explains the gradient of {found.explained} of {found.wrong} wrong steps{where}"]
    lines.append(f"{found.defect.sentence} Fix: {found.defect.fix}")
    if found.alike:
        lines.append(not_apart(found.alike))
    if found.explained < found.wrong:
        rest = found.wrong - found.explained - found.nearly
        if found.nearly:
            lines.append(f"{found.nearly} more in half precision come near it: there a tie may fall either way")
        if rest:
            lines.append(f"{rest} wrong steps remain unexplained: there is more wrong than this")
    match = of_defect(found.defect, found.explained, found.wrong - found.nearly, 0.0, found.alike)
    return lines, match if follows(found.defect, failed, "gradient") else {**match, "usable_for": ""}


def of_metrics(
    metrics: Sequence[NamedMetrics], rest: Sequence[str], failed: Sequence[Record], where: str
) -> tuple[list[str], dict[str, Any] | None]:
    """The diagnosis of a trainer whose steps are right and whose metrics are not."""
    lines: list[str] = []
    for one in metrics:
        lines.append(f"{one.defect.shown}: explains {one.wrong} of {one.wrong} wrong {', '.join(one.keys)}{where}")
        lines.append(f"{one.defect.sentence} Fix: {one.defect.fix}")
        if one.alike:
            lines.append(not_apart(one.alike))
    if rest:
        lines.append(f"no catalogued cause fits {', '.join(rest)}")
    most = max(metrics, key=lambda one: one.wrong)
    beside = sum(one.wrong for one in metrics if one is not most) + len(rest)
    match = of_defect(most.defect, most.wrong, most.wrong + beside, 0.0, most.alike)
    return lines, match if follows(most.defect, failed, "metric") else {**match, "usable_for": ""}


def follows(defect: Defect, failed: Sequence[Record], shown: str) -> bool:
    """Whether each failed MUST is one that the defect violates, or shows what it explains: a gradient, or a metric."""
    must = [record for record in failed if record.level is Level.MUST]
    return all(one.requirement in defect.violates or one.failure.get("shows") == shown for one in must)


def of_defect(defect: Defect, explained: int, of: int, error: float, equivalent: Sequence[str]) -> dict[str, Any]:
    """A named defect of the step loop as an entry of ``matches``."""
    shared = all(catalogue()[name].usable_for == defect.usable_for for name in equivalent if name in catalogue())
    return {
        "name": defect.name,
        "kind": "defect",
        "quality": error,
        "explained": explained,
        "of": of,
        "fix": defect.fix,
        "usable_for": usability(defect.usable_for if explained == of and shared else ""),
        "equivalent": list(equivalent),
        "seen": [citation.url for citation in defect.seen],
    }


def not_apart(names: Sequence[str]) -> str:
    """Defects that return the same on everything that failed."""
    shown = ", ".join(names[:MOST_EQUIVALENTS])
    rest = len(names) - MOST_EQUIVALENTS
    return f"not to be told apart on these inputs: {shown}{f' and {rest} more' if rest > 0 else ''}"
