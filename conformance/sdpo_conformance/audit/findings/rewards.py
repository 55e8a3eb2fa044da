"""Whether the parts of a reward rise together, or one is bought with another."""

from __future__ import annotations

import re
import statistics

from sdpo_conformance.audit.errors import shown
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, Severity, Verdicts

#: What is asked for, as against how the answer looks.
_TASK = re.compile(r"accura|correct|exact|match|solve|success|answer|pass|math|unit_?test")
_FEWEST_ROWS = 20
_LOOKS = re.compile(r"format|tag|style|length|penalt|structure|language")
#: A task's reward at the start that is more than luck, what is left of it, and the rise of what it was bought with.
_VISIBLE = 0.05
_LEFT = 0.1
_RISE = 1.2


def reward_traded(evidence: Evidence) -> Verdicts:
    """The sum of the rewards and another part rise while the task's own reward collapses."""
    metrics = evidence.metrics
    rewards = {} if metrics is None else {n: v for n, v in metrics.rewards.items() if len(v) >= _FEWEST_ROWS}
    course = {
        name: (statistics.fmean(values[: len(values) // 10]), statistics.fmean(values[-len(values) // 2 :]))
        for name, values in rewards.items()
    }
    total = course.pop("reward", None)
    risen = [name for name, (start, end) in course.items() if start > 0 and end >= _RISE * start]
    fallen = [n for n, (start, end) in course.items() if _of_task(n) and start >= _VISIBLE and end <= _LEFT * start]
    risen = [name for name in risen if not _of_task(name)]
    if total is None or not total[1] > total[0] or not risen or not fallen:
        return
    told = [(name, course[name]) for name in (*fallen, *risen)]
    yield Finding(
        id="reward-traded",
        severity=Severity.WARNING,
        statement=f"{shown(fallen[0])} collapses while {shown(risen[0])} and the whole reward rise",
        evidence=tuple(f"{shown(n)}: {start:.3g} to {end:.3g}" for n, (start, end) in (*told[:6], ("reward", total))),
        cause="the policy collects the reward that is cheap: a part that does not depend on the answer's being right",
        next_step="read a few completions; weigh the parts so that a wrong answer cannot gain",
        data={"fallen": fallen, "risen": risen},
    )


def _of_task(name: str) -> bool:
    return bool(_TASK.search(name)) and not _LOOKS.search(name)


CHECKS = (Check("reward-traded", "a task's reward that collapses while the sum rises", reward_traded),)
