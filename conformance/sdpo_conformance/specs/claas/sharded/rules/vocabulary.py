"""VP: the vocabulary cut over tp."""

from __future__ import annotations

from dataclasses import replace

import torch

from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.protocol import METRIC_KEYS, Capability
from sdpo_conformance.specs.claas.corners import NEUTRAL
from sdpo_conformance.specs.claas.rules.aspects import ALL, LOSSES
from sdpo_conformance.specs.claas.sharded import heads_on_ranks as heads
from sdpo_conformance.specs.claas.sharded.cut import ShardedCase
from sdpo_conformance.specs.claas.sharded.draw import PADDED, Cuts
from sdpo_conformance.specs.claas.sharded.moves import ids_at_edges, one_shard_far_below, support_on_one_shard
from sdpo_conformance.specs.claas.sharded.sharded_rule import sharded_rule
from sdpo_conformance.specs.claas.sharded.sharded_subject import ShardedSubject
from sdpo_conformance.specs.requirement import Level

TP = ("tp",)
VALUES = ("loss", *METRIC_KEYS)
GRADIENTS = ("gradient",)
SMALL = NEUTRAL.but(size="small", ratio=("mild", "on_policy"), alpha=("half", "inside", "one"))
ANCHORED = SMALL.but(anchor=("on", "off"), drift=("mild", "strong"))
BALANCED = Cuts(rows=("even",))


@sharded_rule(
    "VP-1",
    Level.MUST,
    "the logsumexp is that of the whole vocabulary: the maximum over all shards, then the sum; results equal on "
    "every rank",
    source="unsloth#10616; verl#2899, #5349",
    why="a local maximum or a local sum is off by up to log(TP), and differently on every rank",
    capabilities=LOSSES,
    axes=TP,
)
def vp_1(subject: ShardedSubject) -> None:
    corner = SMALL.but(logits=("normal", "peaked", "large", "flat"), size=("small", "small", "wide:1024"))

    def check(case: ShardedCase) -> None:
        subject.agrees_on_ranks(case, VALUES)
        if case.truth.logits.abs().max() > 100:
            return
        half = next(iter(case.tensors().values())).dtype in (torch.bfloat16, torch.float16)
        for place in (0, subject.mesh.size("tp") - 1):
            apart = one_shard_far_below(case, place, 30.0 if half else 150.0)
            if apart is not None:
                subject.agrees_on_ranks(apart, VALUES)

    subject.for_all_cuts(corner, check, BALANCED)


@sharded_rule(
    "VP-2",
    Level.MUST,
    "padding of the vocabulary counts for nothing: not in the softmax, the support or the response, and its gradient "
    "is 0; a shard may hold nothing but padding",
    source="apple/ml-cross-entropy#59; SkyRL#1832; verl#2899, #5349",
    why="a padded lane of zeros adds exp(0) to every token's logsumexp",
    capabilities=LOSSES,
    axes=TP,
    rests_on=("VP-1", "VP-3", "VP-8"),
)
def vp_2(subject: ShardedSubject) -> None:
    subject.for_all_cuts(ANCHORED, lambda case: subject.agrees_on_ranks(case, ALL), PADDED, share=0.7)


@sharded_rule(
    "VP-3",
    Level.MUST,
    "the gradient reaches every shard, also where support and response live elsewhere, and is counted once",
    source="ms-swift#9947; pytorch#190746; apple/ml-cross-entropy#42; torchtitan#3412",
    why="a plain all_reduce passes no gradient, and one whose backward sums again counts it TP times",
    capabilities=LOSSES,
    axes=TP,
    rests_on=("VP-1",),
)
def vp_3(subject: ShardedSubject) -> None:
    def check(case: ShardedCase) -> None:
        subject.agrees_on_ranks(case, GRADIENTS)
        elsewhere = support_on_one_shard(case)
        if elsewhere is not None:
            subject.agrees_on_ranks(elsewhere, GRADIENTS)

    subject.for_all_cuts(ANCHORED.but(support=("one", "few"), logits=("normal", "flat")), check, BALANCED, share=0.7)


@sharded_rule(
    "VP-4",
    Level.MUST,
    "the gradient that arrives at each token is used for that token",
    source="NeMo-Automodel#3853; Liger-Kernel#1298 (9ac26bb8)",
    why="the first element scaling all rows is right for a mean and wrong for every weighted loss",
    capabilities=(Capability.DIVERGENCE,),
    axes=TP,
)
def vp_4(subject: ShardedSubject) -> None:
    subject.for_all_cuts(SMALL.but(alpha=("half", "inside"), ratio="on_policy"), subject.judge_divergence, share=0.5)


@sharded_rule(
    "VP-5",
    Level.SHOULD,
    "logits that were gathered already, whole on every rank, are refused with a ValueError, or answered right",
    source="Megatron-LM#7452",
    why="every rank counts the whole vocabulary, and the logsumexp is off by log(TP) without a word",
    capabilities=(Capability.LOSS,),
    axes=TP,
)
def vp_5(subject: ShardedSubject) -> None:
    def check(case: ShardedCase) -> None:
        tp = subject.mesh.size("tp")
        whole = replace(case, cut=replace(case.laid, starts=(0,) * tp, stretches=(case.vocabulary,) * tp))
        try:
            subject.agrees_on_ranks(whole, VALUES)
        except ImplementationError as error:
            if "raised ValueError on every rank" not in error.summary:
                raise

    if subject.claims.dtensor:
        subject.tally.note = "a DTensor says itself whether it is cut or whole"
        return
    subject.for_all_cuts(SMALL, check, BALANCED, share=0.1)


@sharded_rule(
    "VP-6",
    Level.MUST,
    "the teacher's top-k is the global one: candidates of all shards, global ids, k larger than a shard, ties alike on "
    "every rank",
    source="verl megatron/losses.py 177-191; NeMo-RL distributed_vocab_topk 1699-1766",
    why="a top-k of each shard, ids counted from the shard's start, or an all-gather of unequal shards",
    capabilities=(Capability.TEACHER_TOPK,),
    axes=TP,
)
def vp_6(subject: ShardedSubject) -> None:
    heads.judge_topk(subject)


@sharded_rule(
    "VP-7",
    Level.MUST,
    "statistics are kept in float32 at least: the bounds do not grow with the number of shards",
    source="vllm#42259; Megatron-LM's test matrices",
    why="a maximum, a sum or a chosen logit exchanged in half precision costs three digits of every log-prob",
    capabilities=LOSSES,
    axes=TP,
    rests_on=("VP-1", "VP-3"),
)
def vp_7(subject: ShardedSubject) -> None:
    corner = ANCHORED.but(logits=("large", "equal", "normal"), size=("wide:1024", "wide:4099", "small"), ratio="mild")
    subject.for_all_cuts(corner, lambda case: subject.agrees_on_ranks(case, ALL), BALANCED, share=0.6)


@sharded_rule(
    "VP-8",
    Level.MUST,
    "support and response ids are global, each found on the shard that owns it and nowhere else: whole supports on one "
    "shard, none on another, the first and last id of each",
    source="ms-swift#9947; Megatron-LM#7452 items 1 and 3",
    why="an id taken for a local one, or clamped into the shard, reads another token's logit",
    capabilities=LOSSES,
    axes=TP,
    rests_on=("VP-1",),
)
def vp_8(subject: ShardedSubject) -> None:
    def check(case: ShardedCase) -> None:
        for moved in (support_on_one_shard(case), ids_at_edges(case)):
            if moved is not None:
                subject.agrees_on_ranks(moved, ALL)

    corner = ANCHORED.but(support=("few", "one", "many:65"), logits=("normal", "flat"), mass="normal")
    subject.for_all_cuts(corner, check, BALANCED, share=0.5)


@sharded_rule(
    "VP-9",
    Level.MUST,
    "the gradient to the hidden states, which every rank holds, is whole on every rank; that to the head is the "
    "rank's own rows'",
    source="ms-swift#9947; Megatron-LM#673",
    why="a share of the gradient on each rank trains each copy of the adapter on another loss",
    capabilities=(Capability.FUSED,),
    axes=TP,
    rests_on=("VP-1",),
)
def vp_9(subject: ShardedSubject) -> None:
    corner = ANCHORED.but(head=("trainable", "frozen"))
    subject.for_all_cuts(corner, lambda case: subject.agrees_on_ranks(case, GRADIENTS), BALANCED, share=0.5)


@sharded_rule(
    "VP-10",
    Level.MUST,
    "the refresh's log-probs come from the whole vocabulary, equal on every rank, without graph",
    source="verl#3723; NeMo-RL vocab-parallel log-probs",
    why="behaviour log-probs of one shard turn every later ratio into noise",
    capabilities=(Capability.RESPONSE_LOGPROBS,),
    axes=TP,
)
def vp_10(subject: ShardedSubject) -> None:
    heads.judge_logprobs(subject)


@sharded_rule(
    "VP-11",
    Level.MUST,
    "the student's mass on the support, and the floor below it, are those of the whole vocabulary",
    source="spec GJS-8, over shards; FU-1 of the public list: Liger-Kernel#1082, trl#5031",
    why="a support renormalised shard by shard, or a floor applied to a shard's share of the mass",
    capabilities=LOSSES,
    axes=TP,
    rests_on=("VP-1", "VP-3", "VP-8"),
)
def vp_11(subject: ShardedSubject) -> None:
    corner = SMALL.but(
        mass=("shifted", "student_floor", "teacher_floor"), alpha=("half", "inside"), support=("few", "many:65")
    )
    subject.for_all_cuts(corner, lambda case: subject.agrees_on_ranks(case, ALL), BALANCED, share=0.5)
