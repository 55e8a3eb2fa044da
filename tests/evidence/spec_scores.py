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
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from tests.specs.right import right_losses

from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.judging.profiles import PROFILES
from sdpo_conformance.protocol import Capability, Claims
from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.spec import Spec


def verdict(spec: Spec, function: Any, requirement: str, seed: int, profile: str, dtypes: Any) -> tuple[str, int, str]:
    """passed, failed, secondary or skipped; the examples judged; what was found."""
    quick = replace(PROFILES[profile], shrink_seconds=0.0, every=1)
    implementation = SimpleNamespace(compute_sdpo_loss=function)
    subject = Subject(implementation, Capability.LOSS, Claims(), quick, seed, dtypes=dtypes, spec=spec)
    try:
        subject.run(spec.requirements()[requirement])
    except (Disagreement, ImplementationError) as found:
        return "secondary" if getattr(found, "secondary", False) else "failed", subject.tally.examples, str(found)
    except BaseException as error:
        if type(error).__name__ != "Skipped":
            raise
        return "skipped", 0, ""
    return "passed", subject.tally.examples, ""


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``python -m``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("spec")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--profile", choices=sorted(PROFILES), default="quick")
    parser.add_argument("--only", action="append", help="only these defects")
    parser.add_argument("--skip", choices=("mutation", "alarms"), default="")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    spec = find_spec(options.spec)
    defects = importlib.import_module(f"{spec.package}.defects").catalogue()
    started, missed, runs = time.monotonic(), [], 0
    if options.skip != "mutation":
        for name in options.only or defects:
            for seed in range(options.seeds):
                runs += 1
                named = defects[name].violates[0]
                found = verdict(spec, defects[name].wrong, named, seed, options.profile, spec.dtypes)
                if found[0] != "failed":
                    missed.append(f"{name} by {named} with seed {seed}: {found[0]} {found[2][:90]}")
        print(f"{spec.name}: {len(defects)} defects, {runs - len(missed)}/{runs} caught by the rule that names them")
    alarms, examples = [], 0
    if options.skip != "alarms":
        for name, (function, dtypes) in right_losses(spec.name).items():
            for seed in range(options.seeds):
                for id, requirement in spec.requirements().items():
                    if str(requirement.level) != "MUST":
                        continue
                    found = verdict(spec, function, id, seed, options.profile, dtypes)
                    examples += found[1]
                    if found[0] in ("failed", "secondary"):
                        alarms.append(f"{name}: {id} with seed {seed}: {found[2][:120]}")
        print(
            f"{spec.name}: {len(right_losses(spec.name))} right losses, {examples} examples, {len(alarms)} false alarms"
        )
    for line in (*missed, *alarms):
        print(f"  {line}")
    print(f"  {time.monotonic() - started:.0f} s")
    return bool(missed or alarms)


if __name__ == "__main__":
    sys.exit(main())
