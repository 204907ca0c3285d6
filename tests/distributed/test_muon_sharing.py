"""Orthogonal factors that two, three or four processes share.

Each process computes no more than its share and one matrix, of the same numbers that one process would have; all
together each matrix once. What each holds at the end is its part of what one process computes, and the collectives and
what is sent by them are those that the page counts."""

import math
import warnings
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from common import on_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from sgd_sai import muon_sharing
from sgd_sai.muon_sharing import shared_factors
from sgd_sai.orthogonalize import orthogonalize

SHAPES = [(7, 6), (5, 6), (12, 4), (2, 9), (1, 8), (8, 1), (3, 4, 2), (4, 3, 5), (9, 9), (10, 3), (3, 10), (2, 2, 7)]
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
LAYERS = [(128, 32), (32, 32), (32, 32), (96, 32), (8, 32)]
SMALL_BATCH = 60  # entries: less than the largest of them has


def tensors(shapes=SHAPES, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def cost_of(t):
    return t.numel() * min(t.shape[-2:])


def one_by_one(updates):
    return [orthogonalize(t) for t in updates]


def local_of(t, like):
    "The part of a whole tensor that this process holds where `like` is sharded."
    if not isinstance(like, DTensor):
        return t
    whole = DTensor.from_local(t, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return whole.redistribute(placements=like.placements).to_local()


def whole_of(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


class Recorder:
    "Sizes of the messages, in entries that go to other processes, and what is given to `factors_of`."

    def __init__(self):
        self.sent, self.batches, self.counts = {"all_to_all": [], "all_gather": []}, [], {}

    def factors_of(self, batch):
        assert len({t.shape for t in batch}) == 1 and not isinstance(batch[0], DTensor)
        self.batches.append([t.clone() for t in batch])
        return one_by_one(batch)

    def computed(self, wholes):
        "Indices of the tensors that were given to `factors_of`, all of whose numbers have to be the same."
        return [[i for i, w in enumerate(wholes) if torch.equal(w, t)] for batch in self.batches for t in batch]

    @contextmanager
    def messages(self):
        "Record what is sent meanwhile."
        to_all, gather = dist.all_to_all_single, getattr(dist, ALL_GATHER)

        def all_to_all(received, sent, received_sizes, sent_sizes, group):
            self.sent["all_to_all"].append(sum(sent_sizes) - sent_sizes[dist.get_rank(group)])
            return to_all(received, sent, received_sizes, sent_sizes, group=group)

        def all_gather(received, sent, group):
            self.sent["all_gather"].append(sent.numel() * (dist.get_world_size(group) - 1))
            return gather(received, sent, group=group)

        with (
            patch.object(dist, "all_to_all_single", all_to_all),
            patch.object(dist, ALL_GATHER, all_gather),
            CommDebugMode() as counted,
        ):
            yield
        self.counts = {str(op): n for op, n in counted.get_comm_counts().items()}


def shared(updates, costs=None, batch_entries=muon_sharing.BATCH_ENTRIES, **options):
    "What came out for these updates, and whether it is what one process computes."
    wholes, recorder, held = [whole_of(t) for t in updates], Recorder(), {}
    costs = [cost_of(t) for t in wholes] if costs is None else costs
    with patch.object(muon_sharing, "BATCH_ENTRIES", batch_entries), recorder.messages():
        for i, part in shared_factors(updates, recorder.factors_of, costs, **options):
            assert i not in held
            held[i] = part
    assert sorted(held) == list(range(len(updates)))
    expected = [local_of(orthogonalize(w), t) for w, t in zip(wholes, updates, strict=True)]
    assert all(held[i].shape == e.shape and not held[i].requires_grad for i, e in enumerate(expected))
    dtypes = [options.get("factor_dtype") or t.dtype for t in updates]
    return {
        "errors": [
            (held[i] - e.to(held[i].dtype)).abs().max().item() if e.numel() else 0 for i, e in enumerate(expected)
        ],
        "largest": max([0.0] + [e.abs().max().item() for e in expected if e.numel()]),
        "dtypes": [held[i].dtype for i in range(len(held))] == dtypes,
        "computed": recorder.computed(wholes),
        "batches": [sum(t.numel() for t in batch) for batch in recorder.batches],
        "costs": costs,
        "sent": recorder.sent,
        "collectives": sum(recorder.counts.values()),
    }


def sharded(updates, mesh, *placements):
    return [
        DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(placements=placements)
        for t in updates
    ]


# --- what each process tries ------------------------------------------------------------------------------------------


def linear_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 4))


def gradients(model):
    "The gradients of the matrices, of the part of a batch that this process sees."
    torch.manual_seed(dist.get_rank())
    model(torch.randn(4, 6)).square().sum().backward()
    return [p.grad for p in model.parameters() if p.ndim > 1]


def of_fsdp2(mesh):
    model = linear_layers()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return gradients(fully_shard(model, mesh=mesh))


def of_several_kinds(mesh):
    "Matrices of one shape that are held in several ways, and in several dtypes."
    plain = tensors([(6, 6)] * 7)
    by_rows, by_columns = sharded(plain[:1], mesh, Shard(0)), sharded(plain[1:2], mesh, Shard(1))
    everywhere = sharded(plain[2:3], mesh, Replicate())
    narrow, wide = sharded([plain[3].bfloat16()], mesh, Shard(0)), sharded([plain[4].double()], mesh, Shard(0))
    return by_rows + [plain[5], plain[6].double()] + by_columns + everywhere + narrow + wide


def first_round(mesh):
    "Collectives until the first factor, of eight equal matrices, is there."
    recorder = Recorder()
    with patch.object(muon_sharing, "BATCH_ENTRIES", 1), recorder.messages():
        next(shared_factors(sharded(tensors([(6, 6)] * 8), mesh, Shard(0)), one_by_one, [1.0] * 8))
    return recorder.sent


def clones(batch):
    return [t.clone() for t in batch]


class Live(TorchDispatchMode):
    "The most bytes that existed at once of what operations have made, without what collectives take inside of them."

    def __init__(self, given):
        super().__init__()
        self.given, self.live, self.peak = {t.untyped_storage()._cdata for t in given}, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.given:
                self.live[t.untyped_storage()._cdata] = (
                    StorageWeakRef(t.untyped_storage()),
                    t.untyped_storage().nbytes(),
                )
        self.live = {key: (ref, n) for key, (ref, n) in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(n for _, n in self.live.values()))
        return out


def with_copies(collective):
    "A collective that is given copies, which are not counted, since a thread of gloo may hold its tensors for a while."

    def called(received, sent, *args, **kwargs):
        with _disable_current_modes():
            copy = torch.empty_like(received)
            collective(copy, sent.clone(), *args, **kwargs)
            received.copy_(copy)

    return called


def peak(updates, **options):
    "New memory, in matrices of 64 x 64 entries, of which each process owns one in each round."
    given = [t.to_local() if isinstance(t, DTensor) else t for t in updates]
    collectives = {name: with_copies(getattr(dist, name)) for name in ("all_to_all_single", ALL_GATHER)}
    with (
        patch.multiple(dist, **collectives),
        patch.object(muon_sharing, "BATCH_ENTRIES", 1),
        Live(given) as memory,
    ):
        for _, factor in shared_factors(updates, clones, [1.0] * len(updates), **options):
            del factor  # and with it the message of its round
    return memory.peak / (4 * 64 * 64)


def said(*args, **options):
    try:
        shared_factors(*args, **options)
    except ValueError as e:
        return str(e)
    return "no error"


def compiled(updates, **options):
    "Sums of the factors, from a compiled function."

    def together():
        total = 0.0
        for i, factor in shared_factors(updates, one_by_one, [1.0] * len(updates), **options):
            total = total + (i + 1) * factor.square().sum()
        return total

    return together().item(), torch.compile(together, backend="eager")().item()


def of_one_mesh(mesh, world):
    "What two and three processes try."
    group = dist.group.WORLD
    equal = tensors([(6, 6)] * (2 * world))
    large = tensors([(64, 64)] * (8 * world))
    ddp = gradients(nn.parallel.DistributedDataParallel(linear_layers()))
    layers = tensors(LAYERS * 5)
    return {
        "alone": shared([*map(nn.Parameter, tensors())]),
        "DDP": shared(tensors(), process_group=group),
        "DDP, small batches": shared(tensors(), batch_entries=200, process_group=group),
        "DDP, many rounds": shared(tensors(), batch_entries=SMALL_BATCH, process_group=group),
        "DDP, a model": shared(ddp, process_group=group),
        "rows": shared([*map(nn.Parameter, sharded(tensors(), mesh, Shard(0)))]),
        "rows, many rounds": shared(sharded(tensors(), mesh, Shard(0)), batch_entries=SMALL_BATCH),
        "columns": shared(sharded(tensors(), mesh, Shard(1)), batch_entries=SMALL_BATCH),
        "last dimension": shared(sharded(tensors([(3, 4, 5), (2, 2, 7)]), mesh, Shard(2))),
        "everywhere": shared(sharded(tensors(), mesh, Replicate()), batch_entries=SMALL_BATCH),
        "fewer than processes": shared(sharded(tensors([(1, 4)]), mesh, Shard(0))),
        "FSDP2, a model": shared(of_fsdp2(mesh)),
        "several kinds": shared(of_several_kinds(mesh), costs=[1.0] * 7, process_group=group),
        "float64": shared(sharded(tensors(dtype=torch.float64), mesh, Shard(0))),
        "bfloat16": shared(sharded(tensors(dtype=torch.bfloat16), mesh, Shard(0))),
        "bfloat16, alone": shared(tensors(dtype=torch.bfloat16)),
        "factors in bfloat16": shared(sharded(tensors(), mesh, Shard(0)), factor_dtype=torch.bfloat16),
        "equal, DDP": shared(equal, batch_entries=1, process_group=group),
        "equal, rows": shared(sharded(equal, mesh, Shard(0)), batch_entries=1),
        "layers, DDP": shared(layers, batch_entries=1, process_group=group),
        "first round": first_round(mesh),
        "peaks": (peak(sharded(large, mesh, Shard(0))), peak(large, process_group=group)),
        "compiled": (compiled(tensors()), compiled(sharded(tensors(), mesh, Shard(0)))),
        "said": (
            said(tensors(), one_by_one, [1.0]),
            said(tensors(), one_by_one, [1.0] * len(SHAPES), dist.new_group([world - 1])),
            said([DTensor.from_local(torch.ones(2, 2), mesh, [Partial()])], one_by_one, [1.0]),
        ),
    }


def tensor_parallel(mesh):
    "A weight in a model with FSDP2 and tensor parallelism: in strides along the first mesh dimension."
    model = parallelize_module(linear_layers(), mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    return [model[0].weight]


def in_strides(mesh):
    "A matrix of eight rows, every other pair of which is in the first of two processes."
    whole = tensors([(8, 3)])[0]
    local = whole.view(2, 2, 2, 3)[:, mesh.get_local_rank()].reshape(4, 3)
    return [DTensor.from_local(local, mesh, [_StridedShard(0, split_factor=2)], run_check=False)]


def of_two_dimensions():
    "What four processes try, in two groups of two."
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    equal = tensors([(6, 6)] * 8)
    return {
        "HSDP": shared(sharded(tensors(), mesh, Replicate(), Shard(0))),
        "HSDP, many rounds": shared(sharded(tensors(), mesh, Replicate(), Shard(0)), batch_entries=SMALL_BATCH),
        "HSDP, other order": shared(sharded(tensors(), mesh, Shard(1), Replicate())),
        "HSDP, a model": shared(of_fsdp2(mesh)),
        "equal, HSDP": shared(sharded(equal, mesh, Replicate(), Shard(0)), batch_entries=1),
        "one group of two": shared(sharded(tensors(), mesh["tensor"], Shard(0))),
        "not shared, strides along one": shared(in_strides(mesh["data"])),
        "not shared, both": shared(sharded(tensors(), mesh, Shard(0), Shard(1))),
        "not shared, strides": shared(tensor_parallel(mesh)),
    }


def of_rank(rank, store, out, world):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = of_two_dimensions() if world == 4 else of_one_mesh(init_device_mesh("cpu", (world,)), world)
    torch.save(found, f"{out}.{rank}")
    dist.destroy_process_group()


# --- what has to come out ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    "What the processes of a job of so many have found."
    found = {}

    def of(world):
        if world not in found:
            found[world] = None  # a job that fails is not started again
            found[world] = on_processes(world, partial(of_rank, world=world), tmp_path_factory.mktemp("sharing"))
        assert found[world], "the processes failed in an earlier test, which says how"
        return found[world]

    return of


REPEATED = [(2, "alone"), (2, "bfloat16, alone")]
REPEATED += [(4, f"not shared, {how}") for how in ("both", "strides", "strides along one")]
SHARED = ["DDP", "DDP, small batches", "DDP, many rounds", "DDP, a model", "rows", "rows, many rounds", "columns"]
SHARED += ["last dimension", "everywhere", "fewer than processes", "FSDP2, a model", "several kinds", "float64"]
SHARED += ["bfloat16", "factors in bfloat16", "equal, DDP", "equal, rows", "layers, DDP"]
HYBRID = ["HSDP", "HSDP, many rounds", "HSDP, other order", "HSDP, a model", "equal, HSDP"]
each_world = pytest.mark.parametrize("world", [2, 3])
on_one_mesh = [(world, way) for world in (2, 3) for way in SHARED]
on_two_dimensions = [(4, way) for way in HYBRID]


@pytest.mark.parametrize("world, way", on_one_mesh + on_two_dimensions + REPEATED + [(4, "one group of two")])
def test_each_process_holds_its_part_of_what_one_process_computes(processes, world, way):
    for found in processes(world):
        assert max(found[way]["errors"]) <= 1e-6 and found[way]["dtypes"]
    assert max(found[way]["largest"] for found in processes(world)) > 0.3


@pytest.mark.parametrize("world", [2, 3])
def test_numbers_are_sent_in_their_own_dtype(processes, world):
    for found in processes(world):
        assert max(found["float64"]["errors"]) < 1e-13


@pytest.mark.parametrize("world, way", on_one_mesh + on_two_dimensions + [(4, "one group of two")])
def test_no_process_computes_more_than_its_share_and_one_matrix(processes, world, way):
    ranks = processes(world)[:2] if way == "one group of two" else processes(world)
    computed = [found[way]["computed"] for found in ranks]
    costs = ranks[0][way]["costs"]
    assert sorted(i for one in computed for found in one for i in found) == list(range(len(costs)))  # each once
    for one in computed:
        assert sum(costs[i] for found in one for i in found) <= sum(costs) / len(ranks) + max(costs)


@pytest.mark.parametrize("world, way", REPEATED)
def test_what_is_not_shared_is_computed_by_all(processes, world, way):
    for found in processes(world):
        assert sorted(map(tuple, found[way]["computed"])) == [(i,) for i in range(len(found[way]["costs"]))]


@pytest.mark.parametrize("world, way", [(2, "DDP, many rounds"), (3, "columns"), (4, "HSDP, many rounds")])
def test_small_matrices_are_computed_together_up_to_a_limit(processes, world, way):
    largest = max(math.prod(shape) for shape in SHAPES)
    assert all(max(found[way]["batches"], default=0) <= largest for found in processes(world))


@each_world
def test_an_all_gather_of_small_matrices_is_short(processes, world):
    largest = max(math.prod(shape) for shape in SHAPES)
    for found in processes(world):
        sent = found["DDP, small batches"]["sent"]["all_gather"]
        assert len(sent) > 1 and max(sent) <= max(largest, 200 // world) * (world - 1)


# N matrices of r x c entries in each: the table of the page
MESSAGES = {
    "equal, DDP": lambda n, world: {"all_gather": ([36 * (world - 1)] * (n // world))},
    "equal, rows": lambda n, world: {"all_to_all": [36 * (world - 1) // world] * (2 * n // world)},
    "equal, HSDP": lambda n, world: {"all_to_all": [18] * (2 * n // 4), "all_gather": [36] * (n // 4)},
}


@pytest.mark.parametrize(
    "world, way", [(world, f"equal, {way}") for world in (2, 3) for way in ("DDP", "rows")] + [(4, "equal, HSDP")]
)
def test_messages_are_those_of_the_table(processes, world, way):
    for found in processes(world):
        n = len(found[way]["costs"])
        expected = {"all_to_all": [], "all_gather": [], **MESSAGES[way](n, world)}
        assert found[way]["sent"] == expected
        assert found[way]["collectives"] == sum(map(len, expected.values()))  # and none besides


@each_world
def test_small_matrices_of_any_shapes_take_one_round(processes, world):
    for found in processes(world):
        assert (found["DDP"]["collectives"], found["rows"]["collectives"], found["alone"]["collectives"]) == (1, 2, 0)


@each_world
def test_little_is_padded(processes, world):
    whole = 5 * sum(map(math.prod, LAYERS)) * (world - 1) / world
    for found in processes(world):
        assert whole <= sum(found["layers, DDP"]["sent"]["all_gather"]) <= 1.1 * whole


@each_world
def test_factors_come_as_soon_as_their_round_is_over(processes, world):
    assert all(len(found["first round"]["all_to_all"]) == 2 for found in processes(world))


@each_world
def test_new_memory_is_that_of_one_round(processes, world):
    for found in processes(world):
        rows, ddp = found["peaks"]
        assert rows <= 3.1 and ddp <= 2 + world  # matrices, of which a process owns eight


@each_world
def test_a_compiled_function_may_use_them(processes, world):
    for found in processes(world):
        for eager, compiled_sum in found["compiled"]:
            assert compiled_sum == pytest.approx(eager, rel=1e-6) and eager > 1


@each_world
def test_errors_say_what_to_do(processes, world):
    count, group, summands = processes(world)[0]["said"]
    assert count == f"costs has 1 numbers for {len(SHAPES)} updates; give one for each update"
    assert "process_group does not contain this process" in group
    assert "Partial" in summands and "redistribute" in summands
