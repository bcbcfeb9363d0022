"""Any module to a file and back: what is written, what is refused, and that nothing is left half done."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import einlinear as el
from einlinear.storage import align, layer_spec, made_layer


class Model(nn.Module):
    """A tied head, a buffer, odd sizes, two layers with one weight, and one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.up, self.down = nn.Linear(16, 37), nn.Linear(37, 16, bias=False)
        self.twins = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.twins[1].weight = self.twins[0].weight
        self.again = self.up
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.down(self.again(x).relu())
        for twin in self.twins:
            x = x + twin(x).tanh()
        return self.head(self.norm(x))


TOKENS = torch.arange(50)


def made() -> nn.Module:
    torch.manual_seed(1)
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def model() -> nn.Module:
    model = made()
    el.convert(model, {"up": "tensor_train(rank=3)", "*": "btt(rank=2)"})
    model(TOKENS)
    return model.eval()


@pytest.mark.parametrize("skeleton", ["cpu", "meta", "converted"])
def test_what_is_saved_is_loaded_to_the_same_bits(model: nn.Module, tmp_path: Path, skeleton: str):
    el.save(model, tmp_path / "model.safetensors")
    with torch.device("meta" if skeleton == "meta" else "cpu"):
        other = Model().eval()
    if skeleton == "converted":
        el.convert(other, {"*": "low_rank(rank=5)"}, weights="init")
    assert el.load(tmp_path / "model.safetensors", other) is other
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert other.head.weight is other.embedding.weight
    assert other.twins[0].factors[0] is other.twins[1].factors[0]
    assert other.up is other.again
    assert repr(other) == repr(model)
    assert {p.data_ptr() % 64 for p in other.parameters()} == {0}


def test_one_file_without_pickle_or_copies(model: nn.Module, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    el.save(model, path)
    assert [*tmp_path.iterdir()] == [path]
    tensors = load_file(path)
    assert sum(t.numel() for t in tensors.values()) == sum(t.numel() for t in [*model.parameters(), *model.buffers()])
    for name, tensor in tensors.items():
        assert torch.equal(tensor, model.state_dict()[name])
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["einlinear"])
    assert {*header["layers"]} == {"up", "down", "again", "twins.0", "twins.1"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path):
    model = nn.Sequential(el.Linear(16, 24, "btt", dtype=dtype))
    el.save(model, tmp_path / "m")
    other = el.load(tmp_path / "m", nn.Sequential(nn.Linear(16, 24)))
    assert other[0].factors[0].dtype == dtype
    assert torch.equal(other[0].factors[1], model[0].factors[1])


def test_a_layer_by_itself_and_a_folder_that_is_not_there_are_refused(tmp_path: Path):
    layer = el.Linear(16, 24, "btt")
    with pytest.raises(ValueError, match=r"save torch.nn.Sequential\(layer\)"):
        el.save(layer, tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        el.save(nn.Sequential(layer), tmp_path / "none" / "m")


def test_a_dtype_without_a_place_in_the_format_is_refused(tmp_path: Path):
    model = nn.Sequential(el.Linear(16, 24, "btt", dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"cannot save '0.bias' .* no type for complex128"):
        el.save(model, tmp_path / "m")
    assert not [*tmp_path.iterdir()]


def test_a_spec_makes_the_layer_again(layer: el.Linear):
    again = made_layer(json.loads(json.dumps(layer_spec(layer))))
    assert repr(again) == repr(layer)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(3, layer.in_features)
    assert torch.equal(again(x), layer(x))


def test_a_layer_with_more_than_the_format_knows_is_refused():
    layer = el.Linear(16, 16, "btt")
    layer.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(el.StructureError, match="the parameters scale"):
        layer_spec(layer)


def test_tensors_lie_at_multiples_of_a_cache_line(tmp_path: Path):
    tensors = {
        "a": torch.randn(3),
        "b": torch.randn(64),
        "c": torch.randn(2, 32),
        "d": torch.randn(0),
        "e": torch.ones(1),
    }
    path = tmp_path / "odd.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    align(path)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert (8 + size) % 64 == 0 and header["__metadata__"] == {"format": "pt"}
    assert all(header[name]["data_offsets"][0] % 64 == 0 for name in "bc")


# What does not fit is refused by name, and nothing is changed


def rewritten(path: Path, change: str) -> None:
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata["einlinear"])
    if change == "shape":
        tensors["down.factors.1"] = tensors["down.factors.1"][:-1].contiguous()
    elif change == "missing":
        del tensors["down.factors.1"]
    elif change == "extra":
        tensors["other"] = torch.ones(1)
    elif change == "layer":
        header["layers"]["nowhere"] = header["layers"]["up"]
    elif change == "spec":
        del header["layers"]["up"]["expression"]
    elif change == "torn":
        tensors["head.weight"] = tensors["embedding.weight"] + 1
        del header["aliases"]["head.weight"]
    elif change == "future":
        header["version"] = 99
    metadata["einlinear"] = json.dumps(header)
    save_file(tensors, path, metadata={} if change == "plain" else metadata)
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif change == "garbage":
        path.write_bytes(b"no tensors at all")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("shape", "the tensor 'down.factors.1' has the shape"),
        ("missing", "the file has no tensor 'down.factors.1'"),
        ("extra", "the Model has no tensor 'other'"),
        ("layer", "the Model has no layer 'nowhere'"),
        ("spec", "KeyError"),
        ("torn", "shares one tensor between 'embedding.weight' and 'head.weight'"),
        ("future", "describes no structured layers that this version can read"),
        ("plain", "describes no structured layers that this version can read"),
        ("truncated", "it is damaged"),
        ("garbage", "it is damaged"),
    ],
)
def test_what_does_not_fit_is_refused(model: nn.Module, tmp_path: Path, change: str, says: str):
    path = tmp_path / "model.safetensors"
    el.save(model, path)
    rewritten(path, change)
    other = Model()
    before, modules = copy.deepcopy(other.state_dict()), dict(other.named_modules())
    with pytest.raises(ValueError, match="cannot") as raised:
        el.load(path, other)
    assert says in str(raised.value)
    assert dict(other.named_modules()) == modules
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in before.items())


def test_no_file_is_an_error_of_its_own(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        el.load(tmp_path / "nothing", Model())


def test_a_buffer_that_no_file_has_must_not_stay_on_the_meta_device(tmp_path: Path):
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)
            self.register_buffer("positions", torch.arange(4), persistent=False)

    model = Positions()
    el.convert(model, {"layer": "btt"})
    el.save(model, tmp_path / "m")
    with torch.device("meta"):
        skeleton = Positions()
    with pytest.raises(ValueError, match="buffer 'positions'"):
        el.load(tmp_path / "m", skeleton)


def test_a_failed_save_leaves_the_old_file(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "model.safetensors"
    path.write_text("the old one")

    def fail(path: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("einlinear.storage.align", fail)
    with pytest.raises(OSError, match="no space left"):
        el.save(model, path)
    assert [*tmp_path.iterdir()] == [path] and path.read_text() == "the old one"
    with pytest.raises(ValueError, match="on the meta device"):
        el.save(nn.Sequential(el.Linear(4, 4, "btt", device="meta")), path)


def test_a_structured_layer_has_no_weight():
    """PEFT would merge into a computed one, and return a wrong model."""
    assert not hasattr(el.Linear(4, 4, "btt"), "weight")


class Attention(nn.Module):
    """As timm writes it: one layer for queries, keys and values, whose outputs are unbound."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class VisionTransformer(nn.Module):
    """A tiny one in timm's style: patches by a convolution, a class token, fused queries, keys and values."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, width))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "attn": Attention(width, 4),
                    "norm2": nn.LayerNorm(width),
                    "mlp": nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
                }
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = x + block["attn"](block["norm1"](x))
            x = x + block["mlp"](block["norm2"](x))
        return self.head(x[:, 0])


def test_a_vision_transformer_in_the_style_of_timm_is_compressed_saved_and_loaded(tmp_path: Path):
    dense, images = VisionTransformer().eval(), torch.randn(8, 3, 16, 16)
    expected = dense(images)
    model = copy.deepcopy(dense)
    _, report = el.compress(model, "low_rank", 0.6, calibration=[images], exclude_modules=["head"])
    assert isinstance(model.blocks[0]["attn"].qkv, el.Linear) and isinstance(model.head, nn.Linear)
    assert report.parameters_after < report.parameters_before
    assert (model(images) - expected).norm() < 0.7 * expected.norm()
    el.save(model, tmp_path / "vit.safetensors")
    with torch.device("meta"):
        skeleton = VisionTransformer().eval()
    el.load(tmp_path / "vit.safetensors", skeleton)
    assert torch.equal(skeleton(images), model(images))
