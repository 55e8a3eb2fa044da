"""Ways to report a step wrongly that was taken rightly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.protocol import METRIC_KEYS, RATIO_LOG_CLAMP
from sdpo_conformance.specs.claas.defects import step_loop_variants as right
from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.defects.parameter import Parameter, logarithmic, whole_numbers
from sdpo_conformance.specs.claas.defects.step_loop_variants import Metrics, Prepared, Run, TrainerParts, trainer
from sdpo_conformance.specs.claas.defects.wrong_trainer import loop, right_loss

Report = Callable[[Run, Tensor, float], Metrics]

TRAINING = "Training: the adapter is right, the metrics are not."
METRICS = "Report the step's own means over samples, taken before the update."
OWN_NORM = "Report what clip_grad_norm_ returns: the norm before clipping."


def changed(run: Run, total: Tensor, grad_norm: float, **metrics: float) -> Metrics:
    """The right entry but for these."""
    return {**right.report(run, total, grad_norm), **metrics}


# --- another step's ---


def first_metrics(run: Run, total: Tensor, grad_norm: float) -> Metrics:
    """The first step's metrics with the step's number."""
    fresh = right.report(run, total, grad_norm)
    return {**(run.metrics[0] if run.metrics else fresh), "step": run.step}


def previous_metrics(run: Run, total: Tensor, grad_norm: float) -> Metrics:
    """The metrics of the step before."""
    fresh = right.report(run, total, grad_norm)
    last = run.kept.get("metrics", fresh)
    run.kept["metrics"] = fresh
    return {**last, "step": run.step}


def last_metrics(run: Run, total: Tensor, grad_norm: float) -> Metrics:
    """One mapping for all steps, which every step overwrites."""
    shared: Metrics = run.kept.setdefault("entry", {})
    shared.update(right.report(run, total, grad_norm))
    return shared


@torch.no_grad()
def metrics_after_update(run: Run, total: Tensor, grad_norm: float) -> Metrics:
    """Loss and metrics under the updated weights."""
    run.results = [right.sample_loss(run, one, right_loss) for one in run.batch]
    return right.report(run, torch.stack([result["loss"] for result in run.results]).mean(), grad_norm)


def summed_so_far(run: Run, total: Tensor, grad_norm: float) -> Metrics:
    """Sums over the steps up to this one."""
    fresh = right.report(run, total, grad_norm)
    before = run.kept.get("sums", {})
    run.kept["sums"] = {key: value + before.get(key, 0.0) for key, value in fresh.items()}
    return {**run.kept["sums"], "step": run.step}


def averaged_so_far(run: Run, total: Tensor, grad_norm: float) -> Metrics:
    """Means over the steps up to this one."""
    sums = summed_so_far(run, total, grad_norm)
    return {**{key: value / run.step for key, value in sums.items()}, "step": run.step}


def steps_from_zero(run: Run, total: Tensor, grad_norm: float) -> Metrics:
    """Counted from 0."""
    return changed(run, total, grad_norm, step=run.step - 1)


# --- other means over samples ---


def weighted(weights: Callable[[Sequence[int]], Sequence[float]]) -> Report:
    """Sums over samples of their metrics under these weights, which may depend on their lengths."""

    def report(run: Run, total: Tensor, grad_norm: float) -> Metrics:
        shares = weights([one.response.shape[1] for one in run.batch])
        results = [
            {**result, "total_loss": loss.detach()} for result, loss in zip(run.results, run.losses, strict=True)
        ]
        means = {
            key: sum(share * float(one[key]) for share, one in zip(shares, results, strict=True))
            for key in ("total_loss", *METRIC_KEYS)
        }
        return changed(run, total, grad_norm, **means)

    return report


of_sum = weighted(lambda lengths: [1.0] * len(lengths))
of_last_sample = weighted(lambda lengths: [0.0] * (len(lengths) - 1) + [1.0])
of_first_sample = weighted(lambda lengths: [1.0] + [0.0] * (len(lengths) - 1))
over_tokens = weighted(lambda lengths: [length / sum(lengths) for length in lengths])
over_longest = weighted(lambda lengths: [length / max(lengths) / len(lengths) for length in lengths])
divided_again = weighted(lambda lengths: [len(lengths) ** -2.0] * len(lengths))


def with_padding(run: Run, total: Tensor, grad_norm: float) -> Metrics:
    """Means over the padded batch, with a ratio of 1 on padding."""
    found = over_longest(run, total, grad_norm)
    lengths = [one.response.shape[1] for one in run.batch]
    padding = 1 - sum(lengths) / max(lengths) / len(lengths)
    return {**found, "mean_is_ratio": found["mean_is_ratio"] + padding}


# --- other numbers of a token ---


def own(one: Prepared) -> Tensor:
    """The policy's log-probs of the response in the step's forward, (1, T)."""
    return one.logits.double().log_softmax(-1).gather(-1, one.response.unsqueeze(-1)).squeeze(-1)


def log_ratio(one: Prepared) -> Tensor:
    """Current over behaviour policy, (1, T)."""
    return (own(one) - one.behaviour.double()).clamp(-RATIO_LOG_CLAMP, RATIO_LOG_CLAMP)


def drift(one: Prepared) -> Tensor:
    """Current policy over base, (1, T)."""
    return (own(one) - one.base.double()).clamp(-RATIO_LOG_CLAMP, RATIO_LOG_CLAMP)


def instead(key: str, of_sample: Callable[[Run, Prepared], Tensor]) -> Report:
    """One metric is the mean over samples of another number."""

    def report(run: Run, total: Tensor, grad_norm: float) -> Metrics:
        values = [float(of_sample(run, one)) for one in run.batch]
        return changed(run, total, grad_norm, **{key: sum(values) / len(values)})

    return report


def anchored(of_drift: Callable[[Tensor], Tensor]) -> Report:
    """kl_reg, and the loss it is part of, are reported with another estimator."""

    def report(run: Run, total: Tensor, grad_norm: float) -> Metrics:
        found = right.report(run, total, grad_norm)
        kl_reg = sum(float(of_drift(drift(one)).mean()) for one in run.batch) / len(run.batch)
        loss = found["distill_loss"] + run.training.kl_reg_weight * kl_reg
        return {**found, "kl_reg": kl_reg, "total_loss": loss}

    return report


def outside(run: Run, one: Prepared, below: bool, above: bool) -> Tensor:
    """The share of tokens whose ratio lies beyond 1 / is_clip or is_clip."""
    ratio, cap = log_ratio(one).exp(), run.training.is_clip
    beyond = (ratio < 1 / cap) & below | (ratio >= cap) & above
    return beyond.double().mean()


def clipped_tokens(run: Run, one: Prepared) -> Tensor:
    """How many tokens are capped, not which share."""
    return outside(run, one, False, True) * one.response.shape[1]


@torch.no_grad()
def on_policy(run: Run, total: Tensor, grad_norm: float) -> Metrics:
    """The loss and metrics of a ratio of 1."""
    ratioless = []
    for one in run.batch:
        behaviour, logits = one.behaviour, one.logits
        one.behaviour = own(one).to(behaviour.dtype)
        ratioless.append(right.sample_loss(run, one, right_loss, logits))
        one.behaviour = behaviour
    kept, run.results = run.results, ratioless
    found = right.report(run, torch.stack([result["loss"] for result in ratioless]).mean(), grad_norm)
    run.results = kept
    return found


# --- other numbers of a step ---


def of_entry(**metrics: Callable[[Metrics, Any], float]) -> Report:
    """Some metrics are made of the right entry and the config."""

    def report(run: Run, total: Tensor, grad_norm: float) -> Metrics:
        found = right.report(run, total, grad_norm)
        return {**found, **{key: value(found, run.training) for key, value in metrics.items()}}

    return report


def scaled(factor: float) -> Report:
    """Everything times a factor."""
    return of_entry(**{key: partial(times, key, factor) for key in ("total_loss", *METRIC_KEYS, "grad_norm")})


def times(key: str, factor: float, entry: Metrics, training: Any) -> float:
    """One metric times a factor."""
    return factor * entry[key]


def rounded(digits: float) -> Report:
    """Everything rounded to so many digits after the point."""
    return of_entry(**{key: partial(round_to, key, int(digits)) for key in ("total_loss", *METRIC_KEYS, "grad_norm")})


def round_to(key: str, digits: int, entry: Metrics, training: Any) -> float:
    """One metric, rounded."""
    return round(entry[key], digits)


_ENTRIES: list[Metrics] = []


def with_entries_kept(model: Any, samples: Sequence[Any], training: Any, optimizer_cls: Any) -> Any:
    """The list of metrics is one for all calls."""
    _ENTRIES.extend(right.distill(TrainerParts(), model, samples, training, optimizer_cls)["per_step_metrics"])
    return {"per_step_metrics": list(_ENTRIES)}


def reported(
    name: str,
    sentence: str,
    report: Report,
    fix: str = METRICS,
    seen: tuple[str, ...] = (),
    parameter: Parameter | None = None,
) -> Defect:
    """A defect of what is reported."""
    return loop(name, sentence, ("STEP-6",), fix, trainer(report=report), seen, TRAINING, parameter)


DEFECTS = (
    reported(
        "metrics-of-first-step",
        "Every step reports the first step's metrics.",
        first_metrics,
        seen=("verl-project/verl#2501",),
    ),
    reported("metrics-one-step-late", "Every step reports the metrics of the one before it.", previous_metrics),
    reported("metrics-of-last-step", "All steps report into one mapping, which is left with the last's.", last_metrics),
    reported("metrics-after-update", "Metrics are taken under the updated weights.", metrics_after_update),
    reported("metrics-summed-over-steps", "Metrics are never reset: each step adds to the one before.", summed_so_far),
    reported("metrics-averaged-over-steps", "Metrics are means over the steps so far.", averaged_so_far),
    reported("metrics-of-last-sample", "The last sample's metrics stand for the batch.", of_last_sample),
    reported("metrics-of-first-sample", "The first sample's metrics stand for the batch.", of_first_sample),
    reported("metrics-summed", "Metrics are summed over samples.", of_sum),
    reported("metrics-over-tokens", "Metrics are means over all tokens of the batch, not over samples.", over_tokens),
    reported(
        "metrics-over-longest",
        "Each sample's metrics are divided by the longest response, as means over a padded batch with zeros.",
        over_longest,
    ),
    reported(
        "metrics-with-padding",
        "Metrics are means over the padded batch, with a ratio of 1 on padding.",
        with_padding,
    ),
    reported(
        "metrics-divided-again",
        "Metrics are divided by the number of samples once more, as where accumulation has scaled the loss already.",
        divided_again,
    ),
    reported("metrics-on-policy", "Metrics are those of a ratio of 1: its behaviour policy is the current.", on_policy),
    reported(
        "metrics-scaled",
        "Metrics are multiplied by 100.",
        scaled(100.0),
        parameter=Parameter(
            "factor", lambda f: TrainerParts(report=scaled(f)), logarithmic(1e-3, 1e3, 25), "multiplied by 100"
        ),
    ),
    reported(
        "metrics-rounded",
        "Metrics are rounded to 3 digits after the point.",
        rounded(3),
        parameter=Parameter(
            "digits", lambda d: TrainerParts(report=rounded(d)), whole_numbers((1, 2, 3, 4)), "to 3 digits", whole=True
        ),
    ),
    reported(
        "total-loss-without-anchor",
        "total_loss leaves out the anchor.",
        of_entry(total_loss=lambda entry, training: entry["distill_loss"]),
    ),
    reported(
        "distill-loss-with-anchor",
        "distill_loss has the anchor in it.",
        of_entry(distill_loss=lambda entry, training: entry["total_loss"]),
    ),
    reported(
        "kl-reg-weighted",
        "kl_reg is already multiplied by kl_reg_weight.",
        of_entry(kl_reg=lambda entry, training: training.kl_reg_weight * entry["kl_reg"]),
    ),
    reported(
        "kl-reg-zero-at-weight-zero",
        "kl_reg is not computed where kl_reg_weight is 0, and reported as 0.",
        of_entry(kl_reg=lambda entry, training: entry["kl_reg"] if training.kl_reg_weight else 0.0),
    ),
    reported("kl-reg-as-k1", "kl_reg is reported as the mean log-ratio to the base.", anchored(lambda d: d)),
    reported("kl-reg-as-k1-of-base", "kl_reg is reported as the mean log-ratio of the base.", anchored(lambda d: -d)),
    reported("kl-reg-as-k2", "kl_reg is reported as half the squared log-ratio.", anchored(lambda d: d.square() / 2)),
    reported(
        "kl-reg-of-base",
        "kl_reg is reported with the log-ratio's other sign, base over policy.",
        anchored(lambda d: torch.expm1(-d) + d),
    ),
    reported(
        "mean-ratio-reported-uncapped",
        "mean_is_ratio is the mean of the ratios before they are capped.",
        instead("mean_is_ratio", lambda run, one: log_ratio(one).exp().mean()),
    ),
    reported(
        "mean-ratio-of-mean",
        "mean_is_ratio is the exponential of the mean log-ratio.",
        instead("mean_is_ratio", lambda run, one: log_ratio(one).mean().exp()),
    ),
    reported(
        "mean-ratio-as-logarithm",
        "mean_is_ratio is the mean log-ratio.",
        instead("mean_is_ratio", lambda run, one: log_ratio(one).mean()),
    ),
    reported(
        "mean-ratio-inverted",
        "mean_is_ratio is that of behaviour over current policy.",
        instead("mean_is_ratio", lambda run, one: (-log_ratio(one)).exp().clamp(max=run.training.is_clip).mean()),
    ),
    reported(
        "clip-fraction-of-kept",
        "clip_fraction is the share of tokens that are not capped.",
        of_entry(clip_fraction=lambda entry, training: 1 - entry["clip_fraction"]),
    ),
    reported(
        "clip-fraction-of-capped",
        "clip_fraction asks which capped ratios exceed the cap: none.",
        of_entry(clip_fraction=lambda entry, training: 0.0),
    ),
    reported(
        "clip-fraction-of-small",
        "clip_fraction counts ratios below 1 / is_clip.",
        instead("clip_fraction", lambda run, one: outside(run, one, True, False)),
    ),
    reported(
        "clip-fraction-of-both-sides",
        "clip_fraction counts ratios below 1 / is_clip too.",
        instead("clip_fraction", lambda run, one: outside(run, one, True, True)),
    ),
    reported(
        "clip-fraction-as-count",
        "clip_fraction is a number of tokens, not a share.",
        instead("clip_fraction", clipped_tokens),
    ),
    reported(
        "grad-norm-after-clipping",
        "grad_norm is reported after clipping.",
        of_entry(grad_norm=lambda entry, training: min(entry["grad_norm"], training.max_grad_norm)),
        OWN_NORM,
        ("radixark/miles#2132", "verl-project/verl#2282"),
    ),
    reported(
        "grad-norm-after-zeroing",
        "grad_norm is read when the gradients are gone.",
        of_entry(grad_norm=lambda entry, training: 0.0),
        OWN_NORM,
    ),
    reported(
        "grad-norm-squared",
        "grad_norm is the sum of squares, without its root.",
        of_entry(grad_norm=lambda entry, training: entry["grad_norm"] ** 2),
        OWN_NORM,
    ),
    reported(
        "grad-norm-as-coefficient",
        "grad_norm is the factor that gradients are clipped by.",
        of_entry(grad_norm=lambda entry, training: min(1.0, training.max_grad_norm / (entry["grad_norm"] + 1e-6))),
        OWN_NORM,
    ),
    reported("steps-from-zero", "Steps are counted from 0.", steps_from_zero, "Count from 1."),
    loop(
        "metrics-kept-across-calls",
        "per_step_metrics has the entries of earlier calls before its own, as a list in a default argument keeps them.",
        ("STEP-6",),
        "Begin with an empty list in every call.",
        with_entries_kept,
        (),
        "The first call of a process; training: the adapter is right, the metrics are not.",
    ),
)
