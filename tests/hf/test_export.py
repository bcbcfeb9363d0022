"""Structured models outside of Python: torch.export and ONNX, by matmuls alone."""

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import einlinear as el

from .conftest import tiny

BATCH = torch.export.Dim("batch", min=1, max=4096)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A layer of every family, one padded, one with a cap, one without a bias."""
    torch.manual_seed(0)
    layers = [el.Linear(36, 36, family) for family in el.families() if not family(36, 36).routed]
    layers += [el.Linear(36, 37, "monarch(blocks=4)"), el.Linear(37, 36, "btt", bias=False, cap=True)]
    return nn.Sequential(*(nn.Sequential(layer, nn.GELU()) for layer in layers)).eval()


def test_exported_programs_take_any_number_of_tokens_and_need_no_einlinear(model: nn.Module, tmp_path: Path):
    program = torch.export.export(model, (torch.randn(5, 36),), dynamic_shapes=({0: BATCH},))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.bmm.default" in called and not any("einlinear" in name for name in called)
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for tokens in (1, 5, 700):
        x = torch.randn(tokens, 36)
        torch.testing.assert_close(again(x), model(x))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_onnx_is_matmuls_and_computes_the_same(model: nn.Module, tmp_path: Path):
    exported = torch.onnx.export(model, (torch.randn(5, 36),), dynamo=True, dynamic_shapes=({0: BATCH},), verbose=False)
    exported.save(tmp_path / "model.onnx")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert kinds["MatMul"] + kinds["Gemm"] >= sum(len(m.factors) for m in model.modules() if isinstance(m, el.Linear))
    assert "Einsum" not in kinds and {node.domain for node in onnx.load(tmp_path / "model.onnx").graph.node} == {""}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for tokens in (1, 700):
        x = torch.randn(tokens, 36)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_whole_model(tmp_path: Path):
    model = tiny("bert")
    el.convert(model, "btt(rank=2)")
    ids = torch.arange(1, 21).reshape(2, 10)
    program = torch.export.export(model, (ids,), strict=False)
    expected = model(ids)[0]
    torch.testing.assert_close(program.module()(ids)[0], expected)
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "bert.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "bert.onnx")
    (y, *_) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-4, atol=1e-5)
