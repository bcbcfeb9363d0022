"""Two processes on the CPU hold half of the experts each, and compute what one process does with all of them."""

import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

import einlinear as el
from einlinear.expert_parallel import parallelize_experts

gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        el.Linear(12, 16, "btt", experts=4, active=2),
        el.MixtureMLP(16, 24, "dense", experts=4, active=2),
        el.Linear(16, 5, "low_rank(rank=3)", experts=4, active=1),
    ).double()
    for module in layers.modules():
        if isinstance(module, el.Router):
            nn.init.normal_(module.weight)
    return layers


SPLITS = (20, 40)  # tokens of the first process; with all of them there, the other has none


def half_of_it(rank: int, folder: str, x: Tensor) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for first in SPLITS:
        layers = parallelize_experts(model(), dist.init_device_mesh("cpu", (2,)))
        loss = layers(x[:first] if rank == 0 else x[first:]).square().sum() / 100
        loss.backward()
        results = {"loss": loss.detach()}
        for name, parameter in layers.named_parameters():
            grad = parameter.grad
            results[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            if grad is results[name]:  # whole on both: as DistributedDataParallel does
                dist.all_reduce(grad)
                grad /= 2
        dist.all_reduce(results["loss"])
        results["loss"] /= 2
        if rank == 0:
            assert [tuple(f.to_local().shape) for f in layers[0].factors] == [
                (shape[0] // 2, *shape[1:]) for shape in model()[0].structure.matrix_shapes
            ]
            torch.save(results, f"{folder}/results {first}")
    dist.barrier()  # gloo's threads let go of the tensors before Python shuts down
    dist.destroy_process_group()


@gloo
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    x = torch.randn(40, 12, dtype=torch.float64)
    torch.multiprocessing.spawn(half_of_it, (str(tmp_path), x), nprocs=2)
    whole = model()
    loss = whole(x).square().mean()
    loss.backward()
    wanted = {"loss": loss.detach()} | {name: parameter.grad for name, parameter in whole.named_parameters()}
    for first in SPLITS:
        assert_close(torch.load(tmp_path / f"results {first}", weights_only=True), wanted)


@gloo
def test_what_cannot_be_placed_is_one_sentence(tmp_path: Path) -> None:
    class Three:
        ndim = 1

        def size(self) -> int:
            return 3

    layers = model()
    before = copy.deepcopy(layers.state_dict())
    with pytest.raises(el.StructureError, match=r"the 4 experts of '0' on 3 devices.*a multiple of 3"):
        parallelize_experts(layers, Three())
    assert_close(layers.state_dict(), before)
    Three.ndim = 2
    with pytest.raises(el.StructureError, match="a mesh of 2 dimensions"):
        parallelize_experts(layers, Three())


def a_quarter_of_it(rank: int, folder: str, x: Tensor) -> None:
    """Two processes hold all experts, and two such pairs share each parameter: a step, kept, lost and loaded again."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=4)
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "experts"))
    layers = parallelize_experts(model(), mesh["experts"])
    fully_shard(layers, mesh=mesh["data"])
    optimizer = torch.optim.SGD(layers.parameters(), 0.1)
    (layers(x.chunk(4)[rank]).square().sum() / 50 + el.balance_loss(layers)).backward()
    for parameter in layers.parameters():
        if "experts" not in parameter.device_mesh.mesh_dim_names:  # the pair has it twice
            dist.all_reduce(parameter.grad.to_local(), group=mesh["experts"].get_group())
            parameter.grad.to_local().div_(2)
    optimizer.step()
    el.rebalance(layers)
    dist.checkpoint.save({"model": get_model_state_dict(layers)}, checkpoint_id=f"{folder}/kept")
    with torch.no_grad():
        for tensor in layers.state_dict().values():
            tensor.zero_()
    state = {"model": get_model_state_dict(layers)}
    dist.checkpoint.load(state, checkpoint_id=f"{folder}/kept")
    set_model_state_dict(layers, state["model"])
    whole = get_model_state_dict(layers, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(whole, f"{folder}/results")
    dist.barrier()
    dist.destroy_process_group()


@gloo
@pytest.mark.filterwarnings("ignore")
def test_experts_are_sharded_further_and_checkpointed(tmp_path: Path) -> None:
    x = torch.randn(40, 12, dtype=torch.float64)
    torch.multiprocessing.spawn(a_quarter_of_it, (str(tmp_path), x), nprocs=4)
    whole = model()
    optimizer, loads = torch.optim.SGD(whole.parameters(), 0.1), Counter()
    for part in x.chunk(4):  # routers balance what each process sees, biases what all of them do
        (whole(part).square().sum() / 50 + el.balance_loss(whole)).div(4).backward()
        for name, router in whole.named_modules():
            if isinstance(router, el.Router):
                loads[name] += router.collected.chosen.flatten().bincount(minlength=4).float()
    optimizer.step()
    for name, load in loads.items():
        whole.get_submodule(name).bias += 0.01 * (load.mean() - load).sign()
    assert_close(torch.load(tmp_path / "results", weights_only=True), dict(whole.state_dict()))


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """Of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@gloo
def test_experts_that_are_no_maps_or_placed_already_are_refused(mesh: DeviceMesh, tmp_path: Path) -> None:
    x, routing = torch.randn(3, 12), el.Router(12, 4, 2)(torch.randn(5, 12))
    for axis, why in (("g", "one of the input or output"), ("r", "to itself")):
        structure = el.Structure.parse("g i, g s r i, g o r -> g o", g=3, i=4, r=2, o=2, s=2).route(axis, active=1)
        with pytest.raises(el.StructureError, match=why):
            parallelize_experts(nn.Sequential(el.Linear(12, 6, structure)), mesh)
    layers = nn.Sequential(el.Linear(12, 8, "btt", experts=4, active=2, router=False))
    parallelize_experts(layers, mesh)
    with pytest.raises(el.StructureError, match=r"to 3 tokens.*route the same tokens"):
        layers[0](x, routing)
    with pytest.raises(el.StructureError, match="last dimension must be d_in = 12"):
        layers[0](x[:, 1:], routing)
    with pytest.raises(el.StructureError, match=r"sharded already.*fully_shard after it"):
        parallelize_experts(layers, mesh)
    with pytest.raises(ValueError, match=r"cannot save '0\.factors\.0'.*each process has a share of it"):
        el.save(layers, tmp_path / "model.safetensors")
    x = torch.randn(5, 12)
    assert_close(copy.deepcopy(layers)[0](x, routing), layers[0](x, routing))  # as an average of weights needs
