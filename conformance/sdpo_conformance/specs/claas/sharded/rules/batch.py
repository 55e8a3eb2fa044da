"""DP: the batch cut over dp (and, where it is there, the sequence over cp: a token is a token)."""

from __future__ import annotations

import torch

from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.protocol import METRIC_KEYS
from sdpo_conformance.specs.claas.corners import NEUTRAL
from sdpo_conformance.specs.claas.rules.aspects import ALL, LOSSES
from sdpo_conformance.specs.claas.sharded.cut import ShardedCase, tokens_of
from sdpo_conformance.specs.claas.sharded.draw import Cuts
from sdpo_conformance.specs.claas.sharded.sharded_rule import sharded_rule
from sdpo_conformance.specs.claas.sharded.sharded_subject import ShardedSubject
from sdpo_conformance.specs.requirement import Level

BATCH = ("dp", "cp")
BROAD = NEUTRAL.but(
    size=("small", "crowd:9"),
    ratio=("mild", "below", "above_cap"),
    anchor=("on", "off"),
    drift=("mild", "strong"),
    alpha=("half", "inside", "one"),
)
EVERY = Cuts(rows=("even", "lopsided", "none_first", "none_last"))
LOSS_AND_GRADIENT = ("loss", "distill_loss", "kl_reg", "gradient")


def counts(case: ShardedCase) -> list[float]:
    """What the mask sums to on each rank."""
    mask, cut = case.loss_input.response_mask.double(), case.laid
    return [float(tokens_of(cut, rank, mask, masked=True).sum()) for rank in range(cut.mesh.ranks)]


def uneven(case: ShardedCase) -> ShardedCase:
    """The case with another number of counting tokens on every rank: a mean of means is then another mean."""
    mask = case.loss_input.response_mask.clone()
    mask[1:, mask.shape[1] // 2 + 1 :] = 0
    changed = case.with_fields(response_mask=mask)
    return changed


@sharded_rule(
    "DP-1",
    Level.MUST,
    "loss and gradient are those of ONE token mean over all ranks, for every cut of the batch: after the mean over "
    "dp x cp the gradient is the one of a single process",
    source="verl#7200, #7225; transformers#34191, #34373; torchtune#1875; open-instruct#1161; trl#5619, #6006, #6478",
    why="a mean of rank means gives tokens of short ranks more weight, and a missing factor is the world's size",
    capabilities=LOSSES,
    axes=BATCH,
)
def dp_1(subject: ShardedSubject) -> None:
    corner = BROAD.but(mask=("ragged", "random", "fractional", "full"))

    def check(case: ShardedCase) -> None:
        subject.agrees_on_ranks(case, LOSS_AND_GRADIENT)
        subject.agrees_on_ranks(uneven(case), LOSS_AND_GRADIENT)

    subject.for_all_cuts(corner, check, share=0.8)


@sharded_rule(
    "DP-2",
    Level.MUST,
    "a rank without a counting token neither hangs nor counts as a mean of 0: its results are the others', its "
    "gradient is 0",
    source="lasgroup/SDPO self_distillation_mask; ms-swift gkd_loss.py 118-122",
    why="an early return leaves the other ranks waiting in a collective",
    capabilities=LOSSES,
    axes=BATCH,
    rests_on=("DP-1",),
)
def dp_2(subject: ShardedSubject) -> None:
    def check(case: ShardedCase) -> None:
        mask, cut = case.loss_input.response_mask, case.laid
        for rank in (0, cut.mesh.ranks - 1):
            here = torch.zeros_like(mask, dtype=torch.bool)
            rows = [row for row in cut.rows[cut.mesh.coordinate(rank, "dp")] if row >= 0]
            positions = [t for t in cut.positions[cut.mesh.coordinate(rank, "cp")] if t >= 0]
            for row in rows:
                here[row, positions] = True
            without = case.with_fields(response_mask=torch.where(here, torch.zeros_like(mask), mask))
            subject.agrees_on_ranks(without, ALL)
        nobody = case.with_fields(response_mask=torch.zeros_like(mask))
        subject.agrees_on_ranks(nobody, ALL)

    subject.for_all_cuts(BROAD.but(mask=("full", "ragged", "fractional"), size="small"), check, EVERY, share=0.4)


@sharded_rule(
    "DP-3",
    Level.MUST,
    "distill_loss, kl_reg, mean_is_ratio and clip_fraction are those of the whole batch, reduced once, equal on every "
    "rank",
    source="SkyRL#1420; Megatron-LM#4896",
    why="a metric summed over the wrong group is doubled, one left out is a rank's own: both hide what training does",
    capabilities=LOSSES,
    axes=BATCH,
)
def dp_3(subject: ShardedSubject) -> None:
    corner = BROAD.but(mask=("ragged", "full", "fractional"), is_clip=("default", "low", "high"))

    def check(case: ShardedCase) -> None:
        subject.agrees_on_ranks(case, METRIC_KEYS)
        subject.agrees_on_ranks(uneven(case), METRIC_KEYS)

    subject.for_all_cuts(corner, check, share=0.6)


@sharded_rule(
    "DP-4",
    Level.MUST,
    "the denominator is max(sum of the mask over all ranks, 1): the clamp acts on the whole sum, not on a rank's",
    source="spec RED-4, over ranks; transformers#34373",
    why="clamping each rank's count before the sum counts empty and fractional ranks as a token",
    capabilities=LOSSES,
    axes=BATCH,
    rests_on=("DP-1", "DP-3"),
)
def dp_4(subject: ShardedSubject) -> None:
    def check(case: ShardedCase) -> None:
        try:
            subject.agrees_on_ranks(case, ALL)
        except Disagreement as found:
            full = case.with_fields(response_mask=torch.ones_like(case.loss_input.response_mask))
            found.secondary = subject.wrong_on_ranks(full, ALL)
            raise

    subject.for_all_cuts(BROAD.but(mask=("tiny", "fractional", "empty"), size="small"), check, EVERY, share=0.6)


@sharded_rule(
    "DP-5",
    Level.MUST,
    "the gradient scales with the incoming one on every rank",
    source="Liger-Kernel#1298; DDP and FSDP with a gradient scaler",
    why="a gradient made in the forward pass must still be multiplied by what arrives",
    capabilities=LOSSES,
    axes=("dp", "cp", "tp"),
    rests_on=("DP-1", "VP-1", "VP-3"),
)
def dp_5(subject: ShardedSubject) -> None:
    corner = BROAD.but(incoming=(3.0, -0.5, 1024.0), size="small")
    subject.for_all_cuts(corner, lambda case: subject.agrees_on_ranks(case, ("gradient",)), share=0.4)
