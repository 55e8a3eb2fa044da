"""Whose log-probs the samples carry, said from the fit of them to the models at hand."""

from __future__ import annotations

from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, NotJudged, Severity, Verdicts
from sdpo_conformance.audit.loss_replay import SAMPLER_DIFFERS
from sdpo_conformance.audit.model_loading import AFTER
from sdpo_conformance.audit.sampler_fit import BASE, EXPLAINED, SamplerFit, SamplerHypothesis

#: What is left of the gap must be little in itself, too: nats per token.
_LARGEST_LEFT = 0.05


def recorded_logprobs(evidence: Evidence) -> Verdicts:
    """Recorded log-probs that another adapter, temperature, nucleus or position explains."""
    fit = evidence.sampler_fit
    if fit is None:
        if evidence.replay is not None:
            yield NotJudged("recorded-logprobs", "no recorded log-probs, or fewer than 12 tokens of them")
        return
    if fit.gap <= SAMPLER_DIFFERS:
        yield from _sampled_otherwise(fit)
        return
    explained = fit.best.parts > 0 and fit.best_gap <= min(EXPLAINED * fit.gap, _LARGEST_LEFT)
    if not explained:
        yield NotJudged(
            "recorded-logprobs",
            f"recorded and recomputed log-probs are {fit.gap:.3g} nats per token apart, which no adapter at hand,"
            " temperature, top-p or shift explains",
        )
        return
    grave = fit.best.source != "before" or fit.best.shift != 0
    yield Finding(
        id="recorded-logprobs",
        severity=Severity.ERROR if grave else Severity.WARNING,
        statement=_statement(fit.best),
        evidence=(
            f"{fit.tokens} tokens: {fit.best_gap:.3g} nats per token from that, {fit.gap:.3g} from the starting"
            " adapter's own log-probs",
        ),
        cause=_cause(fit.best),
        next_step=_next_step(fit.best),
        data={
            "source": fit.best.source,
            "temperature": fit.best.temperature,
            "top_p": fit.best.top_p,
            "shift": fit.best.shift,
            "gap": fit.gap,
            "gap_left": fit.best_gap,
        },
    )


def _statement(best: SamplerHypothesis) -> str:
    told = []
    if best.source == BASE:
        told.append("the sampler ran without the adapter: the recorded log-probs are the base model's")
    elif best.source == AFTER:
        told.append("the recorded log-probs are the finished adapter's, not those of the policy that sampled")
    else:
        told.append("the recorded log-probs are the starting adapter's")
    if best.shift:
        told.append(f"shifted by one: each belongs to the {'next' if best.shift > 0 else 'previous'} token")
    if best.temperature != 1:
        told.append(f"of logits divided by the temperature {best.temperature:g}")
    if best.top_p != 1:
        told.append(f"renormalised over the top-p {best.top_p:g} nucleus")
    return ", ".join(told)


def _cause(best: SamplerHypothesis) -> str:
    if best.source == BASE:
        return "the adapter was never delivered to the engine, or its requests did not name it"
    if best.source == AFTER:
        return "the log-probs were recomputed after the update, or the sampler already held the new adapter"
    if best.shift:
        return "the logits of position t were read as those of token t: they are of token t + 1"
    return "the sampler records processed log-probs; a trainer that scores plain logits has another distribution"


def _next_step(best: SamplerHypothesis) -> str:
    if best.source == BASE:
        return "check that the engine loads each new adapter and that every request names it; sample again"
    if best.source == AFTER:
        return "record the log-probs while sampling"
    if best.shift:
        return "take the logits one position earlier: start - 1 .. -2 of prompt + response"
    return "divide the trainer's logits by the same temperature and keep the same nucleus, or sample at 1 without top-p"


def _sampled_otherwise(fit: SamplerFit) -> Verdicts:
    """Raw log-probs of tokens that were sampled from a processed distribution."""
    temperature, top_p = fit.sampled_at
    if (temperature, top_p) == (1, 1):
        return
    if temperature == 1:
        told = (
            f"raw log-probs under top-p {top_p:g}: the ratios are off by the kept mass, {fit.kept_mass:.3f} in the mean"
        )
    else:
        nucleus = f" and under a top-p of about {top_p:g}" if top_p != 1 else ""
        told = f"raw log-probs of tokens that were sampled at a temperature of about {temperature:g}{nucleus}"
    yield Finding(
        id="recorded-logprobs",
        severity=Severity.WARNING,
        statement=told,
        evidence=(
            f"the {fit.tokens} tokens are {fit.likelier:.3g} nats likelier so than at temperature 1 without top-p"
            + (f"; not one lies outside the top-p {top_p:g} nucleus" if top_p != 1 else ""),
        ),
        cause="the engine records log-probs before temperature and top-p (vLLM's default, raw_logprobs)",
        next_step=(
            "ask for processed_logprobs and score with the same temperature, or sample at temperature 1 without top-p"
        ),
        data={"temperature": temperature, "top_p": top_p, "kept_mass": fit.kept_mass, "gain_nats": fit.likelier},
    )


CHECKS = (
    Check("recorded-logprobs", "recorded log-probs of another policy than the one that sampled", recorded_logprobs),
)
