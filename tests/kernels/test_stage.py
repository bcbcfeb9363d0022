import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import einlinear as el
from einlinear.kernels.chain import Tiles
from einlinear.kernels.kernel import CUDA_HALF
from einlinear.kernels.stage import Launch, empty_state, launch_forward, padded, stage
from einlinear.links import STAGES as SPECS

pytest.importorskip("triton", reason="Triton is not installed: its interpreter runs these kernels")
pytestmark = pytest.mark.usefixtures("poisoned")

SIZES = [  # tokens, slices, out, in: whole tiles, odd ones, and more tokens than one program takes
    (128, 2, 32, 16),
    (37, 3, 20, 24),
    (1, 2, 16, 9),
    (1100, 1, 16, 16),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_a_stage_is_its_einsum_forward_and_each_gradient(
    spec: str, with_bias: bool, sizes: tuple[int, int, int, int]
) -> None:
    inputs = _inputs(spec, sizes, with_bias)
    y, expected = _stage(*inputs.values(), spec), _reference(spec, *inputs.values())
    _close("y", y, expected)
    direction = torch.randn_like(expected)
    named = {name: value for name, value in inputs.items() if value is not None}
    ours = torch.autograd.grad(y, named.values(), direction.float())
    theirs = torch.autograd.grad(expected, named.values(), direction)
    for name, mine, their in zip(named, ours, theirs, strict=True):
        _close(f"the gradient of {name}", mine, their)


@pytest.mark.parametrize("spec", SPECS)
def test_a_stage_takes_any_strides(spec: str) -> None:
    x, weight, _ = _inputs(spec, (37, 3, 20, 24), False).values()
    spread = x.detach().mT.contiguous().mT.requires_grad_()
    y = _stage(spread, weight, None, spec)
    direction = torch.randn(()).expand_as(y)  # as the gradient of a sum comes: strides of zero
    expected = _reference(spec, x, weight, None)
    _close("y", y, expected)
    ours = torch.autograd.grad(y, (spread, weight), direction)
    theirs = torch.autograd.grad(expected, (x, weight), direction.double())
    for name, mine, their in zip(("x", "weight"), ours, theirs, strict=True):
        _close(f"the gradient of {name}", mine, their)


def test_a_stage_is_a_proper_operator() -> None:
    x, weight, bias = _inputs("mbk,bnk->bnm", (9, 2, 16, 16), True).values()
    torch.library.opcheck(stage, (x, [weight], bias, "mbk,bnk->bnm", 9))


def test_a_gradient_has_a_gradient() -> None:
    spec = SPECS[0]
    inputs = tuple(_inputs(spec, (9, 2, 16, 16), True).values())
    direction = torch.randn_like(_stage(*inputs, spec))

    def penalty(y: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(y, inputs[:2], direction.to(y), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs[:2])

    for mine, their in zip(penalty(_stage(*inputs, spec)), penalty(_reference(spec, *inputs)), strict=True):
        _close("second derivative", mine, their)


@pytest.mark.parametrize("group", [1, 2, 3, 4])
@pytest.mark.parametrize("spec", SPECS[:2])
def test_tiles_in_any_order_are_each_made_once(spec: str, group: int) -> None:
    """Also where a group does not go into the number of tiles."""
    x = torch.randn((64, 3, 16) if spec[0] == "m" else (16, 3, 64), dtype=torch.float16)
    weight = torch.randn(3, 16, 16, dtype=torch.float16)
    y = empty_state(x, weight, spec, 64).fill_(torch.nan)
    launch_forward(x, [weight], None, [y], spec, 64, Launch(tokens=16, group=group))
    assert_close(y, torch.einsum(spec, x, weight), rtol=1e-2, atol=1e-2)


def test_the_ranges_of_tokens_cover_them_all_and_none_is_empty() -> None:
    device = torch.device("cpu")
    for launch in (Launch(), Launch(tokens=64, resident=4)):
        for tokens in (1, 63, 64, 65, 1000, 16384):
            for slices in (1, 3, 64):
                splits, share = launch.splits(tokens, slices, device)
                assert share % launch.tokens == 0
                assert (splits - 1) * share < tokens <= splits * share


@pytest.mark.parametrize("family", [el.BTT(), el.BTT(rank=2), el.Monarch(blocks=2), el.BlockDiagonal(blocks=2)])
def test_the_chain_of_tiles_is_the_reference(family: el.Family) -> None:
    structure = family(256, 256).canonical
    assert Tiles().refuses(structure, CUDA_HALF) is None
    factors = [torch.randn(shape) / shape[-1] ** 0.5 for shape in structure.matrix_shapes]
    x, bias = torch.randn(11, 256), torch.randn(256)
    y = Tiles().prepare(structure)(factors, x, bias)
    _close("y", y, el.apply(structure, [f.double() for f in factors], x.double()) + bias)


def test_what_tiles_cannot_do_is_said() -> None:
    assert "16 bits" in str(Tiles().refuses(el.BTT()(256, 256)))
    assert "blocks" in str(Tiles().refuses(el.LowRank()(256, 256), CUDA_HALF))
    with pytest.raises(ValueError, match="convert"):
        _stage(torch.randn(4, 2, 16), torch.randn(2, 16, 16, dtype=torch.float64), None, SPECS[0])


def _stage(x: Tensor, weight: Tensor, bias: Tensor | None, spec: str) -> Tensor:
    """With as many tokens as `x` has, surplus ones added and taken away."""
    tokens = x.shape[spec.index("m")]
    if spec[2] == "m":
        x = torch.nn.functional.pad(x, (0, padded(tokens) - tokens))
    y = stage(x, [weight], bias, spec, tokens)[0]
    if spec[-1] == "m":
        assert y.shape[-1] == padded(tokens)
        assert bias is not None or not y[..., tokens:].any()
    return y[..., :tokens] if spec[-1] == "m" else y


def _inputs(spec: str, sizes: tuple[int, int, int, int], with_bias: bool) -> dict[str, Tensor | None]:
    size = dict(zip("mbnk", sizes, strict=True))
    x = torch.randn([size[name] for name in spec[:3]], requires_grad=True)
    weight = torch.randn(size["b"], size["n"], size["k"], requires_grad=True)
    bias = torch.randn(size["b"] * size["n"], requires_grad=True) if with_bias else None
    return {"x": x, "weight": weight, "bias": bias}


def _reference(spec: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.einsum(spec, x.double(), weight.double())
    if bias is None:
        return y
    added = bias.double().view(weight.shape[:2])
    return y + (added if spec[-1] == "n" else added[..., None])


def _close(what: str, mine: Tensor, theirs: Tensor) -> None:
    error = (mine.double() - theirs).norm() / theirs.norm()
    assert error < 1e-6, f"{what} differs by {error:.2g}"
