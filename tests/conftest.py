"""What all tests share: one thread each, and the families at the widths that laws are checked for."""

import pytest
import torch

import einlinear as el

WIDTHS = [(16, 16), (36, 64), (64, 36), (97, 131)]
"""Square, wide, tall, and prime widths that need padding."""


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
