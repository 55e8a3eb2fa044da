"""MESH: what holds on every mesh, whatever it cuts."""

from __future__ import annotations

from dataclasses import replace

import torch

from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.sharded.rank import Request
from sdpo_conformance.specs.claas.corners import EVERYTHING, NEUTRAL
from sdpo_conformance.specs.claas.inputs.masked import with_garbage
from sdpo_conformance.specs.claas.rules.aspects import ALL, LOSSES
from sdpo_conformance.specs.claas.sharded.compare_ranks import compare_ranks, complaints, expected_of
from sdpo_conformance.specs.claas.sharded.cut import ShardedCase, part_of, sharded
from sdpo_conformance.specs.claas.sharded.draw import Cuts
from sdpo_conformance.specs.claas.sharded.sharded_rule import sharded_rule
from sdpo_conformance.specs.claas.sharded.sharded_subject import ShardedSubject
from sdpo_conformance.specs.requirement import Level

ANY = ("dp", "cp", "tp")
FIRST = ("VP-1", "VP-3", "VP-8", "DP-1", "DP-3", "CP-1")
SMALL = NEUTRAL.but(size="small", ratio=("mild", "above_cap"), anchor=("on", "off"), alpha=("half", "inside", "one"))
OF_PADDING = Cuts(vocabulary=("chunk", "aligned:4", "aligned:64"), filling=("zero", "high"))
WIDEST = Cuts(rows=("even", "lopsided", "none_first"))


@sharded_rule(
    "MESH-1",
    Level.MUST,
    "with everything at once, results and gradients on the mesh are those of one process",
    source="design section 12: the oracle is unsharded; FU-1: Liger-Kernel#1082, #1088; trl#7063",
    why="a sharded path loses what the unsharded one has: the ratio, the cap, the anchor, alpha = 1, the mask",
    capabilities=LOSSES,
    axes=ANY,
    rests_on=FIRST,
)
def mesh_1(subject: ShardedSubject) -> None:
    corner = EVERYTHING.but(size=("small", "small", "crowd:9", "tall:17"), support=("few", "one", "whole", "many:65"))
    subject.for_all_cuts(corner, lambda case: subject.agrees_on_ranks(case, ALL), WIDEST)


@sharded_rule(
    "MESH-2",
    Level.MUST,
    "the result has the five keys, metrics without graph, and the inputs are left as they were on every rank",
    source="spec RED-6 and GRAD-3",
    why="a caller reads these keys on every rank and goes on with the tensors",
    capabilities=LOSSES,
    axes=ANY,
)
def mesh_2(subject: ShardedSubject) -> None:
    def check(case: ShardedCase) -> None:
        for rank, answer in enumerate(subject.answers(case)):
            if answer.problems:
                raise Disagreement("the result", "the protocol's keys and types", answer.problems[0], case=case)
            if answer.touched:
                found = ", ".join(answer.touched)
                raise Disagreement(
                    f"inputs after the call on rank {rank}", "unmodified", f"{found} modified", case=case
                )

    subject.for_all_cuts(SMALL, check, OF_PADDING, share=0.3)


@sharded_rule(
    "MESH-3",
    Level.MUST,
    "two graphs alive at once do not share buffers, and a second backward through one gives the same gradient",
    source="spec GRAD-5, over ranks",
    why="a reduced gradient kept in the forward pass is reduced again, or is another batch's",
    capabilities=LOSSES,
    axes=ANY,
    rests_on=FIRST,
)
def mesh_3(subject: ShardedSubject) -> None:
    def check(case: ShardedCase) -> None:
        expected = expected_of(case, subject.entry)
        if not expected.attainable:
            return
        features = "student_hidden" if case.fused else "student_logits"
        other = case.with_fields(
            **{features: case.tensors()[features] * 0.5}, response_mask=torch.ones_like(case.loss_input.response_mask)
        )
        theirs = expected_of(other, subject.entry)
        requests = [
            Request(subject.entry.value, part_of(case, rank), 2, before=part_of(other, rank))
            for rank in range(subject.mesh.ranks)
        ]
        answers = subject.ask(requests)
        complaints(answers, "gradient")
        found = compare_ranks(case, subject.entry, answers, ALL, expected)
        for number, (one, truth) in ((1, (case, expected)), (2, (other, theirs))):
            if found is None and truth.attainable:
                passed = [replace(answer, gradients=answer.gradients[number:]) for answer in answers]
                found = compare_ranks(one, subject.entry, passed, ("gradient",), truth)
                if found is not None:
                    found.detail = "in a second backward" if number == 1 else "once another graph was made and used"
        if found is not None:
            found.secondary = subject.wrong_on_ranks(case, ALL)
            raise found

    subject.for_all_cuts(SMALL, check, share=0.3)


@sharded_rule(
    "MESH-4",
    Level.MUST,
    "under no_grad the results are the same",
    source="spec GRAD-6, over ranks",
    why="evaluation calls the loss without a graph, on every rank",
    capabilities=LOSSES,
    axes=ANY,
    rests_on=FIRST,
)
def mesh_4(subject: ShardedSubject) -> None:
    values = tuple(aspect for aspect in ALL if aspect != "gradient")
    subject.for_all_cuts(SMALL, lambda case: subject.agrees_on_ranks(case, values, grad_mode="no_grad"), share=0.2)


@sharded_rule(
    "MESH-5",
    Level.MUST,
    "masked positions count for nothing on any rank, whatever stands there",
    source="spec RED-2, over ranks; lasgroup/SDPO self_distillation_mask",
    why="padding of one rank that reaches a sum reaches every rank",
    capabilities=LOSSES,
    axes=ANY,
    rests_on=FIRST,
)
def mesh_5(subject: ShardedSubject) -> None:
    def check(case: ShardedCase) -> None:
        garbage = sharded(with_garbage(case), case.laid)
        try:
            subject.agrees_on_ranks(garbage, ALL)
        except Disagreement as found:
            found.secondary = subject.wrong_on_ranks(case, ALL)
            raise

    subject.for_all_cuts(SMALL.but(mask=("random", "ragged")), check, WIDEST, share=0.4)
