"""Ways of training in several processes, each measured against the bare loop in one process.

`python tests/distributed/ways.py OUT.json` writes what each process measures. Four processes train one small model for
20 steps. Its sizes do not divide by four, so that shards are uneven and some are empty; one layer is frozen and joins
at step 10; after step 14, with SGDSaI after step 8 as well, everything is saved, built anew from other initial weights,
loaded, and goes on.
"""

import copy
import json
import os
import sys
import tempfile
import warnings
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.functional import cross_entropy

from sgd_sai import AdaHessian, Adan, MuonSaI, SGDSaI
from sgd_sai.internals.sharding import register_fsdp1

WORLD, STEPS, UNFREEZE, SAVES, BATCH, WORDS = 4, 20, 10, (8, 14), 8, 11
OPTIMIZERS = {
    "SGDSaI": partial(SGDSaI, lr=2e-3, weight_decay=0.1),
    "Adan": partial(Adan, lr=1e-2, weight_decay=0.02),
    "AdaHessian": partial(AdaHessian, lr=0.02, eps=1e-2),
}


class Block(nn.Module):
    "Two linear layers with a residual connection."

    def __init__(self, width, hidden):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.LayerNorm(width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    "Eleven words, ten numbers each; three classes. `late` is frozen at first."

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.block, self.late, self.head = (
            nn.Embedding(WORDS, 10),
            Block(10, 12),
            Block(10, 8),
            nn.Linear(10, 3),
        )
        self.gain = nn.Parameter(torch.ones(1))
        self.late.requires_grad_(False)

    def forward(self, x):
        return self.head(self.late(self.block(self.embed(x))).mean(1)) * self.gain

    @staticmethod
    def batch(step):
        g = torch.Generator().manual_seed(1000 + step)
        x = torch.randint(WORDS, (BATCH, 5), generator=g)
        return x, (x.sum(1) // 18).clamp(max=2)


# --- ways -------------------------------------------------------------------------------------------------------------


class Way:
    "One process. Subclasses say what they wrap, which part of a batch a process sees, and how they save."

    graph_options = {}  # of AdaHessian
    without = {}  # optimizers that are not tried, and why

    def __init__(self, rank=0):
        self.rank, self.world = rank, dist.get_world_size() if dist.is_initialized() else 1

    def build(self, seed):
        return Net(seed)

    def batch(self, step):
        return Net.batch(step)

    def wrap(self, net):
        return net

    def optimizer(self, make, model):
        return make((clean(name), p) for name, p in model.named_parameters())

    def part(self, batch):
        return batch

    def unfreeze(self, model):
        "Let `late` train; returns the model to go on with."
        for name, p in model.named_parameters():
            if "late" in name:
                p.requires_grad_(True)
        return model

    def loss(self, model, batch, graph):
        "Forward and backward; the loss over the whole batch."
        x, y = self.part(batch)
        loss = cross_entropy(model(x), y)
        loss.backward(create_graph=graph)
        return loss.detach()

    def step(self, opt, model):
        opt.step()

    def save(self, model, opt, folder):
        torch.save((model.state_dict(), opt.state_dict()), f"{folder}/{self.rank}.pt")

    def load(self, model, opt, folder):
        weights, state = torch.load(f"{folder}/{self.rank}.pt")
        model.load_state_dict(weights)
        opt.load_state_dict(state)

    def scales(self, opt):
        return {clean(name): value for name, value in opt.scales().items()} if hasattr(opt, "scales") else {}


def clean(name):
    return name.replace("module.", "").replace("_fsdp_wrapped_", "").replace("_orig_mod.", "")


class DataParallel(Way):
    "Each process sees a part of every batch."

    def part(self, batch):
        return tuple(column.chunk(self.world)[self.rank] for column in batch)

    def loss(self, model, batch, graph):
        loss = super().loss(model, batch, graph)
        dist.all_reduce(loss)
        return loss / self.world


class DDP(DataParallel):
    graph_options = dict(average_gradients=True)

    def wrap(self, net):
        return nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)

    def unfreeze(self, model):
        return self.wrap(super().unfreeze(model.module))  # DDP averages what required a gradient when it was made

    def loss(self, model, batch, graph):
        if not graph:
            return super().loss(model, batch, graph)
        with model.no_sync():
            return super().loss(model, batch, graph)


class Accumulated(DDP):
    def loss(self, model, batch, graph):
        x, y = self.part(batch)
        with model.no_sync():
            first = cross_entropy(model(x[:1]), y[:1]) / 2
            first.backward(create_graph=graph)
        with model.no_sync() if graph else nullcontext():
            second = cross_entropy(model(x[1:]), y[1:]) / 2
            second.backward(create_graph=graph)
        loss = (first + second).detach()
        dist.all_reduce(loss)
        return loss / self.world


class ZeroRedundancy(DDP):
    "Each process keeps the state of some of the parameters; they stay whole."

    def optimizer(self, make, model):
        from torch.distributed.optim import ZeroRedundancyOptimizer

        self.names = {p: clean(name) for name, p in model.named_parameters()}
        return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=make.func, **make.keywords)

    without = {"AdaHessian": "each process has other parameters, so that their curvatures cannot be averaged"}

    def save(self, model, opt, folder):
        opt.consolidate_state_dict(to=0)
        if self.rank == 0:
            super().save(model, opt, folder)
        dist.barrier()

    def load(self, model, opt, folder):
        weights, state = torch.load(f"{folder}/0.pt")
        model.load_state_dict(weights)
        opt.load_state_dict(state)

    def scales(self, opt):
        found = [None] * self.world
        dist.all_gather_object(
            found, {self.names[p]: state["gsnr"] for p, state in opt.optim.state.items() if "gsnr" in state}
        )
        together = {name: G for each in found for name, G in each.items()}
        assert len(together) == sum(map(len, found))  # nobody's twice
        return together


class Sharded(DataParallel):
    "FSDP2, saved with torch.distributed.checkpoint."

    options = StateDictOptions()

    def mesh(self):
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh("cpu", (self.world,))

    def wrap(self, net):
        from torch.distributed.fsdp import fully_shard

        mesh = self.mesh()
        for part in (net.block, net.late):
            fully_shard(part, mesh=mesh)
        return fully_shard(net, mesh=mesh)

    def save(self, model, opt, folder):
        weights, state = get_state_dict(model, opt, options=self.options)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)

    def load(self, model, opt, folder):
        weights, state = get_state_dict(model, opt, options=self.options)
        both = {"model": weights, "optimizer": state}
        dcp.load(both, checkpoint_id=folder)
        set_state_dict(
            model, opt, model_state_dict=both["model"], optim_state_dict=both["optimizer"], options=self.options
        )


class Hybrid(Sharded):
    "Saved in the flat form, that large trainers use."

    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def mesh(self):
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh("cpu", (2, self.world // 2), mesh_dim_names=("replicate", "shard"))


class TensorParallel(Sharded):
    "All processes see the whole batch; matrices are cut by rows or columns."

    def wrap(self, net):
        return self.parallel(net, self.mesh())

    def parallel(self, net, mesh):
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
        from torch.distributed.tensor.placement_types import Replicate

        plan = {
            f"{block}.{layer}": style()
            for block in ("block", "late")
            for layer, style in (("up", ColwiseParallel), ("down", RowwiseParallel))
        }
        plan["head"] = ColwiseParallel(output_layouts=Replicate())
        return parallelize_module(net, mesh, plan)

    part = Way.part
    loss = Way.loss


class TensorAndData(TensorParallel):
    "Two groups of two: tensor parallel within, FSDP2 between."

    def wrap(self, net):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2, self.world // 2), mesh_dim_names=("data", "tensor"))
        self.data = mesh["data"]
        net = self.parallel(net, mesh["tensor"])
        for part in (net.block, net.late):
            fully_shard(part, mesh=self.data)
        return fully_shard(net, mesh=self.data)

    def part(self, batch):
        return tuple(column.chunk(2)[self.data.get_local_rank()] for column in batch)

    loss = DataParallel.loss


class FSDP1(DataParallel):
    "The older wrapper, with its original parameters."

    options = dict(use_orig_params=True)

    def wrap(self, net):
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        return FullyShardedDataParallel(
            net, auto_wrap_policy=ModuleWrapPolicy({Block}), device_id=torch.device("cpu"), **self.options
        )

    def optimizer(self, make, model):
        opt = make((clean(name), p) for name, p in model.named_parameters())
        if make.func is SGDSaI:
            register_fsdp1(opt, model)
        return opt

    def save(self, model, opt, folder):
        if not isinstance(
            opt, SGDSaI
        ):  # on a CPU, PyTorch (2.14, 2.15) gives all averages of a parameter the content of one of them, AdamW's too
            return super().save(model, opt, folder)
        weights, state = model.state_dict(), type(model).optim_state_dict(model, opt)  # gathered by all
        if self.rank == 0:
            torch.save((weights, state), f"{folder}/whole.pt")
        dist.barrier()

    def load(self, model, opt, folder):
        if not isinstance(opt, SGDSaI):
            return super().load(model, opt, folder)
        weights, state = torch.load(f"{folder}/whole.pt")
        model.load_state_dict(weights)
        opt.load_state_dict(type(model).optim_state_dict_to_load(model, opt, state))


class HybridFSDP1(FSDP1):
    @property
    def options(self):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import ShardingStrategy

        return dict(
            use_orig_params=True,
            sharding_strategy=ShardingStrategy.HYBRID_SHARD,
            device_mesh=init_device_mesh("cpu", (2, self.world // 2)),
        )


class AccelerateFSDP2(Sharded):
    "accelerate's: the optimizer is made before, and `prepare` puts sharded parameters in the place of its own."

    without = {"AdaHessian": "FSDP leaves no graph behind"}

    def accelerator(self, **plugins):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        os.environ.update(
            RANK=str(self.rank),
            LOCAL_RANK=str(self.rank),
            WORLD_SIZE=str(self.world),
            MASTER_ADDR="localhost",
            MASTER_PORT="0",
        )
        AcceleratorState._reset_state()
        return Accelerator(cpu=True, **plugins)

    def wrap(self, net):
        from accelerate import FullyShardedDataParallelPlugin
        from accelerate.utils import DistributedType

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
        )
        self.prepares = self.accelerator(fsdp_plugin=plugin)
        self.prepares.state.distributed_type, self.prepares.state.fsdp_plugin = (
            DistributedType.FSDP,
            plugin,
        )  # accelerate would offer it on GPUs only
        return net

    def optimizer(self, make, model):
        prepared, opt = self.prepares.prepare(model, make(model.named_parameters()))
        assert prepared is model and all(hasattr(p, "to_local") for group in opt.param_groups for p in group["params"])
        return opt.optimizer


class AccelerateDDP(AccelerateFSDP2, DDP):
    graph_options, without = DDP.graph_options, {}
    unfreeze, loss, optimizer, save, load = DDP.unfreeze, DDP.loss, DDP.optimizer, Way.save, Way.load

    def wrap(self, net):
        from accelerate import DistributedDataParallelKwargs

        return self.accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]).prepare(
            net
        )


WAYS = {
    "DistributedDataParallel": DDP,
    "DistributedDataParallel, two micro-batches": Accumulated,
    "DistributedDataParallel, ZeroRedundancyOptimizer": ZeroRedundancy,
    "FSDP2 (fully_shard)": Sharded,
    "FSDP2, hybrid mesh 2 x 2": Hybrid,
    "tensor parallel": TensorParallel,
    "tensor parallel and FSDP2, mesh 2 x 2": TensorAndData,
    "FSDP1, original parameters": FSDP1,
    "FSDP1, original parameters, hybrid": HybridFSDP1,
    "accelerate, DistributedDataParallel": AccelerateDDP,
    "accelerate, FSDP2": AccelerateFSDP2,
}


class Refused(Exception):
    "An optimizer that says in words why it cannot be made; in all processes alike."


# --- measuring --------------------------------------------------------------------------------------------------------


def run(way, make, steps, start=None, seed=0, unfrozen=False, folder=None, saves=()):
    "Losses of the steps, and the scales by name. With `start` the run goes on from that step's checkpoint in `folder`."
    model = way.wrap(way.build(seed))
    if unfrozen:
        model = way.unfreeze(model)
    try:
        opt = way.optimizer(make, model)
    except ValueError as e:
        raise Refused(e) from None
    if start:
        way.load(model, opt, f"{folder}/{start}")
    graph, losses = make.func is AdaHessian, []
    for step in range(start or 0, steps):
        if step == UNFREEZE:
            model = way.unfreeze(model)
        losses.append(float(way.loss(model, way.batch(step), graph)))
        way.step(opt, model)
        opt.zero_grad()
        if step + 1 in saves:
            Path(f"{folder}/{step + 1}").mkdir(parents=True, exist_ok=True)
            if dist.is_initialized():
                dist.barrier()
            way.save(model, opt, f"{folder}/{step + 1}")
    return losses, way.scales(opt)


@cache
def alone_with(name):
    "One process with this optimizer, and nobody to average with."
    return run(
        Way(), OPTIMIZERS[name] if name != "AdaHessian" else partial(OPTIMIZERS[name], process_group=False), STEPS
    )


def measure_way(way, name, folder):
    "What one process finds; `folder` is the same for all."
    make = OPTIMIZERS[name]
    if name == "AdaHessian":
        make = partial(make, **way.graph_options)
    alone, expected = alone_with(name)
    saves = SAVES if name == "SGDSaI" else SAVES[1:]
    losses, scales = run(way, make, STEPS, folder=folder, saves=saves)
    found = {"loss": max(abs(a - b) for a, b in zip(losses, alone, strict=True))}
    resumed = [run(way, make, STEPS, start=at, seed=5, unfrozen=at > UNFREEZE, folder=folder) for at in saves]
    found["resume"] = all(
        again == losses[at:] and same == scales for at, (again, same) in zip(saves, resumed, strict=True)
    )
    found["fell"] = sum(losses[:5]) / 5 - sum(losses[-5:]) / 5
    if name == "SGDSaI":
        assert scales.keys() == expected.keys(), (sorted(scales), sorted(expected))
        found["G"] = max(abs(scales[key] / expected[key] - 1) for key in expected)
        found["unfreeze"] = sum("late" in key for key in scales) == 6
    return found


# --- further checks in the same processes -----------------------------------------------------------------------------


def first_step(way, make=OPTIMIZERS["SGDSaI"]):
    "A wrapped model with the gradients of its first batch, and its optimizer."
    model = way.wrap(Net())
    opt = way.optimizer(make, model)
    way.loss(model, Net.batch(0), False)
    return model, opt


def messages(way):
    "How many collectives of any kind a first step takes, and how many the next ones."
    model, opt = first_step(way)
    counts = []
    for _ in range(2):
        with CommDebugMode() as seen:
            opt.step()
        counts.append(seen.get_total_counts())
    return counts


def error_of(f):
    try:
        f()
    except (RuntimeError, ValueError) as e:
        return str(e)
    return "no error"


def not_finite(rank):
    "One entry of one process is not a number: nobody steps."
    model, opt = first_step(Sharded(rank))
    if rank == 1:
        model.embed.weight.grad.to_local()[0, 0] = float("nan")
    before = model.head.weight.full_tensor().clone()
    return error_of(opt.step), torch.equal(before, model.head.weight.full_tensor()) and not opt.state


def refusals(rank):
    "The errors for flat parameters, unregistered shards and flat partitions."

    class Flat(FSDP1):
        options = dict(use_orig_params=False)

    flat = Flat(rank)
    flat_model = flat.wrap(Net().requires_grad_(True))
    fsdp1 = FSDP1(rank)
    _, unregistered = first_step(fsdp1, partial(type("Unregistered", (SGDSaI,), {}), lr=1e-3))

    model = Net()
    opt = SGDSaI(model.parameters())
    for group in opt.param_groups:  # as the partitions of ZeRO's stages 1 and 2
        vector = torch.cat([p.detach().flatten() for p in group["params"]])
        part = nn.Parameter(vector.tensor_split(WORLD)[rank].clone())
        part.grad = torch.randn_like(part)
        group["params"] = [part]
    return {
        "flat": error_of(lambda: SGDSaI(flat_model.parameters())),
        "shards": error_of(unregistered.step),
        "partition": error_of(opt.step),
        "muon": error_of(lambda: MuonSaI(fsdp1.wrap(Net()))),
    }


def train_on(way, model, opt, first, steps):
    losses = []
    for step in range(first, first + steps):
        losses.append(float(way.loss(model, Net.batch(step), False)))
        opt.step()
        opt.zero_grad()
    return losses


def one_rank_differs(rank):
    """In a mesh of 2 x 2, what every process says if one of them has another order; and scales of tensors that are
    sharded along one dimension each, which stand in another order in two processes: that is no difference.

    If each took its groups in the order of its tensors, all four would wait for each other."""
    way = TensorAndData(rank)
    model = way.wrap(Net())
    pairs = list(model.named_parameters())
    opt = SGDSaI(pairs[::-1] if rank == 3 else pairs)
    way.loss(model, Net.batch(0), False)
    said = error_of(opt.step)

    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = next(p.device_mesh for _, p in pairs if p.device_mesh.ndim == 2)
    each = {}
    for name, placements in (("by rows", [Shard(0), Replicate()]), ("by columns", [Replicate(), Shard(1)])):
        torch.manual_seed(0)
        each[name] = nn.Parameter(distribute_tensor(torch.randn(6, 6), mesh, placements))
        each[name].grad = each[name].detach().clone()
    opt = SGDSaI(list(each.items())[:: -1 if rank in (1, 2) else 1])
    opt.step()
    return said, opt.scales()


def other_numbers(rank, folder):
    """State of four processes in two, in one, and the other way round.

    For each the largest difference of losses, and whether the scales are the same."""
    four = Sharded(rank)
    model, opt = first_step(four)
    opt.zero_grad()
    train_on(four, model, opt, 0, 5)
    four.save(model, opt, f"{folder}/four")
    complete = get_state_dict(model, opt, options=StateDictOptions(full_state_dict=True))
    straight = train_on(four, model, opt, 5, 5)
    found = {}

    alone = Way()  # from the gathered state
    one = Net(7)
    single = alone.optimizer(OPTIMIZERS["SGDSaI"], one)
    if rank == 0:  # only the first process is given the whole
        set_state_dict(
            one,
            single,
            model_state_dict=complete[0],
            optim_state_dict=complete[1],
            options=StateDictOptions(full_state_dict=True),
        )
        found["one"] = (
            max(abs(a - b) for a, b in zip(train_on(alone, one, single, 5, 5), straight, strict=True)),
            single.scales() == four.scales(opt),
        )

    pair = dist.new_group([0, 1])
    if rank < 2:
        from torch.distributed.device_mesh import DeviceMesh

        two = Sharded(rank)
        two.world, two.mesh = 2, lambda: DeviceMesh.from_group(pair, "cpu")
        small = two.wrap(Net(3))
        half = two.optimizer(OPTIMIZERS["SGDSaI"], small)
        weights, state = get_state_dict(small, half)
        both = {"model": weights, "optimizer": state}
        dcp.load(both, checkpoint_id=f"{folder}/four", process_group=pair)
        set_state_dict(small, half, model_state_dict=both["model"], optim_state_dict=both["optimizer"])
        losses = []
        for step in range(5, 10):
            x, y = (column.chunk(2)[rank] for column in Net.batch(step))
            loss = cross_entropy(small(x), y)
            loss.backward()
            half.step()
            half.zero_grad()
            total = loss.detach()
            dist.all_reduce(total, group=pair)
            losses.append(float(total) / 2)
        found["two"] = max(abs(a - b) for a, b in zip(losses, straight, strict=True)), half.scales() == four.scales(opt)
    dist.barrier()

    whole = Net()  # state of one process in four
    plain = alone.optimizer(OPTIMIZERS["SGDSaI"], whole)
    train_on(alone, whole, plain, 0, 5)
    spread = four.wrap(copy.deepcopy(whole))
    new = four.optimizer(OPTIMIZERS["SGDSaI"], spread)
    new.load_state_dict(plain.state_dict())
    expected = train_on(alone, whole, plain, 5, 5)
    found["four"] = (
        max(abs(a - b) for a, b in zip(train_on(four, spread, new, 5, 5), expected, strict=True)),
        new.scales() == plain.scales(),
    )
    return found


def asked_before_training(rank):
    "A new optimizer that has shown its state to a checkpoint trains as one that has not."
    way, losses = Sharded(rank), []
    for ask in (False, True):
        model = way.wrap(Net())
        opt = way.optimizer(OPTIMIZERS["SGDSaI"], model)
        if ask:
            _, state = get_state_dict(model, opt)
            assert state["state"] and not opt.scales()
        losses.append(train_on(way, model, opt, 0, 5))
    return losses[0] == losses[1]


def same_as_alone(way, make):
    "Largest difference of losses between one process and several, over 10 steps."
    alone, net = Way(), Net()
    expected = train_on(alone, net, make(net), 0, 10)
    model = way.wrap(Net())
    return max(abs(a - b) for a, b in zip(train_on(way, model, make(model), 0, 10), expected, strict=True))


def restarting(model, made):
    made.append(Adan(model.named_parameters(), lr=1e-2, restart_radius=0.05))
    return made[-1]


def restarts(rank):
    "The same with restarts by the length of the path, and whether there were any, in both."
    made = []
    difference = same_as_alone(Sharded(rank), partial(restarting, made=made))
    return difference, [max((float(state["step"]) for state in opt.state.values()), default=0) for opt in made]


def checks(rank, folder):
    "Everything else that wants several processes."
    return {
        "messages": {
            "FSDP2": messages(Sharded(rank)),
            "hybrid": messages(Hybrid(rank)),
            "tensor parallel and FSDP2": messages(TensorAndData(rank)),
            "DDP": messages(DDP(rank)),
            "FSDP1": messages(FSDP1(rank)),
        },
        "not finite": not_finite(rank),
        "refusals": refusals(rank),
        "one rank differs": one_rank_differs(rank),
        "other numbers": other_numbers(rank, folder),
        "asked": asked_before_training(rank),
        "Muon, FSDP2": same_as_alone(Sharded(rank), MuonSaI),
        "Muon, both": same_as_alone(TensorAndData(rank), MuonSaI),
        "Adan that restarts": restarts(rank),
    }


def one_process(rank, store, out):
    "The life of one of the processes."
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    only = sys.argv[2:]
    records = {}
    for label, kind in WAYS.items():
        if only and not any(word in label for word in only):
            continue
        for name in OPTIMIZERS:
            with tempfile.TemporaryDirectory() as own:
                folder = [own]
                dist.broadcast_object_list(folder)
                if name in kind.without:
                    record = {"refused": kind.without[name]}
                else:
                    try:
                        record = measure_way(kind(rank), name, folder[0])
                    except Refused as e:
                        record = {"refused": str(e)}
                records[f"{label} | {name}"] = record
                dist.barrier()
    if not only or "checks" in only:
        with tempfile.TemporaryDirectory() as own:
            folder = [own]
            dist.broadcast_object_list(folder)
            records["checks"] = checks(rank, folder[0])
            dist.barrier()
    Path(f"{out}.{rank}").write_text(json.dumps(records))
    dist.barrier()
    dist.destroy_process_group()


def main(out):
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(one_process, (f"{folder}/store", f"{folder}/out"), nprocs=WORLD, start_method="fork")
        ranks = [json.loads(Path(f"{folder}/out.{rank}").read_text()) for rank in range(WORLD)]
    Path(out).write_text(json.dumps(ranks, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1])
