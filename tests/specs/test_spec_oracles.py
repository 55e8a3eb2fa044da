"""The oracles of the specs beside CLaaS: all recordings, refusals, finite differences, extended precision."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import mpmath
import pytest
import torch

from sdpo_conformance.inputs.choices import SeededSource
from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.shared.oracle.categories import divergence, slope, to_support, with_tail
from sdpo_conformance.specs.shared.parts_of import recordings_folder
from sdpo_conformance.specs.shared.recordings import Recording, recordings
from sdpo_conformance.specs.verl_topk.loss_input import VerlTopKLossInput, VerlTopKTraining
from sdpo_conformance.specs.verl_topk.oracle import verl_topk_loss

NAMES = ("lasgroup", "trl", "ms-swift", "verl-topk")
COUNTS = {"lasgroup": (61, 11, 2), "trl": (54, 7, 4), "ms-swift": (46, 4, 1), "verl-topk": (43, 4, 1)}


def kind_of(name: str) -> Any:
    return importlib.import_module(f"{find_spec(name).package}.case").KIND


def inputs(name: str) -> Iterator[tuple[Recording, Any]]:
    """Every recording with its input."""
    kind = kind_of(name)
    for one in recordings(recordings_folder(find_spec(name))):
        yield one, kind.input(training=kind.training(**one.config), **one.inputs)


ROUNDING = 1e-15
"""What float64 leaves of terms of size 1 that cancel: a divergence of 1e-11 is a difference of such terms."""


def alike(got: float, expected: float) -> bool:
    """Equal to 1e-9, or to the rounding of the terms; NaN to NaN."""
    if math.isnan(got) or math.isnan(expected):
        return math.isnan(got) and math.isnan(expected)
    return got == expected or abs(got - expected) <= 1e-9 * abs(expected) + ROUNDING


@pytest.mark.parametrize("name", NAMES)
def test_recordings(name: str) -> None:
    oracle, seen = kind_of(name).oracle, {"cases": 0, "nonfinite": 0, "raises": 0}
    for one, loss_input in inputs(name):
        seen[one.group] += 1
        if one.group == "raises":
            with pytest.raises(ValueError):
                oracle(loss_input, True)
            continue
        truth = oracle(loss_input, True)
        numbers = {"loss": truth.loss, **truth.metrics}
        for key, expected in one.expected.items():
            if key != "loss_as_shipped":
                assert alike(float(numbers[key]), expected), (one.name, key)
        recorded, got = one.results["grad_student_logits"], truth.grad_logits
        finite = torch.isfinite(recorded)
        assert torch.equal(finite, torch.isfinite(got)), one.name
        size = torch.where(finite, recorded, 0.0).abs().amax((1, 2), keepdim=True)
        assert bool(((torch.where(finite, recorded - got, 0.0)).abs() <= 1e-9 * size + ROUNDING).all()), one.name
        if "rollout_is_weights" in one.results:
            assert torch.allclose(one.results["rollout_is_weights"], truth.aside["rollout_is_weights"], rtol=1e-9)
    assert tuple(seen.values()) == COUNTS[name]


@pytest.mark.parametrize("name", NAMES)
def test_manifest_follows_its_schema(name: str) -> None:
    folder = recordings_folder(find_spec(name))
    schema = json.loads((folder / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads((folder / "manifest.json").read_text()), schema)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_agrees(name: str) -> None:
    module = importlib.import_module(find_spec(name).bundled["reference"])
    oracle = kind_of(name).oracle
    for one, loss_input in inputs(name):
        if one.group != "cases":
            continue
        leaf = loss_input.student_logits.clone().requires_grad_()
        loss = module.compute_sdpo_loss(replace(loss_input, student_logits=leaf))["loss"]
        (gradient,) = torch.autograd.grad(loss, [leaf])
        truth = oracle(loss_input)
        assert torch.allclose(loss.detach(), truth.loss, rtol=1e-9, atol=1e-15), one.name
        assert torch.allclose(gradient, truth.grad_logits, rtol=1e-7, atol=1e-12), one.name


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_derivative(name: str) -> None:
    """Central differences along random directions, where no switch is near and nothing is detached."""
    spec, case_module = find_spec(name), importlib.import_module(f"{find_spec(name).package}.case")
    corners = importlib.import_module(f"{spec.package}.corners")
    generator = torch.Generator().manual_seed(3)
    for number in range(12):
        corner = corners.NEUTRAL.but(
            logits="normal", size="small", **({"mode": ("tail", "whole")} if name in ("lasgroup", "trl") else {})
        )
        case = case_module.build(SeededSource(f"{number}"), corner, [torch.float64])
        case = case.with_training(**{"is_clip": None} if name == "lasgroup" else {})
        if name == "trl":
            case = case.with_training(distillation_is_clip=None)
        oracle, logits = kind_of(name).oracle, case.loss_input.student_logits
        direction = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        step = 1e-6
        ends = [oracle(replace(case.loss_input, student_logits=logits + s * step * direction)).loss for s in (1, -1)]
        slope_of = float((case.truth.grad_logits * direction).sum())
        assert float(ends[0] - ends[1]) / (2 * step) == pytest.approx(slope_of, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mass", [0.3, 3e-7, 3e-8])
def test_tail_in_extended_precision(alpha: float, mass: float) -> None:
    """Divergence with a tail, its clamp open and closed, and its derivative by the log-probs at the support."""
    mpmath.mp.dps = 40
    support = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    a = (support * (1 - mass)).log().view(1, 1, 3)
    b = (torch.tensor([0.2, 0.5, 0.1], dtype=torch.float64)).log().view(1, 1, 3)

    def exact(logs: Any) -> Any:
        def tailed(values: Any) -> list[Any]:
            total = mpmath.log(sum(mpmath.e**value for value in values))
            total = min(total, mpmath.mpf(-1e-7))
            return [mpmath.e**value for value in values] + [-mpmath.expm1(total)]

        q, p = tailed(logs), tailed([mpmath.mpf(float(value)) for value in b.flatten()])
        if alpha == 0:
            return sum(y * mpmath.log(y / x) for x, y in zip(q, p, strict=True))
        if alpha == 1:
            return sum(x * mpmath.log(x / y) for x, y in zip(q, p, strict=True))
        m = [alpha * y + (1 - alpha) * x for x, y in zip(q, p, strict=True)]
        teacher = sum(y * mpmath.log(y / z) for y, z in zip(p, m, strict=True))
        return alpha * teacher + (1 - alpha) * sum(x * mpmath.log(x / z) for x, z in zip(q, m, strict=True))

    logs = [mpmath.mpf(float(value)) for value in a.flatten()]
    q, p = with_tail(a), with_tail(b)
    assert float(divergence(q.log, p.log, alpha)) == pytest.approx(float(exact(logs)), rel=1e-11)
    got = to_support(q, slope(q.log, p.log, alpha), renormalises=False).flatten()
    for index in range(3):
        h = mpmath.mpf(10) ** -14
        ahead, behind = list(logs), list(logs)
        ahead[index] += h
        behind[index] -= h
        assert float(got[index]) == pytest.approx(float((exact(ahead) - exact(behind)) / (2 * h)), rel=1e-6)


def test_an_integer_mask_swallows_the_row_floor_of_verl() -> None:
    """1 + 1e-8 is 1 in float32, to which upstream's sum of an integer mask is promoted."""
    training = VerlTopKTraining(loss_agg_mode="seq-mean-token-mean")
    logits = torch.randn(1, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logprobs, ids = logits.flip(-1).log_softmax(-1).topk(3, dim=-1)
    loss = {}
    for dtype in (torch.int64, torch.float64):
        mask = torch.tensor([[1, 0]]).to(dtype)
        given = VerlTopKLossInput(logits, logprobs, ids, mask, training)
        loss[dtype] = [float(verl_topk_loss(given, published).loss) for published in (False, True)]
    assert loss[torch.float64][0] == loss[torch.float64][1] == loss[torch.int64][0]
    assert loss[torch.int64][1] == pytest.approx(loss[torch.int64][0] * (1 + 1e-8), rel=1e-13)
