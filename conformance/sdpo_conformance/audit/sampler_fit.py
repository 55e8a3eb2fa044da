"""Whose log-probs were recorded: the samples' own, fitted to adapters, temperatures, nuclei and positions.

Candidates are {starting adapter, base model, finished adapter} x {temperature, top-p, shifted by one}. Top-p as vLLM
applies it: the smallest set of tokens whose mass reaches p is kept. "Processed" log-probs are of the distribution that
was sampled from; "raw" ones are of the model's own, whatever the sampler then did to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sdpo_conformance.audit.config import RequestSample
from sdpo_conformance.audit.generation import response_logits
from sdpo_conformance.audit.model_loading import AFTER, BEFORE, AdaptedModel

if TYPE_CHECKING:
    import torch

TEMPERATURES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 2.0)
TOP_P = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
BASE = "base"
#: Rows of logits held at once, so that a long response of a large vocabulary stays within some hundred MiB.
_CHUNK_ROWS = 64
_FEWEST_TOKENS = 12
#: A hypothesis explains the recorded log-probs where it leaves at most this part of the gap.
EXPLAINED = 0.4
#: Nats of evidence that something was done to the distribution (odds of one in a million), and that it was two things.
_CONVINCING = math.log(1e6)
_SECOND = 3.0
#: Standard deviations below its expectation at which a sum of log-probs is no sample's of that distribution.
_DEVIATIONS = 4.0


@dataclass(frozen=True)
class SamplerHypothesis:
    """One explanation of the recorded log-probs; `shift` is 1 where they belong to the next token."""

    source: str
    temperature: float = 1.0
    top_p: float = 1.0
    shift: int = 0

    @property
    def parts(self) -> int:
        """How many things it supposes besides the starting adapter's own log-probs."""
        return (self.source != BEFORE) + (self.temperature != 1) + (self.top_p != 1) + (self.shift != 0)


@dataclass(frozen=True)
class SamplerFit:
    """`gap` of the starting adapter's raw log-probs and of the best candidate: mean |difference|, nats per token.

    `sampled_at` is what the sampled tokens themselves say, however their log-probs were recorded: the temperature and
    top-p under which they are far likelier than under (1, 1), by `likelier` nats; `kept_mass` is the mean mass that the
    nucleus keeps of the model's own distribution at that temperature.
    """

    tokens: int
    gap: float
    best: SamplerHypothesis
    best_gap: float
    sampled_at: tuple[float, float]
    likelier: float
    kept_mass: float

    @property
    def processed(self) -> bool:
        """Whether the sampler's temperature or top-p explains the records: a trainer may score with the same."""
        own = self.best.source == BEFORE and not self.best.shift and self.best.parts > 0
        return own and self.best_gap <= EXPLAINED * self.gap


@dataclass
class _Sums:
    """Log-probs of the sampled tokens, and what the nucleus kept, by (temperature, top-p) and token; by temperature and
    token, how far the log-prob lies above its expectation, and its variance.
    """

    logprobs: dict[tuple[float, float], list[float]] = field(default_factory=dict)
    kept: dict[tuple[float, float], list[float]] = field(default_factory=dict)
    surplus: dict[float, list[float]] = field(default_factory=dict)
    variance: dict[float, list[float]] = field(default_factory=dict)

    def add(self, other: _Sums) -> None:
        """Append another sample's."""
        for pair, values in other.logprobs.items():
            self.logprobs.setdefault(pair, []).extend(values)
        for pair, values in other.kept.items():
            self.kept.setdefault(pair, []).extend(values)
        for temperature, values in other.surplus.items():
            self.surplus.setdefault(temperature, []).extend(values)
        for temperature, values in other.variance.items():
            self.variance.setdefault(temperature, []).extend(values)


def fit_sampler(adapted: AdaptedModel, samples: Sequence[RequestSample]) -> SamplerFit | None:
    """Fit the recorded log-probs; None without recorded ones, or with too few tokens to tell anything."""
    recorded = [sample for sample in samples if sample.response_logprobs is not None]
    tokens = sum(len(sample.response_token_ids) for sample in recorded)
    if tokens < _FEWEST_TOKENS or BEFORE not in adapted.adapters:
        return None
    sources = [BEFORE, BASE, *([AFTER] if AFTER in adapted.adapters else [])]
    gaps: dict[SamplerHypothesis, list[float]] = {}
    own = _Sums()
    for sample in recorded:
        old = [float(value) for value in sample.response_logprobs or ()]
        for source in sources:
            sums = _score(adapted, source, sample)
            for (temperature, top_p), new in sums.logprobs.items():
                for shift in (0, 1, -1) if temperature == top_p == 1 else (0,):
                    gaps.setdefault(SamplerHypothesis(source, temperature, top_p, shift), []).extend(
                        _gaps(old, new, shift)
                    )
            if source == BEFORE:
                own.add(sums)
    means = {candidate: math.fsum(values) / len(values) for candidate, values in gaps.items() if values}
    least = min(means.values())
    # Among candidates that fit about equally well the one that supposes least is believed.
    close = [c for c, gap in means.items() if gap <= 1.5 * least + 2e-3]
    best = min(close, key=lambda c: (c.parts, means[c]))
    return SamplerFit(tokens, means[SamplerHypothesis(BEFORE)], best, means[best], *_sampled_at(own))


def _gaps(old: Sequence[float], new: Sequence[float], shift: int) -> list[float]:
    if shift:
        old, new = (old[:-1], new[1:]) if shift > 0 else (old[1:], new[:-1])
    # A token outside a candidate's nucleus speaks against that candidate, without drowning everything else.
    return [abs(a - b) if math.isfinite(a - b) else 20.0 for a, b in zip(old, new, strict=True)]


def _score(adapted: AdaptedModel, source: str, sample: RequestSample) -> _Sums:
    import torch

    name = None if source == BASE else source
    logits = response_logits(adapted, name, sample.prompt_token_ids, sample.response_token_ids)
    chosen = torch.tensor(sample.response_token_ids, device=logits.device)
    sums = _Sums()
    for start in range(0, len(chosen), _CHUNK_ROWS):
        rows = logits[start : start + _CHUNK_ROWS].double()
        _score_rows(rows, chosen[start : start + _CHUNK_ROWS], sums)
    return sums


def _score_rows(rows: torch.Tensor, chosen: torch.Tensor, sums: _Sums) -> None:
    """rows (T, V) logits, chosen (T,) token ids."""
    import torch

    ordered = rows.sort(dim=-1, descending=True).values  # the order is the same at every temperature
    logit = rows.gather(-1, chosen[:, None])
    likelier = (ordered > logit).sum(dim=-1, keepdim=True)
    for temperature in TEMPERATURES:
        total = torch.logsumexp(ordered / temperature, dim=-1, keepdim=True)
        picked = (logit / temperature - total)[:, 0]
        sums.logprobs.setdefault((temperature, 1.0), []).extend(picked.tolist())
        logprobs = ordered / temperature - total
        expected = (logprobs.exp() * logprobs).sum(dim=-1)
        sums.surplus.setdefault(temperature, []).extend((picked - expected).tolist())
        variance = (logprobs.exp() * logprobs.square()).sum(dim=-1) - expected.square()
        sums.variance.setdefault(temperature, []).extend(variance.tolist())
        cumulative = logprobs.exp().cumsum(dim=-1)
        ahead = cumulative.gather(-1, (likelier - 1).clamp(min=0)).masked_fill(likelier == 0, 0.0)[:, 0]
        for p in TOP_P:
            last = (cumulative < p).sum(dim=-1, keepdim=True).clamp(max=rows.shape[-1] - 1)
            kept = cumulative.gather(-1, last)[:, 0]
            inside = picked - kept.log()
            inside[ahead >= p] = -math.inf
            sums.logprobs.setdefault((temperature, p), []).extend(inside.tolist())
            sums.kept.setdefault((temperature, p), []).extend(kept.tolist())


def _sampled_at(own: _Sums) -> tuple[tuple[float, float], float, float]:
    """The (temperature, top-p) under which the tokens are likeliest, by how many nats, and the mean mass kept.

    Together they have to make them a million times likelier: by chance some token falls outside a nucleus, and of a
    temperature that was not used little is gained. Tokens that are unlikely at every temperature, or likeliest at the
    highest, were not sampled from this model.
    """
    totals = {pair: math.fsum(values) for pair, values in own.logprobs.items()}
    scores = {(t, p): total - _SECOND * ((t != 1) + (p != 1)) for (t, p), total in totals.items()}
    best = max(scores, key=lambda pair: scores[pair])
    surplus, variance = math.fsum(own.surplus[best[0]]), math.fsum(own.variance[best[0]])
    foreign = best[0] == max(TEMPERATURES) or surplus < -_DEVIATIONS * math.sqrt(max(variance, 0.0))
    if foreign or totals[best] - totals[1.0, 1.0] < _CONVINCING:
        return (1.0, 1.0), 0.0, 1.0
    kept = own.kept.get(best, [])
    return best, totals[best] - totals[1.0, 1.0], math.fsum(kept) / len(kept) if kept else 1.0
