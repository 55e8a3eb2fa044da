"""Ways to get mask, reduction and the returned mapping wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.specs.claas.defects import loss_parts as parts
from sdpo_conformance.specs.claas.defects.defect import Change, Defect, around, both, replacing
from sdpo_conformance.specs.claas.defects.loss_parts import Parts, Result, Work
from sdpo_conformance.specs.claas.defects.sources import cite

FULL_ROWS = "Batches of one row, as the step loop makes them."
FULL_MASKS = "Masks that are 1 everywhere, as the step loop makes them."


def with_mask(function: Callable[[Work], Tensor]) -> Change:
    """Another mask for everything that reads it, applied after masked positions were blanked."""

    def accept(before: Callable[[Any], Work], loss_input: Any) -> Work:
        w = before(loss_input)
        w.mask = function(w)
        return w

    return around("accept", accept)


def row_means(w: Work, values: Tensor) -> Tensor:
    """The mean over rows of the token means of the rows."""
    return ((values * w.mask).sum(-1) / w.mask.sum(-1).clamp(min=1.0)).mean()


def unmasked(before: Callable[[Any], Work], loss_input: Any) -> Work:
    """Masked positions as they are, and a mask of ones."""
    del before
    w = parts.accept(loss_input, clean=False)
    w.mask = torch.ones_like(w.mask)
    return w


def without_blanking(before: Callable[[Any], Work], loss_input: Any) -> Work:
    """Masked positions as they are: the mask is only multiplied in at the end."""
    del before
    return parts.accept(loss_input, clean=False)


def cut_to_count(before: Callable[[Any], Work], loss_input: Any) -> Work:
    """As many first columns as the fullest row's mask adds up to."""
    w = before(loss_input)
    kept = math.ceil(float(w.mask.sum(-1).max())) if w.mask.numel() else 0
    for name in ("z", "tau", "support", "base", "old", "mask", "y"):
        setattr(w, name, getattr(w, name)[:, :kept])
    return w


def permuted_rows(before: Callable[[Any], Work], loss_input: Any) -> Work:
    """Behaviour log-probs that belong to the previous row."""
    w = before(loss_input)
    w.old = w.old.roll(1, dims=0)
    return w


def first_row_mask(before: Callable[[Any], Work], loss_input: Any) -> Work:
    """Every row with the first row's mask."""
    w = parts.accept(loss_input, clean=False)
    del before
    w.mask = w.mask[:1].expand_as(w.mask)
    return w


def shifted_mask(before: Callable[[Any], Work], loss_input: Any) -> Work:
    """The mask one token late."""
    del before
    w = parts.accept(loss_input, clean=False)
    w.mask = w.mask.roll(1, dims=1)
    return w


def first_row_only(before: Callable[[Any], Work], loss_input: Any) -> Work:
    """Only the first row counts."""
    w = before(loss_input)
    rows = torch.arange(w.mask.shape[0], device=w.mask.device).unsqueeze(-1)
    w.mask = torch.where(rows == 0, w.mask, 0.0)
    return w


def without_last_token(w: Work) -> Tensor:
    """The mask with its last column cleared."""
    return torch.cat([w.mask[:, :-1], torch.zeros_like(w.mask[:, -1:])], dim=1)


def whole_tiles(tile: int, w: Work) -> Tensor:
    """The mask without the tokens of an incomplete last tile."""
    length = w.mask.shape[1]
    kept = length - length % tile if length > tile else length
    return torch.where(torch.arange(length, device=w.mask.device) < kept, w.mask, 0.0)


def numbered(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Another mapping returned."""

    def result(before: Callable[..., Result], w: Work, metrics: Any) -> Any:
        return change(dict(before(w, metrics)))

    return around("result", result)


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The mapping without one key."""
    return lambda returned: {name: value for name, value in returned.items() if name != key}


def with_graph(before: Callable[..., Result], w: Work, metrics: Any) -> Result:
    """Metrics that keep the graph alive."""
    return {**before(w, metrics), "distill_loss": w.distill_loss, "kl_reg": w.kl_reg}


def in_chunks(w: Work, values: Tensor) -> Tensor:
    """The means of chunks of 8 tokens, summed."""
    starts = range(0, values.shape[1], 8)
    sums = [
        (values[:, start : start + 8] * w.mask[:, start : start + 8]).sum()
        / w.mask[:, start : start + 8].sum().clamp(min=1.0)
        for start in starts
    ]
    return torch.stack(sums).sum() if sums else (values * w.mask).sum()


def reduced_by(function: Callable[[Work, Tensor], Tensor]) -> Change:
    """Another reduction for both parts of the loss."""
    return replacing(distill_loss=lambda w: function(w, w.weighted), kl_reg=lambda w: function(w, w.k3))


def unblanked(change: Change) -> Change:
    """A change whose implementation reads what stands at masked positions."""

    def both_of(before: Parts) -> Parts:
        return change(around("accept", without_blanking)(before))

    return both_of


def as_prefix(mask: Tensor) -> Tensor:
    """A row's first tokens, as many as count."""
    places = torch.arange(mask.shape[-1], device=mask.device)
    return (places < (mask != 0).sum(-1, keepdim=True)).to(mask)


def spread_over_prefix(mask: Tensor) -> Tensor:
    """A row's first tokens, as many as count, each with the row's mean weight."""
    return as_prefix(mask) * mask.sum(-1, keepdim=True) / (mask != 0).sum(-1, keepdim=True).clamp(min=1)


def to_first_hole(mask: Tensor) -> Tensor:
    """A row's tokens up to the first one that does not count."""
    counts = mask != 0
    return mask * ((counts.cumsum(-1) == 0) | counts).to(mask).cumprod(-1)


def made_of(change: Callable[[Tensor], Tensor]) -> Change:
    """Another mask, and what stands under the right one's zeros as it is given."""

    def accept(before: Callable[[Any], Work], loss_input: Any) -> Work:
        del before
        w = parts.accept(loss_input, clean=False)
        w.mask = change(w.mask)
        return w

    return around("accept", accept)


def mask_in_cap(w: Work) -> Tensor:
    """sum(D min(exp(log-ratio) mask, is_clip)) / n."""
    return (w.divergence * (w.log_ratio.exp() * w.mask).clamp(max=w.is_clip)).sum() / w.count


def floored_by_chunk(size: float) -> Change:
    """Each chunk of tokens counts at least 1."""
    return replacing(count=lambda w: sum(part.sum().clamp(min=1.0) for part in w.mask.reshape(-1).split(int(size))))


DEFECTS = (
    Defect(
        name="row-mean",
        sentence="The loss is the mean over rows of each row's token mean.",
        violates=("RED-1", "RED-5"),
        fix="One token mean over the whole batch: sum over rows and tokens, divided by n.",
        change=reduced_by(row_means),
        seen=cite("akaszubski/autonomous-dev#413", "allenai/open-instruct#1161"),
        usable_for=f"{FULL_ROWS} Rows with equally many tokens agree as well.",
    ),
    Defect(
        name="token-sum",
        sentence="The loss is the sum over tokens, not their mean.",
        violates=("RED-1",),
        fix="Divide by max(sum of the mask, 1).",
        change=replacing(count=lambda w: w.mask.new_ones(())),
        usable_for="Single-token responses.",
    ),
    Defect(
        name="row-sum-mean",
        sentence="The tokens of a row are summed and the rows averaged.",
        violates=("RED-1",),
        fix="One token mean over the whole batch.",
        change=replacing(count=lambda w: w.mask.new_tensor(float(max(w.mask.shape[0], 1)))),
        seen=cite("akaszubski/autonomous-dev#413"),
        usable_for="Single-token responses.",
    ),
    Defect(
        name="divided-by-padded-length",
        sentence="The denominator is B x T, masked positions included.",
        violates=("RED-4", "RED-2", "RED-5"),
        fix="Divide by max(sum of the mask, 1).",
        change=replacing(count=lambda w: w.mask.new_tensor(float(max(w.mask.numel(), 1)))),
        seen=cite("huggingface/trl#3138", "huggingface/trl#6439"),
        usable_for=FULL_MASKS,
    ),
    Defect(
        name="token-count-truncated",
        sentence="The denominator is the mask's sum rounded down to a whole number.",
        violates=("RED-4",),
        fix="Divide by max(sum of the mask, 1).",
        change=replacing(count=lambda w: w.mask.sum().floor().clamp(min=1.0)),
        usable_for="Masks of zeros and ones.",
    ),
    Defect(
        name="divided-by-constant",
        sentence="Everything is divided by 64, a maximal length or a number of steps, whatever the mask.",
        violates=("RED-4", "RED-1"),
        fix="Divide by max(sum of the mask, 1).",
        change=replacing(count=lambda w: w.mask.new_tensor(64.0)),
        seen=cite("huggingface/trl#3138"),
    ),
    Defect(
        name="loss-divided-by-rows",
        sentence="The loss is divided by the number of rows once more; what is reported is not.",
        violates=("RED-1", "GRAD-1"),
        fix="One token mean over the whole batch: sum over rows and tokens, divided by n.",
        change=replacing(loss=lambda w: (w.distill_loss + w.kl_reg_weight * w.kl_reg) / max(w.mask.shape[0], 1)),
        usable_for="One row.",
    ),
    Defect(
        name="divergence-divided-by-constant",
        sentence="The divergence is divided by 64, a maximal length or a number of steps; the rest by the mask's sum.",
        violates=("RED-4", "RED-1"),
        fix="Divide by max(sum of the mask, 1).",
        change=replacing(distill_loss=lambda w: (w.weighted * w.mask).sum() / 64),
    ),
    Defect(
        name="denominator-floor-missing",
        sentence="The denominator is the sum of the mask itself, so an all-zero mask gives NaN.",
        violates=("RED-3", "RED-4"),
        fix="Divide by max(sum of the mask, 1).",
        change=replacing(count=lambda w: w.mask.sum()),
        seen=cite("unslothai/unsloth-zoo#1286", "microsoft/LMOps#38"),
        usable_for="Batches with at least one whole token.",
    ),
    Defect(
        name="denominator-epsilon",
        sentence="The denominator is the sum of the mask plus 1e-8, so masks that sum to less than 1 are scaled up.",
        violates=("RED-4",),
        fix="Divide by max(sum of the mask, 1).",
        change=replacing(count=lambda w: w.mask.sum() + 1e-8),
        usable_for="Batches whose mask sums to 1 or more.",
    ),
    Defect(
        name="denominator-counts-tokens",
        sentence="The denominator counts the positions with a non-zero mask instead of summing their weights.",
        violates=("RED-4",),
        fix="Divide by max(sum of the mask, 1).",
        change=replacing(count=lambda w: (w.mask != 0).sum().clamp(min=1).to(w.mask)),
        usable_for="Masks of zeros and ones.",
    ),
    Defect(
        name="denominator-floored-by-chunk",
        sentence="The denominator is added up over chunks of 16 tokens, each of at least 1.",
        violates=("RED-4", "RED-2"),
        fix="Add up the mask, then take at least 1, once.",
        change=floored_by_chunk(16),
        usable_for=FULL_MASKS,
    ),
    Defect(
        name="mask-binarised",
        sentence="Every non-zero mask weight counts as 1.",
        violates=("RED-4",),
        fix="Multiply with the mask's weights.",
        change=with_mask(lambda w: (w.mask != 0).to(w.mask)),
        usable_for="Masks of zeros and ones.",
    ),
    Defect(
        name="mask-applied-twice",
        sentence="The mask is multiplied in twice, so fractional weights are squared.",
        violates=("RED-4",),
        fix="Multiply with the mask once.",
        change=both(
            around("weighted", lambda before, w: before(w) * w.mask),
            around("k3", lambda before, w: before(w) * w.mask),
        ),
        usable_for="Masks of zeros and ones.",
    ),
    Defect(
        name="mask-inside-cap",
        sentence="The mask multiplies the ratio before the cap: a fraction of a capped token weighs too much.",
        violates=("RED-4",),
        fix="mask min(r, is_clip): cap first.",
        change=replacing(distill_loss=mask_in_cap),
        usable_for="Masks of zeros and ones.",
    ),
    Defect(
        name="mask-truncated-to-integer",
        sentence="The mask is cast to an integer type, so fractional weights become 0.",
        violates=("RED-4",),
        fix="Keep the mask's weights.",
        change=with_mask(lambda w: w.mask.long().to(w.mask)),
        usable_for="Masks of zeros and ones.",
    ),
    Defect(
        name="mask-ignored",
        sentence="The mask is accepted and never read.",
        violates=("RED-2", "RED-3", "RED-4"),
        fix="Weigh every token with the mask and divide by max(sum of the mask, 1).",
        change=around("accept", unmasked),
        seen=cite("linkedin/Liger-Kernel#974", "peremartra/optipfair#34"),
        usable_for=FULL_MASKS,
    ),
    Defect(
        name="mask-not-on-anchor",
        sentence="The anchor is summed over masked positions as well.",
        violates=("RED-2",),
        fix="Weigh the anchor with the mask.",
        change=unblanked(replacing(kl_reg=lambda w: w.k3.sum() / w.count)),
        usable_for=FULL_MASKS,
    ),
    Defect(
        name="mask-not-on-divergence",
        sentence="The divergence is summed over masked positions as well.",
        violates=("RED-2",),
        fix="Weigh the divergence with the mask.",
        change=unblanked(replacing(distill_loss=lambda w: w.weighted.sum() / w.count)),
        seen=cite("linkedin/Liger-Kernel#974"),
        usable_for=FULL_MASKS,
    ),
    Defect(
        name="mask-shifted",
        sentence="The mask is shifted by one token against the response.",
        violates=("RED-2", "RED-4"),
        fix="Keep mask, response ids and logits aligned.",
        change=around("accept", shifted_mask),
        seen=cite("Goekdeniz-Guelmez/mlx-lm-lora#80"),
        usable_for=FULL_MASKS,
    ),
    Defect(
        name="response-logprobs-squeezed",
        sentence="The response's log-probs lose every dimension of size 1: with one token a row, (B,) meets (B, 1) and "
        "becomes (B, B).",
        violates=("RED-1",),
        fix="squeeze(-1) after the gather.",
        change=both(around("accept", without_blanking), replacing(chosen=lambda w: parts.chosen(w).squeeze())),
        usable_for=FULL_ROWS,
    ),
    Defect(
        name="batch-cut-to-longest-count",
        sentence="The batch is cut to as many columns as the fullest row has tokens that count.",
        violates=("RED-2", "RED-4"),
        fix="Cut behind the last token that counts, if at all: a mask may be padded on the left and have holes.",
        change=around("accept", cut_to_count),
        usable_for=FULL_MASKS,
    ),
    Defect(
        name="mask-as-prefix",
        sentence="The mask is made anew of each row's number of tokens: as many first tokens count.",
        violates=("RED-2", "RED-4"),
        fix="Multiply by the mask: it may be padded on the left, have holes and fractions.",
        change=made_of(as_prefix),
        usable_for=FULL_MASKS,
    ),
    Defect(
        name="mask-spread-over-prefix",
        sentence="Each row's weight is spread over as many first tokens as count.",
        violates=("RED-2", "RED-4"),
        fix="Multiply by the mask: it may be padded on the left, have holes and fractions.",
        change=made_of(spread_over_prefix),
        usable_for=FULL_MASKS,
    ),
    Defect(
        name="mask-to-first-hole",
        sentence="A row ends at its first token that does not count: what follows a hole in the mask is dropped.",
        violates=("RED-1", "RED-4"),
        fix="Multiply by the mask: a response of several turns has holes.",
        change=made_of(to_first_hole),
        usable_for=FULL_MASKS,
    ),
    Defect(
        name="mask-of-first-row",
        sentence="Every row is masked with the first row's mask.",
        violates=("RED-5", "RED-2"),
        fix="Mask each row with its own mask.",
        change=around("accept", first_row_mask),
        seen=cite("linkedin/Liger-Kernel#330"),
        usable_for=FULL_ROWS,
    ),
    Defect(
        name="first-row-only",
        sentence="Only the first row of the batch counts.",
        violates=("RED-5", "RED-1"),
        fix="Reduce over all rows.",
        change=around("accept", first_row_only),
        usable_for=FULL_ROWS,
    ),
    Defect(
        name="rows-misaligned",
        sentence="Each row is divided by the behaviour log-probs of the row before it.",
        violates=("RED-5", "IS-3"),
        fix="Keep each row's tensors together.",
        change=around("accept", permuted_rows),
        seen=cite("nishide-dev/unturtle#40", "kvablack/ddpo-pytorch#29"),
        usable_for=FULL_ROWS,
    ),
    Defect(
        name="last-token-dropped",
        sentence="The last position of every row is left out.",
        violates=("RED-1", "RED-4"),
        fix="The response's positions are all of the T given.",
        change=with_mask(without_last_token),
        seen=cite("nlp-with-transformers/notebooks#67"),
    ),
    Defect(
        name="first-token-dropped",
        sentence="The first position of every row is left out.",
        violates=("RED-1", "RED-4"),
        fix="The response's positions are all of the T given.",
        change=with_mask(lambda w: torch.cat([torch.zeros_like(w.mask[:, :1]), w.mask[:, 1:]], dim=1)),
        seen=cite("nlp-with-transformers/notebooks#67"),
    ),
    Defect(
        name="token-zero-as-padding",
        sentence="Token id 0 is taken for padding and masked out.",
        violates=("GJS-1", "RED-1"),
        fix="Only the mask says what counts.",
        change=with_mask(lambda w: torch.where(w.y == 0, 0.0, w.mask)),
        usable_for="Responses without token 0.",
    ),
    Defect(
        name="token-tile-dropped",
        sentence="With more than 16 tokens, those of an incomplete last tile of 16 are left out of the sums.",
        violates=("RED-1", "FUS-6"),
        fix="Mask the last tile instead of skipping it.",
        change=with_mask(lambda w: whole_tiles(16, w)),
        usable_for="Response lengths up to 16 or divisible by 16.",
    ),
    Defect(
        name="chunk-means-summed",
        sentence="The means of chunks of 8 tokens are added up, so longer responses have a larger loss.",
        violates=("RED-1", "RED-5"),
        fix="Sum over chunks, and divide by n once.",
        change=reduced_by(in_chunks),
        seen=cite("NVIDIA-NeMo/Automodel#3803", "NVIDIA-NeMo/Automodel#3804"),
        usable_for="Responses of up to 8 tokens.",
    ),
    Defect(
        name="different-denominators",
        sentence="The anchor is divided by the number of positions, the divergence by the mask's sum.",
        violates=("RED-4", "RED-2"),
        fix="Both are divided by max(sum of the mask, 1).",
        change=replacing(kl_reg=lambda w: (w.k3 * w.mask).sum() / max(w.mask.numel(), 1)),
        seen=cite("PrimeIntellect-ai/prime-rl#1391"),
        usable_for=FULL_MASKS,
    ),
    Defect(
        name="loss-as-float",
        sentence="The loss is returned as a Python float.",
        violates=("RED-6",),
        fix="Return a 0-dim tensor with its graph.",
        change=numbered(lambda returned: {**returned, "loss": returned["loss"].item()}),
        usable_for="Evaluation: every number is right.",
    ),
    Defect(
        name="loss-without-graph",
        sentence="The loss is returned detached.",
        violates=("RED-6", "GJS-9"),
        fix="Return a 0-dim tensor with its graph.",
        change=numbered(lambda returned: {**returned, "loss": returned["loss"].detach()}),
        seen=cite("Goekdeniz-Guelmez/mlx-lm-lora#69"),
        usable_for="Evaluation: every number is right.",
    ),
    Defect(
        name="loss-per-token",
        sentence="The loss is returned as the (B, T) tensor of token losses.",
        violates=("RED-6",),
        fix="Reduce it: one token mean over the batch.",
        change=around(
            "result",
            lambda before, w, metrics: {**before(w, metrics), "loss": w.weighted + w.kl_reg_weight * w.k3},
        ),
        seen=cite("NVIDIA-NeMo/Automodel#3803"),
    ),
    Defect(
        name="loss-one-element",
        sentence="The loss has shape (1,).",
        violates=("RED-6",),
        fix="Return a 0-dim tensor.",
        change=numbered(lambda returned: {**returned, "loss": returned["loss"].reshape(1)}),
    ),
    Defect(
        name="clip-fraction-missing",
        sentence="The result has no clip_fraction.",
        violates=("RED-6",),
        fix="Return loss, distill_loss, kl_reg, mean_is_ratio and clip_fraction.",
        change=numbered(without("clip_fraction")),
        usable_for="Callers that do not read clip_fraction.",
    ),
    Defect(
        name="kl-reg-none-when-unweighted",
        sentence="With kl_reg_weight = 0 the anchor is not computed and kl_reg is None.",
        violates=("RED-6", "KL-5"),
        fix="Report kl_reg whatever its weight.",
        change=around(
            "result",
            lambda before, w, metrics: {
                **before(w, metrics),
                **({} if w.kl_reg_weight else {"kl_reg": None}),
            },
        ),
        usable_for="kl_reg_weight > 0.",
    ),
    Defect(
        name="kl-reg-zero-when-unweighted",
        sentence="With kl_reg_weight = 0 the anchor is not computed and kl_reg is reported as 0.",
        violates=("KL-5", "KL-1"),
        fix="Report kl_reg whatever its weight.",
        change=around(
            "result",
            lambda before, w, metrics: {**before(w, metrics), **({} if w.kl_reg_weight else {"kl_reg": 0.0})},
        ),
        usable_for="kl_reg_weight > 0, and training without the anchor: the gradient is right.",
    ),
    Defect(
        name="metrics-with-graph",
        sentence="distill_loss and kl_reg are returned with their graph, which keeps every step's activations alive.",
        violates=("RED-6",),
        fix="Return floats, or detached 0-dim tensors.",
        change=around("result", with_graph),
    ),
    Defect(
        name="result-as-tuple",
        sentence="The result is a tuple (loss, metrics).",
        violates=("RED-6",),
        fix="Return one mapping with the five keys.",
        change=numbered(lambda returned: (returned.pop("loss"), returned)),
    ),
)
