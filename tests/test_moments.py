"""Laws of streamed second moments, and what they refuse."""

import math

import pytest
import torch

import einlinear as el
from einlinear.projection.moments import second_moments


def test_streaming_in_pieces_is_the_whole():
    x = torch.randn(7, 40, 12) * torch.logspace(0, 2, 12)
    whole = el.Moments(12).update(x)
    pieces = el.Moments(12)
    for piece in x:
        pieces.update(piece[:17]).update(piece[17:])
    exact = x.double().reshape(-1, 12)
    torch.testing.assert_close(whole.matrix, exact.mT @ exact / 280, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pieces.matrix, whole.matrix, rtol=1e-9, atol=1e-9)
    assert whole.tokens == pieces.tokens == 280
    torch.testing.assert_close(whole.importance, exact.square().mean(0).sqrt())


def test_many_small_updates_keep_their_digits():
    """A float32 sum of a million equal terms would be off in the third digit."""
    moments = el.Moments(2)
    row = torch.full((1000, 2), 0.1)
    for _ in range(1000):
        moments.update(row)
    torch.testing.assert_close(moments.matrix, row[:1].double().mT @ row[:1].double(), rtol=1e-12, atol=0)


def test_the_weighted_error_is_that_of_the_outputs():
    x, weight = torch.randn(300, 24, dtype=torch.float64) @ torch.randn(24, 24).double(), torch.randn(16, 24).double()
    structure = el.BTT()(24, 16)
    curve = el.error_curve(weight, [el.BTT()], el.Moments(24).update(x))
    found = el.project(weight, structure, el.Moments(24).update(x), sweeps=3)
    lost = (x @ (weight - el.dense(structure, found)).mT).square().sum(-1).mean()
    assert curve.points[0].error == pytest.approx(float(lost))
    assert curve.total == pytest.approx(float((x @ weight.mT).square().sum(-1).mean()))


def test_what_is_no_calibration_is_refused_in_a_sentence():
    moments = el.Moments(4)
    with pytest.raises(el.StructureError, match="zero calibration tokens"):
        el.project(torch.randn(4, 4), el.LowRank(2)(4, 4), moments)
    with pytest.raises(el.StructureError, match="zero calibration tokens"):
        moments.update(torch.randn(0, 4)).importance  # noqa: B018
    with pytest.raises(el.StructureError, match=r"shape \(2, 3\).*d_in = 4"):
        moments.update(torch.randn(2, 3))
    with pytest.raises(el.StructureError, match="not finite"):
        moments.update(torch.full((2, 4), math.nan))
    assert moments.tokens == 0
    good = torch.eye(4)
    skew = good.clone()
    skew[0, 1] = 1
    cases = [
        (torch.eye(3), r"shape \(3, 3\).*4 inputs"),
        (good * math.inf, "not finite"),
        (0 * good, "all zero"),
        (skew, "not symmetric"),
        (good - 1.5, "not positive semi-definite"),
    ]
    for matrix, why in cases:
        for call in (
            lambda matrix: el.project(torch.randn(4, 4), el.BTT()(4, 4), matrix),
            lambda matrix: el.cur(torch.randn(4, 4), 2, matrix),
            lambda matrix: el.error_curve(torch.randn(4, 4), [el.LowRank(1)], matrix),
        ):
            with pytest.raises(el.StructureError, match=why):
                call(matrix)
    rounded = (torch.randn(2, 4).mT @ torch.randn(2, 4)).float()
    rounded = (rounded @ rounded.mT).float()  # rank 2, indefinite by rounding alone
    assert second_moments(rounded, torch.randn(3, 4)).dtype == torch.float64
