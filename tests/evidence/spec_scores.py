"""Scores of the specs beside CLaaS: mutation by the rule that names the defect, and false alarms on right losses.

``python -m tests.evidence.spec_scores lasgroup --seeds 10 --profile quick``

Exit status 0 where every defect is caught by the requirement that names it with every seed and no right loss fails a
MUST, 1 otherwise.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from tests.evidence.processes import in_processes
from tests.specs.right import right_losses

from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.judging.profiles import PROFILES
from sdpo_conformance.protocol import Capability, Claims
from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.shared.wrong_teachers import TeacherDefect
from sdpo_conformance.specs.spec import Spec


def verdict(spec: Spec, function: Any, requirement: str, seed: int, profile: str, dtypes: Any) -> tuple[str, int, str]:
    """passed, failed, secondary or skipped; the examples judged; what was found. ``function``: the entry that the rule
    is tested through."""
    quick = replace(PROFILES[profile], shrink_seconds=0.0, every=1)
    (entry,) = spec.requirements()[requirement].capabilities
    implementation = SimpleNamespace(**{entry.value: function})
    subject = Subject(implementation, entry, Claims(), quick, seed, dtypes=dtypes, spec=spec)
    try:
        subject.run(spec.requirements()[requirement])
    except (Disagreement, ImplementationError) as found:
        return "secondary" if getattr(found, "secondary", False) else "failed", subject.tally.examples, str(found)
    except BaseException as error:
        if type(error).__name__ != "Skipped":
            raise
        return "skipped", 0, ""
    return "passed", subject.tally.examples, ""


def known_defects(spec: Spec) -> dict[str, Any]:
    """The catalogue, wrong teachers among it, by name."""
    module = importlib.import_module(f"{spec.package}.defects")
    return {**module.catalogue(), **{one.name: one for one in getattr(module, "TEACHERS", ())}}


def wrong(defect: Any) -> Any:
    """The entry that has the defect."""
    return defect.make() if isinstance(defect, TeacherDefect) else defect.wrong


@dataclass(frozen=True)
class Task:
    """One loss with one seed: a ``defect`` by the rule that names it, or a ``right`` one by every MUST."""

    spec: str
    kind: str
    name: str
    seed: int
    profile: str


def judge(task: Task) -> tuple[Task, list[str], int]:
    """The task, what is wrong about its verdicts, and the examples judged."""
    torch.set_num_threads(1)
    spec = find_spec(task.spec)
    if task.kind == "defect":
        defect = known_defects(spec)[task.name]
        named = defect.violates[0]
        outcome, examples, message = verdict(spec, wrong(defect), named, task.seed, task.profile, spec.dtypes)
        return task, [] if outcome == "failed" else [f"{named} {outcome} {message[:90]}"], examples
    function, dtypes = right_losses(spec.name)[task.name]
    accused, examples = [], 0
    for id, requirement in spec.requirements().items():
        if str(requirement.level) == "MUST" and Capability.LOSS in requirement.capabilities:
            outcome, judged, message = verdict(spec, function, id, task.seed, task.profile, dtypes)
            examples += judged
            accused += [f"{id} {outcome} {message[:120]}"] if outcome in ("failed", "secondary") else []
    return task, accused, examples


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``python -m``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("spec")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--profile", choices=sorted(PROFILES), default="quick")
    parser.add_argument("--only", action="append", help="only these defects")
    parser.add_argument("--jobs", type=int, default=1, help="processes that judge losses")
    parser.add_argument("--skip", choices=("mutation", "alarms"), default="")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    spec = find_spec(options.spec)
    defects = known_defects(spec)
    started = time.monotonic()
    missed: list[str] = []
    alarms: list[str] = []
    if options.skip != "mutation":
        names = options.only or list(defects)
        work = [
            Task(spec.name, "defect", name, seed, options.profile) for name in names for seed in range(options.seeds)
        ]
        for task, found, _ in in_processes(judge, work, options.jobs):
            missed += [f"{task.name} with seed {task.seed}: {line}" for line in found]
        print(
            f"{spec.name}: {len(names)} defects, "
            f"{len(work) - len(missed)}/{len(work)} caught by the rule that names them"
        )
    if options.skip != "alarms":
        right, examples = right_losses(spec.name), 0
        work = [
            Task(spec.name, "right", name, seed, options.profile) for name in right for seed in range(options.seeds)
        ]
        for task, found, judged in in_processes(judge, work, options.jobs):
            alarms += [f"{task.name} with seed {task.seed}: {line}" for line in found]
            examples += judged
        print(f"{spec.name}: {len(right)} right losses, {examples} examples, {len(alarms)} false alarms")
    for line in (*missed, *alarms):
        print(f"  {line}")
    print(f"  {time.monotonic() - started:.0f} s")
    return bool(missed or alarms)


if __name__ == "__main__":
    sys.exit(main())
