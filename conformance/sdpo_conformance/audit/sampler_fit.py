"""Whose log-probs were recorded: the samples' own, fitted to adapters, temperatures, nuclei and positions.

Candidates are {starting adapter, base model, finished adapter} x {temperature, top-p, shifted by one}. Top-p as vLLM
applies it: the smallest set of tokens whose mass reaches p is kept. "Processed" log-probs are of the distribution that
was sampled from; "raw" ones are of the model's own, whatever the sampler then did to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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

    `likelier_temperature` and `nucleus` are what the sampled tokens themselves say, however their log-probs were
    recorded: a temperature under which they are far likelier (and by how many nats), and a top-p outside of which no
    token fell although by chance some would have (with the mean mass that it keeps).
    """

    tokens: int
    gap: float
    best: SamplerHypothesis
    best_gap: float
    likelier_temperature: tuple[float, float] | None
    nucleus: tuple[float, float] | None

    @property
    def processed(self) -> bool:
        """Whether the sampler's temperature or top-p explains the records: a trainer may score with the same."""
        own = self.best.source == BEFORE and not self.best.shift and self.best.parts > 0
        return own and self.best_gap <= 0.25 * self.gap


@dataclass
class _Sums:
    """Log-probs of the sampled tokens by (temperature, top-p), and what the nucleus kept, token by token."""

    logprobs: dict[tuple[float, float], list[float]]
    mass_before: list[float]
    kept: dict[float, list[float]]


def fit_sampler(adapted: AdaptedModel, samples: Sequence[RequestSample]) -> SamplerFit | None:
    """Fit the recorded log-probs; None without recorded ones, or with too few tokens to tell anything."""
    recorded = [sample for sample in samples if sample.response_logprobs is not None]
    tokens = sum(len(sample.response_token_ids) for sample in recorded)
    if tokens < _FEWEST_TOKENS or BEFORE not in adapted.adapters:
        return None
    sources = [BEFORE, BASE, *([AFTER] if AFTER in adapted.adapters else [])]
    gaps: dict[SamplerHypothesis, list[float]] = {}
    own = _Sums({}, [], {p: [] for p in TOP_P})
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
                for pair, new in sums.logprobs.items():
                    own.logprobs.setdefault(pair, []).extend(new)
                own.mass_before.extend(sums.mass_before)
                for p, kept in sums.kept.items():
                    own.kept[p].extend(kept)
    means = {candidate: math.fsum(values) / len(values) for candidate, values in gaps.items() if values}
    least = min(means.values())
    # Among candidates that fit about equally well the one that supposes least is believed.
    close = [c for c, gap in means.items() if gap <= 1.5 * least + 2e-3]
    best = min(close, key=lambda c: (c.parts, means[c]))
    return SamplerFit(tokens, means[SamplerHypothesis(BEFORE)], best, means[best], _temperature(own), _nucleus(own))


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
    sums = _Sums({}, [], {p: [] for p in TOP_P})
    for start in range(0, len(chosen), _CHUNK_ROWS):
        rows = logits[start : start + _CHUNK_ROWS].double()
        _score_rows(rows, chosen[start : start + _CHUNK_ROWS], sums)
    return sums


def _score_rows(rows: torch.Tensor, chosen: torch.Tensor, sums: _Sums) -> None:
    """rows (T, V) logits, chosen (T,) token ids."""
    import torch

    for temperature in TEMPERATURES:
        logprobs = torch.log_softmax(rows / temperature, dim=-1)
        picked = logprobs.gather(-1, chosen[:, None])[:, 0]
        sums.logprobs.setdefault((temperature, 1.0), []).extend(picked.tolist())
        ordered = logprobs.exp().sort(dim=-1, descending=True).values
        cumulative = ordered.cumsum(dim=-1)
        ahead = (logprobs.exp() * (logprobs > picked[:, None])).sum(dim=-1)  # mass of the likelier tokens
        if temperature == 1:
            sums.mass_before.extend(ahead.tolist())
        for p in TOP_P:
            last = (cumulative < p).sum(dim=-1, keepdim=True).clamp(max=rows.shape[-1] - 1)
            kept = cumulative.gather(-1, last)[:, 0]
            inside = picked - kept.log()
            inside[ahead >= p] = -math.inf
            sums.logprobs.setdefault((temperature, p), []).extend(inside.tolist())
            if temperature == 1:
                sums.kept[p].extend(kept.tolist())


def _temperature(own: _Sums) -> tuple[float, float] | None:
    """The temperature under which the sampled tokens are likeliest, and by how many nats over temperature 1."""
    totals = {t: math.fsum(values) for (t, p), values in own.logprobs.items() if p == 1}
    best = max(totals, key=lambda t: totals[t])
    gain = totals[best] - totals[1.0]
    return (best, gain) if best != 1 and gain > 10.0 else None


def _nucleus(own: _Sums) -> tuple[float, float] | None:
    """The smallest top-p with every token inside, where chance would have put one outside with all but 1e-6."""
    for p in TOP_P:
        if all(ahead < p for ahead in own.mass_before):
            chance = math.fsum(math.log(min(kept, 1.0)) for kept in own.kept[p])
            if chance < math.log(1e-6):
                return p, math.fsum(own.kept[p]) / len(own.kept[p])
            return None
    return None
