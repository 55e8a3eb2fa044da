"""Ways to get the importance ratio and its two metrics wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.protocol import RATIO_LOG_CLAMP
from sdpo_conformance.specs.claas.defects.defect import Change, Defect, around, both, replacing
from sdpo_conformance.specs.claas.defects.loss_parts import Work, log_ratio, ratio, token_mean, weighted
from sdpo_conformance.specs.claas.defects.sources import cite
from sdpo_conformance.specs.claas.defects.wrong_divergence import valued

ON_POLICY = "steps_per_batch = 1 with log-probs recorded by the same policy and software: the ratio is 1 there."
TRAINING = "Training: loss and gradient are right, the metric is not."

APPLY_RATIO = "Multiply each token's divergence by min(exp(clamp(sg(new - old), -20, 20)), is_clip) before the mean."


def difference(w: Work) -> Tensor:
    """new - old without its clamp."""
    return (w.chosen - w.old).detach()


def row_mean(w: Work, values: Tensor) -> Tensor:
    """The mean over a row's tokens, spread over the row again."""
    mean = (values * w.mask).sum(-1, keepdim=True) / w.mask.sum(-1, keepdim=True).clamp(min=1.0)
    return mean.expand_as(values)


def batch_mean(w: Work, values: Tensor) -> Tensor:
    """The mean over all tokens, at every token."""
    return ((values * w.mask).sum() / w.mask.sum().clamp(min=1.0)).expand_as(values)


def one_where_close(w: Work, nats: float = 1e-3) -> Tensor:
    """0 for every token where no log-ratio is larger than ``nats``."""
    found = log_ratio(w)
    return torch.zeros_like(found) if bool((found.abs() <= nats).all()) else found


def tile_start(length: int, tile: int) -> Tensor:
    """For each position the same place in the first tile."""
    return torch.arange(length) % tile


def of_first_tile(tile: int, w: Work) -> Tensor:
    """The ratio of the token at the same place in the first tile."""
    values = ratio(w)
    return values[:, tile_start(values.shape[1], tile).to(values.device)]


def over_support(w: Work) -> Tensor:
    """l[y] less the student's log-mass on the support."""
    return w.chosen - torch.logsumexp(w.l.gather(-1, w.support), dim=-1)


def of_probabilities(w: Work) -> Tensor:
    """exp(new) / exp(old), capped."""
    return (w.chosen.detach().exp() / w.old.exp()).clamp(max=w.is_clip)


def teacher_at_y(w: Work) -> Tensor:
    """tau at y, -20 outside the support."""
    match = w.support == w.y.unsqueeze(-1)
    return torch.where(match.any(-1), torch.where(match, w.tau, 0.0).sum(-1), -20.0)


def clamped(difference: Tensor) -> Tensor:
    """A log-ratio within +-20, without gradient."""
    return difference.detach().clamp(-RATIO_LOG_CLAMP, RATIO_LOG_CLAMP)


def with_old(change: Callable[[Work, Tensor], Tensor]) -> Change:
    """Other behaviour log-probs, made of all that are given: of masked tokens too."""

    def accept(before: Callable[[Any], Work], loss_input: Any) -> Work:
        w = before(loss_input)
        w.old = change(w, loss_input.old_student_logprobs.to(w.old))
        return w

    return around("accept", accept)


def of_other_order(w: Work, old: Tensor) -> Tensor:
    """Rows in descending order of length, behaviour log-probs in the order given."""
    order = (w.mask != 0).sum(-1).argsort(descending=True, stable=True)
    return torch.empty_like(old).index_copy(0, order, old)


def of_first_tokens(w: Work, old: Tensor) -> Tensor:
    """Counted tokens compacted, behaviour log-probs cut to as many from the start."""
    counted = w.mask != 0
    return torch.zeros_like(old).masked_scatter(counted, old.reshape(-1)[: int(counted.sum())])


def infinite_old_skipped(w: Work) -> Tensor:
    """A ratio of 1 where the behaviour log-prob is not finite."""
    return torch.where(w.old.isfinite(), log_ratio(w), 0.0)


def gradient_of_uncapped(w: Work) -> Tensor:
    """D r with the gradient of D times the uncapped ratio."""
    return valued(weighted(w), w.divergence * w.log_ratio.exp())


CHUNK = 16


def metrics_of_last_chunk(of: Callable[[Work], Tensor], w: Work) -> Tensor:
    """A mean over the last chunk of tokens alone."""
    start = (w.mask.numel() - 1) // CHUNK * CHUNK if w.mask.numel() else 0
    values, mask = of(w).reshape(-1)[start:], w.mask.reshape(-1)[start:]
    return (values * mask).sum() / mask.sum().clamp(min=1e-12)


DEFECTS = (
    Defect(
        name="dropped-importance-sampling",
        sentence="The divergence is not multiplied by the importance ratio: old_student_logprobs is never read.",
        violates=("IS-2", "IS-3", "IS-4", "IS-5", "IS-9"),
        fix=APPLY_RATIO,
        change=replacing(ratio=lambda w: torch.ones_like(w.chosen.detach())),
        seen=cite("linkedin/Liger-Kernel#1082", "huggingface/trl#5031", "huggingface/trl#4935"),
        usable_for=ON_POLICY,
    ),
    Defect(
        name="ratio-reported-not-applied",
        sentence="The importance ratio is computed and reported, but the divergence is not multiplied by it.",
        violates=("IS-2", "IS-3", "IS-9"),
        fix=APPLY_RATIO,
        change=replacing(weighted=lambda w: w.divergence),
        seen=cite("inclusionAI/AReno#68", "unslothai/unsloth-zoo#870"),
        usable_for=ON_POLICY,
    ),
    Defect(
        name="ratio-inverted",
        sentence="The ratio is behaviour over current policy: exp(old - new).",
        violates=("IS-3", "IS-4", "IS-5"),
        fix="The log-ratio is new minus old.",
        change=replacing(log_ratio=lambda w: (-difference(w)).clamp(-20, 20)),
        usable_for=ON_POLICY,
    ),
    Defect(
        name="ratio-one-where-close",
        sentence="A batch whose log-ratios are all small is taken for on-policy: its ratio is 1.",
        violates=("IS-3",),
        fix=f"Compute the ratio for every batch. {APPLY_RATIO}",
        change=replacing(log_ratio=one_where_close),
        usable_for=ON_POLICY,
    ),
    Defect(
        name="ratio-squared",
        sentence="The divergence is multiplied by the ratio twice.",
        violates=("IS-3", "IS-5"),
        fix=APPLY_RATIO,
        change=around("weighted", lambda before, w: before(w) * w.ratio),
        seen=cite("PrimeIntellect-ai/verifiers#462"),
        usable_for=ON_POLICY,
    ),
    Defect(
        name="ratio-square-root",
        sentence="Half the log-ratio is exponentiated.",
        violates=("IS-3",),
        fix="The ratio is exp(new - old).",
        change=replacing(log_ratio=lambda w: difference(w).clamp(-20, 20) / 2),
        usable_for=ON_POLICY,
    ),
    Defect(
        name="ratio-linearised",
        sentence="The ratio is 1 + (new - old), its first-order expansion.",
        violates=("IS-3", "IS-4"),
        fix="The ratio is exp(new - old).",
        change=replacing(ratio=lambda w: (1 + w.log_ratio).clamp(min=0.0, max=w.is_clip)),
        usable_for=ON_POLICY,
    ),
    Defect(
        name="ratio-undetached",
        sentence="Gradient flows through the ratio.",
        violates=("IS-7",),
        fix="Detach new - old before exp.",
        change=replacing(log_ratio=lambda w: (w.chosen - w.old).clamp(-20, 20)),
        seen=cite("huggingface/trl#224"),
        usable_for="Reading the metrics: every value is right, the gradient is not.",
    ),
    Defect(
        name="ratio-undetached-below-alpha-one",
        sentence="Gradient flows through the ratio where alpha < 1; the reverse-KL surrogate has it detached.",
        violates=("IS-7",),
        fix="Detach new - old before exp, whatever the objective.",
        change=replacing(log_ratio=lambda w: log_ratio(w) if w.reverse else (w.chosen - w.old).clamp(-20, 20)),
        usable_for="Reading the metrics: every value is right, the gradient is not.",
    ),
    Defect(
        name="ratio-batch-mean",
        sentence="One ratio for the whole batch: the mean over tokens multiplies the mean divergence.",
        violates=("IS-6",),
        fix=APPLY_RATIO,
        change=replacing(weighted=lambda w: w.divergence * batch_mean(w, w.ratio)),
        seen=cite("PrimeIntellect-ai/prime-rl#1391"),
        usable_for=ON_POLICY,
    ),
    Defect(
        name="ratio-sequence-mean",
        sentence="One ratio per response: exp of the mean log-ratio, as in GSPO.",
        violates=("IS-6",),
        fix=APPLY_RATIO,
        change=replacing(log_ratio=lambda w: row_mean(w, difference(w).clamp(-20, 20))),
        seen=cite("huggingface/trl#5190", "unslothai/unsloth-zoo#870"),
        usable_for=ON_POLICY,
    ),
    Defect(
        name="ratio-sequence-product",
        sentence="One ratio per response: the product of its tokens' ratios.",
        violates=("IS-6",),
        fix=APPLY_RATIO,
        change=replacing(
            log_ratio=lambda w: (
                (difference(w).clamp(-20, 20) * w.mask).sum(-1, keepdim=True).clamp(-20, 20).expand_as(w.chosen)
            )
        ),
        seen=cite("unslothai/unsloth-zoo#870"),
        usable_for=ON_POLICY,
    ),
    Defect(
        name="ratio-row-mean",
        sentence="Every token of a response gets the mean of the response's ratios.",
        violates=("IS-6",),
        fix=APPLY_RATIO,
        change=replacing(weighted=lambda w: w.divergence * row_mean(w, w.ratio)),
        seen=cite("huggingface/trl#5190"),
        usable_for=ON_POLICY,
    ),
    Defect(
        name="ratio-normalised",
        sentence="The ratios are divided by their mean over the batch (self-normalised importance sampling).",
        violates=("IS-3", "IS-6"),
        fix=APPLY_RATIO,
        change=replacing(weighted=lambda w: w.divergence * w.ratio / batch_mean(w, w.ratio).clamp(min=1e-8)),
        usable_for=ON_POLICY,
    ),
    Defect(
        name="ratio-normalised-and-reported",
        sentence="The ratios are divided by their mean over the batch, and reported so: mean_is_ratio is always 1.",
        violates=("IS-3", "IS-6"),
        fix=APPLY_RATIO,
        change=around("ratio", lambda before, w: before(w) / batch_mean(w, before(w)).clamp(min=1e-8)),
        usable_for=ON_POLICY,
    ),
    Defect(
        name="ratio-of-next-token",
        sentence="Each token is multiplied by the ratio of the token after it.",
        violates=("IS-6",),
        fix="Slice old and new log-probs alike.",
        change=replacing(weighted=lambda w: w.divergence * w.ratio.roll(-1, dims=1)),
        seen=cite("huggingface/trl#6191", "areal-project/AReaL#1729"),
        usable_for=ON_POLICY,
    ),
    Defect(
        name="old-of-other-row-order",
        sentence="Rows are sorted by length and old_student_logprobs are not: rows get each other's.",
        violates=("RED-5", "IS-6"),
        fix="Permute old_student_logprobs with everything else.",
        change=with_old(of_other_order),
        usable_for="Batches of one row, as the step loop makes them.",
    ),
    Defect(
        name="old-of-first-tokens",
        sentence="Tokens that count are compacted, old_student_logprobs are cut to as many from the start.",
        violates=("IS-6", "RED-2"),
        fix="Compact old_student_logprobs with the same mask.",
        change=with_old(of_first_tokens),
        usable_for="Masks that are 1 everywhere, as the step loop makes them.",
    ),
    Defect(
        name="ratio-symmetric-clip",
        sentence="The ratio is clipped from below as well, to [1 / is_clip, is_clip].",
        violates=("IS-5",),
        fix="Cap above only: clamp(max=is_clip).",
        change=replacing(ratio=lambda w: w.log_ratio.exp().clamp(min(1 / w.is_clip, w.is_clip), w.is_clip)),
        seen=cite("NVIDIA-NeMo/RL#2886", "thinking-machines-lab/tinker-cookbook#763"),
        usable_for="Ratios above 1 / is_clip, and on-policy steps.",
    ),
    Defect(
        name="ratio-ppo-clip",
        sentence="The ratio is clipped to 1 +- 0.2 on both sides, as in PPO.",
        violates=("IS-5",),
        fix="Cap above only, with the config's is_clip.",
        change=replacing(ratio=lambda w: w.log_ratio.exp().clamp(0.8, 1.2)),
        seen=cite("GMISWE/tinker-cloud#68"),
        usable_for=ON_POLICY,
    ),
    Defect(
        name="ratio-cap-hard-coded",
        sentence="The cap is 5.0 whatever the config says.",
        violates=("IS-5", "IS-10"),
        fix="Read training.is_clip.",
        change=replacing(ratio=lambda w: w.log_ratio.exp().clamp(max=5.0)),
        seen=cite("GMISWE/tinker-cloud#68", "unslothai/unsloth#11277"),
        usable_for="is_clip = 5.0, the default.",
    ),
    Defect(
        name="ratio-cap-two",
        sentence="The cap is 2.0, lasgroup/SDPO's default, whatever the config says.",
        violates=("IS-5", "IS-10"),
        fix="Read training.is_clip.",
        change=replacing(ratio=lambda w: w.log_ratio.exp().clamp(max=2.0)),
        seen=cite("GMISWE/tinker-cloud#68"),
        usable_for="is_clip = 2.0, and on-policy steps.",
    ),
    Defect(
        name="ratio-cap-missing",
        sentence="The ratio is not capped.",
        violates=("IS-5",),
        fix="Clamp the ratio with max=is_clip.",
        change=replacing(ratio=lambda w: w.log_ratio.exp()),
        seen=cite("OpenRLHF/OpenRLHF#1293"),
        usable_for="Ratios below is_clip, and on-policy steps.",
    ),
    Defect(
        name="gradient-with-uncapped-ratio",
        sentence="The value has the capped ratio, the gradient the uncapped one.",
        violates=("IS-5",),
        fix="Keep the capped ratio for the backward.",
        change=replacing(weighted=gradient_of_uncapped),
        usable_for="Ratios below is_clip, and on-policy steps.",
    ),
    Defect(
        name="ratio-cap-in-log-space",
        sentence="is_clip is compared with the log-ratio, so the cap is exp(is_clip).",
        violates=("IS-5",),
        fix="Cap the ratio, not its logarithm.",
        change=replacing(ratio=lambda w: w.log_ratio.clamp(max=w.is_clip).exp()),
        usable_for="Ratios below is_clip, and on-policy steps.",
    ),
    Defect(
        name="ratio-masked-above-cap",
        sentence="Tokens whose ratio exceeds the cap are dropped, not capped.",
        violates=("IS-5",),
        fix="Cap: a ratio above is_clip counts as is_clip.",
        change=replacing(ratio=lambda w: torch.where(w.log_ratio.exp() <= w.is_clip, w.log_ratio.exp(), 0.0)),
        seen=cite("huggingface/trl#4732", "allenai/open-instruct#1503"),
        usable_for="Ratios below is_clip, and on-policy steps.",
    ),
    Defect(
        name="ratio-capped-at-one",
        sentence="Ratios above 1 are cut to 1, whatever is_clip.",
        violates=("IS-5", "IS-3"),
        fix="Cap at is_clip.",
        change=replacing(ratio=lambda w: w.log_ratio.exp().clamp(max=min(1.0, w.is_clip))),
        usable_for=ON_POLICY,
    ),
    Defect(
        name="log-ratio-clamp-missing",
        sentence="The log-ratio is not clamped before exp.",
        violates=("IS-4",),
        fix="Clamp new - old to +-20 before exp.",
        change=replacing(log_ratio=difference),
        seen=cite("THUDM/slime#2198", "radixark/miles#1363", "OpenRLHF/OpenRLHF#1293"),
        usable_for="Log-ratios within +-20.",
    ),
    Defect(
        name="log-ratio-clamp-ten",
        sentence="The log-ratio is clamped to +-10.",
        violates=("IS-4",),
        fix="Clamp new - old to +-20.",
        change=replacing(log_ratio=lambda w: difference(w).clamp(-10, 10)),
        usable_for="Log-ratios within +-10.",
    ),
    Defect(
        name="log-ratio-clamped-above-only",
        sentence="The log-ratio has no lower clamp.",
        violates=("IS-4",),
        fix="Clamp new - old to +-20 on both sides.",
        change=replacing(log_ratio=lambda w: difference(w).clamp(max=20)),
        usable_for="Log-ratios above -20.",
    ),
    Defect(
        name="clamp-after-exp",
        sentence="The clamp to +-20 is applied to the ratio, not to its logarithm.",
        violates=("IS-4",),
        fix="Clamp new - old before exp.",
        change=replacing(log_ratio=difference, ratio=lambda w: w.log_ratio.exp().clamp(-20, 20).clamp(max=w.is_clip)),
        seen=cite("OpenRLHF/OpenRLHF#1293"),
        usable_for="Log-ratios above -20, with is_clip up to 20.",
    ),
    Defect(
        name="clamp-on-log-probs",
        sentence="old and new log-probs are clamped at -20 each, not their difference.",
        violates=("IS-4",),
        fix="Clamp new - old.",
        change=replacing(log_ratio=lambda w: w.chosen.detach().clamp(min=-20) - w.old.clamp(min=-20)),
        usable_for="Tokens whose log-probs are above -20.",
    ),
    Defect(
        name="ratio-of-probabilities",
        sentence="The ratio is a quotient of probabilities, which is 0/0 where both underflow.",
        violates=("IS-4", "NUM-7"),
        fix="Take the difference of log-probs, clamp it, then exp.",
        change=replacing(ratio=of_probabilities),
        usable_for="Tokens whose log-probs are above -20.",
    ),
    Defect(
        name="ratio-applied-to-anchor",
        sentence="The anchor is multiplied by the importance ratio too.",
        violates=("IS-8",),
        fix="Only the divergence carries the ratio.",
        change=replacing(kl_reg=lambda w: token_mean(w, w.k3 * w.ratio)),
        seen=cite("THUDM/slime#1004", "huggingface/trl#6594", "PrimeIntellect-ai/prime-rl#1391"),
        usable_for=ON_POLICY,
    ),
    Defect(
        name="ratio-applied-to-anchor-in-loss",
        sentence="The anchor is multiplied by the importance ratio in the loss, and kl_reg is reported without it.",
        violates=("IS-8",),
        fix="Only the divergence carries the ratio.",
        change=replacing(loss=lambda w: w.distill_loss + w.kl_reg_weight * token_mean(w, w.k3 * w.ratio)),
        usable_for=ON_POLICY,
    ),
    Defect(
        name="ratio-not-at-alpha-one",
        sentence="The reverse-KL surrogate is not multiplied by the ratio.",
        violates=("IS-9",),
        fix="The ratio multiplies D whichever the objective.",
        change=replacing(weighted=lambda w: w.divergence if w.reverse else weighted(w)),
        seen=cite("unslothai/unsloth-zoo#870"),
        usable_for="alpha < 1, and on-policy steps.",
    ),
    Defect(
        name="ratio-only-at-alpha-one",
        sentence="Only the reverse-KL surrogate is multiplied by the ratio.",
        violates=("IS-2", "IS-3"),
        fix="The ratio multiplies D whichever the objective.",
        change=replacing(weighted=lambda w: weighted(w) if w.reverse else w.divergence),
        seen=cite("unslothai/unsloth-zoo#870"),
        usable_for="alpha = 1, and on-policy steps.",
    ),
    Defect(
        name="ratio-over-support",
        sentence="The current log-prob is renormalised over the support, the behaviour's is not.",
        violates=("IS-1", "IS-3"),
        fix="Both log-probs are over the whole vocabulary.",
        change=replacing(log_ratio=lambda w: (over_support(w) - w.old).detach().clamp(-20, 20)),
        seen=cite("huggingface/trl#7269", "huggingface/trl#6789"),
        usable_for="Nothing but the full vocabulary as support (K = V).",
    ),
    Defect(
        name="ratio-from-logit",
        sentence="The logit of the response token stands in for its log-prob.",
        violates=("IS-1", "IS-3", "GJS-4"),
        fix="Subtract the logsumexp over the vocabulary.",
        change=replacing(
            log_ratio=lambda w: (w.z.gather(-1, w.y.unsqueeze(-1)).squeeze(-1) - w.old).detach().clamp(-20, 20)
        ),
    ),
    Defect(
        name="old-taken-for-bits",
        sentence="The kernel's log-prob is in bits, and old_student_logprobs is subtracted from it in nats.",
        violates=("IS-1", "IS-3"),
        fix="Multiply old_student_logprobs by log2(e) before the difference.",
        change=replacing(log_ratio=lambda w: clamped(w.chosen - w.old * math.log(2))),
    ),
    Defect(
        name="ratio-from-teacher",
        sentence="The numerator of the ratio is the teacher's log-prob, not the student's.",
        violates=("IS-1", "IS-3"),
        fix="The ratio is current student over behaviour policy.",
        change=replacing(log_ratio=lambda w: (teacher_at_y(w) - w.old).clamp(-20, 20)),
        seen=cite("THUDM/slime#179"),
    ),
    Defect(
        name="ratio-against-base",
        sentence="The denominator of the ratio is the base policy, not the behaviour policy.",
        violates=("IS-2", "IS-1", "IS-3"),
        fix="Divide by old_student_logprobs.",
        change=replacing(log_ratio=lambda w: (w.chosen - w.base).detach().clamp(-20, 20)),
        seen=cite("huggingface/trl#1340"),
    ),
    Defect(
        name="ratio-without-temperature",
        sentence="The current log-prob is taken at temperature 0.7, the behaviour's at 1.",
        violates=("IS-1", "IS-3"),
        fix="Take both log-probs at the same temperature: 1.",
        change=replacing(
            log_ratio=lambda w: (
                (torch.log_softmax(w.z / 0.7, -1).gather(-1, w.y.unsqueeze(-1)).squeeze(-1) - w.old)
                .detach()
                .clamp(-20, 20)
            )
        ),
        seen=cite("huggingface/trl#4159", "huggingface/trl#3029"),
    ),
    Defect(
        name="ratio-in-bfloat16",
        sentence="The log-ratio is rounded to bfloat16 before exp.",
        violates=("NUM-1", "IS-3"),
        fix="Take the difference of log-probs in float32.",
        change=replacing(log_ratio=lambda w: difference(w).clamp(-20, 20).bfloat16().to(w.chosen)),
        seen=cite("genlm/genlm-backend#66"),
        usable_for="On-policy steps in one and the same software, where the ratio is 1.",
    ),
    Defect(
        name="old-infinite-not-handled",
        sentence="An infinite behaviour log-prob makes the loss NaN: exp(new) / exp(old) by multiplication.",
        violates=("NUM-7",),
        fix="Clamp new - old before exp; an infinite old then saturates.",
        change=around("ratio", lambda before, w: before(w) + 0 * w.old),
        seen=cite("THUDM/slime#2198", "MakazhanAlpamys/Soup#342"),
        usable_for="Finite behaviour log-probs.",
    ),
    Defect(
        name="old-infinite-skipped",
        sentence="Where the behaviour log-prob is infinite the ratio is 1.",
        violates=("NUM-7",),
        fix="Let the clamp saturate: -inf gives exp(20), +inf exp(-20), then the cap.",
        change=replacing(log_ratio=infinite_old_skipped),
        usable_for="Finite behaviour log-probs.",
    ),
    Defect(
        name="ratio-below-threshold-dropped",
        sentence="Ratios below 0.01 are set to 0.",
        violates=("IS-5",),
        fix="Cap above only.",
        change=around("ratio", lambda before, w: torch.where(before(w) < 0.01, 0.0, before(w))),
        seen=cite("huggingface/trl#4732", "allenai/open-instruct#1503"),
        usable_for="Ratios above 0.01, and on-policy steps.",
    ),
    Defect(
        name="ratio-above-threshold-dropped",
        sentence="Ratios above 2.0 are set to 0, whatever is_clip.",
        violates=("IS-5",),
        fix="Cap above only, with the config's is_clip.",
        change=replacing(ratio=lambda w: torch.where(ratio(w) > 2.0, 0.0, ratio(w))),
        usable_for="Ratios below the threshold.",
    ),
    Defect(
        name="ratio-of-other-tile",
        sentence="Tokens past the 16th read the ratio of the token 16 positions earlier in the first tile.",
        violates=("IS-6", "FUS-6"),
        fix="Index the behaviour log-probs with the token, not with its place in the tile.",
        change=replacing(ratio=lambda w: of_first_tile(16, w)),
        seen=cite("linkedin/Liger-Kernel#330"),
        usable_for="Batches of up to 16 tokens.",
    ),
    Defect(
        name="ratio-of-other-tile-32",
        sentence="Tokens past the 32nd read the ratio of the same place in the first tile.",
        violates=("IS-6", "FUS-6"),
        fix="Index the behaviour log-probs with the token, not with its place in the tile.",
        change=replacing(ratio=lambda w: of_first_tile(32, w)),
        seen=cite("linkedin/Liger-Kernel#330"),
        usable_for="Batches of up to 32 tokens.",
    ),
    Defect(
        name="ratio-of-other-tile-128",
        sentence="Tokens past the 128th read the ratio of the same place in the first tile.",
        violates=("IS-6", "FUS-6"),
        fix="Index the behaviour log-probs with the token, not with its place in the tile.",
        change=replacing(ratio=lambda w: of_first_tile(128, w)),
        seen=cite("linkedin/Liger-Kernel#330"),
        usable_for="Batches of up to 128 tokens.",
    ),
    Defect(
        name="clip-fraction-strict",
        sentence="clip_fraction counts capped ratios that exceed the cap, of which there are none.",
        violates=("IS-10",),
        fix="Compare with >=.",
        change=replacing(clip_fraction=lambda w: token_mean(w, (w.ratio > w.is_clip).to(w.ratio))),
        seen=cite("RLinf/RLinf#1529", "huggingface/trl#3032"),
        usable_for=TRAINING,
    ),
    Defect(
        name="clip-fraction-two-sided",
        sentence="clip_fraction counts ratios below 1 / is_clip too.",
        violates=("IS-10",),
        fix="Count r >= is_clip alone.",
        change=around(
            "clip_fraction",
            lambda before, w: before(w) + token_mean(w, (w.log_ratio < -abs(math.log(w.is_clip))).to(w.ratio)),
        ),
        usable_for=TRAINING,
    ),
    Defect(
        name="clip-fraction-counts-padding",
        sentence="clip_fraction is the mean over all positions, masked ones among them.",
        violates=("IS-10", "RED-2"),
        fix="Weigh with the mask and divide by n.",
        change=replacing(clip_fraction=lambda w: (w.ratio >= w.is_clip).to(w.ratio).mean()),
        seen=cite("linkedin/Liger-Kernel#974"),
        usable_for=TRAINING,
    ),
    Defect(
        name="clip-fraction-count",
        sentence="clip_fraction is a number of tokens, not a fraction.",
        violates=("IS-10",),
        fix="Divide by n.",
        change=replacing(clip_fraction=lambda w: ((w.ratio >= w.is_clip).to(w.ratio) * w.mask).sum()),
        usable_for=TRAINING,
    ),
    Defect(
        name="mean-ratio-before-cap",
        sentence="mean_is_ratio averages the ratios before the cap.",
        violates=("IS-10",),
        fix="Average the capped ratios.",
        change=replacing(mean_is_ratio=lambda w: token_mean(w, w.log_ratio.exp())),
        usable_for=TRAINING,
    ),
    Defect(
        name="mean-ratio-geometric",
        sentence="mean_is_ratio is exp of the mean log-ratio.",
        violates=("IS-10",),
        fix="Average the ratios, not their logarithms.",
        change=replacing(mean_is_ratio=lambda w: token_mean(w, w.ratio.clamp(min=1e-30).log()).exp()),
        usable_for=TRAINING,
    ),
    Defect(
        name="mean-ratio-counts-padding",
        sentence="mean_is_ratio is the mean over all positions, masked ones among them.",
        violates=("IS-10", "RED-2"),
        fix="Weigh with the mask and divide by n.",
        change=replacing(mean_is_ratio=lambda w: w.ratio.mean()),
        seen=cite("linkedin/Liger-Kernel#974"),
        usable_for=TRAINING,
    ),
    Defect(
        name="metrics-constant",
        sentence="mean_is_ratio is 1 and clip_fraction 0 whatever the ratios are.",
        violates=("IS-10",),
        fix="Report sum(r mask)/n and sum([r >= is_clip] mask)/n.",
        change=both(
            replacing(mean_is_ratio=lambda w: torch.ones_like(w.count)),
            replacing(clip_fraction=lambda w: torch.zeros_like(w.count)),
        ),
        usable_for=TRAINING,
    ),
    Defect(
        name="ratio-metrics-of-last-chunk",
        sentence="mean_is_ratio and clip_fraction are those of the last 16 tokens alone.",
        violates=("IS-10",),
        fix="Add up the chunks' sums, then divide by the mask's sum.",
        change=replacing(
            mean_is_ratio=partial(metrics_of_last_chunk, lambda w: w.ratio),
            clip_fraction=partial(metrics_of_last_chunk, lambda w: (w.ratio >= w.is_clip).to(w.ratio)),
        ),
        usable_for=TRAINING,
    ),
    Defect(
        name="distill-loss-reported-without-ratio",
        sentence="distill_loss is reported before the ratio is applied.",
        violates=("IS-2", "IS-10"),
        fix="Report what enters the loss: sum(D r mask)/n.",
        change=around(
            "result",
            lambda before, w, metrics: before(w, {**metrics, "distill_loss": token_mean(w, w.divergence.detach())}),
        ),
        usable_for=TRAINING,
    ),
)
