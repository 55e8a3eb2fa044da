"""Which rules catch which sharded defects: python -m tests.sharded.sharded_kills [--all] [NAME ...].

One warm pool per mesh judges every defect that shows there, by the rule that has to catch it; --all: by every rule.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.judging.implementation import load_implementation
from sdpo_conformance.judging.profiles import PROFILES, Profile
from sdpo_conformance.protocol import Capability
from sdpo_conformance.sharded.mesh import MeshShape
from sdpo_conformance.sharded.pool import Pool
from sdpo_conformance.specs import DEFAULT, find_spec
from sdpo_conformance.specs.claas.sharded.defects import ShardedDefect, sharded_catalogue
from sdpo_conformance.specs.claas.sharded.sharded_rule import ShardedRule, sharded_rules
from sdpo_conformance.specs.claas.sharded.sharded_subject import ShardedSubject

QUICK = replace(PROFILES["quick"], shrink_seconds=0.0)


@dataclass(frozen=True)
class Verdict:
    """What one rule made of one defect through one entry; ``summary`` empty where it passed."""

    defect: str
    rule: str
    entry: str
    summary: str


def judge(
    pool: Pool, target: str, rule: ShardedRule, entry: Capability, profile: Profile = QUICK, seed: int = 0
) -> str:
    """The failure's summary, or an empty string."""
    claims = load_implementation(target, find_spec(DEFAULT)).claims
    subject = ShardedSubject(
        None, entry, claims, profile, seed=seed, dtypes=("float32", "bfloat16", "float16"), pool=pool, target=target
    )
    try:
        subject.run(rule)
    except Disagreement as found:
        return str(found) or "wrong"
    except ImplementationError as error:
        return error.summary
    return ""


def verdicts(defects: Sequence[ShardedDefect], every_rule: bool) -> Iterator[Verdict]:
    """Every defect on its mesh, one pool per mesh."""
    rules = sharded_rules()
    for mesh in dict.fromkeys(defect.mesh for defect in defects):
        with Pool("reference", MeshShape.parse(mesh)) as pool:
            for defect in (defect for defect in defects if defect.mesh == mesh):
                named = [id for id in rules if rules[id].applies(pool.mesh)] if every_rule else defect.violates[:1]
                for entry in defect.capabilities:
                    for id in named:
                        if entry in rules[id].capabilities:
                            summary = judge(pool, f"defect:{defect.name}", rules[id], entry)
                            yield Verdict(defect.name, id, entry.value, summary)


def main() -> int:
    names = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    chosen = [defect for defect in sharded_catalogue().values() if not names or defect.name in names]
    started, killed, total = time.monotonic(), 0, 0
    for verdict in verdicts(chosen, "--all" in sys.argv):
        total, killed = total + 1, killed + bool(verdict.summary)
        mark = "caught" if verdict.summary else "PASSED"
        print(f"{mark} {verdict.defect} by {verdict.rule} through {verdict.entry}: {verdict.summary[:100]}", flush=True)
    print(f"{killed} of {total} caught, {len(chosen)} defects, {time.monotonic() - started:.0f} s")
    return 0 if killed == total else 1


if __name__ == "__main__":
    sys.exit(main())
