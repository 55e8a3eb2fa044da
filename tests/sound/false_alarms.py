"""Right implementations through the whole suite: ``python -m tests.sound.false_alarms --profile default --jobs 4``.

Prints every false alarm and how many examples were judged, part by part; exit status 1 where there was an alarm.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from sdpo_conformance.judging.profiles import PROFILES
from sdpo_conformance.protocol import Capability, Claims

DTYPES = ("float32", "bfloat16", "float16")

PARTS = 4
"""Into so many parts an entry's requirements are dealt, so that no process is left alone with the slowest entry."""


def methods() -> list[str]:
    """The implementations' module names."""
    aside = {"shared", "false_alarms"}
    found = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name for name in found if name not in aside and not name.startswith("test_"))


def judge(name: str, entry: Capability, profile: str, seed: int, part: int) -> tuple[int, list[str]]:
    """Examples judged and alarms raised by one part of the requirements of one entry of one implementation."""
    import torch

    from sdpo_conformance.judging.call import ImplementationError
    from sdpo_conformance.judging.compare import Disagreement
    from sdpo_conformance.judging.examples import Subject
    from sdpo_conformance.specs import find_spec

    torch.set_num_threads(1)
    module = importlib.import_module(f"{__package__}.{name}")
    claims = Claims.read(getattr(module, "SDPO_CLAIMS", None))
    judged, alarms = 0, []
    for requirement in list(find_spec("claas").requirements().values())[part::PARTS]:
        if entry not in requirement.capabilities or requirement.id in claims.expected_failures:
            continue
        subject = Subject(module, entry, claims, PROFILES[profile], seed, dtypes=DTYPES)
        try:
            subject.run(requirement)
        except (Disagreement, ImplementationError) as alarm:
            alarms.append(f"{name} through {entry.value}, {requirement.id}, seed {seed}: {alarm}")
        except BaseException as error:
            if type(error).__name__ != "Skipped":
                raise
        judged += subject.tally.examples
    return judged, alarms


def main(arguments: Sequence[str] | None = None) -> int:
    """Every method, both entries, some seeds, in parallel."""
    parser = argparse.ArgumentParser(prog="tests.sound.false_alarms")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="default")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from 0 on")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    work = [
        (name, entry, options.profile, seed, part)
        for seed in range(options.seeds)
        for part in range(PARTS)
        for name in methods()
        for entry in (Capability.LOSS, Capability.FUSED)
        if hasattr(importlib.import_module(f"{__package__}.{name}"), entry.value)
    ]
    total, count = 0, 0
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = {pool.submit(judge, *task): task for task in work}
        for future in as_completed(tasks):
            judged, alarms = future.result()
            total, count = total + judged, count + len(alarms)
            name, entry, _, seed, part = tasks[future]
            which = f"{name} through {entry.value}, seed {seed}, part {part + 1} of {PARTS}"
            print(f"{which}: {judged} examples", flush=True)
            for alarm in alarms:
                print(alarm, flush=True)
    print(f"{len(methods())} right implementations, {total} examples, {count} false alarms")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
