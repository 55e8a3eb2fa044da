"""Mutation score: every defect through the suite, in parallel, and the table of what caught it.

``python -m tests.evidence.mutation --profile default --seeds 10 --jobs 8 --json scores.json``

With the first seed every requirement judges every defect, through one entry; all else is judged by the requirement
that names it. Exit status 0 when each defect is caught by the requirement that names it with every seed, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tests.evidence.processes import in_processes

from sdpo_conformance.judging.profiles import PROFILES
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas import defects
from sdpo_conformance.specs.claas.defects.defect import Defect

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Task:
    """One defect through one entry with one seed; ``everything``: by all requirements, not only its own."""

    defect: str
    entry: Capability
    seed: int
    profile: str
    everything: bool


@dataclass(frozen=True)
class Score:
    """``named`` is the requirement that has to catch the defect in this entry; ``caught`` maps each requirement
    that failed to the examples it took, not counting those by which the failure was made small; ``secondary`` are
    those of them that point to another rule; ``everything`` as in the task."""

    defect: str
    entry: str
    seed: int
    named: str
    everything: bool
    caught: Mapping[str, int]
    secondary: tuple[str, ...]
    seconds: float

    @property
    def by_named(self) -> bool:
        return self.named in self.caught and self.named not in self.secondary


def named_requirement(defect: Defect, entry: Capability) -> str | None:
    """The first of the defect's requirements that is tested through ``entry``; None where none is."""
    from sdpo_conformance.specs import find_spec

    known = find_spec("claas").requirements()
    for requirement in defect.violates:
        if requirement in known and entry in known[requirement].capabilities:
            return requirement
    return None


def tasks(
    names: Sequence[str], entries: Sequence[Capability], profile: str, seeds: int, named_only: bool = False
) -> list[Task]:
    """The work, slow entries first."""
    found = [
        Task(name, entry, seed, profile, everything=seed == 0 and place == 0 and not named_only)
        for seed in range(seeds)
        for name in names
        for place, entry in enumerate(judged_through(defects.find(name), entries))
    ]
    return sorted(found, key=lambda task: (not task.everything, task.entry is not Capability.DISTILL))


def judged_through(defect: Defect, entries: Sequence[Capability]) -> list[Capability]:
    """Those of ``entries`` through which a requirement names the defect, the plain loss first."""
    through = [entry for entry in defect.capabilities if entry in entries and named_requirement(defect, entry)]
    return sorted(through, key=lambda entry: entry is not Capability.LOSS)


def score(task: Task) -> Score:
    """Run one task in this process."""
    import torch

    from sdpo_conformance.judging.call import ImplementationError
    from sdpo_conformance.judging.compare import Disagreement
    from sdpo_conformance.judging.examples import Subject
    from sdpo_conformance.protocol import Claims
    from sdpo_conformance.specs import find_spec

    torch.set_num_threads(1)
    defect = defects.find(task.defect)
    named = named_requirement(defect, task.entry)
    assert named is not None
    profile = replace(PROFILES[task.profile], shrink_seconds=0.0)
    started = time.monotonic()
    caught: dict[str, int] = {}
    secondary: list[str] = []
    for requirement in find_spec("claas").requirements().values():
        if task.entry not in requirement.capabilities or not (task.everything or requirement.id == named):
            continue
        implementation = defect.implementation()
        subject = Subject(implementation, task.entry, Claims(), profile, task.seed, dtypes=DTYPES)
        try:
            subject.run(requirement)
        except (Disagreement, ImplementationError) as failure:
            caught[requirement.id] = max(subject.tally.examples, 1)
            if getattr(failure, "secondary", False):
                secondary.append(requirement.id)
        except BaseException as error:
            if type(error).__name__ != "Skipped":
                raise
    return Score(
        task.defect,
        task.entry.value,
        task.seed,
        named,
        task.everything,
        caught,
        tuple(secondary),
        time.monotonic() - started,
    )


@dataclass(frozen=True)
class Summary:
    """``defects`` catalogued and judged; ``runs`` of one defect, entry and seed; ``caught`` by anything,
    ``named`` by the requirement that names it; ``missed`` lists defect, entry, requirement and seeds."""

    defects: int
    runs: int
    caught: int
    named: int
    missed: tuple[str, ...]


def summarise(found: Iterable[Score]) -> Summary:
    """The mutation score of a set of runs."""
    found = list(found)
    missed: dict[str, list[int]] = {}
    for one in found:
        if not one.by_named:
            missed.setdefault(f"{one.defect} through {one.entry}, {one.named}", []).append(one.seed)
    return Summary(
        defects=len({one.defect for one in found}),
        runs=len(found),
        caught=sum(bool(one.caught) for one in found),
        named=sum(one.by_named for one in found),
        missed=tuple(f"{what}: seeds {', '.join(map(str, sorted(seeds)))}" for what, seeds in sorted(missed.items())),
    )


def table(found: Sequence[Score]) -> Any:
    """A rich table of the first seed's scores."""
    from rich.table import Table

    order = list(defects.catalogue())
    result = Table(title="mutation score", title_justify="left")
    for name in ("defect", "entry", "named by", "examples"):
        result.add_column(name, no_wrap=True)
    result.add_column("also broken")
    result.add_column("wrong because of these")
    for one in sorted((s for s in found if s.seed == 0), key=lambda s: (order.index(s.defect), s.entry)):
        others = " ".join(name for name in one.caught if name != one.named and name not in one.secondary)
        if not one.everything:
            others = "[dim]not asked[/dim]"
        mark = one.named if one.by_named else f"[red]{one.named} MISSED[/red]"
        entry = one.entry.removeprefix("compute_").removesuffix("_loss")
        result.add_row(
            one.defect,
            entry,
            mark,
            str(one.caught.get(one.named, "-")),
            others or "[dim]nothing else[/dim]",
            " ".join(name for name in one.secondary if name != one.named),
        )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tests.evidence.mutation", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=sorted(PROFILES), default="default")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from 0 on")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--entry", action="append", choices=[c.value for c in Capability], help="only these entries")
    parser.add_argument("--only", action="append", help="only these defects")
    parser.add_argument(
        "--named-only", action="store_true", help="with the first seed too, only the naming requirement"
    )
    parser.add_argument("--json", type=Path, help="write every score here")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    try:
        names = [defects.find(name).name for name in options.only or defects.catalogue()]
    except KeyError as error:
        parser.error(str(error))
    entries = [Capability(entry) for entry in options.entry or Capability]

    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 160
    work = tasks(names, entries, options.profile, options.seeds, options.named_only)
    found: list[Score] = []
    started = time.monotonic()
    for one in in_processes(score, work, options.jobs):
        found.append(one)
        if not one.by_named:
            print(
                f"missed: {one.defect} through {one.entry} with seed {one.seed} by {one.named}",
                file=sys.stderr,
                flush=True,
            )
    summary = summarise(found)
    console.print(table(found))
    console.print(
        f"{summary.defects} defects, {summary.runs} runs, {time.monotonic() - started:.0f} s: "
        f"caught {summary.caught}/{summary.runs}, by the requirement that names it {summary.named}/{summary.runs}"
    )
    for line in summary.missed:
        console.print(f"missed: {line}")
    if options.json:
        content = {
            "profile": options.profile,
            "seeds": options.seeds,
            "dtypes": DTYPES,
            "summary": asdict(summary),
            "scores": [asdict(one) for one in found],
        }
        partial = options.json.with_name(options.json.name + ".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, options.json)
    return 0 if summary.named == summary.runs else 1


if __name__ == "__main__":
    sys.exit(main())
