"""The batch of a timed step, and the operations it cannot do without."""

from __future__ import annotations

import pytest

from sdpo_conformance.bench.steps import PROMPT, STEPS, TEACHER_PROMPT, response_lengths, step_batch, step_flops
from sdpo_conformance.bench.workloads import SAMPLES, Direction, Selection, Workload, plan


@pytest.mark.parametrize("samples", [1, 3, *SAMPLES])
def test_the_responses_share_the_tokens_unevenly(samples: int) -> None:
    work = Workload("laptop", 512 * samples, Direction.STEP, samples=samples)
    lengths = response_lengths(work)
    assert len(lengths) == samples
    assert sum(lengths) == work.tokens
    assert [len(sample.response_token_ids) for sample in step_batch(work)] == lengths
    if samples > 1:
        assert max(lengths) > 3 * min(lengths) or samples == 3
        assert lengths != sorted(lengths)


def test_samples_alone_ask_for_steps() -> None:
    assert [(work.direction, work.samples) for work in plan(Selection(samples=(8, 32)))] == [
        (Direction.STEP, 8),
        (Direction.STEP, 32),
    ]
    assert all(work.samples == 0 for work in plan(Selection()) if work.direction is not Direction.STEP)


def test_the_floor_counts_two_operations_a_weight_and_token() -> None:
    pytest.importorskip("peft")
    from sdpo_conformance.bench.steps import step_model

    work = Workload("laptop", 8, Direction.STEP, dtype="float32", device="cpu", samples=1)
    model = step_model(work)
    layers, attended = 2 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512), 2 * 2 * 4 * 64

    def decoder(tokens: int) -> int:
        return 2 * layers * tokens + attended * tokens**2

    heads = 2 * 256 * 8192 * 8
    student, teacher = decoder(PROMPT + 8), decoder(TEACHER_PROMPT + 8)
    assert step_flops(work, model) == student + teacher + 2 * heads + STEPS * (2 * student + 2 * heads)
