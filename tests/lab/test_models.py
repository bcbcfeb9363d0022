"""What the lab's models promise: exact costs, causality, one code path for every structure, muP."""

import math

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import einlinear as el
from einlinear.kernels import plan
from einlinear.kernels.reference import Materialised
from einlinear.lab.data import Examples, Sequences
from einlinear.lab.models import GPT, MLP, Architecture, build, counted, forward_flops, loss
from einlinear.optim import parameter_groups

CONTEXT, VOCABULARY = 12, 11


@pytest.fixture
def sequences() -> Sequences:
    tokens = torch.arange(200) % VOCABULARY
    return Sequences("s", "", "", VOCABULARY, CONTEXT, tokens, tokens, limit=100)


@pytest.fixture
def examples() -> Examples:
    return Examples("e", "", "", 5, 3, "cross-entropy", lambda random, size: None, (torch.ones(2, 5), torch.zeros(2)))


def architecture(family: el.Family | str = "dense", width: int = 48, depth: int = 2, base: int = 16) -> Architecture:
    return Architecture(family=str(family), width=width, depth=depth, base_width=base, base_depth=1, head=8)


def shaken(model: nn.Module) -> nn.Module:
    """With no parameter at zero, so that every part of the model shows in its output."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def test_flops_are_those_torch_counts(
    family: el.Family, sequences: Sequences, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The structure's own FLOPs count: where a planner makes W of so small a layer, it takes more of them and less time.
    monkeypatch.setattr(Materialised, "refuses", lambda *_: "the structure's own FLOPs are counted")
    plan.cache_clear()
    for task, inputs in ((sequences, torch.zeros(3, CONTEXT, dtype=torch.long)), (examples, torch.ones(3, 5))):
        model = build(task, architecture(family))
        # Of the attention kernels only the plain one is counted on a CPU.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(inputs)
        tokens = inputs.numel() if task is sequences else len(inputs)
        assert forward_flops(model).total * tokens == counter.get_total_flops()
    plan.cache_clear()


def test_counting_needs_no_model(family: el.Family, sequences: Sequences) -> None:
    model = build(sequences, architecture(family))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert counted(sequences, architecture(family)) == (parameters, forward_flops(model))


def test_every_layer_between_the_ends_has_the_structure(sequences: Sequences) -> None:
    model = build(sequences, architecture("low_rank(rank=3)"))
    structured = [module for module in model.modules() if isinstance(module, el.Linear)]
    assert len(structured) == 2 * 6
    assert all(layer.structure.sizes["r"] == 3 for layer in structured)
    assert [name for name, module in model.named_modules() if isinstance(module, nn.Linear)] == ["readout"]


def test_the_future_is_not_seen_and_the_past_is(sequences: Sequences) -> None:
    model = shaken(build(sequences, architecture()))
    tokens = torch.randint(VOCABULARY, (1, CONTEXT))
    changed = tokens.clone()
    changed[0, 5] = (tokens[0, 5] + 1) % VOCABULARY
    differs = (model(tokens) - model(changed)).abs().amax(-1)[0] > 1e-6
    assert differs.tolist() == [position >= 5 for position in range(CONTEXT)]


def test_the_order_of_the_past_matters(sequences: Sequences) -> None:
    # With one block, only positions can tell apart two orders of the tokens before the last.
    model = shaken(build(sequences, architecture(depth=1)))
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    assert (model(tokens)[0, -1] - model(tokens[:, [1, 0, 2, 3, 4]])[0, -1]).abs().max() > 1e-4


def test_only_distances_matter(sequences: Sequences) -> None:
    # Rotary positions: what a token sees two places back does not depend on where both stand. The tokens
    # in between and before are equal, so attention from the end sees the same at any length.
    model = shaken(build(sequences, architecture(depth=1)))
    attention = model.blocks[0].attention
    normed = nn.functional.rms_norm(torch.randn(1, 1, 1, 8).expand(1, 1, CONTEXT, 8), (8,))
    turned = attention._turned(normed)[0, 0]
    products = turned @ turned.T
    for distance in range(4):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert products[0, 0] > products[0, 1] + 0.01
    torch.testing.assert_close(turned.square().sum(-1), normed[0, 0].square().sum(-1))


def test_a_new_model_knows_nothing(sequences: Sequences, examples: Examples) -> None:
    tokens = torch.randint(VOCABULARY, (2, CONTEXT))
    start = loss(sequences, build(sequences, architecture())(tokens), tokens)
    assert start.item() == pytest.approx(math.log(VOCABULARY))
    assert build(examples, architecture())(torch.randn(4, 5)).abs().max() == 0


@pytest.mark.parametrize("family", ["dense", "btt(rank=2)"])
@pytest.mark.parametrize("task", ["sequences", "examples"])
def test_logits_move_alike_at_every_width(family: str, task: str, request: pytest.FixtureRequest) -> None:
    """muP: after a few steps at one base rate, logits of a model 16 times as wide are of the same size."""
    task = request.getfixturevalue(task)
    inputs = torch.randint(VOCABULARY, (8, CONTEXT)) if isinstance(task, Sequences) else torch.randn(64, 5)
    targets = inputs.roll(-1, 1) if isinstance(task, Sequences) else torch.randint(3, (64,))
    sizes = []
    widths = (32, 128, 512)
    for width in widths:
        torch.manual_seed(0)
        shape = architecture(family, width, base=32)
        model = build(task, shape)
        groups = parameter_groups(model, 2**-7, readout="readout", roles=model.roles, width_mult=shape.width_mult)
        optimizer = torch.optim.Adam(groups)
        for _ in range(4):
            optimizer.zero_grad()
            loss(task, model(inputs), targets).backward()
            optimizer.step()
        sizes.append(model(inputs).square().mean().sqrt().item())
    slope = math.log(sizes[-1] / sizes[0]) / math.log(widths[-1] / widths[0])
    assert abs(slope) < 0.2, sizes


def test_rates_fall_with_the_width_for_hidden_layers_alone(sequences: Sequences, examples: Examples) -> None:
    for task in (sequences, examples):
        model = build(task, architecture(width=64, depth=1, base=16))
        groups = parameter_groups(model, 1.0, readout="readout", roles=model.roles, width_mult=4)
        multiples = {name: group["lr_mult"] for group in groups for name in group["param_names"]}
        assert {name for name, multiple in multiples.items() if multiple == 0.25} == {
            n for n in multiples if "blocks" in n
        }
        assert {multiple for name, multiple in multiples.items() if "blocks" not in name} == {1.0}


def test_branches_shrink_with_depth(sequences: Sequences) -> None:
    model = build(sequences, architecture(depth=4))
    assert {block.branch for block in model.blocks} == {0.25}


def test_a_width_without_whole_heads_is_refused(sequences: Sequences) -> None:
    with pytest.raises(ValueError, match=r"width 50: it is not a multiple of 8.* such as 56"):
        build(sequences, architecture(width=50))


def test_the_kind_of_task_decides_the_model(sequences: Sequences, examples: Examples) -> None:
    assert isinstance(build(sequences, architecture()), GPT)
    assert isinstance(build(examples, architecture()), MLP)
    squared = Examples("e", "", "", 5, 1, "mean squared error", examples.sample, examples.validation)
    assert loss(squared, torch.tensor([[3.0], [1.0]]), torch.tensor([[1.0], [1.0]])).item() == 2.0
