"""Steps of MuonSaI in two and three processes that share the work of its matrices: those of one process.

FSDP2 with shards of unequal sizes, and DDP with `process_group=`; momenta too, also of matrices that another process
owns. Each process makes no more matrices orthogonal than its share and one, and a gradient that one of them lacks is
an error in all."""

import copy
import pickle
import warnings
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from common import on_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from sgd_sai import MuonSaI, muon_step

FSDP2 = [("row_norm", None), ("sgd_sai", None), ("sign", None)]  # rest, dtype of the state
DDP = [("sgd_sai", None), ("row_norm", torch.bfloat16), ("adams", torch.int8)]


class Net(nn.Module):
    "An embedding, five hidden matrices whose rows two or three processes cannot share evenly, a head, vectors."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 7)
        self.up, self.down, self.mid = nn.Linear(7, 13), nn.Linear(13, 7), nn.Linear(7, 7)
        self.wide, self.narrow = nn.Linear(7, 5), nn.Linear(5, 7)
        self.head = nn.Linear(7, 11)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.mid(self.down(torch.tanh(self.up(x))))
        return self.head(x + self.narrow(torch.tanh(self.wide(x))))


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(11, (6, 5), generator=generator)


def four_steps(model, opt):
    "The same batch in all processes, so that the average of their gradients is that of one."
    inner = getattr(model, "module", model)
    for step in range(4):
        opt.zero_grad()
        x = batch(step)
        nn.functional.cross_entropy(model(x).transpose(1, 2), x.roll(1, 1)).backward()
        opt.step()
    values = {name: whole(p.detach()).clone() for name, p in inner.named_parameters()}
    momenta = {name: whole(opt.state[p]["momentum_buffer"]).clone() for name, p in inner.named_parameters()}
    return values, momenta


def counted(make_step):
    "What `make_step` returns, the cost of the matrices that this process made orthogonal, and its collectives."
    costs, real = [], muon_step.orthogonalize_

    def noted(X, *args):
        costs.extend([X[0].numel() * X.shape[1]] * len(X))
        return real(X, *args)

    with patch.object(muon_step, "orthogonalize_", noted), CommDebugMode() as messages:
        result = make_step()
    return result, costs, {str(op): n for op, n in messages.get_comm_counts().items()}


def built(model, rest, state_dtype, **more):
    return MuonSaI(model, lr=0.02, rest=rest, state_dtype=state_dtype, weight_decay=0.1, **more)


def lacking(rank):
    "What a step says in a process where one rank has no gradient of a matrix, and whether all is as it was."
    model = DistributedDataParallel(Net())
    opt = built(model, "row_norm", None, process_group=dist.group.WORLD)
    four_steps(model, opt)
    if rank == 1:
        model.module.mid.weight.grad = None
    before = [p.detach().clone() for p in model.parameters()]
    try:
        opt.step()
    except RuntimeError as e:
        return str(e), all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    return "no error", False


def of_rank(rank, store, out, world):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mesh, found = init_device_mesh("cpu", (world,)), {}
    for rest, dtype in {*FSDP2, *DDP}:
        model = Net()
        found["alone", rest, dtype] = counted(partial(four_steps, model, built(model, rest, dtype)))
    for rest, dtype in FSDP2:
        model = Net()
        fully_shard(model, mesh=mesh)
        found["FSDP2", rest, dtype] = counted(partial(four_steps, model, built(model, rest, dtype)))
    for rest, dtype in DDP:
        model = DistributedDataParallel(Net())
        opt = built(model, rest, dtype, process_group=dist.group.WORLD)
        found["DDP", rest, dtype] = counted(partial(four_steps, model, opt))
    found["copies"] = [each.process_group for each in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)))]
    found["lacking"] = lacking(rank)
    torch.save(found, f"{out}.{rank}")
    dist.destroy_process_group()


def of_rank_of_two(rank, store, out):
    of_rank(rank, store, out, 2)


def of_rank_of_three(rank, store, out):
    of_rank(rank, store, out, 3)


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, tmp_path_factory):
    target = of_rank_of_two if request.param == 2 else of_rank_of_three
    return on_processes(request.param, target, tmp_path_factory.mktemp("shared"))


WAYS = [("FSDP2", *settings) for settings in FSDP2] + [("DDP", *settings) for settings in DDP]
each_way = pytest.mark.parametrize("way, rest, dtype", WAYS, ids=str)


@each_way
def test_steps_and_momenta_are_those_of_one_process(processes, way, rest, dtype):
    start = Net().state_dict()
    for found in processes:
        (values, momenta), (alone, alone_momenta) = found[way, rest, dtype][0], found["alone", rest, dtype][0]
        assert values.keys() == alone.keys()
        for name, p in alone.items():
            assert (values[name] - p).abs().max() <= 1e-6, name
            torch.testing.assert_close(momenta[name], alone_momenta[name], rtol=1e-6, atol=1e-6, msg=name)
            assert (p - start[name]).abs().max() > 1e-4


@each_way
def test_each_process_makes_no_more_orthogonal_than_its_share_and_a_matrix(processes, way, rest, dtype):
    total = processes[0]["alone", rest, dtype][1]
    shares = [sum(found[way, rest, dtype][1]) / 4 for found in processes]
    assert len(total) == 4 * 5 and sum(shares) == sum(total) / 4
    assert max(shares) <= sum(total) / 4 / len(processes) + max(total)


@each_way
def test_collectives_of_four_steps(processes, way, rest, dtype):
    """All small matrices of a step take one round: two exchanges of shards, or one gather of what the copies computed.

    FSDP2 also adds up what the shards found: whether gradients are finite, the sizes of rows, and scales once."""
    added = {"row_norm": 8, "sgd_sai": 6, "sign": 4}
    for found in processes:
        counts = found[way, rest, dtype][2]
        if way == "DDP":
            assert counts["c10d._allgather_base_"] == 4 and "c10d.alltoall_base_" not in counts
        else:
            assert counts["c10d.alltoall_base_"] == 8 and counts["c10d.allreduce_"] == added[rest]


def test_a_gradient_that_one_process_lacks_is_an_error_in_all(processes):
    for found in processes:
        said, unchanged = found["lacking"]
        assert "mid.weight" in said and unchanged, said


def test_a_copy_has_no_process_group(processes):
    "It cannot be pickled; the copy computes all matrices for itself."
    assert all(found["copies"] == [None, None] for found in processes)
