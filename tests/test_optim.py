import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import einlinear as el


class Block(nn.Module):
    def __init__(self, width: int, family: str | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = el.Linear(width, 4 * width, family) if family else nn.Linear(width, 4 * width)
        self.down = el.Linear(4 * width, width, family) if family else nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """A small residual language model; dense where no family is given."""

    def __init__(self, width: int = 16, family: str | None = "btt", depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width, family) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def by_name(groups: list[dict]) -> dict[str, dict]:
    return {name: group for group in groups for name in group["param_names"]}


def described(groups: list[dict]) -> list[dict]:
    """All that groups say, without the tensors."""
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    tokens = torch.arange(11)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(tokens), tokens.roll(1))
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("mult", [1, 2, 4, 8])
def test_dense_models_have_the_rates_and_decays_of_mup(mult: int) -> None:
    """The table is Tensor Programs V's, in the form of microsoft/mup 1.0.0.

    Checked by hand against `mup.MuAdamW` and `mup.MuSGD` on this very model, base width 16 and
    widths 16 to 128: every pair agrees.
    """
    model = Model(16 * mult, family=None)
    adamw = {"embedding": 1.0, "up.weight": 1 / mult, "down.weight": 1 / mult}
    sgd = {"embedding": mult, "up.weight": 1.0, "down.weight": 1.0, "norm": mult, "head.weight": mult}
    sgd |= {"up.bias": mult, "down.bias": mult}
    for optimizer, table in (("adamw", adamw), ("sgd", sgd)):
        groups = el.parameter_groups(model, 0.1, 0.01, readout="head", optimizer=optimizer, width_mult=mult)
        for name, group in by_name(groups).items():
            expected = next((rate for part, rate in table.items() if part in name), 1.0)
            assert group["lr"] == pytest.approx(0.1 * expected), (optimizer, name)
            assert group["weight_decay"] == pytest.approx(0.01 / expected), (optimizer, name)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_factors_take_the_dense_rate_times_their_own(family: el.Family, optimizer: str) -> None:
    layer = nn.ModuleList([el.Linear(36, 64, family)])
    groups = el.parameter_groups(layer, 1.0, 0.1, readout=None, optimizer=optimizer, width_mult=2)
    dense = {"adamw": 1 / 2, "sgd": 1.0, "muon": math.sqrt(64 / 36)}[optimizer]
    for index, scale in enumerate(el.spectral(layer[0].structure, optimizer)):
        group = by_name(groups)[f"0.factors.{index}"]
        assert group["lr"] == pytest.approx(dense * scale.lr)
        assert group["lr"] * group["weight_decay"] == pytest.approx(0.1)  # all factors decay as dense does


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_the_naive_rule_gives_factors_the_rate_of_their_dense_layer(optimizer: str) -> None:
    options = {"readout": "head", "optimizer": optimizer, "width_mult": 4}
    naive = by_name(el.parameter_groups(Model(64), 0.1, structure_aware=False, **options))
    dense = by_name(el.parameter_groups(Model(64, None), 0.1, **options))
    for name, group in naive.items():
        same = name.replace("factors.0", "weight").replace("factors.1", "weight")
        assert group["lr"] == dense[same]["lr"], name


def test_every_trained_parameter_is_in_one_group_and_groups_are_few() -> None:
    model = Model(depth=6)
    model.norm.bias.requires_grad_(False)
    groups = el.parameter_groups(model, 1e-2, 0.1, readout="head", width_mult=4)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = [name for group in groups for name in group["param_names"]]
    named = dict(model.named_parameters())
    assert [id(named[name]) for name in names] == found
    assert len(groups) <= 6


def test_tied_parameters_appear_once() -> None:
    model = Model()
    model.head.weight = model.embedding.weight
    groups = el.parameter_groups(model, 1e-2, readout="head", width_mult=4)
    assert sum(parameter is model.head.weight for group in groups for parameter in group["params"]) == 1
    assert by_name(groups)["embedding.weight"]["lr"] == 1e-2
    with pytest.raises(ValueError, match=r"tied parameter embedding.weight = head.weight.*readout="):
        el.parameter_groups(model, 1e-2, readout=None, width_mult=4)


def test_options_of_decay() -> None:
    model = Model(family="btt")
    plain = by_name(el.parameter_groups(model, 1e-2, 0.1, readout="head", decoupled=True))
    assert {group["weight_decay"] for group in plain.values()} == {0.1}
    bare = by_name(el.parameter_groups(model, 1e-2, 0.1, readout="head", decay_vectors=False))
    undecayed = {name for name, group in bare.items() if group["weight_decay"] == 0}
    assert undecayed == {name for name, p in model.named_parameters() if p.ndim == 1}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_moves_the_logits_of_a_router_alike_at_every_width(optimizer: str) -> None:
    moved, sizes = [], []
    for width in (64, 1024):
        router, x = el.Router(width, 4), torch.randn(32, width)
        groups = el.parameter_groups(
            nn.Sequential(router), 0.01, readout=None, optimizer=optimizer, width_mult=width / 64, eps=1e-6
        )
        router(x)
        router.latest.logits[:, 0].mean().backward()
        sizes.append(router.weight.grad.square().mean().sqrt().item() / groups[0]["eps"])
        {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer](
            [{"params": [router.weight], "lr": groups[0]["lr"]}]
        ).step()
        router(x)
        moved.append(router.latest.logits[:, 0].mean().item())
    assert moved[1] == pytest.approx(moved[0], rel=0.3)
    assert sizes[1] == pytest.approx(sizes[0], rel=0.3)  # ε is as small beside its gradients


@pytest.mark.parametrize(("optimizer", "exponent"), [("adamw", -0.5), ("muon", -0.5), ("sgd", 0.0)])
def test_depth_changes_the_rates_of_blocks_alone(optimizer: str, exponent: float) -> None:
    """CompleteP, table 1, at α = 1/2; α = 1 needs no change for normalised updates."""
    options = {"readout": "head", "optimizer": optimizer}
    model = Model(family="btt")
    shallow = by_name(el.parameter_groups(model, 1e-2, **options))
    deep = by_name(el.parameter_groups(model, 1e-2, depth_mult=9, depth_alpha=0.5, **options))
    for name, group in deep.items():
        change = 9**exponent if name.startswith("blocks.") else 1.0
        assert group["lr"] == pytest.approx(shallow[name]["lr"] * change), name
    if optimizer != "sgd":
        assert by_name(el.parameter_groups(model, 1e-2, depth_mult=9, **options)).keys() == shallow.keys()
        assert described(el.parameter_groups(model, 1e-2, depth_mult=9, **options)) == described(
            el.parameter_groups(model, 1e-2, **options)
        )


def test_epsilon_follows_the_size_of_gradients() -> None:
    groups = by_name(
        el.parameter_groups(Model(family=None), 1e-2, readout="head", width_mult=4, depth_mult=8, eps=1e-8)
    )
    assert groups["blocks.0.up.weight"]["eps"] == pytest.approx(1e-8 / 4 / 8)
    assert groups["embedding.weight"]["eps"] == pytest.approx(1e-8 / 4)
    assert groups["head.bias"]["eps"] == pytest.approx(1e-8)
    low_rank = nn.ModuleList([el.Linear(64, 32, "low_rank(rank=4)")])
    found = by_name(el.parameter_groups(low_rank, 1e-2, readout=None, eps=1e-8))
    # The gradient of the first factor is shared out over 4 outputs where a dense layer has 32.
    assert found["0.factors.0"]["eps"] == pytest.approx(1e-8 * 32 / 4)
    assert found["0.factors.1"]["eps"] == pytest.approx(1e-8)
    assert "eps" not in el.parameter_groups(low_rank, 1e-2, readout=None)[0]


def averaged(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model)


def materialised(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        empty = Model()
    return empty.to_empty(device="cpu")


def assigned(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        other = Model()
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def compiled(model: nn.Module) -> nn.Module:
    model.blocks[0] = torch.compile(model.blocks[0])
    return torch.compile(model)


@pytest.mark.parametrize("change", [copy.deepcopy, averaged, materialised, assigned, compiled])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_a_changed_model_has_the_same_groups(change, optimizer: str) -> None:
    options = {"readout": "head", "optimizer": optimizer, "width_mult": 4, "depth_mult": 2, "eps": 1e-8}
    model = Model()
    groups = el.parameter_groups(model, 1e-2, 0.1, **options)
    other = change(model)
    changed = el.parameter_groups(other, 1e-2, 0.1, **options)
    assert described(changed) == described(groups)
    assert {id(p) for group in changed for p in group["params"]} == {id(p) for p in other.parameters()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_sharded_model_has_the_same_groups_and_trains_the_same(one_process, optimizer: str) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    options = {"readout": "head", "optimizer": optimizer, "width_mult": 4}
    model = Model()
    sharded = copy.deepcopy(model)
    for block in sharded.blocks:
        fully_shard(block, mesh=one_process)
    fully_shard(sharded, mesh=one_process)
    groups, changed = (el.parameter_groups(m, 1e-2, 0.1, **options) for m in (model, sharded))
    assert described(changed) == described(groups)
    assert all(isinstance(parameter, DTensor) for group in changed for parameter in group["params"])
    make = el.Muon if optimizer == "muon" else torch.optim.AdamW
    losses = [train(m, make(g), 3) for m, g in ((model, groups), (sharded, changed))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "make"),
    [
        ("adamw", lambda groups: torch.optim.AdamW(groups, fused=True)),
        ("adamw", torch.optim.Adam),
        ("sgd", lambda groups: torch.optim.SGD(groups, momentum=0.9)),
        ("muon", el.Muon),
    ],
    ids=["AdamW(fused)", "Adam", "SGD", "Muon"],
)
def test_optimizers_schedules_and_checkpoints_keep_the_groups(optimizer: str, make, tmp_path) -> None:
    model = Model()
    first = make(el.parameter_groups(model, 1e-2, 0.1, readout="head", optimizer=optimizer, width_mult=2))
    rates = [group["lr"] for group in first.param_groups]
    schedule = torch.optim.lr_scheduler.LambdaLR(first, lambda step: 0.5**step)
    train(model, first, 2)
    schedule.step()
    assert [group["lr"] for group in first.param_groups] == [rate / 2 for rate in rates]
    assert all(group["lr"] == pytest.approx(0.5e-2 * group["lr_mult"]) for group in first.param_groups)

    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    twin = copy.deepcopy(model)
    second = make(el.parameter_groups(twin, 1.0, readout="head", optimizer=optimizer))
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert described(second.param_groups) == described(first.param_groups)
    assert train(model, first, 2) == train(twin, second, 2)


def test_names_roles_and_options_that_do_not_fit_are_refused() -> None:
    model = Model()
    with pytest.raises(ValueError, match=r"cannot find the readout 'haed'.*near are head"):
        el.parameter_groups(model, 1e-2, readout="haed")
    with pytest.raises(ValueError, match="no linear layer of the model has that name"):
        el.parameter_groups(model, 1e-2, readout="embedding")
    with pytest.raises(TypeError, match="readout"):
        el.parameter_groups(model, 1e-2)
    with pytest.raises(ValueError, match=r"'norm.wieght' a role.*norm.weight"):
        el.parameter_groups(model, 1e-2, readout="head", roles={"norm.wieght": "vector"})
    with pytest.raises(ValueError, match="roles are hidden, embedding"):
        el.parameter_groups(model, 1e-2, readout="head", roles={"norm.weight": "norm"})
    with pytest.raises(ValueError, match="known are adamw, sgd, muon"):
        el.parameter_groups(model, 1e-2, readout="head", optimizer="adafactor")
    with pytest.raises(ValueError, match="width_mult=0"):
        el.parameter_groups(model, 1e-2, readout="head", width_mult=0)
    with pytest.raises(ValueError, match="lr=nan: pass a number of at least 0"):
        el.parameter_groups(model, float("nan"), readout="head")
    with pytest.raises(ValueError, match="weight_decay=-1"):
        el.parameter_groups(model, 1e-2, -1, readout="head")
    with pytest.raises(ValueError, match=r"cannot choose a learning rate for 0.weight: it is not there yet"):
        el.parameter_groups(torch.nn.Sequential(torch.nn.LazyLinear(4)), 1e-2, readout=None)


def test_a_parameter_beside_a_child_called_module_is_trained() -> None:
    """Wrappers such as AveragedModel hold nothing beside it."""
    model = torch.nn.Module()
    model.module, model.shift = el.Linear(16, 16, "btt"), nn.Parameter(torch.zeros(3))
    groups = el.parameter_groups(model, 1e-2, readout=None)
    names = {name for group in groups for name in group["param_names"]}
    assert names == {name for name, _ in model.named_parameters()}


def test_an_unknown_matrix_needs_a_role() -> None:
    model = Model(family=None)
    model.positions = nn.Parameter(torch.zeros(5, 16))
    with pytest.raises(ValueError, match=r"positions of shape \(5, 16\).*roles=\{'positions': 'hidden'\}"):
        el.parameter_groups(model, 1e-2, readout="head")
    groups = el.parameter_groups(model, 1e-2, readout="head", width_mult=4, roles={"pos*": "embedding"})
    assert by_name(groups)["positions"]["lr"] == 1e-2


def test_attention_and_conv1d_are_known() -> None:
    class Conv1D(nn.Module):  # as in transformers: the weight is [in, out]
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 32))
            self.bias = nn.Parameter(torch.zeros(32))

    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, add_bias_kv=True), "mlp": Conv1D()})
    rates = {n: g["lr_mult"] for n, g in by_name(el.parameter_groups(model, 1, readout=None, width_mult=4)).items()}
    assert {name for name, rate in rates.items() if rate == 1 / 4} == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "mlp.weight",
    }
    muon = by_name(el.parameter_groups(model, 1, readout=None, optimizer="muon"))
    assert muon["mlp.weight"]["lr"] == pytest.approx(math.sqrt(32 / 8))


def test_gains_of_capped_layers_keep_their_rate_and_are_not_decayed(family: el.Family) -> None:
    model = nn.ModuleList([el.Linear(36, 64, family, cap=True)])
    for optimizer in ("adamw", "sgd", "muon"):
        group = by_name(
            el.parameter_groups(model, 1e-2, 0.1, readout=None, optimizer=optimizer, width_mult=8, depth_mult=4)
        )["0.gains"]
        assert (group["lr"], group["weight_decay"], group["role"]) == (1e-2, 0.0, "gain")


def test_capped_layers_that_start_at_zero_have_finite_gradients(family: el.Family) -> None:
    layer = el.Linear(36, 64, family, cap=True, zero=True)
    layer(torch.randn(3, 36)).square().sum().backward()
    layer(torch.randn(3, 36)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
    assert bool(layer.factors[0].grad.any())


def test_the_cap_needs_no_values_on_the_host() -> None:
    with torch.device("meta"):
        layer = el.Linear(36, 64, "btt", cap=True)
        layer(torch.empty(3, 36)).sum().backward()
    assert layer.gains.grad.is_meta and layer.gains.grad.shape == (2,)


def test_the_cap_holds_back_what_has_grown_and_leaves_the_rest() -> None:
    layer = el.Linear(64, 64, "btt", cap=True)
    ceilings = [scale.std for scale in el.spectral(layer.structure)]
    with torch.no_grad():
        layer.factors[0].mul_(0.5)
        layer.factors[1].mul_(100)
        layer.gains[1] = 3
        low, high = layer.effective_factors()
    torch.testing.assert_close(low, layer.factors[0].detach())
    assert float(high.square().mean().sqrt()) == pytest.approx(3 * ceilings[1])


def test_explain_prints_every_kind_of_parameter_once() -> None:
    model = Model(64, depth=3)
    model.norm.bias.requires_grad_(False)
    text = el.explain(model, el.parameter_groups(model, 1e-2, 0.1, readout="head", width_mult=4))
    lines = {line.split()[0]: line for line in text.splitlines()}
    factor = lines["blocks.*.down.factors.1"]
    scale = el.spectral(model.blocks[0].down.structure)[1]
    assert f"{scale.slices} x {scale.fan_in} -> {scale.fan_out}" in factor
    assert f"{scale.std:.3g}" in factor and f"{1e-2 * scale.lr / 4:.3g}" in factor and factor.endswith(" 3")
    assert "not trained" in lines["norm.bias"] and "readout" in lines["head.weight"]
    assert not any(line.startswith("blocks.1") for line in lines)
