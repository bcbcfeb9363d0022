"""What all tests share: one thread each, and the families at the widths that laws are checked for."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Triton's interpreter runs the GPU kernels without a GPU; it must be asked for before torch imports Triton.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import Module
from torch.testing import assert_close

import einlinear as el

WIDTHS = [(16, 16), (36, 64), (64, 36), (97, 131)]
"""Square, wide, tall, and prime widths that need padding."""

Draw = Callable[..., list[Tensor]]


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    # Two threads on a busy machine run small batched matmuls up to 70 times slower.
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=el.families(), ids=str)
def family(request: pytest.FixtureRequest) -> el.Family:
    return request.param


@pytest.fixture(params=WIDTHS, ids="{0[0]}to{0[1]}".format)
def widths(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


@pytest.fixture
def structure(family: el.Family, widths: tuple[int, int]) -> el.Structure:
    return family(*widths)


@pytest.fixture(scope="session")
def draw() -> Draw:
    """Draws factors for a structure, one dimension for each axis, at the scale of its initialisation."""

    def factors(structure: el.Structure, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        scales = zip(structure.factor_shapes, el.spectral(structure), strict=True)
        return [torch.randn(shape, dtype=dtype) * scale.std for shape, scale in scales]

    return factors


@pytest.fixture
def factors(structure: el.Structure, draw: Draw) -> list[Tensor]:
    return draw(structure)


@pytest.fixture(scope="session")
def trained() -> Callable[[Module], Module]:
    """Moves every parameter of a module away from the value it starts at, so that none is forgotten unnoticed."""

    def move(module: Module) -> Module:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return module

    return move


@pytest.fixture(params=[{}, {"bias": False}, {"cap": True}, {"zero": True}], ids=str)
def options(request: pytest.FixtureRequest) -> dict[str, bool]:
    """Options of a layer."""
    return request.param


@pytest.fixture
def layer(family: el.Family, widths: tuple[int, int], trained: Callable[[el.Linear], el.Linear]) -> el.Linear:
    return trained(el.Linear(*widths, family))


@pytest.fixture(scope="session")
def named_gradients() -> Callable[[Module, Tensor], dict[str, Tensor]]:
    """The output of a module and the gradients of input and parameters, by name."""

    def gradients(module: Module, x: Tensor) -> dict[str, Tensor]:
        x = x.detach().clone().requires_grad_()
        module.zero_grad()
        y = module(x)
        y.square().sum().backward()
        named = {name.removeprefix("_orig_mod."): p.grad.clone() for name, p in module.named_parameters()}
        return {"output": y.detach(), "x": x.grad, **named}

    return gradients


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """Compares tensors by name, and says which one differs."""

    def compare(found: dict[str, Tensor], wanted: dict[str, Tensor], **tolerance: float) -> None:
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert_close(found[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)

    return compare


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that is handed out uninitialised holds NaN, so a kernel that forgets to write is caught."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A mesh of this process alone, on which tensors can be distributed."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()
