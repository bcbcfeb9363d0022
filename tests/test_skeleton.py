"""Laws of CUR: real columns and rows, the best matrix between, no worse than its theory."""

import pytest
import torch

import einlinear as el


@pytest.fixture
def weight():
    decay = torch.logspace(0, -3, 20, dtype=torch.float64)
    return (torch.randn(30, 20, dtype=torch.float64) * decay) @ torch.randn(20, 40, dtype=torch.float64)


def test_columns_and_rows_are_those_of_the_weight(weight):
    found = el.cur(weight, 6)
    rows, _, columns = found.factors
    torch.testing.assert_close(columns, weight[:, found.columns])
    torch.testing.assert_close(rows, weight[found.rows])
    assert len({*found.columns.tolist()}) == len({*found.rows.tolist()}) == 6
    x = torch.randn(3, 40, dtype=torch.float64)
    made = el.apply(found.structure, found.factors, x)
    torch.testing.assert_close(made, x @ (found.factors[2] @ found.factors[1] @ found.factors[0]).mT)


@pytest.mark.parametrize("rank", [2, 5, 10])
@pytest.mark.parametrize("aware", [False, True])
def test_the_middle_is_the_best_there_is(weight, rank, aware):
    gram = el.Moments(40).update(torch.randn(200, 40) * torch.logspace(0, 1, 40)) if aware else None
    found = el.cur(weight, rank, gram)
    rows, middle, columns = (factor.clone().requires_grad_(k == 1) for k, factor in enumerate(found.factors))
    rest = weight - columns @ middle @ rows
    (rest * (rest if gram is None else rest @ gram.matrix)).sum().backward()
    assert middle.grad.norm() < 1e-8 * weight.square().sum() ** 1.5 * (1 if gram is None else gram.matrix.norm())


def test_a_matrix_of_the_rank_is_recovered(weight):
    u, s, vh = torch.linalg.svd(weight)
    member = (u[:, :7] * s[:7]) @ vh[:7]
    found = el.cur(member, 7)
    torch.testing.assert_close(el.dense(found.structure, found.factors), member)


def test_chosen_ones_beat_any(weight):
    """Within a small factor of the truncated SVD, far below columns and rows drawn by chance."""
    found = el.cur(weight, 8)
    error = (weight - el.dense(found.structure, found.factors)).norm()
    assert error < 4 * torch.linalg.svdvals(weight)[8:].norm()
    drawn = []
    for _ in range(20):
        c, r = weight[:, torch.randperm(40)[:8]], weight[torch.randperm(30)[:8]]
        drawn.append((weight - c @ torch.linalg.pinv(c) @ weight @ torch.linalg.pinv(r) @ r).norm())
    assert error < torch.stack(drawn).median()


def test_points_follow_the_definition_of_interpolation():
    """DEIM, step by step: where the next vector differs most from its interpolation at the points so far."""
    weight = torch.randn(20, 15, dtype=torch.float64)
    u = torch.linalg.svd(weight)[0][:, :6]
    points = [int(u[:, 0].abs().argmax())]
    for k in range(1, 6):
        known = u[:, :k]
        residual = u[:, k] - known @ torch.linalg.solve(known[points], u[points, k])
        points.append(int(residual.abs().argmax()))
    assert el.cur(weight, 6).rows.tolist() == points


def test_moments_move_the_columns_to_what_is_used():
    weight = torch.randn(30, 40, dtype=torch.float64)
    used = torch.randperm(40)[:10]
    scale = torch.full((40,), 0.01)
    scale[used] = 1
    found = el.cur(weight, 8, el.Moments(40).update(torch.randn(500, 40) * scale))
    assert {*found.columns.tolist()} <= {*used.tolist()}


def test_what_has_no_room_is_refused(weight):
    for rank in (0, 31):
        with pytest.raises(el.StructureError, match=f"cannot take {rank} columns"):
            el.cur(weight, rank)
    with pytest.raises(el.StructureError, match="not finite"):
        el.cur(weight / 0, 3)
