"""How often the diagnosis is right: every catalogued defect, and pairs drawn at random.

``python -m tests.evidence.diagnosis_score --pairs 30 --seed 0 --jobs 4 --json measured.json``

A defect is diagnosed right when it is named, or is among those that cannot be told from what is named. A pair is
right when both its defects are, in either order.

``--leave-one-out`` diagnoses each defect by a catalogue without it, as a defect that nobody catalogued is: silence is
right, and so is a neighbour, whose naming requirement the defect breaks or that breaks the defect's own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from sdpo_conformance.files import write_json
from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.judging.profiles import PROFILES
from sdpo_conformance.judging.records import Record, Status
from sdpo_conformance.protocol import Capability, Claims
from sdpo_conformance.reproduction.failure import failure_of
from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.claas.defects import catalogue, combine, find
from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.defects.dialects import Dialect
from sdpo_conformance.specs.claas.diagnosis.diagnose import Diagnosis, diagnose
from sdpo_conformance.specs.claas.diagnosis.heads import ObservedHead
from sdpo_conformance.specs.claas.diagnosis.observed import Observed, ObservedLoss, values_of, words_of
from sdpo_conformance.specs.claas.diagnosis.run import ENOUGH
from sdpo_conformance.specs.claas.loss_case import LossCase

BROAD = ("GJS-1", "GJS-9", "RKL-1", "IS-2", "IS-10", "KL-1", "RED-1", "RED-4")
"""Requirements that every measured defect is judged by, besides those it violates."""

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Measured:
    """``right``: named or equivalent; ``answer``: what was said, with ``equivalent`` ones; ``explained`` of
    ``failures``, to a relative ``error``."""

    defect: str
    entry: str
    right: bool
    answer: str
    equivalent: tuple[str, ...]
    explained: int
    failures: int
    error: float
    seconds: float


def failures_of(
    defect: Defect, entry: Capability, seed: int, rules: Sequence[str] = ()
) -> tuple[list[Observed], list[str]]:
    """What the suite observes of a defect by these rules (its own and broad ones if none are given), and those that
    held."""
    profile = replace(PROFILES["quick"], shrink_seconds=0.3)
    observed: list[Observed] = []
    held = []
    for name in dict.fromkeys(rules or (*defect.violates, *BROAD)):
        requirement = find_spec("claas").requirements().get(name)
        if requirement is None or entry not in requirement.capabilities:
            continue
        subject = Subject(defect.implementation(), entry, Claims(), profile, seed, dtypes=DTYPES)
        try:
            subject.run(requirement)
            held.append(name)
        except (Disagreement, ImplementationError) as found:
            if (one := observed_of(found, name, entry)) is not None:
                observed.append(one)
        except BaseException as error:
            if type(error).__name__ != "Skipped":
                raise
    return observed, held


def observed_of(found: Disagreement | ImplementationError, rule: str, entry: Capability) -> Observed | None:
    """What a run would keep of a failure; None where it keeps no input."""
    if isinstance(found, Disagreement):
        words = {"probe": found.probe, "aspect": found.aspect, "got": found.got, "secondary": found.secondary}
        values = values_of(found.outcome) if found.outcome is not None else {}
    else:
        words, values = {"probe": "raises", "aspect": entry.value, "got": found.summary, "secondary": False}, {}
    if isinstance(found.case, LossCase):
        return ObservedLoss(rule, entry, found.case, values, **words_of(words))
    if "observed" not in found.extra:
        return None
    with TemporaryDirectory() as folder:
        path = Path(folder) / "observed.safetensors"
        found.extra["observed"](path)
        return ObservedHead.load(path, rule, entry, words)


def names_of(answer: Diagnosis) -> set[frozenset[str]]:
    """Every explanation that was given, as sets of defect names."""
    given = {frozenset(defect.name for defect in answer.defects)}
    return given | {frozenset(defect.name.split("+")) for defect in answer.equivalent}


def measure(name: str, entry: Capability, seed: int) -> Measured:
    """Judge, diagnose and compare."""
    import torch

    torch.set_num_threads(1)
    started = time.monotonic()
    defect = find(name)
    observed, held = failures_of(defect, entry, seed)
    answer = diagnose(observed, held)
    wanted = frozenset(name.split("+"))
    return Measured(
        defect=name,
        entry=entry.value,
        right=answer is not None and wanted in names_of(answer),
        answer="no match" if answer is None else answer.name,
        equivalent=() if answer is None else tuple(one.name for one in answer.equivalent),
        explained=0 if answer is None else len(answer.explained),
        failures=len(observed),
        error=0.0 if answer is None else answer.error,
        seconds=time.monotonic() - started,
    )


def measure_trainer(name: str, entry: Capability, seed: int, left_out: bool = False) -> Measured:
    """Judge a step loop by every rule, and read the diagnosis of the run; ``left_out``: by a catalogue without it."""
    import torch

    torch.set_num_threads(1)
    started = time.monotonic()
    spec, defect = find_spec("claas"), find(name)
    others = {one.name: one for one in catalogue().values() if not left_out or one.name != name}
    failed: list[Record] = []
    implementation = defect.implementation()  # one, for what it did is kept by it
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        for reader in ("specs.claas.step_loop.explanations", "specs.claas.diagnosis.trainers"):
            stack.enter_context(patch(f"sdpo_conformance.{reader}.catalogue", return_value=others))
        for requirement in spec.requirements().values():
            if entry not in requirement.capabilities:
                continue
            subject = Subject(implementation, entry, Claims(), PROFILES["quick"], seed, dtypes=DTYPES)
            try:
                subject.run(requirement)
            except (Disagreement, ImplementationError) as found:
                failure = failure_of(folder, f"defect:{name}", "cpu", spec, requirement, entry, found)
                failed.append(Record(requirement.id, entry.value, requirement.level, Status.FAILED, failure=failure))
            except BaseException as error:
                if type(error).__name__ != "Skipped":
                    raise
        answer = spec.parts.diagnose(folder, failed, [entry]) if failed else None
    match = next(iter(answer["matches"]), None) if answer else None
    said = match["name"] if match else ""
    alike = tuple(match["equivalent"]) if match else ()
    broken = find(said).violates if said else ()
    near = bool({*broken[:1]} & {*defect.violates} or {*defect.violates[:1]} & {*broken})
    return Measured(
        defect=name,
        entry=entry.value,
        right=(not said or near) if left_out else name in (said, *alike),
        answer=said or "silence",
        equivalent=alike,
        explained=match["explained"] if match else 0,
        failures=match["of"] if match else len(failed),
        error=0.0,
        seconds=time.monotonic() - started,
    )


def measure_trainer_left_out(name: str, entry: Capability, seed: int) -> Measured:
    return measure_trainer(name, entry, seed, left_out=True)


def rule_named(answer: Diagnosis) -> list[Defect]:
    """The answer's defects that a rule names; a dialect has none."""
    return [one for one in answer.defects if not isinstance(one, Dialect)]


def measure_left_out(name: str, entry: Capability, seed: int) -> Measured:
    """Judge, and diagnose by the catalogue's other defects; what explains less than a report asks for is not said."""
    import torch

    torch.set_num_threads(1)
    started = time.monotonic()
    defect = find(name)
    observed, held = failures_of(defect, entry, seed)
    others = {one.name: one for one in catalogue().values() if one.name != name}
    with patch("sdpo_conformance.specs.claas.diagnosis.diagnose.catalogue", return_value=others):
        answer = diagnose(observed, held)
        # A run judges every rule: those that name what was answered are asked, too, before it counts.
        asked = {*defect.violates, *BROAD}
        while answer is not None and (open_ones := {one.violates[0] for one in rule_named(answer)} - asked):
            asked |= open_ones
            more, kept = failures_of(defect, entry, seed, sorted(open_ones))
            observed, held = [*observed, *more], [*held, *kept]
            answer = diagnose(observed, held)
    if answer is not None and len(answer.explained) < ENOUGH * len(observed):
        answer = None
    said = () if answer is None else getattr(answer.defects[0], "violates", ())
    return Measured(
        defect=name,
        entry=entry.value,
        right=answer is None or bool({*said[:1]} & {*defect.violates} or {*defect.violates[:1]} & {*said}),
        answer="silence" if answer is None else answer.name,
        equivalent=() if answer is None else tuple(one.name for one in answer.equivalent),
        explained=0 if answer is None else len(answer.explained),
        failures=len(observed),
        error=0.0 if answer is None else answer.error,
        seconds=time.monotonic() - started,
    )


def random_pairs(count: int, seed: int) -> list[str]:
    """Pairs of independent loss defects, each caught by a MUST, drawn without replacement."""
    from sdpo_conformance.specs import find_spec
    from sdpo_conformance.specs.requirement import Level

    levels = {name: requirement.level for name, requirement in find_spec("claas").requirements().items()}
    names = [
        defect.name
        for defect in catalogue().values()
        if Capability.LOSS in defect.capabilities and levels.get(defect.violates[0]) is Level.MUST
    ]
    drawn: list[str] = []
    generator = random.Random(seed)
    while len(drawn) < count:
        first, second = generator.sample(names, 2)
        try:
            combine(find(first), find(second))
        except ValueError:
            continue
        if f"{first}+{second}" not in drawn:
            drawn.append(f"{first}+{second}")
    return drawn


def measured(
    work: Sequence[tuple[str, Capability]],
    seed: int,
    jobs: int,
    how: Callable[[str, Capability, int], Measured] = measure,
) -> Iterator[Measured]:
    """Every measurement as it comes."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A fresh process each: a trainer's diagnosis tries the names first that it gave before.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        for future in as_completed([pool.submit(how, name, entry, seed) for name, entry in work]):
            yield future.result()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m``; exit status 0 when every single defect is diagnosed right."""
    parser = argparse.ArgumentParser(prog="tests.evidence.diagnosis_score")
    parser.add_argument("--pairs", type=int, default=30, help="pairs drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs and of the examples")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--entry", default=Capability.LOSS.value, choices=[c.value for c in Capability])
    parser.add_argument("--only", action="append", help="only these defects")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    parser.add_argument("--leave-one-out", action="store_true", help="each defect by a catalogue without it")
    options = parser.parse_args(arguments)
    entry = Capability(options.entry)
    singles = [name for name in options.only or catalogue() if entry in find(name).capabilities]
    trainers = entry is Capability.DISTILL
    pairs = [] if options.only or options.leave_one_out or trainers else random_pairs(options.pairs, options.seed)
    if trainers:
        how = measure_trainer_left_out if options.leave_one_out else measure_trainer
    else:
        how = measure_left_out if options.leave_one_out else measure
    found = []
    for one in measured([(name, entry) for name in (*singles, *pairs)], options.seed, options.jobs, how):
        found.append(one)
        mark = "right" if one.right else "WRONG" if one.answer not in ("silence", "no match") else "silent"
        print(f"{mark} {one.defect}: said {one.answer} ({one.explained} of {one.failures})", flush=True)
    for kind, names in (("defects", singles), ("pairs", pairs)):
        of_kind = [one for one in found if one.defect in names]
        print(f"{kind}: {sum(one.right for one in of_kind)} of {len(of_kind)} diagnosed right")
    print(f"silent: {sum(one.answer in ('silence', 'no match') for one in found)} of {len(found)}")
    if options.json:
        content = {"seed": options.seed, "pairs": pairs, "measured": [asdict(one) for one in found]}
        write_json(options.json, content)
    return 0 if all(one.right for one in found if one.defect in singles) else 1


if __name__ == "__main__":
    sys.exit(main())
