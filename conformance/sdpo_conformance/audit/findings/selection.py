"""Whether the checkpoint that was chosen is the best by the metric it was chosen by."""

from __future__ import annotations

import re

from sdpo_conformance.audit.errors import shown
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, Severity, Verdicts

_HIGHER = re.compile(
    r"(^|[_/])(reward|rewards|accuracy|acc|f1|precision|recall|success|success_rate|win_rate|winrate|pass|pass@\d+|"
    r"exact_match|em|bleu|rouge\w*|auc|mcc|solve_rate|correct)([_/]|$)"
)
_LOWER = re.compile(r"(^|[_/])(loss|perplexity|ppl|wer|cer|error|error_rate|mse|mae|nll)$")
#: Numbers of which a name does not say whether more is better: spreads, and rewards of what should be unlikely.
_EITHER = re.compile(r"(std|var|variance|margin)s?$|rejected|penalt|cost|length|entropy|kl($|[_/])")
_FEWEST = 3


def worst_is_best(evidence: Evidence) -> Verdicts:
    """The best checkpoint has the worst value of all evaluations, by a metric whose name says which way is better."""
    best = evidence.best
    if best is None or len(best.values) < _FEWEST or _EITHER.search(best.metric):
        return
    higher, lower = _HIGHER.search(best.metric), _LOWER.search(best.metric)
    if bool(higher) == bool(lower):
        return
    others = [value for _, value in best.values if value != best.value]
    if len(others) != len(best.values) - 1 or any((value > best.value) != bool(higher) for value in others):
        return
    switch = evidence.settings.values.get("greater_is_better", frozenset())
    yield Finding(
        id="worst-is-best",
        severity=Severity.WARNING,
        statement=f"{shown(best.checkpoint)} was held to be the best, and has the worst {shown(best.metric)} of all",
        evidence=(
            ", ".join(f"step {step}: {value:.4g}" for step, value in best.values[:12]),
            *(f"greater_is_better is {value}" for value in switch if isinstance(value, bool)),
        ),
        cause=f"greater_is_better the wrong way round: the {'smallest' if higher else 'largest'} value was kept",
        next_step="take the checkpoint with the best value; set greater_is_better to suit metric_for_best_model",
        data={"metric": best.metric, "value": best.value},
    )


CHECKS = (Check("worst-is-best", "a best checkpoint that is the worst by its own metric", worst_is_best),)
