"AdaHessian in two processes: curvature and gradients are averaged, which the released code forgets."

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from adahessian_shared import (
    assert_same_run,
    small_data,
    small_net,
)
from common import (
    on_two_processes,
)

from sgd_sai.adahessian import AdaHessian

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True"),
]


def distributed_run(x, y, steps=4, wrapped=None, average=True, **options):
    "Parameters and states after some steps in float64; with `average`, gradients are averaged by hand."
    net = small_net().double()
    opt = AdaHessian(net.named_parameters(), lr=0.05, weight_decay=0.1, n_samples=2, update_period=2, **options)
    model = net if wrapped is None else wrapped(net)
    for _ in range(steps):
        opt.zero_grad()
        with model.no_sync() if wrapped is not None else contextlib.nullcontext():
            F.mse_loss(model(x), y).backward(create_graph=opt.needs_graph())
        for p in net.parameters() if average else ():
            g = p.grad.detach()  # the numbers; the graph is that of this process
            dist.all_reduce(g)
            g /= dist.get_world_size()
        opt.step()
    return [p.detach() for p in net.parameters()], [dict(opt.state[p]) for p in net.parameters()]


def on_half_of_the_batch(rank, store, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    from torch.nn.parallel import DistributedDataParallel

    x, y = (t.chunk(2)[rank] for t in small_data())
    pair, alone = dist.new_group([0, 1]), [dist.new_group([r]) for r in range(2)]
    runs = {
        "by hand": distributed_run(x, y),
        "a group of all": distributed_run(x, y, process_group=pair),
        "DistributedDataParallel, no_sync": distributed_run(x, y, wrapped=DistributedDataParallel),
        "average_gradients": distributed_run(
            x, y, wrapped=DistributedDataParallel, average=False, average_gradients=True
        ),
        "no averaging": distributed_run(x, y, average=False, process_group=False),
        "a group of one": distributed_run(x, y, average=False, process_group=alone[rank]),
        "gradients only": distributed_run(x, y, process_group=False),
    }
    wrapped = DistributedDataParallel(small_net().double())
    try:
        F.mse_loss(wrapped(x), y).backward(create_graph=True)
        runs["DistributedDataParallel"] = "no error"
    except RuntimeError as error:
        runs["DistributedDataParallel"] = str(error)
    torch.save(runs, f"{out}.{rank}")
    dist.destroy_process_group()


def test_defect_distributed_average_is_discarded(tmp_path):
    results = on_two_processes(on_half_of_the_batch, tmp_path)
    whole = distributed_run(*small_data(), average=False)
    exact = dict(rtol=1e-9, atol=1e-12)
    for rank, runs in enumerate(results):
        half = distributed_run(*(t.chunk(2)[rank] for t in small_data()), average=False)
        for setting in ("by hand", "a group of all", "DistributedDataParallel, no_sync", "average_gradients"):
            assert_same_run(runs[setting], whole, **exact)
        for setting in ("no averaging", "a group of one"):
            assert_same_run(runs[setting], half, **exact)
        mine, theirs = (
            run[1][0]["exp_hessian_diag_sq"] for run in (whole, runs["gradients only"])
        )  # the latter is what the released code does
        assert not torch.allclose(mine, theirs, rtol=1e-3)
    for a, b in zip(*(runs["by hand"][0] for runs in results), strict=True):
        assert torch.equal(a, b)  # the processes stay together to the last bit
    # DistributedDataParallel's own averaging does not support create_graph=True:
    # PyTorch fails in the backward pass, unless the model has one parameter
    assert all("leaf Variable that requires grad" in runs["DistributedDataParallel"] for runs in results)


def scaled_run(data, poisoned, average_gradients=True, process_group=None):
    "Parameters and states after six steps under a GradScaler; in the steps `poisoned` the loss here is infinite."
    net = small_net()
    opt = AdaHessian(
        net.named_parameters(),
        lr=0.05,
        update_period=2,
        average_gradients=average_gradients,
        process_group=process_group,
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    for t in range(6):
        x, y = (part.float() for part in data(t))
        opt.zero_grad()
        loss = F.mse_loss(net(x), y) * (torch.inf if t in poisoned else 1.0)
        scaler.scale(loss).backward(create_graph=opt.needs_graph())
        scaler.step(opt)
        scaler.update()
    return [p.detach() for p in net.parameters()], [dict(opt.state[p]) for p in net.parameters()], scaler.get_scale()


POISONED = [{2}, {1, 4}]  # steps of each process; with an estimate every other step, the second is one without


def under_a_grad_scaler(rank, store, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save(scaled_run(lambda t: (part.chunk(2)[rank] for part in small_data()), POISONED[rank]), f"{out}.{rank}")
    dist.destroy_process_group()


def test_infinite_gradients_in_one_process_make_all_skip_the_step(tmp_path):
    first, second = on_two_processes(under_a_grad_scaler, tmp_path)
    for p, q in zip(first[0], second[0], strict=True):
        assert torch.equal(p, q)
    for state in first[1] + second[1]:
        assert state["step"] == 3  # of six, three were skipped
    assert first[2] == 2.0**5 and second[2] == 2.0**4  # each scaler has seen its own infinities
    # the scales differ by then, and the means are still those of the whole batch
    whole = scaled_run(lambda t: small_data(), POISONED[0] | POISONED[1], average_gradients=False)
    assert_same_run(first[:2], whole[:2], rtol=1e-5, atol=1e-7)
