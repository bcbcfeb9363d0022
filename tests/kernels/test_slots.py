"""Grouped contractions as a GPU runs them, by torch's grouped matmul on a CPU, against one matmul for each expert."""

import pytest
import torch
from torch.testing import assert_close

from einlinear.kernels import slots
from einlinear.links import INTO, OUT_OF


@pytest.fixture
def strict(monkeypatch):
    """A grouped matmul that takes what one on a GPU does: few groups, and groups that begin at 16 bytes."""
    real = torch._grouped_mm
    groups = []

    def checked(a, b, *, offs):
        groups.append(len(offs))
        # A group begins where its first row does; along the other dimension that is any multiple of 2 bytes.
        assert a.stride(-1) == 1 if b.ndim == 3 else a.stride(-2) == 1
        assert b.ndim == 3 or b.stride(-1) == 1
        return real(a, b, offs=offs)

    monkeypatch.setattr(torch, "_grouped_mm", checked)
    monkeypatch.setattr(slots, "MOST_GROUPS", 7)
    return groups


@pytest.mark.parametrize("spec", [INTO, OUT_OF, "mb,nb->mn"])
def test_grouped_matmuls_of_a_gpu_are_those_of_each_expert(spec, strict) -> None:
    names, factor, _ = slots._names(spec)
    size = {"m": 21, "b": 8, "k": 8, "n": 16, "a": 8}
    offsets = torch.tensor([0, 3, 3, 21])  # not by multiples of 8, one expert idle
    a = torch.randn([size[n] for n in names]).bfloat16()
    b = torch.randn([3, *(size[n] for n in factor)]).bfloat16()
    expected = slots.grouped(a, b, offsets, spec, 21)
    assert_close(slots._grouped_on_cuda(a, b, offsets, spec, 21), expected, rtol=2e-2, atol=2e-2)
    grad = torch.randn_like(expected)
    wanted = slots.grouped_weight(a, grad, offsets, spec, 21)
    assert_close(slots._grouped_weight_on_cuda(a, grad, offsets, spec, 21), wanted, rtol=2e-2, atol=4e-2)
    assert max(strict) <= 7
