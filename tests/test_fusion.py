"""Finding the MLPs of a model and replacing them changes nothing but how they run."""

import pytest
import torch
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
    assert "its activation Tanh" in str(told["tanh"])
    assert "dropout 'drop' of 0.1" in str(told["drop"])
    assert "name a family" in str(told["dense"])
    assert all(isinstance(part, Plain) for part in whole.values())
    assert [fusion.name for fusion in el.fuse_mlps(whole, "btt", only="de*")] == ["dense"]


def test_hooks_are_not_lost_in_silence() -> None:
    whole = nn.ModuleDict({"mlp": Plain(nn.GELU())})
    whole["mlp"].fc1.register_forward_hook(lambda module, inputs, output: None)
    (fusion,) = el.fuse_mlps(whole, "btt")
    assert "has hooks" in str(fusion)


def test_the_mlp_of_a_llama() -> None:
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
