"""The benchmark's parts: plans, inputs, verdicts on right and wrong answers, comparison, output."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdpo_conformance.bench import bench_judging as judging
from sdpo_conformance.bench import bench_results as results
from sdpo_conformance.bench import comparing, measuring, memory, plots, truth, workloads
from sdpo_conformance.bench.bench_cells import cells_of
from sdpo_conformance.bench.bench_inputs import forget, inputs_of, rotation
from sdpo_conformance.bench.markdown import markdown
from sdpo_conformance.bench.subjects import NotOffered, TimedSubject, bind, load
from sdpo_conformance.bench.supports import recorded_support
from sdpo_conformance.bench.workloads import Direction, Selection, Workload, plan, problems
from sdpo_conformance.judging.implementation import Implementation
from sdpo_conformance.protocol import Capability, Claims
from sdpo_conformance.running.options import RunError

WORK = Workload("tiny", 24, Direction.BOTH, dtype="float32", device="cpu", top_k=10, quick=True)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A head that a test can afford."""
    heads = {**workloads.HEADS, "tiny": workloads.Head("tiny", 16, 300)}
    monkeypatch.setattr(workloads, "HEADS", heads)
    monkeypatch.setattr("sdpo_conformance.bench.bench_inputs.HEADS", heads)
    yield
    forget()
    truth.slice_logits.cache_clear()
    truth.slice_truth.cache_clear()


def work(**changes: Any) -> Workload:
    return Workload(**{**vars(WORK), **changes})


def subject(target: str, work: Workload) -> tuple[Implementation, TimedSubject]:
    implementation = load(target)
    return implementation, bind(implementation, target, work)


def test_full_plan_covers_models_tokens_directions_and_settings() -> None:
    works = plan(Selection(device="cuda"))
    assert {one.workload for one in works} - {"tiny"} == {"qwen3-0.6b", "qwen3-8b", "llama-3.2-1b", "32b"}
    assert {one.direction for one in works} == set(Direction)
    assert {(one.alpha, bool(one.anchor)) for one in works} >= {(0.5, False), (0.5, True), (1.0, False), (1.0, True)}
    assert {one.tokens for one in works} >= {512, 16384}
    assert {one.dtype for one in works} == {"bfloat16"}
    assert len(works) == len(set(works))


def test_selection_is_a_product_and_settings_do_not_multiply_where_they_play_no_part() -> None:
    chosen = Selection(["laptop"], [8, 16], ["log-probs", "forward"], [0.5, 1.0], [0.0, 0.1])
    works = plan(chosen)
    assert len([one for one in works if one.direction is Direction.LOGPROBS]) == 2
    assert len([one for one in works if one.direction is Direction.FORWARD]) == 8


def test_bad_choices_cost_themselves_and_are_named() -> None:
    kept, lines = problems(Selection(["laptop", "gpt5"], [8, -1], ["sideways", "forward"], [2.0, 0.5], [-1.0, 0.0]))
    assert (kept.workloads, kept.tokens, kept.directions) == (["laptop"], [8], ["forward"])
    assert (kept.alphas, kept.anchors) == ([0.5], [0.0])
    assert [line.partition(":")[0] for line in lines] == ["gpt5", "sideways", "-1", "2.0", "-1.0"]
    _, lines = problems(Selection(["gpt5"]))
    assert lines[-1] == workloads.NOTHING_LEFT


def test_compiled_implementations_come_last() -> None:
    cells = cells_of([WORK, work(tokens=8)], ["compile:a", "b"])
    assert [cell.target for cell in cells] == ["b", "b", "compile:a", "compile:a"]
    assert len({cell.name for cell in cells}) == 4


def test_rotation_is_other_memory_with_the_same_tokens() -> None:
    inputs = inputs_of("tiny", 24, 10, "float32", "cpu")
    first, second, *_ = copies = rotation(inputs)
    assert len({one.hidden.data_ptr() for one in copies}) == len(copies)
    assert first.head.data_ptr() != second.head.data_ptr()
    torch.testing.assert_close(second.hidden.roll(-12, 1), first.hidden)
    assert all(one.hidden.requires_grad for one in copies)


def test_inputs_are_what_the_spec_calls_them() -> None:
    inputs = inputs_of("tiny", 24, 10, "float32", "cpu")
    logprobs = (inputs.teacher_hidden @ inputs.head.T).log_softmax(-1)
    torch.testing.assert_close(logprobs.gather(-1, inputs.teacher_indices), inputs.teacher_logprobs)
    student = (inputs.hidden @ inputs.head.T).log_softmax(-1)
    chosen = student.gather(-1, inputs.response_ids.unsqueeze(-1)).squeeze(-1)
    assert 0.1 < float((chosen - inputs.old_student_logprobs).detach().std()) < 1.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("alpha", "anchor"), [(0.5, 0.0), (0.5, 0.1), (1.0, 0.0), (1.0, 0.1)])
def test_reference_is_right(dtype: str, alpha: float, anchor: float) -> None:
    chosen = work(alpha=alpha, anchor=anchor, dtype=dtype)
    verdict = judging.judge(subject("reference", chosen)[1], chosen)
    assert verdict.wrong == ""
    assert verdict.error is not None
    assert verdict.error < (1e-4 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.LOGPROBS, Direction.TOPK])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference_is_right_in_other_directions(direction: Direction, dtype: str) -> None:
    chosen = work(direction=direction, dtype=dtype)
    assert judging.judge(subject("reference", chosen)[1], chosen).wrong == ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_divergence_alone_is_judged_as_a_divergence(dtype: str) -> None:
    from sdpo_implementations import reference

    implementation = Implementation("d", reference, (Capability.DIVERGENCE,), Claims())
    chosen = work(dtype=dtype)
    bound = bind(implementation, "d", chosen)
    assert "no ratio" in bound.other
    assert judging.judge(bound, chosen).wrong == ""
    with pytest.raises(NotOffered):
        bind(implementation, "d", work(alpha=1.0))


class Altered:
    """The reference, its answers changed on the way out."""

    def __init__(self, factor: float = 1.0, shift: int = 0, swap: bool = False) -> None:
        self.factor, self.shift, self.swap = factor, shift, swap

    def compute_fused_sdpo_loss(self, loss_input: Any) -> Any:
        from sdpo_implementations.reference import compute_fused_sdpo_loss

        result = compute_fused_sdpo_loss(loss_input)
        return {**result, "loss": result["loss"] * self.factor}

    def compute_response_logprobs(self, hidden: Any, head: Any, ids: Any) -> Any:
        from sdpo_implementations.reference import compute_response_logprobs

        return compute_response_logprobs(hidden, head, ids.roll(self.shift, 1))

    def compute_teacher_topk(self, hidden: Any, head: Any, k: int) -> Any:
        from sdpo_implementations.reference import compute_teacher_topk

        values, indices = compute_teacher_topk(hidden, head, k + 1)
        return (values[..., 1:], indices[..., 1:]) if self.swap else (values[..., :-1], indices[..., :-1])


@pytest.mark.parametrize(
    ("direction", "altered"),
    [
        (Direction.BOTH, Altered(factor=1.2)),
        (Direction.FORWARD, Altered(factor=1.2)),
        (Direction.BOTH, Altered(factor=math.nan)),
        (Direction.LOGPROBS, Altered(shift=1)),
        (Direction.TOPK, Altered(swap=True)),
    ],
)
def test_a_fast_wrong_answer_is_marked(direction: Direction, altered: Altered) -> None:
    chosen = work(direction=direction)
    offered = (Capability.FUSED, Capability.RESPONSE_LOGPROBS, Capability.TEACHER_TOPK)
    good, bad = Implementation("x", Altered(), offered, Claims()), Implementation("x", altered, offered, Claims())
    assert judging.judge(bind(good, "x", chosen), chosen).wrong == ""
    assert judging.judge(bind(bad, "x", chosen), chosen).wrong


def test_nonconformity_names_the_first_recorded_case() -> None:
    assert judging.nonconformity(load("reference"), Capability.FUSED, "cpu") == ""
    assert judging.nonconformity(load("reference"), Capability.DIVERGENCE, "cpu") == ""
    text = judging.nonconformity(load("defect:dropped-importance-sampling"), Capability.LOSS, "cpu")
    assert "recorded cases wrong" in text
    assert "off_policy" in text


def test_a_gradient_wrong_at_every_third_token_is_seen() -> None:
    true = torch.randn(1, 30, 8, dtype=torch.float64)
    got = true.clone()
    got[:, ::3] *= 1.5
    half, most = truth.token_errors(got, true)
    assert half == 0
    assert most == pytest.approx(0.5)
    assert math.isinf(truth.token_errors(got * math.nan, true)[0])


def test_cpu_peak_counts_what_is_alive_together() -> None:
    def call() -> torch.Tensor:
        first = torch.zeros(2**20)
        second = first + 1
        del first
        return second * 2

    peak = memory.peak_mib(call, "cpu")
    assert peak == pytest.approx(8.0, abs=0.5)


def row_document(target: str = "a", tokens: int = 8, ratio: float = 2.0, **changes: Any) -> dict[str, Any]:
    chosen = Workload("laptop", tokens, Direction.BOTH, dtype="float32", device="cpu")
    record = {
        "target": target,
        "work": chosen.write(),
        "status": "measured",
        "limit_ms": float(tokens),
        "limit_ratio": ratio,
        "limit_ratio_q1": ratio * 0.99,
        "limit_ratio_q3": ratio * 1.01,
        "peak_mib": 10.0,
        "error": 1e-6,
        "error_of": "gradient",
        "wrong": "",
        "nonconforming": "",
        "other": "",
        "remarks": [],
        **changes,
    }
    seconds = ratio * tokens / 1e3
    stats = {"median": seconds, "q1": seconds * 0.98, "q3": seconds * 1.02, "rounds": 9}
    return {"extra_info": {"sdpo": record}, "stats": stats}


def document(*benchmarks: dict[str, Any], unmeasured: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    machine = {"device": "Some GPU", "torch": "2", "packages": {}}
    return {
        "machine_info": machine,
        "benchmarks": list(benchmarks),
        "datetime": "2026-01-01T00:00:00",
        "sdpo_unmeasured": list(unmeasured),
    }


def failed(target: str, tokens: int, status: str = "failed", reason: str = "out of memory") -> dict[str, Any]:
    chosen = Workload("laptop", tokens, Direction.BOTH, dtype="float32", device="cpu")
    return {"target": target, "work": chosen.write(), "status": status, "reason": reason}


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"ratio": 2.0}, {"ratio": 2.5}, "+25%"),
        ({}, {"wrong": "loss off"}, "was right, now loss off"),
        ({}, {"peak_mib": 20.0}, "peak 10 to 20 MiB"),
    ],
)
def test_regressions_are_flagged(before: dict[str, Any], after: dict[str, Any], words: str) -> None:
    (found,) = comparing.changes(document(row_document(**before)), document(row_document(**after)))
    assert found.worse
    assert words in str(found)
    back = comparing.changes(document(row_document(**after)), document(row_document(**before)))
    assert not any(change.worse for change in back)


def test_noise_is_not_flagged() -> None:
    base = document(row_document(ratio=2.0))
    assert comparing.changes(base, document(row_document(ratio=2.08))) == []
    wide = {"limit_ratio_q1": 1.6, "limit_ratio_q3": 2.4}
    assert comparing.changes(document(row_document(**wide)), document(row_document(ratio=2.3))) == []


def test_a_row_that_now_fails_is_a_regression_and_one_cut_by_time_is_not() -> None:
    base = document(row_document())
    (found,) = comparing.changes(base, document(unmeasured=(failed("a", 8),)))
    assert found.worse
    assert "out of memory" in str(found)
    assert comparing.changes(base, document(unmeasured=(failed("a", 8, "not run"),))) == []


def test_another_device_is_no_baseline() -> None:
    other = copy.deepcopy(document())
    other["machine_info"]["device"] = "Another GPU"
    with pytest.raises(RunError, match="not comparable"):
        comparing.comparable(other, document())


@pytest.mark.parametrize(
    "text", ["", "[]", '{"benchmarks": [{"stats": {}}]}', '{"machine_info": {}, "benchmarks": []}']
)
def test_another_file_is_no_baseline(tmp_path: Path, text: str) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(text)
    with pytest.raises(RunError, match=r"baseline\.json"):
        comparing.read_document(path)
    with pytest.raises(RunError, match="cannot read"):
        comparing.read_document(tmp_path / "none.json")


def test_ratio_to_the_first_goes_through_the_limit() -> None:
    rows = results.rows_of(document(row_document("a", ratio=2.0), row_document("b", ratio=3.0)))
    (group,) = results.groups_of(rows, ["b", "a"])
    assert [row.target for row in group.rows] == ["b", "a"]
    assert group.to_first(group.rows[1]) == pytest.approx(2 / 3)
    assert group.limit_ms == 8


def test_markdown_marks_wrong_answers_and_says_why_rows_are_absent() -> None:
    run = document(
        row_document("a"),
        row_document("b", wrong="loss off by 0.2", other="x | y"),
        unmeasured=(failed("c", 8), failed("d", 8, "unavailable", "no module 'd'"), failed("e", 8, "not run", "late")),
    )
    text = markdown(run, ["a", "b", "c", "d", "e"], [])
    assert "b: WRONG ANSWER: loss off by 0.2" in text
    assert "x \\| y" in text
    assert "c: failed: out of memory" in text
    assert "- d: unavailable: no module 'd'" in text
    assert "No change beyond the noise." in text
    assert "| d |" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {8}
    assert "queued" not in rows[0]


def test_a_row_timed_behind_a_full_queue_has_a_column() -> None:
    run = document(row_document("a", queued_ratio=1.125), row_document("b"), unmeasured=(failed("c", 8),))
    header, _, limit, first, second, third = [
        [cell.strip() for cell in line.split("|")]
        for line in markdown(run, ["a", "b", "c"]).splitlines()
        if "|" in line
    ]
    place = header.index("queued")
    assert [row[place] for row in (limit, first, second, third)] == ["1", "1.12", "–", "–"]
    assert {len(row) for row in (limit, first, second, third)} == {len(header)}


class Clock:
    """An event whose time is the number of events and calls before it."""

    calls = 0

    def __init__(self, enable_timing: bool) -> None:
        self.time = 0

    def record(self) -> None:
        self.time = Clock.calls

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: Clock) -> int:
        return later.time - self.time


def test_behind_a_full_queue_a_call_is_held_to_the_product_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def spend(calls: int) -> None:
        Clock.calls += calls

    limit = SimpleNamespace(run=lambda inputs: spend(2))
    assert measuring.queued_ratio(lambda inputs: spend(3), None, limit, ahead=4) == 1.5
    assert Clock.calls == 4 * 2 + 2 + 3


def test_plots_are_written_where_there_is_a_curve(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = document(*(row_document(target, tokens) for target in ("a", "b") for tokens in (8, 16, 32)))
    written = plots.write_plots(run, ["a", "b"], tmp_path)
    assert sorted(path.suffix for path in written) == [".png", ".png", ".svg", ".svg"]
    svg = next(path for path in written if path.suffix == ".svg" and path.name.startswith("time")).read_text()
    assert "the limit" in svg
    assert "Some GPU" in svg
    assert plots.write_plots(document(row_document()), ["a"], tmp_path) == []
    assert not list(tmp_path.glob(".*"))


def test_plots_show_spread_and_no_line_lies_under_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    noisy = {"limit_ratio_q1": 1.5, "limit_ratio_q3": 2.5}
    rows = [row_document("a", n) for n in (8, 16, 32)] + [row_document("b", n, **noisy) for n in (8, 16, 32)]
    plots.write_plots(document(*rows), ["a", "b"], tmp_path)
    axes = figures[0].axes[0]
    (one, _, (bars,)), (other, _, _) = (container.lines for container in axes.containers)
    assert list(one.get_ydata()) == list(other.get_ydata())
    assert not set(one.get_xdata()) & set(other.get_xdata())
    assert one.get_marker() != other.get_marker()
    assert all(segment[:, 1].tolist() == pytest.approx([1.98, 2.02]) for segment in bars.get_segments())
    written = [text.get_text() for text in axes.texts]
    assert any("b  2×" in text and "noisy, up to ± 25%" in text for text in written)
    assert not any("noisy" in text for text in written if text.startswith("a "))
    assert all(text.get_text() for text in axes.get_yticklabels())
    for figure in figures:
        figure.clf()


@pytest.mark.parametrize(("low", "high"), [(1.0, 7.0), (12.0, 4e4), (1e-3, 1e9), (4.0, 30.0)])
def test_a_logarithmic_axis_has_ticks_to_read(low: float, high: float) -> None:
    assert 3 <= len(plots.ticks(low, high)) <= 14


@pytest.mark.parametrize("heights", [[0.05] * 6, [0.05, 0.1, 0.05, 0.1, 0.1, 0.05]])
def test_labels_do_not_overlap(heights: list[float]) -> None:
    centres = plots.spread_out([0.1, 0.1, 0.11, 0.5, 0.97, 0.99], heights)
    for index in range(5):
        assert centres[index + 1] - centres[index] >= (heights[index] + heights[index + 1]) / 2 - 1e-3
    assert centres[0] - heights[0] / 2 >= -1e-3
    assert centres[-1] + heights[-1] / 2 <= 1 + 1e-3


def test_documents_survive_json() -> None:
    run = document(row_document())
    assert results.rows_of(json.loads(json.dumps(run))) == results.rows_of(run)
    assert Workload.read(json.loads(json.dumps(WORK.write()))) == WORK


def test_zipf_supports_share_ids_and_recorded_ones_are_taken_as_they_are(tmp_path: Path) -> None:
    even = inputs_of("tiny", 24, 10, "float32", "cpu").teacher_indices
    zipf = inputs_of("tiny", 24, 10, "float32", "cpu", "zipf").teacher_indices
    assert zipf.unique().numel() < even.unique().numel()
    recorded = torch.stack([torch.randperm(20)[:12] for _ in range(5)])
    path = tmp_path / "recorded.safetensors"
    save_file({"teacher_indices": recorded}, path)
    inputs = inputs_of("tiny", 24, 10, "float32", "cpu", str(path))
    assert torch.equal(inputs.teacher_indices[0, 5:10], recorded[:, :10])
    at_teacher = (inputs.teacher_hidden @ inputs.head.T).log_softmax(-1)
    assert torch.allclose(inputs.teacher_logprobs, at_teacher.gather(-1, inputs.teacher_indices))
    work = plan(Selection(support=str(path)))[0]
    assert work.task.endswith("support recorded.safetensors")
    assert Workload.read(work.write()) == work


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), "3 ids a row, the work asks for 10"),
        (torch.arange(10).repeat(2, 1) + 10**6, "must lie in"),
        (torch.zeros(2, 10, dtype=torch.int64), "twice in a row"),
        (torch.rand(2, 10), "needs teacher_indices"),
    ],
)
def test_a_file_of_supports_that_cannot_serve(ids: torch.Tensor, says: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.safetensors"
    save_file({"teacher_indices": ids}, path)
    with pytest.raises(ValueError, match=says):
        recorded_support(str(path), 24, 10, 100)
    with pytest.raises(ValueError, match="no such file"):
        recorded_support(str(tmp_path / "absent"), 24, 10, 100)
