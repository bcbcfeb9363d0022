"""Conversion: what is chosen, what is kept, what is refused, and what the report says."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

import einlinear as el


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"query": nn.Linear(16, 16), "value": nn.Linear(16, 16, bias=False)})
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention["query"](x).tanh() * self.attention["value"](x)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(16, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


TOKENS = torch.arange(12).reshape(2, 6)
MLP = {f"blocks.{k}.mlp.{j}" for k in (0, 1) for j in (0, 2)}
ATTENTION = {f"blocks.{k}.attention.{name}" for k in (0, 1) for name in ("query", "value")}


def converted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, el.Linear)}


# What a pattern means


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*", MLP | ATTENTION | {"lm_head"}),
        ("all-linear", MLP | ATTENTION),
        ("query", {"blocks.0.attention.query", "blocks.1.attention.query"}),
        ("attention.query", {"blocks.0.attention.query", "blocks.1.attention.query"}),
        ("blocks.1.mlp.0", {"blocks.1.mlp.0"}),
        ("*.mlp.*", MLP),
        ("mlp.*", MLP),
        ("mlp.[02]", MLP),
        ("blocks.*.mlp.0", {"blocks.0.mlp.0", "blocks.1.mlp.0"}),
        ("*lm_*", {"lm_head"}),
        ("*.lm_head", {"lm_head"}),
    ],
)
def test_patterns(pattern, names):
    model = Model()
    report = el.convert(model, {pattern: "btt"})
    assert converted(model) == {row.name for row in report.rows} == names
    assert not report.skipped


def test_a_suffix_ends_at_a_dot():
    with pytest.raises(ValueError, match=r"'uery'.*no linear layer.*near names are query"):
        el.convert(Model(), {"uery": "btt"})


def test_the_first_rule_that_matches_decides():
    model = Model()
    report = el.convert(model, {"blocks.0.mlp.*": None, "mlp.*": "btt(rank=2)", "all-linear": el.LowRank(rank=3)})
    families = {row.name: row.family for row in report.rows}
    assert families == {
        name: "btt(rank=2)" if "mlp" in name else "low_rank(rank=3)" for name in MLP | ATTENTION if "0.mlp" not in name
    }
    assert report.skipped == {f"blocks.0.mlp.{k}": "left as it is by the rule 'blocks.0.mlp.*'" for k in (0, 2)}


@pytest.mark.parametrize("exclude", [r".*\.attention\..*", ["attention.*"], ["query", "value"]])
def test_exclusions_come_before_every_rule(exclude):
    model = Model()
    report = el.convert(model, {"all-linear": "btt"}, exclude_modules=exclude)
    assert converted(model) == MLP
    assert set(report.skipped) == ATTENTION


def test_all_linear_leaves_the_output_layer_that_the_model_names():
    class Telling(Model):
        def __init__(self) -> None:
            super().__init__()
            self.to_vocabulary, self.lm_head = self.lm_head, nn.Identity()

        def get_output_embeddings(self) -> nn.Module:
            return self.to_vocabulary

    model = nn.ModuleDict({"wrapped": Telling()})
    el.convert(model, {"all-linear": "btt"})
    assert type(model["wrapped"].to_vocabulary) is nn.Linear
    assert len(converted(model)) == 8


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ({"mlp": "btt"}, r"'blocks.0.mlp' is a Sequential.*blocks.\*.mlp.\*"),
        ({"embedding": "btt"}, "is a Embedding"),
        ({"*.conv*": "btt"}, "matches no linear layer"),
        ({"*": "btt", "lm_head": "dense"}, "'lm_head' by '\\*'; put the more special rule first"),
        ({"*": "bttt"}, "did you mean 'btt'"),
        ({"*": el.BTT}, r"einlinear.BTT\(rank=4\)"),
        ({"*": 3}, "3 is no family"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused_in_a_sentence(rules, why):
    model = Model()
    with pytest.raises(ValueError, match=why):
        el.convert(model, rules)
    assert not converted(model)


def test_a_model_that_is_or_has_no_linear_layer_is_refused():
    with pytest.raises(ValueError, match="from_dense"):
        el.convert(nn.Linear(4, 4), {"*": "btt"})
    with pytest.raises(ValueError, match="has no linear layers"):
        el.convert(nn.Sequential(nn.ReLU()), {"*": "btt"})
    with pytest.raises(ValueError, match="'project', 'init' or 'reverse'"):
        el.convert(Model(), {"*": "btt"}, weights="zero")


# What a converted model computes


@pytest.mark.parametrize("family", [el.Dense(), el.LowRank(rank=16), el.BTT(rank=16), el.Monarch(blocks=1)], ids=str)
def test_a_family_that_contains_every_matrix_changes_nothing(family):
    model = Model().double()
    before = model(TOKENS)
    report = el.convert(model, {"all-linear": family})
    assert len(converted(model)) == 8
    torch.testing.assert_close(model(TOKENS), before)
    assert all(row.error < 1e-12 for row in report.rows)


def test_projected_layers_are_those_nearest_to_the_old_ones():
    model = Model()
    old = copy.deepcopy(model)
    report = el.convert(model, {"*": el.BTT(rank=2)})
    for row in report.rows:
        expected = el.Linear.from_dense(old.get_submodule(row.name), el.BTT(rank=2))
        new = model.get_submodule(row.name)
        torch.testing.assert_close(new.state_dict(), expected.state_dict())
        weight = old.get_submodule(row.name).weight.detach()
        difference = new.to_dense().weight.detach() - weight
        assert row.error == pytest.approx(float(difference.norm() / weight.norm()), rel=1e-4)
        assert 0 < row.error < 1


def test_new_layers_are_drawn_as_a_new_layer_is():
    model = nn.Sequential(nn.Linear(256, 1024), nn.Linear(1024, 256, bias=False))
    report = el.convert(model, {"*": el.BTT(rank=2)}, weights="init")
    for layer in model:
        for factor, scale in zip(layer.factors, el.spectral(layer.structure), strict=True):
            assert float(factor.detach().std()) == pytest.approx(scale.std, rel=0.1)
    assert not model[0].bias.any() and model[1].bias is None
    assert [row.error for row in report.rows] == [None, None]


def test_a_converted_model_saves_loads_compiles_and_trains():
    model, fresh = Model(), Model()
    el.convert(model, {"all-linear": el.BTT(rank=2)})
    el.convert(fresh, {"all-linear": el.BTT(rank=2)}, weights="init")
    assert not torch.equal(fresh(TOKENS), model(TOKENS))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(TOKENS), model(TOKENS))
    torch.testing.assert_close(copy.deepcopy(model)(TOKENS), model(TOKENS))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
    compiled(TOKENS).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


# What is kept


def test_dtype_bias_mode_and_frozen_weights_are_kept():
    model = Model().to(torch.bfloat16).eval()
    model.blocks[0].requires_grad_(False)
    bias = model.blocks[0].mlp[0].bias
    el.convert(model, {"all-linear": "btt"})
    assert model.blocks[0].mlp[0].bias is bias
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.blocks[0].parameters())
    assert all(p.requires_grad for p in model.blocks[1].parameters())
    assert torch.isfinite(model(TOKENS)).all()


def test_a_model_without_storage_can_be_converted_to_initialise_later():
    with torch.device("meta"):
        model = Model()
    el.convert(model, {"all-linear": "btt"}, weights="init")
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(el.StructureError, match='weights="init"'):
        el.convert(model, {"lm_head": "btt"})


def test_a_module_under_two_names_stays_one_module():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, nn.Linear(16, 16)])})
    report = el.convert(model, {"b.0": "btt"})
    assert model["a"] is model["b"][0] and isinstance(model["a"], el.Linear)
    assert type(model["b"][1]) is nn.Linear
    assert [row.name for row in report.rows] == ["a"]


def tied_pair() -> nn.ModuleDict:
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16), "c": nn.Linear(16, 16)})
    model["b"].weight = model["a"].weight
    return model


@pytest.mark.parametrize("weights", ["project", "init"])
def test_layers_with_one_weight_share_their_factors(weights):
    model = tied_pair()
    biases = [model["a"].bias, model["b"].bias]
    report = el.convert(model, {"*": "btt"}, weights=weights)
    a, b, c = model.values()
    assert all(one is other for one, other in zip(a.factors, b.factors, strict=True))
    assert c.factors[0] is not a.factors[0]
    assert a.bias is not b.bias
    if weights == "project":
        assert a.bias is biases[0] and b.bias is biases[1]
    factors = el.parameters(a.structure)
    assert (report.parameters_before, report.parameters_after) == (2 * 256 + 3 * 16, 2 * factors + 3 * 16)


@pytest.mark.parametrize("rules", [{"a": "btt", "*": "dense"}, {"[ac]": "btt"}, {"a": None, "*": "btt"}])
def test_layers_with_one_weight_are_never_torn_apart(rules):
    model = tied_pair()
    if rules.get("a"):
        with pytest.raises(el.StructureError, match=r"'a'.*weight is also that of 'b' \(Linear\)"):
            el.convert(model, rules)
    else:
        report = el.convert(model, rules)
        assert converted(model) == {"c"}
        assert "also that of" in " ".join(report.skipped.values())
    assert model["a"].weight is model["b"].weight


def test_a_head_tied_to_the_embedding_is_skipped_or_refused():
    model = Model(tied=True)
    report = el.convert(model, {"*": "btt"})
    assert "'embedding' (Embedding)" in report.skipped["lm_head"]
    assert model.lm_head.weight is model.embedding.weight
    with pytest.raises(el.StructureError, match="Embedding"):
        el.convert(model, {"lm_head": "btt"})


# What is refused


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """Computes what its parent does."""


class Reader(nn.Module):
    """Reads the dtype of a weight, as T5 does."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.called(x).to(self.read.weight.dtype))


def hooked() -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.register_forward_hook(lambda module, inputs, output: None)
    return layer


def heard() -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.weight.register_hook(lambda gradient: gradient)
    return layer


def overridden() -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.forward = torch.tanh
    return layer


def with_weight(weight: Tensor) -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: el.Linear(16, 16, "btt"), "structured already"),
        (lambda: Doubled(16, 16), "Doubled computes its output in a way of its own"),
        (overridden, "Linear computes its output in a way of its own"),
        (hooked, "hooks"),
        (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(16, 16)), "remove_parametrizations"),
        (lambda: nn.LazyLinear(16), "call the model once first"),
        (lambda: with_weight(torch.ones(16, 16, dtype=torch.int8)), "int8"),
        (lambda: with_weight(torch.ones(16, 16).to(torch.float8_e4m3fn)), "float8"),
        (lambda: with_weight(torch.eye(16).to_sparse()), "sparse"),
        (heard, "hooks"),
        (lambda: with_weight(torch.full((16, 16), torch.nan)), "not finite"),
        (lambda: nn.Linear(16, 3), "padding may add at most 15%"),
    ],
    ids=[
        "structured",
        "subclass",
        "overridden",
        "hooked",
        "parametrized",
        "lazy",
        "integer",
        "short",
        "sparse",
        "heard",
        "nan",
        "narrow",
    ],
)
def test_a_layer_that_cannot_be_converted_is_skipped_or_refused(make, why):
    family = el.BTT(blocks=(4, 4))
    model = nn.ModuleDict({"good": nn.Linear(16, 16), "bad": make()})
    good, bad = model["good"], model["bad"]
    with pytest.raises(el.StructureError, match=f"cannot convert 'bad'.*{why}"):
        el.convert(model, {"good": family, "bad": family})
    assert model["good"] is good and model["bad"] is bad
    report = el.convert(model, {"*": family})
    assert isinstance(model["good"], el.Linear) and model["bad"] is bad
    assert why in report.skipped["bad"] and why in str(report)


def test_a_subclass_that_computes_the_same_is_converted():
    model = nn.Sequential(Renamed(16, 16))
    el.convert(model, {"0": "btt"})
    assert converted(model) == {"0"}


def test_a_weight_that_its_owner_reads_stays():
    model = nn.ModuleDict({"reader": Reader(), "attention": nn.MultiheadAttention(16, 2)})
    x = torch.randn(3, 16)
    report = el.convert(model, {"*": "btt"})
    assert converted(model) == {"reader.called"}
    assert set(report.skipped) == {"reader.read", "attention.out_proj", "attention.in_proj_weight"}
    assert "Reader.forward reads its weight" in report.skipped["reader.read"]
    model["reader"](x), model["attention"](x, x, x)


@pytest.mark.parametrize("way", ["converted", "loaded", "copied", "reversed"])
def test_torchs_encoder_layers_leave_their_fast_path(tmp_path, way):
    """It reads the weights of dense layers; with padding, the whole encoder has one too."""
    dense = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), 1).eval()
    x, mask = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model = copy.deepcopy(dense)
    report = el.convert(model, {"*": "dense"})
    assert converted(model) == {"layers.0.linear1", "layers.0.linear2"}
    assert {*report.skipped} == {"layers.0.self_attn.out_proj", "layers.0.self_attn.in_proj_weight"}
    if way == "loaded":
        el.save(model, tmp_path / "m")
        model = el.load(tmp_path / "m", copy.deepcopy(dense))
    elif way == "copied":
        model = copy.deepcopy(model)
    elif way == "reversed":
        el.convert(model, "dense", weights="reverse")
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x))
        padded = [each(x, src_key_padding_mask=mask) for each in (model, dense)]
    torch.testing.assert_close(*(y[~mask] for y in padded))


def test_a_structure_fits_only_its_own_widths():
    model = Model()
    report = el.convert(model, {"mlp.*": el.Structure.parse("i, r i, o r -> o", i=16, r=4, o=64)})
    assert converted(model) == {"blocks.0.mlp.0", "blocks.1.mlp.0"}
    assert report.rows[0].family == "i, r i, o r -> o"
    assert "maps 16 to 64" in report.skipped["blocks.0.mlp.2"]


def test_a_failure_half_way_leaves_the_model_untouched(monkeypatch):
    model = Model()
    before = dict(model.named_modules())
    calls = []

    def fail_at_the_third(weight, structure, moments=None):
        calls.append(structure)
        if len(calls) == 3:
            raise torch.linalg.LinAlgError("no convergence")
        return el.project(weight, structure)

    monkeypatch.setattr("einlinear.conversion.converting.project", fail_at_the_third)
    with pytest.raises(torch.linalg.LinAlgError):
        el.convert(model, {"*": "btt"})
    assert len(calls) == 3 and dict(model.named_modules()) == before


# What the report says


def test_the_report_counts_what_the_specs_say():
    model = Model()
    sizes = [sum(p.numel() for p in model.parameters())]
    report = el.convert(model, {"mlp.*": el.BTT(rank=2), "lm_head": "btt(rank=1)"})
    sizes.append(sum(p.numel() for p in model.parameters()))
    assert [report.parameters_before, report.parameters_after] == sizes
    for row in report.rows:
        structure = model.get_submodule(row.name).structure
        assert row.structure == repr(structure)
        assert (row.d_in, row.d_out) == (structure.d_in, structure.d_out)
        assert (row.parameters_before, row.parameters_after) == (row.d_in * row.d_out, el.parameters(structure))
        assert (row.flops_before, row.flops_after) == (2 * row.d_in * row.d_out, el.flops(structure))
        assert row.ratio == row.flops_after / row.flops_before
    assert report.flops_before == sum(row.flops_before for row in report.rows)
    assert report.flops_after == sum(row.flops_after for row in report.rows)
    assert dataclasses.asdict(report.rows[0])["family"] == "btt(rank=2)"


def test_the_report_prints_as_an_aligned_table():
    report = el.convert(Model(tied=True), {"*": "btt(rank=2)"})
    header, *rows = str(report).splitlines()[:9]
    assert header.split()[0] == "layer" and {len(row) for row in rows} == {len(header)}
    assert [row.split()[0] for row in rows] == [row.name for row in report.rows]
    assert "8 layers converted" in str(report) and "skipped lm_head: " in str(report)


def test_progress_shows_only_when_asked_for(capsys):
    el.convert(Model(), {"*": "dense"})
    assert capsys.readouterr().out == ""
    el.convert(Model(), {"*": "dense"}, progress=True)
    assert "Converting" in capsys.readouterr().out


# Models of transformers


@pytest.fixture(params=["gpt2", "llama", "bert"])
def pretrained(request) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    tiny = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    wide = {**tiny, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    if request.param == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, **tiny)
        return transformers.GPT2LMHeadModel(config).eval()
    if request.param == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**wide)).eval()
    return transformers.BertForSequenceClassification(transformers.BertConfig(**wide)).eval()


def test_pretrained_models_keep_their_outputs(pretrained):
    with torch.no_grad():
        before = pretrained(TOKENS).logits
        report = el.convert(pretrained, {"all-linear": el.Dense()})
        torch.testing.assert_close(pretrained(TOKENS).logits, before)
    kinds = {type(module).__name__ for name, module in pretrained.named_modules() if name in report.skipped}
    assert not kinds and len(report.rows) >= 8
    left = [name for name, m in pretrained.named_modules() if type(m) is nn.Linear or type(m).__name__ == "Conv1D"]
    assert left in (["lm_head"], ["classifier"])


def test_pretrained_models_run_with_less(pretrained):
    report = el.convert(pretrained, {"all-linear": el.BTT(rank=1)})
    assert all(row.parameters_after < row.parameters_before and 0 < row.error < 1 for row in report.rows)
    assert torch.isfinite(pretrained(TOKENS).logits).all()


def test_conv1d_is_read_as_the_transpose_of_a_linear_layer():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    conv, x = Conv1D(24, 16), torch.randn(3, 16)
    nn.init.normal_(conv.bias)
    model = nn.Sequential(conv)
    weight, expected = conv.weight.detach().clone(), conv(x)
    report = el.convert(model, {"0": el.LowRank(rank=16)})
    assert (report.rows[0].d_in, report.rows[0].d_out) == (16, 24)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(conv.weight, weight)

    tied = nn.ModuleList([Conv1D(16, 16), nn.Linear(16, 16)])
    tied[1].weight = tied[0].weight  # the same numbers, but one is the other's transpose
    assert set(el.convert(tied, {"*": "btt"}).skipped) == {"0", "1"}
