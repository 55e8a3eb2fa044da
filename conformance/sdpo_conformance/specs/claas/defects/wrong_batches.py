"""Ways to get the step loop wrong: which samples count, how micro-batches add up, what is kept by which key."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from sdpo_conformance.specs.claas.defects import step_loop_variants as right
from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.defects.parameter import logarithmic, whole_numbers
from sdpo_conformance.specs.claas.defects.step_loop_variants import Prepared, Run, TrainerParts, trainer
from sdpo_conformance.specs.claas.defects.wrong_forwards import attention, is_double
from sdpo_conformance.specs.claas.defects.wrong_samples import (
    KEEP_WITH,
    MEAN,
    added,
    alone,
    clipped_alone,
    gathered,
    handed_round,
    numbered,
    weighed,
    zero_padded,
)
from sdpo_conformance.specs.claas.defects.wrong_trainer import ADAPTER_OFF, ONE_SAMPLE, STEP_ONE, fitted, loop

MICRO_BATCHES = (2, 3, 4, 5, 6, 8, 10, 12, 16)
"""Sizes of a micro-batch that are tried."""

LENGTHS = (4, 5, 6, 8, 10, 12, 14, 15, 16, 18, 20, 24, 30, 32, 48, 50, 64, 80, 100, 128, 200, 256, 512, 1024)
"""Limits of a length in tokens that are tried."""

CHUNKS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 64, 128, 256)
"""Sizes of a chunk of tokens that are tried."""

ONE_MEAN = "Sum over chunks, and divide by the number of tokens once."
EVERY_SAMPLE = "Every sample counts: the mean is over all that were given."

Key = Callable[[Prepared], Hashable]
Order = Callable[[Run], Sequence[int]]

# --- micro-batches ---


def micro_batches(items: Sequence[int], size: float) -> list[Sequence[int]]:
    """The items in order, ``size`` at a time."""
    return [items[at : at + int(size)] for at in range(0, len(items), int(size))]


def means_of(size: float, over_tokens: bool, of_means: bool) -> Callable[[list[int]], list[float]]:
    """Each sample's share where micro-batches have a mean each, over samples or over tokens, and the means are
    averaged or added."""

    def shares(lengths: list[int]) -> list[float]:
        parts = micro_batches(lengths, size)
        count = len(parts) if of_means else 1
        return [(n / sum(part) if over_tokens else 1 / len(part)) / count for part in parts for n in part]

    return shares


def whole_batches(size: float, at_share: bool) -> Callable[[Run], Tensor]:
    """The samples of an incomplete last micro-batch are lost, from the divisor too or not (``at_share``)."""

    def kept(run: Run) -> Sequence[int]:
        return range(len(run.batch) // int(size) * int(size)) or range(len(run.batch))

    return counting(kept, at_share)


def clipped_on_the_way(size: float) -> Callable[[Run, list[list[Tensor]]], list[Tensor]]:
    """What has been accumulated is clipped after every micro-batch."""

    def combine(run: Run, each: list[list[Tensor]]) -> list[Tensor]:
        total: list[Tensor] = []
        for part in micro_batches(range(len(each)), size):
            mean = [g / len(each) for g in added([each[index] for index in part])]
            total = clipped_alone(run, added([total, mean]) if total else mean)
        return total

    return combine


def sum_clipped(run: Run, each: list[list[Tensor]]) -> list[Tensor]:
    """The samples' gradients are added, clipped, and only then divided by their number."""
    return [g / len(each) for g in clipped_alone(run, added(each))]


def chunk_sizes(length: int, size: float) -> list[int]:
    """Tokens of each chunk of a response."""
    return [len(part) for part in micro_batches(range(length), size)]


def by_chunks(size: float) -> Callable[[Run, Prepared], Tensor]:
    """Tokens weigh as in the mean over chunks of their means: those of an incomplete last chunk for more."""

    def mask(run: Run, one: Prepared) -> Tensor:
        sizes = chunk_sizes(one.response.shape[1], size)
        weights = [sum(sizes) / len(sizes) / tokens for tokens in sizes for _ in range(tokens)]
        return torch.tensor([weights], device=one.response.device)

    return mask


def times_chunks(size: float) -> Callable[[list[int]], list[float]]:
    """Each sample counts as often as it has chunks."""
    return lambda lengths: [len(chunk_sizes(n, size)) / len(lengths) for n in lengths]


def whole_chunks(size: float) -> Callable[[Run, Prepared], Tensor]:
    """Tokens of an incomplete last chunk do not count, unless there are no others."""

    def mask(run: Run, one: Prepared) -> Tensor:
        counted = right.mask(run, one)
        whole = counted.shape[1] // int(size) * int(size)
        if whole:
            counted[:, whole:] = 0
        return counted

    return mask


# --- which samples count ---


def counting(kept: Order, at_share: bool = False) -> Callable[[Run], Tensor]:
    """The mean over the samples at these places, or with ``at_share`` their part of the mean over all; the metrics are
    theirs."""

    def reduce(run: Run) -> Tensor:
        everything = len(run.losses)
        chosen = list(kept(run))
        if not chosen:
            return 0 * torch.stack(run.losses).sum()
        losses, run.results = [run.losses[index] for index in chosen], [run.results[index] for index in chosen]
        return torch.stack(losses).sum() / (everything if at_share else len(chosen))

    return reduce


def stretch(run: Run) -> Sequence[int]:
    """The samples of a step where the batch is split over the steps, from the start again where they are too few."""
    number = -(-len(run.batch) // run.training.steps_per_batch)
    parts = micro_batches(range(len(run.batch)), number)
    return parts[(run.step - 1) % len(parts)]


def half(least: float) -> Order:
    """One half of the batch, the other at the next step, where it has so many samples at least."""

    def order(run: Run) -> Sequence[int]:
        count = len(run.batch)
        if count < least:
            return range(count)
        return range(count // 2) if run.step % 2 else range(count // 2, count)

    return order


def those(wanted: Callable[[Prepared], bool]) -> Order:
    """The places of these samples."""
    return lambda run: [index for index, one in enumerate(run.batch) if wanted(one)]


def ids(row: Tensor) -> tuple[int, ...]:
    """A row's token ids."""
    return tuple(row[0].tolist())


def whole(one: Prepared) -> Hashable:
    """All that a sample came with."""
    recorded = None if one.recorded is None else tuple(one.recorded[0].tolist())
    return ids(one.ids), ids(one.teacher_ids), ids(one.response), recorded


def text(one: Prepared) -> Hashable:
    """All that a sample came with but what the sampler recorded."""
    return ids(one.ids), ids(one.teacher_ids), ids(one.response)


def by_prompt_and_response(one: Prepared) -> Hashable:
    return ids(one.ids), one.response.shape[1]


def by_response(one: Prepared) -> Hashable:
    return ids(one.response)


def by_prompt(one: Prepared) -> Hashable:
    return ids(one.ids)[: -one.response.shape[1]]


def by_prompt_and_length(one: Prepared) -> Hashable:
    return by_prompt(one), one.response.shape[1]


def by_teacher_prompt_and_length(one: Prepared) -> Hashable:
    return ids(one.teacher_ids)[: -one.response.shape[1]], one.response.shape[1]


def alike(key: Key, last: bool) -> Order:
    """For each sample the place of the first, or the last, that has its key."""

    def order(run: Run) -> Sequence[int]:
        places: dict[Hashable, int] = {}
        for index, one in enumerate(run.batch):
            if last or key(one) not in places:
                places[key(one)] = index
        return [places[key(one)] for one in run.batch]

    return order


def once_each(key: Key, last: bool = False) -> Order:
    """The places of one sample of each key."""
    order = alike(key, last)
    return lambda run: sorted(set(order(run)))


# --- what is kept by key, or in another order ---


def behaviour_from(order: Order, recorded: bool, refreshed: bool, padded: bool = False) -> TrainerParts:
    """The behaviour log-probs go by an order: those ``recorded``, those ``refreshed``, or both."""
    fit = zero_padded if padded else fitted

    def before_step(run: Run) -> None:
        if run.step == 1:
            handed_round(run, order(run), fit, as_recorded=True)

    def refresh(run: Run) -> None:
        right.refresh(run)
        handed_round(run, order(run), fit)

    return TrainerParts(
        before_step=before_step if recorded else right.before_step, refresh=refresh if refreshed else right.refresh
    )


def other_sample(run: Run, one: Prepared, order: Order) -> Prepared:
    """The sample at a sample's place in the order."""
    return run.batch[order(run)[next(index for index, other in enumerate(run.batch) if other is one)]]


def teacher_from(order: Order) -> Callable[[Run, Prepared], tuple[Tensor, Tensor]]:
    """The teacher's support is remembered by a key."""
    return lambda run, one: right.teacher(run, other_sample(run, one, order))


def base_from(order: Order) -> Callable[[Run, Prepared], Tensor]:
    """The base's log-probs are remembered by a key."""
    return lambda run, one: right.base(run, other_sample(run, one, order))


def length_of(one: Prepared, total: bool) -> int:
    """Of the response, or with ``total`` of prompt and response."""
    return one.ids.shape[1] if total else one.response.shape[1]


def sorted_by_length(total: bool, longest_first: bool) -> Order:
    """The samples' places in order of length."""

    def order(run: Run) -> Sequence[int]:
        lengths = [length_of(one, total) for one in run.batch]
        return sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=longest_first)

    return order


def inverted(order: Order) -> Order:
    """The order that undoes an order."""

    def inverse(run: Run) -> Sequence[int]:
        places = order(run)
        return sorted(range(len(places)), key=lambda index: places[index])

    return inverse


def into_rows_by(order: Order) -> Callable[[Run], None]:
    """The rows of the behaviour log-probs are in an order, the refresh writes them as the samples were given."""

    def refresh(run: Run) -> None:
        fresh = [right.logprobs(run, one.ids, one.response) for one in run.batch]
        for written, place in zip(fresh, order(run), strict=True):
            one = run.batch[place]
            kept = one.behaviour.to(written.dtype)[:, written.shape[1] :]
            one.behaviour = torch.cat([written[:, : one.response.shape[1]], kept], dim=1)

    return refresh


KEYS: tuple[tuple[str, str, Key], ...] = (
    ("response", "response", by_response),
    ("prompt", "prompt and length", by_prompt_and_length),
    ("prompt-and-response", "prompt and response", by_prompt_and_response),
)


def shared_by_key() -> list[Defect]:
    """Every way in which samples of one key share what is each one's own."""
    found = []
    for name, words, key in KEYS:
        for last in (False, True):
            order, whose = alike(key, last), "last" if last else "first"
            suffix = f"-of-{whose}-with-same-{name}"
            same = f"each sample the log-probs of the {whose} that has its {words}: they are kept by it"
            if name != "prompt-and-response":
                found.append(
                    loop(
                        f"refresh{suffix}",
                        f"The refresh gives {same}.",
                        ("STEP-4", "STEP-2"),
                        KEEP_WITH,
                        trainer(refresh=behaviour_from(order, False, True).refresh),
                        ("huggingface/trl#6191",),
                        ONE_SAMPLE,
                    )
                )
                found.append(
                    loop(
                        f"behaviour{suffix}",
                        f"What the sampler recorded and every refresh: they give {same}.",
                        ("STEP-4", "STEP-1", "STEP-2"),
                        KEEP_WITH,
                        trainer(**changed(behaviour_from(order, True, True))),
                        (),
                        ONE_SAMPLE,
                    )
                )
            found.append(
                loop(
                    f"sampler-logprobs{suffix}",
                    f"What the sampler recorded: it gives {same}.",
                    ("STEP-4", "STEP-1"),
                    KEEP_WITH,
                    trainer(**changed(behaviour_from(order, True, False))),
                    (),
                    ONE_SAMPLE,
                )
            )
    for name, words, key in (
        ("response", "response", by_response),
        ("prompt-and-response", "prompt and response", by_prompt_and_response),
        ("teacher-prompt", "teacher prompt and length", by_teacher_prompt_and_length),
    ):
        for last in (False, True):
            whose = "last" if last else "first"
            found.append(
                loop(
                    f"teacher-of-{whose}-with-same-{name}",
                    f"Each sample gets the teacher's top-k of the {whose} that has its {words}: it is kept by it.",
                    ("STEP-5",),
                    "Keep each sample's teacher top-k with the sample.",
                    trainer(teacher=teacher_from(alike(key, last))),
                    (),
                    ONE_SAMPLE,
                )
            )
    for name, words, key in KEYS[:2]:
        for last in (False, True):
            whose = "last" if last else "first"
            found.append(
                loop(
                    f"base-of-{whose}-with-same-{name}",
                    f"Each sample gets the base's log-probs of the {whose} that has its {words}: they are kept by it.",
                    ("STEP-5",),
                    ADAPTER_OFF,
                    trainer(base=base_from(alike(key, last))),
                    (),
                    ONE_SAMPLE,
                )
            )
    return found


def changed(parts: TrainerParts) -> dict[str, Callable[..., object]]:
    """The parts that are not the right ones, by name."""
    return {name: part for name, part in vars(parts).items() if part is not getattr(TrainerParts, name)}


def twice(order: Order) -> Order:
    """An order taken of what is already in it."""

    def places(run: Run) -> Sequence[int]:
        once = order(run)
        return [once[place] for place in once]

    return places


@torch.no_grad()
def read_past(run: Run, one: Prepared, length: int) -> Tensor:
    """The log-probs (1, length) of a response in a row that is padded on the right with token 0 to the longest of the
    batch: behind its end those of the padding."""
    width = max(other.ids.shape[1] for other in run.batch)
    row = torch.nn.functional.pad(one.ids, (0, width - one.ids.shape[1]))
    seen = torch.nn.functional.pad(torch.ones_like(one.ids), (0, row.shape[1] - one.ids.shape[1]))
    logits = run.model(
        input_ids=row, attention_mask=attention(seen) if is_double(run) else seen, use_cache=False
    ).logits
    places = torch.arange(length, device=row.device) + one.ids.shape[1] - one.response.shape[1] - 1
    scores = logits[:, places.clamp(max=width - 1)].log_softmax(-1)
    token = torch.nn.functional.pad(one.response[:, :length], (0, max(0, length - one.response.shape[1])))
    return scores.gather(-1, token.unsqueeze(-1)).squeeze(-1)


def refresh_from(order: Order) -> Callable[[Run], None]:
    """The refresh gives each sample the log-probs of another, and where these are too few those of its padding."""

    def refresh(run: Run) -> None:
        pairs = list(zip(run.batch, order(run), strict=True))
        fresh = [
            right.logprobs(run, one.ids, one.response)
            if run.batch[place] is one
            else read_past(run, run.batch[place], one.response.shape[1])
            for one, place in pairs
        ]
        for one, log_probs in zip(run.batch, fresh, strict=True):
            one.behaviour = log_probs

    return refresh


def left_sorted() -> list[Defect]:
    """Samples in order of length, their log-probs not, or the other way round."""
    found = []
    for total in (False, True):
        for longest in (True, False):
            order = sorted_by_length(total, longest)
            name = f"{'-by-total' if total else ''}{'-longest-first' if longest else '-shortest-first'}"
            length = "prompt and response" if total else "their responses"
            by = f"by the length of {length}, the {'longest' if longest else 'shortest'} first"
            found.append(
                loop(
                    f"samples-sorted-without-logprobs{name}",
                    f"The samples are sorted {by}, what the sampler recorded is not.",
                    ("STEP-4", "STEP-1"),
                    KEEP_WITH,
                    trainer(**changed(behaviour_from(inverted(order), True, False, padded=True))),
                    (),
                    ONE_SAMPLE,
                )
            )
            for kind, words, places in (
                ("refresh-left-sorted", "are not put back in order", order),
                ("refresh-sorted-twice", "are put back by that order, not by its inverse", twice(order)),
            ):
                zeros = behaviour_from(places, False, True, padded=True).refresh
                for tail, behind, refresh in (
                    ("", "zeros", zeros),
                    ("-padding-read", "the padding's", refresh_from(places)),
                ):
                    found.append(
                        loop(
                            f"{kind}{name}{tail}",
                            f"The refresh reads the samples sorted {by}, and its log-probs {words}; where they are too "
                            f"few, {behind} follow.",
                            ("STEP-4", "STEP-2"),
                            KEEP_WITH,
                            trainer(refresh=refresh),
                            (),
                            ONE_SAMPLE,
                        )
                    )
    return found


DEFECTS = (
    numbered(
        "micro-batch-means",
        "The step's loss is the mean of the means of micro-batches of 2 samples, of which the last may be smaller.",
        ("STEP-7",),
        MEAN,
        "samples",
        lambda size: TrainerParts(reduce=weighed(means_of(size, over_tokens=False, of_means=True))),
        whole_numbers(MICRO_BATCHES),
        2,
        whole=True,
        seen=("huggingface/trl#3138",),
    ),
    numbered(
        "micro-batch-token-means",
        "The step's loss is the mean of the token means of micro-batches of 2 samples.",
        ("STEP-7",),
        MEAN,
        "samples",
        lambda size: TrainerParts(reduce=weighed(means_of(size, over_tokens=True, of_means=True))),
        whole_numbers(MICRO_BATCHES),
        2,
        whole=True,
    ),
    numbered(
        "micro-batch-means-added",
        "The means of micro-batches of 2 samples are added, not averaged.",
        ("STEP-7",),
        MEAN,
        "samples",
        lambda size: TrainerParts(reduce=weighed(means_of(size, over_tokens=False, of_means=False))),
        whole_numbers(MICRO_BATCHES),
        2,
        whole=True,
    ),
    numbered(
        "micro-batch-token-means-added",
        "The token means of micro-batches of 2 samples are added, not averaged.",
        ("STEP-7",),
        MEAN,
        "samples",
        lambda size: TrainerParts(reduce=weighed(means_of(size, over_tokens=True, of_means=False))),
        whole_numbers(MICRO_BATCHES),
        2,
        whole=True,
    ),
    numbered(
        "token-chunk-means",
        "A response's loss is the mean over chunks of 4 tokens of their means, of which the last may be smaller.",
        ("STEP-7", "STEP-1", "STEP-2"),
        ONE_MEAN,
        "tokens",
        lambda size: TrainerParts(mask=by_chunks(size)),
        whole_numbers(CHUNKS),
        4,
        whole=True,
    ),
    numbered(
        "token-chunk-means-added",
        "A response's loss is the sum over chunks of 4 tokens of their means.",
        ("STEP-7", "STEP-1", "STEP-2"),
        ONE_MEAN,
        "tokens",
        lambda size: TrainerParts(mask=by_chunks(size), reduce=weighed(times_chunks(size))),
        whole_numbers(CHUNKS),
        4,
        whole=True,
    ),
    numbered(
        "incomplete-token-chunk-dropped",
        "Responses are read in chunks of 4 tokens, and those of an incomplete last one are left out.",
        ("STEP-7", "STEP-1", "STEP-2"),
        "Every token of the response counts.",
        "tokens",
        lambda size: TrainerParts(mask=whole_chunks(size)),
        whole_numbers(CHUNKS),
        4,
        whole=True,
    ),
    numbered(
        "samples-over-constant",
        "The samples' losses are added and divided by 8, a number of accumulation steps, whatever their number.",
        ("STEP-7",),
        MEAN,
        "constant",
        lambda c: TrainerParts(reduce=weighed(lambda n: [1 / c for _ in n])),
        (*whole_numbers(range(1, 21)), *logarithmic(24, 1024, 10)),
        8.0,
    ),
    numbered(
        "incomplete-micro-batch-dropped",
        "Micro-batches have 2 samples, and those of an incomplete last one are left out.",
        ("STEP-7",),
        EVERY_SAMPLE,
        "samples",
        lambda size: TrainerParts(reduce=whole_batches(size, False)),
        whole_numbers(MICRO_BATCHES),
        2,
        whole=True,
    ),
    numbered(
        "incomplete-micro-batch-lost",
        "Micro-batches have 2 samples, and those of an incomplete last one are left out; the divisor counts them.",
        ("STEP-7",),
        EVERY_SAMPLE,
        "samples",
        lambda size: TrainerParts(reduce=whole_batches(size, True)),
        whole_numbers(MICRO_BATCHES),
        2,
        whole=True,
    ),
    numbered(
        "clip-while-accumulating",
        "The gradient is clipped after every micro-batch, here of 1 sample, so that the first ones count for less.",
        ("STEP-8",),
        "Clip once, when every sample's gradient is in.",
        "samples",
        lambda size: TrainerParts(forward=alone, reduce=gathered(clipped_on_the_way(size))),
        whole_numbers((1, 2, 3, 4)),
        1,
        whole=True,
    ),
    loop(
        "clip-before-mean",
        "The samples' gradients are added and clipped, and divided by their number after that.",
        ("STEP-8",),
        "Clip the mean's gradient.",
        trainer(forward=alone, reduce=gathered(sum_clipped)),
        (),
        ONE_SAMPLE,
    ),
    loop(
        "duplicates-dropped",
        "Samples that are alike in everything count once.",
        ("STEP-7",),
        EVERY_SAMPLE,
        trainer(reduce=counting(once_each(whole))),
        (),
        "Batches in which no sample comes twice.",
    ),
    *(
        loop(
            f"duplicate-texts-dropped{suffix}",
            f"Of samples alike in prompt, response and teacher prompt the {whose} alone counts, whatever was recorded.",
            ("STEP-7",),
            EVERY_SAMPLE,
            trainer(reduce=counting(once_each(text, whose == "last"))),
            (),
            "Batches in which no text comes twice.",
        )
        for whose, suffix in (("first", ""), ("last", "-but-the-last"))
    ),
    numbered(
        "half-of-the-batch-each-step",
        "Odd steps are of the first half of the samples, even steps of the other, where they are 4 or more.",
        ("STEP-7",),
        EVERY_SAMPLE,
        "samples",
        lambda least: TrainerParts(reduce=counting(half(least))),
        whole_numbers((2, 3, 4, 5, 6, 8)),
        4,
        whole=True,
    ),
    *(
        loop(
            f"{whose}-of-same-{name}-alone",
            f"Of the samples with one {words} the {whose} alone counts.",
            ("STEP-7",),
            EVERY_SAMPLE,
            trainer(reduce=counting(once_each(key, whose == "last"))),
            (),
            ONE_SAMPLE,
        )
        for name, words, key in (
            ("prompt-and-response", "prompt and response", by_prompt_and_response),
            ("response", "response", by_response),
            ("prompt", "prompt", by_prompt),
        )
        for whose in ("first", "last")
    ),
    *(
        loop(
            f"refresh-into-rows-{first}-first",
            f"The behaviour log-probs stand in rows with the {first} response first; the refresh writes them in the "
            "order in which the samples were given.",
            ("STEP-4", "STEP-2"),
            "Refresh in the order of the rows.",
            trainer(refresh=into_rows_by(sorted_by_length(total=False, longest_first=first == "longest"))),
            (),
            "Batches in that order.",
        )
        for first in ("longest", "shortest")
    ),
    loop(
        "unrecorded-samples-dropped",
        "Samples of which the sampler recorded nothing are left out.",
        ("STEP-1", "STEP-7"),
        "Recompute their log-probs under the starting policy, or refuse the batch with a ValueError.",
        trainer(reduce=counting(those(lambda one: one.recorded is not None))),
        (),
        "Samples that carry their log-probs.",
    ),
    loop(
        "unrecorded-samples-lost",
        "Samples of which the sampler recorded nothing are left out; the divisor counts them.",
        ("STEP-1", "STEP-7"),
        "Recompute their log-probs under the starting policy, or refuse the batch with a ValueError.",
        trainer(reduce=counting(those(lambda one: one.recorded is not None), at_share=True)),
        (),
        "Samples that carry their log-probs.",
    ),
    loop(
        "samples-without-feedback-dropped",
        "Samples whose teacher prompt is their prompt are left out.",
        ("STEP-7",),
        EVERY_SAMPLE,
        trainer(reduce=counting(those(lambda one: ids(one.ids) != ids(one.teacher_ids)))),
    ),
    numbered(
        "long-responses-dropped",
        "Samples whose response has more than 16 tokens are left out.",
        ("STEP-7",),
        EVERY_SAMPLE,
        "tokens",
        lambda most: TrainerParts(reduce=counting(those(lambda one: one.response.shape[1] <= most))),
        whole_numbers(LENGTHS),
        16,
        whole=True,
    ),
    numbered(
        "long-samples-dropped",
        "Samples of more than 16 tokens, prompt and response, are left out.",
        ("STEP-7",),
        EVERY_SAMPLE,
        "tokens",
        lambda most: TrainerParts(reduce=counting(those(lambda one: one.ids.shape[1] <= most))),
        whole_numbers(LENGTHS),
        16,
        whole=True,
    ),
    numbered(
        "short-responses-dropped",
        "Samples whose response has fewer than 2 tokens are left out.",
        ("STEP-7",),
        EVERY_SAMPLE,
        "tokens",
        lambda least: TrainerParts(reduce=counting(those(lambda one: one.response.shape[1] >= least))),
        whole_numbers((2, 3, 4, 5, 6, 8)),
        2,
        whole=True,
    ),
    numbered(
        "long-responses-lost",
        "Samples whose response has more than 16 tokens are left out; the divisor counts them.",
        ("STEP-7",),
        EVERY_SAMPLE,
        "tokens",
        lambda most: TrainerParts(reduce=counting(those(lambda one: one.response.shape[1] <= most), at_share=True)),
        whole_numbers(LENGTHS),
        16,
        whole=True,
    ),
    numbered(
        "short-responses-lost",
        "Samples whose response has fewer than 2 tokens are left out; the divisor counts them.",
        ("STEP-7",),
        EVERY_SAMPLE,
        "tokens",
        lambda least: TrainerParts(reduce=counting(those(lambda one: one.response.shape[1] >= least), at_share=True)),
        whole_numbers((2, 3, 4, 5, 6, 8)),
        2,
        whole=True,
    ),
    loop(
        "one-sample-each-step",
        "Each step is of one sample, the next after each step.",
        ("STEP-7",),
        EVERY_SAMPLE,
        trainer(reduce=counting(lambda run: [(run.step - 1) % len(run.batch)])),
        (),
        ONE_SAMPLE,
    ),
    loop(
        "every-second-sample-each-step",
        "Odd steps are of the samples at even places, counted from 0, even steps of the others.",
        ("STEP-7",),
        EVERY_SAMPLE,
        trainer(reduce=counting(lambda run: range((run.step - 1) % 2, len(run.batch), 2) or range(len(run.batch)))),
        (),
        ONE_SAMPLE,
    ),
    loop(
        "batch-split-over-steps",
        "The batch is split over the steps: each is of the next stretch of the samples.",
        ("STEP-7",),
        EVERY_SAMPLE,
        trainer(reduce=counting(stretch)),
        (),
        STEP_ONE,
    ),
    *shared_by_key(),
    *left_sorted(),
)
