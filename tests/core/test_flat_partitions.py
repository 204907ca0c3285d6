"""A vector where tensors stood is refused if it is a flat partition (ZeRO), and only then.

In DeepSpeed's stages 1 and 2 every group holds one vector: its parameters joined, padded, and cut for the processes.
"""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from common import through_deepcopy, through_pickle
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from sgd_sai import MuonSaI, SGDSaI

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def processes(request):
    "So many processes, of which this is the first; nothing is sent."
    if request.param > 1:
        dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    if request.param > 1:
        dist.destroy_process_group()


in_processes = pytest.mark.parametrize("processes", [1, 2, 8], indirect=True)


def partition(params, rank, processes, alignment):
    "The part of `rank`, as DeepSpeed makes it: the joined vector padded to a multiple of alignment * processes."
    flat = torch.cat([p.detach().flatten() for p in params])
    short = -flat.numel() % (alignment * processes)
    part = nn.Parameter(torch.cat([flat, flat.new_zeros(short)]).chunk(processes)[rank].clone())
    part.grad = torch.randn_like(part)
    return part


def network():
    return nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 5), nn.Linear(5, 3))


def as_one_group(model):
    return [{"params": list(model.parameters())}]


def as_two_groups(model):
    params = list(model.parameters())
    return [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.0}]


def as_one_matrix(model):
    return [{"params": [model[0].weight]}]


def only_biases(model):
    return [{"params": [layer.bias for layer in model]}]


@in_processes
@pytest.mark.parametrize("alignment", [0, 1, 2, 64])
@pytest.mark.parametrize("grouped", [as_one_group, as_two_groups, as_one_matrix, only_biases])
@pytest.mark.parametrize("travel", [None, copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_flat_partitions_are_refused(processes, alignment, grouped, travel):
    for rank in range(processes):
        opt = SGDSaI(grouped(network()))
        opt = travel(opt) if travel else opt
        for group in opt.param_groups:
            if alignment:
                group["params"] = [partition(group["params"], rank, processes, alignment)]
            else:  # cut without padding, so that the last parts are shorter
                flat = torch.cat([p.detach().flatten() for p in group["params"]])
                group["params"] = [nn.Parameter(flat.tensor_split(processes)[rank].clone())]
                group["params"][0].grad = torch.randn_like(group["params"][0])
        before = [group["params"][0].detach().clone() for group in opt.param_groups]
        with pytest.raises(RuntimeError, match=r"#0 of group 0.*a flat partition \(ZeRO\) in place of parameters"):
            opt.step()
        assert not opt.state
        assert all(torch.equal(p, group["params"][0]) for p, group in zip(before, opt.param_groups, strict=True))


def test_a_partition_of_some_groups_is_refused_as_well():
    "The first group was left alone; the second is cut."
    model = network()
    opt = SGDSaI(as_two_groups(model))
    group = opt.param_groups[1]
    group["params"] = [partition(group["params"], 0, 1, 2)]
    model[0].weight.grad = torch.randn(5, 8)
    with pytest.raises(RuntimeError, match="#0 of group 1.*stands where 3 parameters with 13 entries were"):
        opt.step()


# what changes in a group without being a partition: from a network and its optimizer to both as they are afterwards


def unfrozen_after_a_copy(travel):
    def change(model, opt):
        "The optimizer has held the frozen biases from the start; after the copy a group joins, and they are unfrozen."
        opt = SGDSaI(model.parameters())
        for layer in model:
            layer.weight.grad = torch.randn_like(layer.weight)
        opt.step()
        opt, params = travel(opt, list(model.parameters()))
        late = nn.Parameter(torch.zeros(11))
        opt.add_param_group({"params": [late]})
        return opt, [late, *params[1::2]]

    return change


def unfrozen_one_by_one_after_a_copy(model, opt):
    "The optimizer is made for the head alone; others join in groups of their own, vectors first, after a copy."
    opt = copy.deepcopy(SGDSaI(model[2].parameters()))
    joining = [nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(7)), nn.Parameter(torch.zeros(5, 8))]
    for p in joining:
        opt.add_param_group({"params": [p]})
    return opt, joining


def replaced_head(model, opt):
    model[2] = nn.Linear(5, 9)
    opt.param_groups[0]["params"] = list(model.parameters())
    return opt, list(model[2].parameters())


def only_the_replaced_head(model, opt):
    model[2] = nn.Linear(5, 9)
    opt.param_groups[0]["params"] = list(model[2].parameters())
    return opt, list(model[2].parameters())


def only_a_replaced_bias(model, opt):
    "All else is frozen: BitFit with a head of another size."
    bias = nn.Parameter(torch.zeros(9))
    opt.param_groups[0]["params"] = [bias]
    return opt, [bias]


def only_an_old_bias(model, opt):
    "It is nearly all that the group held."
    bias = nn.Parameter(torch.zeros(50))
    opt = SGDSaI([nn.Parameter(torch.zeros(2, 3)), bias])
    opt.param_groups[0]["params"] = [bias]
    return opt, [bias]


def head_appended(model, opt):
    head = nn.Linear(5, 4)
    opt.param_groups[0]["params"] += list(head.parameters())
    return opt, list(head.parameters())


def soft_prompt(model, opt):
    prompt = nn.Parameter(torch.randn(4, 5))
    opt.param_groups[0]["params"] = [prompt]
    return opt, [prompt]


def soft_prompt_as_a_vector(model, opt):
    opt = SGDSaI([nn.Parameter(torch.randn(4, 50))])
    prompt = nn.Parameter(torch.randn(20))
    opt.param_groups[0]["params"] = [prompt]
    return opt, [prompt]


def adapters_swapped(model, opt):
    opt = SGDSaI([nn.Parameter(torch.randn(shape)) for shape in ((2, 8), (5, 2), (2, 5), (5, 2))])
    other = [nn.Parameter(torch.randn(shape)) for shape in ((4, 8), (5, 4))]
    opt.param_groups[0]["params"] = other
    return opt, other


def adapters_swapped_for_vectors(model, opt):
    "LoRA's matrices, and in their place as many vectors that multiply activations."
    opt = SGDSaI([nn.Parameter(torch.randn(shape)) for shape in ((2, 8), (5, 2))])
    other = [nn.Parameter(torch.ones(n)) for n in (8, 26)]
    opt.param_groups[0]["params"] = other
    return opt, other


def bias_only_group(model, opt):
    "As many vectors, of other lengths."
    opt = SGDSaI([layer.bias for layer in model])
    other = [nn.Parameter(torch.zeros(n)) for n in (15, 16, 17)]
    opt.param_groups[0]["params"] = other
    return opt, other


def one_bias(model, opt):
    opt = SGDSaI([model[2].bias])
    other = nn.Parameter(torch.zeros(12))
    opt.param_groups[0]["params"] = [other]
    return opt, [other]


def lazy_modules(model, opt):
    lazy = nn.Sequential(nn.LazyLinear(5), nn.LazyLinear(3))
    opt = SGDSaI(lazy.parameters())
    lazy(torch.randn(2, 8))
    return opt, list(lazy.parameters())


def lazy_biases_alone(model, opt):
    lazy = nn.LazyLinear(5)
    opt = SGDSaI(lazy.parameters())
    lazy(torch.randn(2, 8))
    opt.param_groups[0]["params"] = [nn.Parameter(torch.zeros(77))]
    return opt, opt.param_groups[0]["params"]


def changed_vocabulary(model, opt):
    "`resize_token_embeddings` replaces the embedding, the head and its bias."
    tokens, head = nn.Embedding(12, 5), nn.Linear(5, 12)
    opt = SGDSaI([*tokens.parameters(), *head.parameters()])
    tokens, head = nn.Embedding(14, 5), nn.Linear(5, 14)
    opt.param_groups[0]["params"] = [*tokens.parameters(), *head.parameters()]
    return opt, opt.param_groups[0]["params"]


def group_taken_out(model, opt):
    opt = SGDSaI(as_two_groups(model))
    del opt.param_groups[0]
    return opt, opt.param_groups[0]["params"]


CHANGES = {
    "unfrozen after deepcopy": unfrozen_after_a_copy(through_deepcopy),
    "unfrozen after pickle": unfrozen_after_a_copy(through_pickle),
    "unfrozen one by one after a copy": unfrozen_one_by_one_after_a_copy,
    "replaced head": replaced_head,
    "only the replaced head": only_the_replaced_head,
    "only a replaced bias": only_a_replaced_bias,
    "only an old bias": only_an_old_bias,
    "head appended": head_appended,
    "soft prompt": soft_prompt,
    "soft prompt as a vector": soft_prompt_as_a_vector,
    "adapters swapped": adapters_swapped,
    "adapters swapped for vectors": adapters_swapped_for_vectors,
    "bias-only group": bias_only_group,
    "one bias": one_bias,
    "lazy modules": lazy_modules,
    "lazy biases alone": lazy_biases_alone,
    "changed vocabulary": changed_vocabulary,
    "group taken out": group_taken_out,
}


@in_processes
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whole_tensors_that_are_new_in_a_group_are_no_partition(processes, copied, change):
    model = network()
    opt = SGDSaI(model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    for p in model.parameters():
        p.grad = None
    opt, new = change(model, copy.deepcopy(opt) if copied else opt)
    for p in new:
        p.grad = torch.randn_like(p)
    opt.step()
    assert all(opt.state[p]["gsnr"] > 0 for p in new)


@pytest.mark.parametrize("rule", ["sgd_sai", "row_norm"])
def test_muon_with_a_flat_partition_of_the_rest_is_refused(rule):
    model = network()
    rest = [p for p in model.parameters() if p is not model[1].weight]
    opt = MuonSaI([{"params": [model[1].weight], "muon": True}, {"params": rest}], rest=rule)
    opt = pickle.loads(pickle.dumps(opt))
    opt.param_groups[1]["params"] = [partition(rest, 0, 1, 2)]
    with pytest.raises(RuntimeError, match=r"a flat partition \(ZeRO\)"):
        opt.step()
