"""Whether the ranks of a data-parallel run hold one adapter."""

from __future__ import annotations

from sdpo_conformance.audit.errors import shown
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, Severity, Verdicts

#: What kernels that add in another order leave between ranks, as a part of lora_B's norm.
_ROUNDING = 1e-2
#: Methods in which ranks train apart for a while, or for good.
_APART_ON_PURPOSE = r"diloco|local[-_ ]?sgd|gossip|federat|fedavg|population|ensemble|swarm|post[-_ ]?local"
_SYNCHRONOUS = {"ddp", "data_parallel", "distributed_data_parallel", "dp", "zero1", "zero2"}


def ranks_differ(evidence: Evidence) -> Verdicts:
    """Copies of the whole adapter, one a rank, that are not the same adapter."""
    copies = evidence.rank_copies
    if copies is None or copies.share <= _ROUNDING or evidence.settings.says(_APART_ON_PURPOSE):
        return
    said = evidence.settings.words("strategy", "distributed_type", "parallelism") & _SYNCHRONOUS
    if not said and not copies.whole:
        return  # each may be a shard of one adapter
    yield Finding(
        id="ranks-differ",
        severity=Severity.ERROR if said else Severity.WARNING,
        statement=f"{shown(copies.first)} and {shown(copies.second)} hold other weights: the ranks trained apart",
        evidence=(
            f"every tensor has its full shape in both; elements differ by up to {copies.apart:.3g}",
            f"lora_B differs by {copies.share:.0%} of its norm",
            *(f"the settings say {word}" for word in sorted(said)),
        ),
        cause="gradients are not averaged between the ranks: what is saved is one rank's training on its own part",
        next_step="compare a weight's gradient on two ranks after the backward: they have to be equal",
        data={"apart": copies.apart, "share": copies.share},
    )


CHECKS = (Check("ranks-differ", "ranks of one run that hold other weights", ranks_differ),)
