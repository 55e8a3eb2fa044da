"""cases/loss: the manifest follows its schema and the tensors follow the manifest."""

from __future__ import annotations

import json

import jsonschema
import torch

from sdpo_conformance.specs.claas.loss_case import recorded_cases, vectors_directory


def test_manifest_follows_its_schema() -> None:
    folder = vectors_directory()
    schema = json.loads((folder / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads((folder / "manifest.json").read_text()), schema)


def test_shapes_and_dtypes() -> None:
    names = set()
    for case, recorded in recorded_cases():
        names.add(case.name)
        fields = case.loss_input
        b, t, v = fields.student_logits.shape
        k = fields.teacher_indices.shape[-1]
        assert fields.student_logits.dtype == torch.float64
        assert recorded["gradient"].shape == (b, t, v)
        assert fields.teacher_logprobs.shape == fields.teacher_indices.shape == (b, t, k)
        for name in ("base_logprobs", "response_mask", "old_student_logprobs", "response_ids"):
            assert getattr(fields, name).shape == (b, t)
        assert int(fields.teacher_indices.max()) < v
        assert all(len(set(row.tolist())) == k for row in fields.teacher_indices.reshape(-1, k))
    assert len(names) == 45


def test_fused_form_is_exact() -> None:
    for case, _ in recorded_cases():
        fused = case.to_fused()
        product = fused.loss_input.student_hidden @ fused.loss_input.lm_head_weight.T
        assert torch.equal(product, case.loss_input.student_logits)
        assert float(fused.truth.loss) == float(case.truth.loss)


def test_save_and_load(tmp_path) -> None:
    from sdpo_conformance.specs.claas.loss_case import LossCase

    case = next(iter(recorded_cases()))[0].to_fused()
    case.save(tmp_path / "case.safetensors")
    loaded = LossCase.load(tmp_path / "case.safetensors")
    assert loaded.training == case.training
    assert loaded.fused
    assert all(torch.equal(loaded.tensors()[key], tensor) for key, tensor in case.tensors().items())
