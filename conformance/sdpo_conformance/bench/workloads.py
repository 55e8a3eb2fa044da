"""What is timed: the output heads of models people train, how many tokens, which part of the work.

A ``Workload`` names one table row's task; every implementation gets the same. Heads are (hidden size, vocabulary) of
the models' published configs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Any


class Direction(StrEnum):
    """``FORWARD`` is the loss without graph; ``BOTH`` the loss and its gradient to the hidden states (the head is
    frozen, as under LoRA); ``STEP`` a whole ``distill`` on a model built from its config."""

    FORWARD = "forward"
    BOTH = "forward+backward"
    LOGPROBS = "log-probs"
    TOPK = "top-k"
    STEP = "step"

    @property
    def has_objective(self) -> bool:
        """Whether alpha and the anchor play a part."""
        return self in (Direction.FORWARD, Direction.BOTH, Direction.STEP)


@dataclass(frozen=True)
class Head:
    """Output head of ``model``: weight (``vocabulary``, ``hidden``)."""

    model: str
    hidden: int
    vocabulary: int


HEADS: Mapping[str, Head] = {
    "qwen3-0.6b": Head("Qwen3-0.6B", 1024, 151936),
    "qwen3-8b": Head("Qwen3-8B", 4096, 151936),
    "llama-3.2-1b": Head("Llama-3.2-1B", 2048, 128256),
    "32b": Head("32B class", 5120, 151936),
    "laptop": Head("laptop", 256, 8192),
}
"""Workloads by name; ``laptop`` is no model's: small enough for a CPU."""

TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
QUICK_TOKENS = (64, 128, 256)
TOP_K = 100
SAMPLES = (8, 32)
"""Samples of a step's batch; its response tokens are shared out unevenly."""
ANCHOR = 0.1
"""kl_reg_weight where the anchor is on; any value but 0 costs the same."""


UNIFORM, ZIPF = "uniform", "zipf"
SUPPORTS = (UNIFORM, ZIPF)
"""``uniform``: every id is as likely, so that tokens share ids by chance only. ``zipf``: id v has a prior of
1 / (v + 1), as tokenisers number their tokens by frequency, about."""


def support_name(support: str) -> str:
    """For tables and names: of a file, its name alone."""
    return support if support in SUPPORTS else Path(support).name


@dataclass(frozen=True)
class Workload:
    """``tokens`` response tokens through the head ``workload``; ``anchor`` is kl_reg_weight. ``quick`` asks for fewer
    rounds. ``support``: how teacher supports share ids, one of ``SUPPORTS`` or a file of recorded ones. ``samples``: of
    the batch of a step, which share ``tokens``; 0 elsewhere."""

    workload: str
    tokens: int
    direction: Direction
    alpha: float = 0.5
    anchor: float = 0.0
    dtype: str = "bfloat16"
    device: str = "cuda"
    top_k: int = TOP_K
    quick: bool = False
    support: str = UNIFORM
    samples: int = 0

    @property
    def head(self) -> Head:
        return HEADS[self.workload]

    @property
    def objective(self) -> str:
        """alpha and anchor in words; empty where they play no part."""
        if not self.direction.has_objective:
            return ""
        return f"alpha {self.alpha:g}" + (f", anchor {self.anchor:g}" if self.anchor else "")

    @property
    def task(self) -> str:
        """What is computed, the number of tokens apart: rows with one task make one curve."""
        support = "" if self.support == UNIFORM else f"support {support_name(self.support)}"
        batch = f"{self.samples} samples" if self.samples else ""
        parts = [self.workload, str(self.direction), batch, self.objective, self.dtype, support]
        return " · ".join(part for part in parts if part)

    @property
    def group(self) -> str:
        """What rows must share to be compared."""
        return f"{self.task} · {self.tokens} tokens"

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Workload:
        """The inverse of ``write``."""
        return cls(**{**document, "direction": Direction(document["direction"])})

    def write(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "direction": str(self.direction)}


@dataclass(frozen=True)
class Selection:
    """What a user asked for; empty means the default plan's choice."""

    workloads: Sequence[str] = ()
    tokens: Sequence[int] = ()
    directions: Sequence[str] = ()
    alphas: Sequence[float] = ()
    anchors: Sequence[float] = ()
    dtype: str = ""
    device: str = "cpu"
    quick: bool = False
    support: str = UNIFORM
    samples: Sequence[int] = ()

    @property
    def narrowed(self) -> bool:
        """Whether anything was chosen beyond device, dtype and --quick."""
        return any((self.workloads, self.tokens, self.directions, self.alphas, self.anchors, self.samples))


def plan(selection: Selection) -> list[Workload]:
    """The work to do, most telling first. Names must have been checked (``problems``)."""
    dtype = selection.dtype or ("bfloat16" if selection.device.startswith("cuda") else "float32")

    def work(
        workload: str, tokens: int, direction: Direction, alpha: float = 0.5, anchor: float = 0.0, samples: int = 8
    ) -> Workload:
        if not direction.has_objective:
            alpha, anchor = 0.5, 0.0
        return Workload(
            workload, tokens, direction, alpha, anchor, dtype, selection.device,
            quick=selection.quick, support=selection.support,
            samples=min(samples, tokens) if direction is Direction.STEP else 0,
        )  # fmt: skip

    if selection.narrowed:
        chosen = product(
            selection.workloads or (["laptop"] if selection.quick else ["qwen3-8b"]),
            selection.tokens or ([QUICK_TOKENS[-1]] if selection.quick else [4096]),
            [Direction(name) for name in selection.directions or default_directions(selection)],
            selection.alphas or [0.5],
            selection.anchors or [0.0],
            selection.samples or [SAMPLES[0]],
        )
        return unique(work(*one) for one in chosen)
    return unique(work(*one) for one in (quick_plan() if selection.quick else full_plan()))


def default_directions(selection: Selection) -> list[Direction]:
    """A number of samples is asked of a step alone."""
    return [Direction.STEP if selection.samples else Direction.BOTH]


Choice = tuple[str, int, Direction, float, float] | tuple[str, int, Direction, float, float, int]


def quick_plan() -> Iterator[Choice]:
    """Every direction and every setting, small."""
    largest = QUICK_TOKENS[-1]
    for alpha, anchor in ((0.5, 0.0), (0.5, ANCHOR), (1.0, 0.0), (1.0, ANCHOR)):
        yield "laptop", largest, Direction.BOTH, alpha, anchor
    for tokens in QUICK_TOKENS:
        yield "laptop", tokens, Direction.BOTH, 0.5, 0.0
    for direction in (Direction.FORWARD, Direction.LOGPROBS, Direction.TOPK):
        yield "laptop", largest, direction, 0.5, 0.0
    yield "laptop", QUICK_TOKENS[0], Direction.STEP, 0.5, 0.0


def full_plan() -> Iterator[Choice]:
    """Every setting at 4096 tokens of every head, then the curves over the number of tokens, then a step."""
    heads = [name for name in HEADS if name != "laptop"]
    heads.sort(key=lambda name: name != "qwen3-8b")
    for head in heads:
        for alpha, anchor in ((0.5, 0.0), (0.5, ANCHOR), (1.0, 0.0), (1.0, ANCHOR)):
            yield head, 4096, Direction.BOTH, alpha, anchor
        for direction in (Direction.FORWARD, Direction.LOGPROBS, Direction.TOPK):
            yield head, 4096, direction, 0.5, 0.0
        if head == "qwen3-8b":
            yield from curves(head)
    for head in ("qwen3-0.6b", "qwen3-8b"):
        for samples in SAMPLES:
            yield head, 512 * samples, Direction.STEP, 0.5, 0.0, samples


def curves(head: str) -> Iterator[Choice]:
    """Time and memory against tokens."""
    for tokens in TOKENS:
        yield head, tokens, Direction.BOTH, 0.5, 0.0
    for tokens in TOKENS:
        yield head, tokens, Direction.LOGPROBS, 0.5, 0.0


def unique(works: Iterable[Workload]) -> list[Workload]:
    return list(dict.fromkeys(works))


def problems(selection: Selection) -> tuple[Selection, list[str]]:
    """The selection without what cannot be, and one line for each thing left out."""
    found: list[str] = []

    def keep(values: Sequence[Any], right: Any, words: str) -> list[Any]:
        found.extend(f"{value}: {words}" for value in values if not right(value))
        return [value for value in values if right(value)]

    workloads = keep(selection.workloads, HEADS.__contains__, f"no such workload; workloads: {', '.join(HEADS)}")
    names = [str(direction) for direction in Direction]
    directions = keep(selection.directions, names.__contains__, f"no such direction; directions: {', '.join(names)}")
    tokens = keep(selection.tokens, lambda n: n > 0, "--tokens must be positive")
    alphas = keep(selection.alphas, lambda a: 0 <= a <= 1, "--alpha must lie in [0, 1]")
    anchors = keep(selection.anchors, lambda w: 0 <= w < float("inf"), "--anchor must be a weight of at least 0")
    samples = keep(selection.samples, lambda n: n > 0, "--samples must be positive")
    kept = replace(
        selection,
        workloads=workloads, tokens=tokens, directions=directions, alphas=alphas, anchors=anchors, samples=samples,
    )  # fmt: skip
    asked = (
        *(selection.workloads, selection.tokens, selection.directions),
        *(selection.alphas, selection.anchors, selection.samples),
    )
    left = (workloads, tokens, directions, alphas, anchors, samples)
    nothing = any(before and not after for before, after in zip(asked, left, strict=True))
    return kept, [*found, NOTHING_LEFT] if nothing else found


NOTHING_LEFT = "nothing left to measure"
