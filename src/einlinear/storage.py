"""Any module with structured layers to a file and back: safetensors, with the layers' specs as JSON in its header."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from einlinear.fast_path import leave_fast_path
from einlinear.layer import Linear
from einlinear.routing import Router
from einlinear.scaling import spectral
from einlinear.structure import Structure, StructureError

VERSION = 1
KEY = "einlinear"
"""What the header of a file, and the config of a transformers model, hold the specs under."""

ALIGNMENT, CHUNK = 64, 2**24

LayerSpec = dict[str, Any]


def layer_spec(layer: Linear) -> LayerSpec:
    """All that is needed to make a layer again but its parameters, as JSON: `made_layer` reads it.

    `std` is that of the initial draw (`einlinear.spectral`), for readers that do not know the rule.
    """
    structure = layer.structure
    known = {f"factors.{k}" for k in range(len(structure.factors))} | {"gains", "bias"}
    of_experts = ("router.", "shared.") if structure.routed else ()
    if unknown := sorted(name for name in {*layer.state_dict()} - known if not name.startswith(of_experts)):
        raise StructureError(
            f"cannot describe a layer of {structure!r}: it has the parameters {', '.join(unknown)}, "
            f"which the format has no place for"
        )
    routing: LayerSpec = {}
    if structure.routed:
        routing = {"routed": structure.routed, "active": structure.active, "shared": layer.shared is not None}
        routing["router"] = None if layer.router is None else layer.router.options
    return routing | {
        "expression": str(structure),
        "sizes": dict(structure.sizes),
        "d_in": structure.d_in,
        "d_out": structure.d_out,
        "bias": layer.bias is not None,
        "cap": layer.gains is not None,
        "std": [scale.std for scale in spectral(structure)],
    }


def made_layer(spec: LayerSpec, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Linear:
    """The layer that a spec describes, newly drawn.

    Raises:
        StructureError: where the spec is none.
    """
    try:
        structure = Structure.parse(spec["expression"], **spec["sizes"]).pad(d_in=spec["d_in"], d_out=spec["d_out"])
        options: LayerSpec = {"cap": spec["cap"]}
        if axis := spec.get("routed"):
            structure, experts = structure.route(axis, active=spec["active"]), structure.sizes[axis]
            options |= {"shared": spec["shared"], "router": False}
            if (router := spec["router"]) is not None:
                where: LayerSpec = {"device": device, "dtype": dtype}
                options["router"] = Router(structure.d_in, experts, spec["active"], **router, **where)
        return Linear(structure.d_in, structure.d_out, structure, spec["bias"], device, dtype, **options)
    except (KeyError, TypeError) as error:
        raise StructureError(f"cannot make a layer of the spec {spec!r}: {error!r}") from None


def layer_specs(model: nn.Module) -> dict[str, LayerSpec]:
    """The spec of each structured layer of a model, by each of its names."""
    named = list(model.named_modules(remove_duplicate=False))
    inside = {module.shared for _, module in named if isinstance(module, Linear)}  # parts of other layers
    return {n: layer_spec(module) for n, module in named if isinstance(module, Linear) and module not in inside}


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a model's parameters and buffers, and the specs of its structured layers, to one safetensors file.

    Nothing is pickled: of everything but structured layers the file holds no code and no
    architecture, so `load` asks for a module to fill. Tensors under several names are written
    once. The file appears when it is complete; one that was there before is replaced then.

    Raises:
        ValueError: for a layer by itself, and for a tensor that is on the meta device, sharded over processes or of a
            type without a place in the format; its name is told.
        FileNotFoundError: where there is no such folder.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot save to '{path}': there is no folder '{path.parent}'; make it first")
    if isinstance(model, Linear):
        raise ValueError(
            f"cannot save a layer by itself to '{path}': load could not put it in the place of another; "
            f"save torch.nn.Sequential(layer)"
        )
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"cannot save '{name}' of the {type(model).__name__}: it is a {type(value)}, no tensor")
        if value.is_meta:
            raise ValueError(
                f"cannot save '{name}' of the {type(model).__name__}: it is on the meta device; load it first"
            )
        if isinstance(value, DTensor):
            raise ValueError(
                f"cannot save '{name}' of the {type(model).__name__}: each process has a share of it; save by "
                f"torch.distributed.checkpoint, or gather it by get_model_state_dict(model, options="
                f"StateDictOptions(full_state_dict=True)), load that into a model of one process and save that"
            )
        if value.dtype == torch.complex128:
            raise ValueError(
                f"cannot save '{name}' of the {type(model).__name__}: safetensors has no type for complex128; "
                f"model.to(torch.complex64) has one"
            )
        same = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else (name,)
        if same in first:
            aliases[name] = first[same]
        else:
            first[same] = name
            tensors[name] = value.detach().contiguous()
    header = {"version": VERSION, "layers": layer_specs(model), "aliases": aliases}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(_apart(tensors), partial, metadata={"format": "pt", KEY: json.dumps(header)})
        align(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], model: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """Fills a module with what `save` wrote, in place, and returns it.

        with torch.device("meta"):
            model = MyModel()
        el.load("model.safetensors", model)

    The layers that were structured are put where their names say, whatever stands there; all else
    must be of the architecture that was saved. The module may be on the meta device: its dense
    weights are never made. Parameters come in the dtype they were saved in. If anything does not
    fit, the module is left as it was.

    Raises:
        ValueError: for a file that `save` did not write or that is damaged, and for a tensor that
            is missing, of another shape, or not the module's; its name is told.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = _header(path, file.metadata())
            aliases = cast(dict[str, str], header["aliases"])
            layers = _layers(path, model, header["layers"])
            wanted = _wanted(path, model, layers)
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _compare(path, model, wanted, {**shapes, **{name: shapes.get(of) for name, of in aliases.items()}})
            _compare_ties(path, model, layers, aliases)
            tensors = {name: aligned(file.get_tensor(name)) for name in shapes}
    except SafetensorError as error:
        raise ValueError(f"cannot load '{path}': it is damaged, or no safetensors file ({error})") from None
    kept = {name: getattr(model.get_submodule(name), "training", True) for name in layers}
    for name, layer in layers.items():
        model.set_submodule(name, layer.train(kept[name]))
    for name, tensor in tensors.items():
        _put(model, name, tensor)
    for name, of in aliases.items():
        owner, local = _owner(model, name)
        setattr(owner, local, getattr(*_owner(model, of)))
    leave_fast_path(model)
    return model


def align(path: Path) -> None:
    """Lays the tensors of a safetensors file out at multiples of 64 bytes, as far as their sizes allow.

    They are used from where they lie in the file, and a matmul of numbers that lie elsewhere in a
    cache line may be rounded differently: a model would not give the same outputs, to the last bit,
    as the one that was saved. The format knows no gaps, so tensors of odd sizes come last.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        metadata = {name: header.pop(name) for name in ("__metadata__",) if name in header}
        places = {name: tensor["data_offsets"] for name, tensor in header.items()}
        order = sorted(places, key=lambda name: ((places[name][1] - places[name][0]) % ALIGNMENT > 0, places[name]))
        position = 0
        for name in order:
            length = places[name][1] - places[name][0]
            header[name] = {**header[name], "data_offsets": [position, position + length]}
            position += length
        text = json.dumps({**metadata, **{name: header[name] for name in order}}, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        partial = path.with_name(f".{path.name}.{os.getpid()}.aligned")
        try:
            with partial.open("wb") as out:
                out.write(len(text).to_bytes(8, "little") + text)
                for name in order:
                    start, end = places[name]
                    file.seek(8 + size + start)
                    for at in range(start, end, CHUNK):
                        out.write(file.read(min(CHUNK, end - at)))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied where it does not lie at a multiple of 64 bytes in this machine's memory."""
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT else tensor


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those that share memory without being the same copied: the format knows no views."""
    owners: dict[int, str] = {}
    return {
        name: tensor if owners.setdefault(tensor.untyped_storage().data_ptr(), name) == name else tensor.clone()
        for name, tensor in tensors.items()
    }


def _header(path: object, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        header = json.loads((metadata or {})[KEY])
        known = header["version"] == VERSION and isinstance(header["layers"], dict)
        known = known and isinstance(header["aliases"], dict)
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise ValueError(
            f"cannot load '{path}': its header describes no structured layers that this version can read; "
            f"einlinear.save writes such files"
        )
    return cast(dict[str, Any], header)


def _layers(path: object, model: nn.Module, specs: Mapping[str, LayerSpec]) -> dict[str, Linear]:
    """The layers to put in, without storage; a module under several names is replaced by one."""
    made: dict[nn.Module, Linear] = {}
    layers = {}
    for name, spec in specs.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"cannot load '{path}': the {type(model).__name__} has no layer '{name}'") from None
        layers[name] = made.setdefault(module, made_layer(spec, "meta"))
    return layers


def _wanted(path: object, model: nn.Module, layers: Mapping[str, Linear]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the model once it has these layers."""
    dense = tuple(f"{name}." for name in layers)
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items() if not name.startswith(dense)}
    for name, layer in layers.items():
        wanted |= {f"{name}.{local}": tuple(tensor.shape) for local, tensor in layer.state_dict().items()}
    held = {*model.state_dict()}
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in held:
            raise ValueError(
                f"cannot load '{path}': the buffer '{name}' is not saved, and the {type(model).__name__} has it on "
                f"the meta device; make the module elsewhere"
            )
    return wanted


def _compare(path: object, model: nn.Module, wanted: Mapping[str, object], found: Mapping[str, object]) -> None:
    for name in sorted({*wanted} ^ {*found}):
        which = "the file has no tensor" if name in wanted else f"the {type(model).__name__} has no tensor"
        raise ValueError(f"cannot load '{path}': {which} '{name}'")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(f"cannot load '{path}': the tensor '{name}' has the shape {found[name]}, expected {shape}")


def _compare_ties(path: object, model: nn.Module, layers: Mapping[str, Linear], aliases: Mapping[str, str]) -> None:
    """Refuses a module that shares a parameter which the file has twice: one of the two would be lost."""
    dense = tuple(f"{name}." for name in layers)
    first: dict[Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        other = first.setdefault(tensor, name)
        if other != name and not name.startswith(dense) and aliases.get(name, name) != aliases.get(other, other):
            raise ValueError(
                f"cannot load '{path}': the {type(model).__name__} shares one tensor between '{other}' and '{name}', "
                f"and the file has two"
            )


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, local = _owner(model, name)
    old = getattr(owner, local)
    is_parameter = isinstance(old, nn.Parameter)
    setattr(owner, local, nn.Parameter(tensor, requires_grad=old.requires_grad) if is_parameter else tensor)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, local = name.rpartition(".")
    return model.get_submodule(path), local
