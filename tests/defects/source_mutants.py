"""Mechanical mutants of the reference's source through the suite.

``pip install cosmic-ray && python -m tests.defects.source_mutants --profile default --jobs 4 --json mutants.json``

cosmic-ray's operators change one place of the source at a time (another arithmetic or comparison operator, a number
off by one, a negated condition, a decorator gone, a loop skipped). Each mutant is judged by all requirements of the
entries it offers until the first one fails; the survivors are printed as a difference of source lines. Exit status 1
where there are any: docs/evidence.md explains them.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import multiprocessing
import os
import sys
import time
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sdpo_conformance.judging.profiles import PROFILES
from sdpo_conformance.protocol import Capability, Claims

REFERENCE = "sdpo_implementations.reference"
ENTRIES = {
    f"{REFERENCE}.loss": (Capability.LOSS, Capability.FUSED, Capability.DIVERGENCE),
    f"{REFERENCE}.response_logprobs": (Capability.RESPONSE_LOGPROBS,),
    f"{REFERENCE}.teacher_topk": (Capability.TEACHER_TOPK,),
    "sdpo_implementations.step_loop": (Capability.DISTILL,),
}
NOISE = ("VariableReplacer", "VariableInserter", "ExceptionReplacer")
"""Operators whose changes are random names, or touch only what is caught and raised again."""

BROADEST = ("NUM-1", "KL-1", "RED-2", "GJS-6", "FUS-1", "FUS-3", "FUS-5")
"""Asked first."""

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""What the reference claims."""


@dataclass(frozen=True)
class Mutant:
    """``occurrence`` of an operator in a module; ``source`` is the whole changed text."""

    module: str
    operator: str
    occurrence: int
    source: str


@dataclass(frozen=True)
class Fate:
    """``killed_by``: the first requirement that failed, with its entry, or the error of loading the mutant; None
    for a survivor."""

    module: str
    operator: str
    occurrence: int
    change: str
    killed_by: str | None
    examples: int
    seconds: float


def source_of(module: str) -> str:
    """The text of an importable module."""
    import importlib.util

    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def meaning(source: str) -> str:
    """The syntax tree without annotations and docstrings: what can change a result."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def mutants(module: str) -> Iterator[Mutant]:
    """Every mutant of a module that differs from it, and from the mutants before it, in more than annotations."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    source = source_of(module)
    seen = {meaning(source)}
    for name in operator_names():
        if name.endswith(NOISE):
            continue
        occurrence = 0
        while (changed := mutate_code(source, get_operator(name)(), occurrence)) is not None:
            if (tree := meaning(changed)) not in seen:
                seen.add(tree)
                yield Mutant(module, name.removeprefix("core/"), occurrence, changed)
            occurrence += 1


def load(mutant: Mutant) -> object:
    """The mutated module under its own name, with the reference's distill put together from a mutated step loop."""
    module = types.ModuleType(mutant.module)
    module.__package__ = mutant.module.rpartition(".")[0]
    sys.modules[mutant.module] = module
    exec(compile(mutant.source, f"<mutant of {mutant.module}>", "exec"), module.__dict__)
    if mutant.module.endswith("step_loop"):
        import importlib

        return importlib.reload(importlib.import_module(f"{REFERENCE}.trainer"))
    return module


def judge(mutant: Mutant, profile: str, seed: int) -> Fate:
    """Run the requirements of the mutated entries until one fails."""
    import torch

    from sdpo_conformance.judging.call import ImplementationError
    from sdpo_conformance.judging.compare import Disagreement
    from sdpo_conformance.judging.examples import Subject
    from sdpo_conformance.specs import find_spec

    torch.set_num_threads(1)
    started, examples = time.monotonic(), 0
    change = "\n".join(
        line
        for line in difflib.unified_diff(
            source_of(mutant.module).splitlines(), mutant.source.splitlines(), lineterm="", n=0
        )
        if not line.startswith(("---", "+++", "@@"))
    )

    def fate(killed_by: str | None) -> Fate:
        return Fate(
            mutant.module,
            mutant.operator,
            mutant.occurrence,
            change,
            killed_by,
            examples,
            round(time.monotonic() - started, 1),
        )

    original = sys.modules.get(mutant.module)
    try:
        try:
            implementation = load(mutant)
        except Exception as error:
            return fate(f"loading: {type(error).__name__}")
        limits = replace(PROFILES[profile], shrink_seconds=0.0)
        for requirement in sorted(find_spec("claas").requirements().values(), key=lambda each: each.id not in BROADEST):
            for entry in ENTRIES[mutant.module]:
                if entry not in requirement.capabilities:
                    continue
                subject = Subject(implementation, entry, Claims(), limits, seed, dtypes=DTYPES)
                try:
                    subject.run(requirement)
                except (Disagreement, ImplementationError):
                    examples += subject.tally.examples
                    return fate(f"{requirement.id} through {entry.value}")
                except BaseException as error:
                    if type(error).__name__ != "Skipped":
                        raise
                examples += subject.tally.examples
        return fate(None)
    finally:
        if original is None:
            sys.modules.pop(mutant.module, None)
        else:
            sys.modules[mutant.module] = original


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tests.defects.source_mutants")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--module", action="append", choices=sorted(ENTRIES), help="only these modules")
    parser.add_argument("--json", type=Path, help="write every fate here")
    options = parser.parse_args(arguments)
    work = [mutant for module in options.module or ENTRIES for mutant in mutants(module)]
    fates: list[Fate] = []
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(judge, mutant, options.profile, options.seed) for mutant in work]):
            fates.append(future.result())
            if len(fates) % 20 == 0:
                print(f"{len(fates)} of {len(work)}", file=sys.stderr, flush=True)
            if fates[-1].killed_by is None:
                print(f"survived: {fates[-1].module}\n{fates[-1].change}\n", flush=True)
    survivors = [fate for fate in fates if fate.killed_by is None]
    print(f"{len(fates)} mutants, {len(fates) - len(survivors)} killed, {len(survivors)} survived")
    if options.json:
        options.json.write_text(json.dumps([asdict(fate) for fate in fates], indent=1), encoding="utf-8")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
