"""CP: the sequence cut over cp."""

from __future__ import annotations

from sdpo_conformance.specs.claas.corners import NEUTRAL
from sdpo_conformance.specs.claas.rules.aspects import ALL, LOSSES
from sdpo_conformance.specs.claas.sharded.cut import FILLER, ShardedCase
from sdpo_conformance.specs.claas.sharded.draw import Cuts
from sdpo_conformance.specs.claas.sharded.sharded_rule import sharded_rule
from sdpo_conformance.specs.claas.sharded.sharded_subject import ShardedSubject
from sdpo_conformance.specs.requirement import Level

CP = ("cp",)
BROAD = NEUTRAL.but(
    size=("small", "small", "tall:17"), ratio=("mild", "above_cap"), anchor=("on", "off"), drift=("mild", "strong"),
    alpha=("half", "inside", "one"),
)  # fmt: skip


@sharded_rule(
    "CP-1",
    Level.MUST,
    "with the sequence cut, contiguous or load-balanced, loss and gradient are those of the whole sequence; the factor "
    "of cp enters once",
    source="Megatron-LM#673, #906; verl#6609, #3723; SkyRL#1420",
    why="scaled by cp twice, or not at all, the gradient is off by the number of ranks",
    capabilities=LOSSES,
    axes=CP,
)
def cp_1(subject: ShardedSubject) -> None:
    corner = BROAD.but(mask=("full", "ragged", "fractional"))
    subject.for_all_cuts(corner, lambda case: subject.agrees_on_ranks(case, ALL), share=0.8)


@sharded_rule(
    "CP-2",
    Level.MUST,
    "mask, ratio, anchor, support and response go with their position: all cut by the same permutation",
    source="ms-swift#8436; verl#6268, #6293",
    why="a mask cut contiguously beside a load-balanced sequence weighs other tokens than those that were trained on",
    capabilities=LOSSES,
    axes=CP,
    rests_on=("CP-1",),
)
def cp_2(subject: ShardedSubject) -> None:
    corner = BROAD.but(mask=("random", "fractional"), ratio=("mild", "below", "above_cap"), size="small")
    subject.for_all_cuts(
        corner, lambda case: subject.agrees_on_ranks(case, ALL), Cuts(positions=("balanced",)), share=0.6
    )


@sharded_rule(
    "CP-3",
    Level.MUST,
    "packed equals padded: rows laid end to end without padding, documents across the ranks' borders, give the same "
    "token by token, the last token of a document included",
    source="maxtext#4016; prime-rl#3032; nanoVLM#204",
    why="a shift by one inside the loss drops or borrows a token at every document's end",
    capabilities=LOSSES,
    axes=CP,
    rests_on=("CP-1",),
)
def cp_3(subject: ShardedSubject) -> None:
    corner = BROAD.but(mask=("ragged", "full"), size="small")
    subject.for_all_cuts(corner, lambda case: subject.agrees_on_ranks(packed(case), ALL), share=0.6)


def packed(case: ShardedCase) -> ShardedCase:
    """The rows' counted tokens laid end to end in one row, cut in equal runs over cp and none over dp."""
    loss_input, cut = case.loss_input, case.laid
    kept = loss_input.response_mask.double() != 0
    changes = {key: tensor[kept].unsqueeze(0) for key, tensor in case.tensors().items() if key != "lm_head_weight"}
    cp, dp, count = cut.mesh.size("cp"), cut.mesh.size("dp"), int(kept.sum())
    size = -(-count // cp)
    positions = [[t if t < count else FILLER for t in range(rank * size, (rank + 1) * size)] for rank in range(cp)]
    rows = ((0,), *((FILLER,),) * (dp - 1))
    new = ShardedCase(
        loss_input=case.with_fields(**changes).loss_input, trainable_head=case.trainable_head, incoming=case.incoming,
        cut=type(cut)(cut.mesh, cut.starts, cut.stretches, rows, tuple(map(tuple, positions)), cut.filling),
    )  # fmt: skip
    return new
