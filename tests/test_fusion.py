"""Finding the MLPs of a model and replacing them changes nothing but how they run."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import einlinear as el


class Gated(nn.Module):
    """As Hugging Face's Llama calls its layers."""

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias), nn.Linear(width, hidden, bias)
        self.down_proj = nn.Linear(hidden, width, bias)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Plain(nn.Module):
    def __init__(self, act: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act, self.drop = nn.Linear(16, 64), nn.Linear(64, 16), act, nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.drop(self.act(self.fc1(x))))


def model() -> nn.Module:
    parts = {
        "gated": Gated(16, 64, bias=True),
        "plain": Plain(nn.GELU("tanh")),
        "row": nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16), nn.Linear(16, 16)),
    }
    return nn.ModuleDict(parts)


@pytest.mark.parametrize("converted", [True, False])
def test_an_mlp_becomes_one_module_and_computes_the_same(converted: bool) -> None:
    before = model()
    if converted:
        el.convert(before, {"*": el.BTT(rank=2, blocks=(4, 4))}, weights="project")
    x = torch.randn(3, 16)
    wanted = {name: part(x) for name, part in before.items()}
    report = el.fuse_mlps(before, None if converted else el.BTT(rank=16, blocks=(4, 4)))  # rank 16: projects exactly
    assert [(fusion.name, fusion.activation, fusion.why) for fusion in report] == [
        ("gated", "silu", None),
        ("plain", "gelu_tanh", None),
        ("row", "relu", None),
    ]
    assert all(isinstance(part, el.StructuredMLP) for part in (before["gated"], before["plain"], before["row"][1]))
    assert before["gated"].activation == "swiglu"
    for name, part in before.items():
        torch.testing.assert_close(part(x), wanted[name], atol=1e-4, rtol=1e-4)
    assert not el.fuse_mlps(before)  # nothing is left to be found


def test_what_stays_says_why() -> None:
    parts = {"tanh": Plain(nn.Tanh()), "drop": Plain(nn.GELU(), 0.1), "dense": Plain(nn.GELU())}
    whole = nn.ModuleDict(parts)
    told = {fusion.name: fusion for fusion in el.fuse_mlps(whole)}
    assert "Tanh, it does not compute down(a(up(x))) with an activation a among" in str(told["tanh"])
    assert "dropout 'drop' of 0.1" in str(told["drop"])
    assert "name a family" in str(told["dense"])
    assert all(isinstance(part, Plain) for part in whole.values())
    assert [fusion.name for fusion in el.fuse_mlps(whole, "btt", only="de*")] == ["dense"]


class Members(nn.Module):
    """Two layers and what is between, as many models have them; subclasses compute with them what they like."""

    def __init__(self, gated: bool = False, **others: nn.Module) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)
        if gated:
            self.c = nn.Linear(16, 64)
        for name, module in others.items():
            self.add_module(name, module)


def computing(forward: Callable[..., object], **options: Any) -> nn.Module:
    return type("Members", (Members,), {"forward": forward})(**options)


def test_what_a_module_computes_decides_and_not_what_its_layers_are_called() -> None:
    taken = {
        "gelu": computing(lambda m, x: m.b(F.gelu(m.a(x)))),
        "gelu_tanh": computing(lambda m, x: m.b(F.gelu(m.a(x), approximate="tanh"))),
        "silu": computing(lambda m, x: m.b(F.silu(m.c(x)) * m.a(x)), gated=True),
        "relu2": computing(lambda m, x: m.b(F.relu(m.a(x)) ** 2), drop=nn.Dropout(0.0), norm=nn.Identity()),
    }
    left = {
        "residual": (computing(lambda m, x: x + m.b(m.act(m.a(x)))), "does not compute"),
        "halved": (computing(lambda m, x: m.b(torch.cat([m.act(m.a(x))[..., :32]] * 2, -1))), "does not compute"),
        "dropped": (computing(lambda m, x: m.b(F.dropout(m.act(m.a(x)), 0.5, m.training))), "does not compute"),
        "normed": (computing(lambda m, x: m.b(m.n(m.act(m.a(x)))), n=nn.LayerNorm(64)), "more than an MLP: n"),
        "masked": (computing(lambda m, x, mask=None: m.b(m.act(m.a(x)))), "takes more than its input"),
        "pair": (computing(lambda m, x: (m.b(m.act(m.a(x))), None)), "returns a tuple"),
    }
    before = nn.ModuleDict(taken | {name: module for name, (module, _) in left.items()}).eval()
    nn.init.zeros_(before["residual"].b.weight)  # what a layer starts with hides nothing
    x = torch.randn(3, 16)
    wanted = {name: before[name](x) for name in taken}
    told = {fusion.name: fusion for fusion in el.fuse_mlps(before, el.BTT(rank=16, blocks=(4, 4)))}
    for name, y in wanted.items():
        assert (told[name].activation, told[name].why) == (name, None)
        assert isinstance(before[name], el.StructuredMLP)
        torch.testing.assert_close(before[name](x), y, atol=1e-4, rtol=1e-4)
    for name, (module, why) in left.items():
        assert why in str(told[name].why), told[name]
        assert before[name] is module
    assert isinstance(before["silu"].c, el.Linear), "layers keep their names"


def test_rows_of_a_sequential() -> None:
    def row(*between: nn.Module, kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
        return kind(nn.Linear(16, 64), *between, nn.Linear(64, 16))

    class Residual(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x)

    rows = {
        "dropout": (row(nn.GELU(), nn.Dropout(0.2)), "a dropout '2' of 0.2"),
        "none": (row(nn.Dropout(0.0), nn.GELU(), nn.Identity()), None),
        "residual": (row(nn.GELU(), kind=Residual), "does not compute"),
        "norm": (row(nn.LayerNorm(64), nn.GELU()), "not found"),
    }
    whole = nn.ModuleDict({name: module for name, (module, _) in rows.items()}).eval()
    x = torch.randn(3, 16)
    wanted = {name: module(x) for name, module in whole.items()}
    told = {fusion.name: fusion.why for fusion in el.fuse_mlps(whole, el.BTT(rank=16, blocks=(4, 4)))}
    for name, (_, why) in rows.items():
        found = told.get(name, "not found")
        assert found is None if why is None else why in found, name
        torch.testing.assert_close(whole[name](x), wanted[name], atol=1e-4, rtol=1e-4)


def test_what_convert_refuses_stays_and_what_it_keeps_is_kept() -> None:
    class Rounded(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).round()

    parts = nn.ModuleDict({name: Plain(nn.GELU()) for name in ("own", "tied", "with", "frozen")})
    parts["own"].fc1 = Rounded(16, 64)
    parts["tied"].fc1.weight = parts["with"].fc1.weight
    parts["frozen"].fc1.weight.requires_grad_(False)
    parts["twice"] = twice = nn.Sequential(*[Plain(nn.GELU())] * 2)
    told = {fusion.name: fusion.why for fusion in el.fuse_mlps(parts, "btt")}
    assert "a way of its own" in str(told["own"])
    assert "also that of 'with.fc1'" in str(told["tied"])
    assert parts["tied"].fc1.weight is parts["with"].fc1.weight
    assert {name for name, p in parts["frozen"].named_parameters() if not p.requires_grad} == {
        "fc1.factors.0",
        "fc1.factors.1",
    }
    assert isinstance(twice[0], el.StructuredMLP)
    assert twice[0] is twice[1], "a module in two places is replaced in both"


def test_layers_keep_their_names_so_that_checkpoints_fit() -> None:
    one, other = (nn.ModuleDict({"mlp": Gated(16, 64), "head": nn.Linear(16, 3)}) for _ in range(2))
    for part in (one, other):
        el.convert(part, {"mlp.*": "btt"}, weights="init")
    el.fuse_mlps(one)
    one.load_state_dict(other.state_dict())
    x = torch.randn(2, 16)
    torch.testing.assert_close(one["mlp"](x), other["mlp"](x))
    assert one["mlp"].gate is one["mlp"].gate_proj


@pytest.mark.parametrize("part", ["mlp", "fc1", "act"])
def test_hooks_are_not_lost_in_silence(part: str) -> None:
    for whole in (
        nn.ModuleDict({"mlp": Plain(nn.GELU())}),
        nn.ModuleDict({"mlp": nn.Sequential(OrderedDict(fc1=nn.Linear(16, 64), act=nn.GELU(), fc2=nn.Linear(64, 16)))}),
    ):
        seen: list[object] = []
        hooked = whole["mlp"] if part == "mlp" else whole["mlp"].get_submodule(part)
        hooked.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        (fusion,) = el.fuse_mlps(whole, "btt")
        whole["mlp"](torch.randn(2, 16))
        assert len(seen) == 1, f"{fusion}"


def test_the_mlp_of_a_llama(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    el.convert(llama, {"*.mlp.*": el.BTT()}, weights="project")
    tokens = torch.randint(50, (2, 7))
    with torch.no_grad():
        wanted = llama(tokens).logits
        report = el.fuse_mlps(llama)
        torch.testing.assert_close(llama(tokens).logits, wanted)
    assert [str(fusion) for fusion in report] == [f"model.layers.{k}.mlp: silu, one StructuredMLP" for k in range(2)]
    assert all(layer.mlp.unfused is None for layer in llama.model.layers)
    llama.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, wanted)


def test_a_decoder_layer_that_has_its_mlp_in_itself_is_left_alone() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=32, vocab_size=50
    )
    opt = transformers.OPTForCausalLM(config).eval()
    el.convert(opt, {"*.fc1": "btt", "*.fc2": "btt"}, weights="init")
    tokens = torch.randint(50, (2, 7))
    with torch.no_grad():
        wanted = opt(tokens).logits
        (fusion,) = el.fuse_mlps(opt)
        torch.testing.assert_close(opt(tokens).logits, wanted)
    assert "more than an MLP: self_attn" in str(fusion)
