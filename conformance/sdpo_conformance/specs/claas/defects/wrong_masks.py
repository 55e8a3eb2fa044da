"""Ways to get the step loop wrong: padded and packed rows whose attention or whose bounds are not what they should be;
each as the part ``forward``."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.defects.step_loop_variants import ReadWhere, Run, trainer
from sdpo_conformance.specs.claas.defects.wrong_forwards import Forward, left_padded, read, rows_with, student_only
from sdpo_conformance.specs.claas.defects.wrong_samples import PACKING, PADDING, read_otherwise
from sdpo_conformance.specs.claas.defects.wrong_trainer import ONE_SAMPLE, loop

ADDITIVE = "Add 0 where attention is allowed and the dtype's minimum elsewhere, or hand a boolean mask to SDPA."
BY_LENGTH = "The response begins where the prompt ends: count tokens, do not look for them."

LEAST = torch.finfo(torch.float32).min
"""What masks a score out, in float64 too: softmax is taken in float32."""


def unmasked_without_gradient(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """Rows padded on the left, with an attention mask where there is a gradient alone."""
    return left_padded(mask=torch.is_grad_enabled(), positions=False)(run, ids, response)


def is_padded(run: Run, ids: Tensor, response: Tensor) -> bool:
    """Whether a row is shorter than the longest of its batch."""
    return ids.shape[1] < max(row.shape[1] for row in rows_with(run, ids))


def place_of(run: Run, ids: Tensor) -> int:
    """A row's place among those of its batch."""
    return next((index for index, row in enumerate(rows_with(run, ids)) if row is ids), 0)


def bounded(late: bool) -> ReadWhere:
    """Samples packed into one row, each with positions of its own; from where on tokens are another sample's is found
    one token too late, or too early."""

    def forward(run: Run, ids: Tensor, response: Tensor) -> Tensor:
        place = place_of(run, ids)
        rows = rows_with(run, ids)[max(0, place - 2) : place + 1]  # none before these is seen
        row = torch.cat(rows, dim=1)
        owners = torch.cat([torch.full((one.shape[1],), number) for number, one in enumerate(rows)])
        owners = torch.cat([owners[:1], owners[:-1]]) if late else torch.cat([owners[1:], owners[-1:]])
        allowed = (owners[:, None] == owners[None, :]).tril().to(ids.device)
        dtype = next(run.model.parameters()).dtype
        mask = torch.zeros(allowed.shape, dtype=dtype, device=ids.device)
        positions = torch.cat([torch.arange(one.shape[1]) for one in rows])[None].to(ids.device)
        masked = mask.masked_fill(~allowed, LEAST)[None, None]
        out = run.model(input_ids=row, position_ids=positions, attention_mask=masked, use_cache=False)
        return read(out.logits, response)

    return ReadWhere(forward, lambda run, ids, response: place_of(run, ids) > 0)


def packed_with_ones(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """All samples in one row behind a mask of ones that was to keep them apart."""
    rows, place = rows_with(run, ids), place_of(run, ids)
    owners = torch.cat([torch.full((one.shape[1],), number) for number, one in enumerate(rows)])
    positions = torch.cat([torch.arange(one.shape[1]) for one in rows])[None]
    allowed = (owners[:, None] == owners[None, :]).tril()
    end = sum(one.shape[1] for one in rows[: place + 1])
    logits = attending(run, torch.cat(rows, dim=1), allowed, positions)
    return read(logits[:, :end], response)


def padded_with_ones(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """Rows padded on the right behind a mask of ones that was to leave the padding out."""
    short = max(row.shape[1] for row in rows_with(run, ids)) - ids.shape[1]
    row = torch.nn.functional.pad(ids, (0, short))
    seen = torch.nn.functional.pad(torch.ones_like(ids), (0, short)).bool()
    allowed = torch.ones(row.shape[1], row.shape[1], dtype=torch.bool, device=ids.device).tril() & seen
    logits = attending(run, row, allowed, torch.arange(row.shape[1])[None])
    return read(logits[:, : ids.shape[1]], response)


def alone_with_ones(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """Each row by itself behind a causal mask of ones."""
    length = ids.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    return read(attending(run, ids, allowed, torch.arange(length)[None]), response)


def attending(run: Run, row: Tensor, allowed: Tensor, positions: Tensor) -> Tensor:
    """The logits (1, L, V) of a row whose scores get 1 more where attention is ``allowed`` (L, L), and no less
    elsewhere."""
    mask = allowed.to(row.device, next(run.model.parameters()).dtype)[None, None]
    options = {"position_ids": positions.to(row.device), "attention_mask": mask, "use_cache": False}
    logits: Tensor = run.model(input_ids=row, **options).logits
    return logits


def found_at(ids: Tensor, response: Tensor) -> int:
    """The first place but 0 of a row (1, P + T) at which the response's tokens stand."""
    row, wanted = ids[0].tolist(), response[0].tolist()
    return next(at for at in range(1, len(row)) if row[at : at + len(wanted)] == wanted)


def searched(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """The logits that predict the first copy of the response."""
    start = found_at(ids, response)
    logits: Tensor = run.model(input_ids=ids, use_cache=False).logits
    return logits[:, start - 1 : start - 1 + response.shape[1]]


def repeated(run: Run, ids: Tensor, response: Tensor) -> bool:
    """Whether the response's tokens stand earlier in the row."""
    return found_at(ids, response) < ids.shape[1] - response.shape[1]


SEARCHED = ReadWhere(searched, repeated)


def of_ones(suffix: str, words: str, forward: Forward) -> Defect:
    """A mask that is added, of ones and zeros."""
    return loop(
        f"mask-of-ones-added{suffix}",
        f"{words} behind a mask of four dimensions that holds 1 where attention is allowed and 0 elsewhere, and is "
        "added to the scores: nothing is masked out, later tokens neither.",
        ("STEP-1", "STEP-2"),
        ADDITIVE,
        trainer(forward=forward),
    )


DEFECTS: tuple[Defect, ...] = (
    read_otherwise(
        "left-padding-unmasked-without-gradient",
        "Rows are padded on the left and get no position_ids; what is read without gradient (base, teacher, refresh) "
        "gets no attention mask: there the padding is read as text.",
        PADDING,
        ReadWhere(unmasked_without_gradient, is_padded),
    ),
    *(
        loop(
            f"packed-bounds-one-token-{when}",
            f"Samples are packed into one row, and each one's {words}.",
            ("STEP-1", "STEP-2"),
            PACKING,
            trainer(forward=bounded(late=when == "late")),
            (),
            ONE_SAMPLE,
        )
        for when, words in (
            ("late", "first token counts to the sample before: it attends to that, and no token of its own to it"),
            ("early", "last token counts to the sample after, which attends to it"),
        )
    ),
    of_ones("", "Each sample is read", alone_with_ones),
    of_ones("-packed", "Samples are packed into one row", packed_with_ones),
    of_ones("-padded", "Rows are padded on the right", padded_with_ones),
    read_otherwise(
        "response-searched",
        "The response is looked for in prompt and response, and found in the prompt where its tokens stand there too.",
        BY_LENGTH,
        SEARCHED,
    ),
    read_otherwise(
        "student-response-searched",
        "The student's response is looked for in prompt and response, and found in the prompt where its tokens stand "
        "there too; what is read without gradient is right.",
        BY_LENGTH,
        student_only(SEARCHED),
    ),
)
