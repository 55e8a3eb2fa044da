"""A launch is repeated only where Triton itself would take the same compiled form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

launching = pytest.importorskip("sdpo_implementations.triton_fused.launching")

import triton.language as tl  # noqa: E402
from triton.runtime import jit  # noqa: E402

specialised_by_triton = getattr(jit, "native_specialize_impl", None)

ALIGNED = torch.zeros(64)
VALUES: tuple[Any, ...] = (
    ALIGNED, ALIGNED[1:], ALIGNED.bfloat16(), ALIGNED.bfloat16()[1:], ALIGNED.to(torch.int64), ALIGNED.to(torch.int32),
    0, 1, 2, 16, 17, 32, 2**31 - 1, 2**31, 2**33, -1, -(2**31) - 1, 1.0, 0.5, None, True, False,
)  # fmt: skip


def kernel(plain, unaligned, unspecialised, COUNT: tl.constexpr, FLAG: tl.constexpr):  # type: ignore[no-untyped-def]
    pass


class Compiled:
    """What a first launch leaves: it notes the arguments of every further one."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.launches.append(arguments)


class Recorded:
    """In the place of a kernel: its parameters, and what it was asked to launch."""

    __name__ = "kernel"

    def __init__(self) -> None:
        options = {"do_not_specialize": ["unspecialised"], "do_not_specialize_on_alignment": ["unaligned"]}
        self.params = jit.JITFunction(kernel, **options).params
        self.forms: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Compiled:
            self.forms.append(Compiled())
            return self.forms[-1]

        return launch


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The hooks that a profiler sets, on a machine whose current device is 0 and whose current stream is 7."""
    calls: list[Any] = []
    active = SimpleNamespace(get_current_stream=lambda device: 7)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        launching,
        "triton",
        SimpleNamespace(
            knobs=SimpleNamespace(runtime=SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=calls))),
            runtime=SimpleNamespace(driver=SimpleNamespace(active=active)),
        ),
    )
    return calls


@pytest.mark.skipif(specialised_by_triton is None, reason="before Triton 3.5 no launch is repeated")
@given(st.sampled_from(VALUES), st.sampled_from(VALUES), st.integers(0, 2))
def test_a_key_tells_apart_what_triton_tells_apart(one: Any, other: Any, place: int) -> None:
    repeated = launching.RepeatedLaunch(Recorded())
    parameter = repeated.kernel.params[place]

    def forms(value: Any) -> tuple[Any, Any]:
        arguments = [ALIGNED, ALIGNED, 5]
        arguments[place] = value
        specialise, align = not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment
        theirs = specialised_by_triton(jit.BaseBackend, value, False, specialise, align)
        return repeated._key(0, tuple(arguments), {"COUNT": 1}), theirs

    (our_one, their_one), (our_other, their_other) = forms(one), forms(other)
    assert our_one != our_other or their_one == their_other


def test_a_form_seen_before_is_launched_with_all_arguments(hooks: list[Any]) -> None:
    recorded = Recorded()
    repeated = launching.RepeatedLaunch(recorded)
    for count in (3, 4):
        for unspecialised in (5, 6):
            repeated[(2, unspecialised)](ALIGNED, ALIGNED, unspecialised, FLAG=True, COUNT=count, num_warps=4)
    assert [form.launches for form in recorded.forms] == [
        [(2, 6, 1, 7, "function", "metadata", None, None, None, ALIGNED, ALIGNED, 6, count, True)] for count in (3, 4)
    ]


def test_options_and_devices_make_forms_of_their_own(hooks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded()
    repeated = launching.RepeatedLaunch(recorded)
    for device in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        for warps in (4, 8):
            repeated[(1,)](ALIGNED, ALIGNED, 5, COUNT=1, FLAG=True, num_warps=warps)
    assert len(recorded.forms) == 4


def test_under_a_profiler_triton_launches(hooks: list[Any]) -> None:
    recorded = Recorded()
    repeated = launching.RepeatedLaunch(recorded)
    hooks.append(print)
    for _ in range(2):
        repeated[(1,)](ALIGNED, ALIGNED, 5, COUNT=1, FLAG=True)
    assert len(recorded.forms) == 2


def test_constants_come_last() -> None:
    recorded = Recorded()
    recorded.params = recorded.params[::-1]
    with pytest.raises(TypeError, match="after the others"):
        launching.RepeatedLaunch(recorded)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_another_alignment_takes_another_form() -> None:
    from sdpo_implementations.triton_fused import compute_response_logprobs

    generator = torch.Generator("cuda").manual_seed(0)
    head = torch.randn(700, 64, device="cuda", generator=generator)
    ids = torch.arange(6, device="cuda").view(1, 6)
    storage = torch.randn(6 * 64 + 1, device="cuda", generator=generator)
    for start in (0, 1, 0, 1):
        hidden = storage[start : start + 6 * 64].view(1, 6, 64)
        expected = torch.log_softmax(hidden.double() @ head.double().T, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        found = compute_response_logprobs(hidden, head, ids)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
