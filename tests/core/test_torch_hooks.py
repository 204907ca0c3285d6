"Hooks around steps, around `state_dict` and around `load_state_dict`."

from copy import deepcopy

import torch
from torch.nn import Parameter
from torch.optim import SGD
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch_contract import contract, each_device, each_kind

pytestmark = contract


def one_param(kind, device, given):
    return kind.cls([torch.rand(2, 3, device=device, requires_grad=True)], **given.kwargs)


def state_dict_pre_hook(opt):
    opt.state["test"] = 1


def state_dict_post_hook(opt, state_dict):
    state_dict["ran_state_dict_pre_hook"] = state_dict["state"].pop("test", None) is not None
    return state_dict


@each_kind
@each_device
def test_state_dict_pre_hook(kind, device):
    for given in kind.all_inputs(device, skip=()):
        opt = one_param(kind, device, given)
        opt.register_state_dict_pre_hook(state_dict_pre_hook)
        assert opt.state_dict()["state"]["test"] == 1


@each_kind
@each_device
def test_state_dict_post_hook(kind, device):
    for given in kind.all_inputs(device, skip=()):
        opt = one_param(kind, device, given)
        opt.register_state_dict_post_hook(state_dict_post_hook)
        assert not opt.state_dict()["ran_state_dict_pre_hook"]


@each_kind
@each_device
def test_state_dict_pre_post_hook(kind, device):
    for given in kind.all_inputs(device, skip=()):
        opt = one_param(kind, device, given)
        opt.register_state_dict_pre_hook(state_dict_pre_hook)
        opt.register_state_dict_post_hook(state_dict_post_hook)
        saved = opt.state_dict()
        assert "test" not in saved["state"] and saved["ran_state_dict_pre_hook"]


def set_lr_in_place(opt, state_dict):
    state_dict["param_groups"][0]["lr"] = 0.002


def set_lr_in_a_copy(opt, state_dict):
    state_dict = deepcopy(state_dict)
    state_dict["param_groups"][0]["lr"] = 0.003
    return state_dict


def note_lr(opt):
    opt.state["ran_load_state_dict_pre_hook2"] = opt.param_groups[0]["lr"] == 0.003
    opt.state["ran_load_state_dict_post_hook"] = True


@each_kind
@each_device
def test_load_state_dict_pre_hook_and_prepend(kind, device):
    for given in kind.all_inputs(device, skip=()):
        opt = one_param(kind, device, given)
        saved = opt.state_dict()
        opt.register_load_state_dict_pre_hook(set_lr_in_place)
        opt.load_state_dict(saved)
        assert opt.param_groups[0]["lr"] == 0.002
        opt.register_load_state_dict_pre_hook(set_lr_in_a_copy, prepend=True)
        opt.load_state_dict(saved)
        assert opt.param_groups[0]["lr"] == 0.002  # the hook put in front is overridden by the other
        opt.register_load_state_dict_pre_hook(set_lr_in_a_copy)
        opt.load_state_dict(saved)
        assert opt.param_groups[0]["lr"] == 0.003


@each_kind
@each_device
def test_load_state_dict_post_hook(kind, device):
    for given in kind.all_inputs(device, skip=()):
        opt = one_param(kind, device, given)
        opt.register_load_state_dict_post_hook(note_lr)
        opt.load_state_dict(opt.state_dict())
        assert not opt.state["ran_load_state_dict_pre_hook2"] and opt.state["ran_load_state_dict_post_hook"]


@each_kind
@each_device
def test_load_state_dict_pre_post_hook(kind, device):
    for given in kind.all_inputs(device, skip=()):
        opt = one_param(kind, device, given)
        opt.register_load_state_dict_pre_hook(set_lr_in_a_copy)
        opt.register_load_state_dict_post_hook(note_lr)
        opt.load_state_dict(opt.state_dict())
        assert opt.state["ran_load_state_dict_pre_hook2"] and opt.state["ran_load_state_dict_post_hook"]


@each_kind
@each_device
def test_load_state_dict_hooks_see_and_change_the_loaded_state(kind, device):
    p = Parameter(torch.randn(4, 3, device=device).bfloat16())
    kind.give(p, torch.randn_like(p))
    opt = kind.cls([p], state_dtype=torch.float32)
    opt.step()
    number, m = opt.state[p].get(kind.number), opt.state[p][kind.average].clone()
    seen = []

    def before(opt, saved):
        saved = deepcopy(saved)
        saved["state"][0][kind.average].mul_(2)
        return saved

    def after(opt):
        seen.append((opt.state[p].get(kind.number), opt.state[p][kind.average].clone()))
        opt.state[p][kind.average].add_(1)

    opt.register_load_state_dict_pre_hook(before)
    opt.register_load_state_dict_post_hook(after)
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    assert m.dtype == torch.float32
    assert seen[0][0] == number and torch.equal(seen[0][1], 2 * m)  # restored to the last bit before the hook runs
    assert torch.equal(opt.state[p][kind.average], 2 * m + 1)  # and what the hook does, stays
    assert len(opt._optimizer_load_state_dict_pre_hooks) == len(opt._optimizer_load_state_dict_post_hooks) == 1


def noting(calls, number):
    "A hook that notes its number in `calls`."

    def hook(opt, args, kwargs):
        calls.append(number)

    return hook


def step_hook_runs_until_it_is_removed(kind, device, register):
    for given in kind.all_inputs(device, skip=()):
        opt, calls = kind.cls([torch.tensor([1.0, 1.0], device=device)], **given.kwargs), []
        handle = getattr(opt, register)(noting(calls, 1))
        opt.step(), opt.step()
        assert len(calls) == 2
        handle.remove()
        opt.step()
        assert len(calls) == 2


@each_kind
@each_device
def test_step_pre_hook(kind, device):
    step_hook_runs_until_it_is_removed(kind, device, "register_step_pre_hook")


@each_kind
@each_device
def test_step_post_hook(kind, device):
    step_hook_runs_until_it_is_removed(kind, device, "register_step_post_hook")


@each_kind
@each_device
def test_step_all_hooks(kind, device):
    params = [torch.tensor([1.0, 1.0], device=device)]
    for given in kind.all_inputs(device, skip=()):
        order = []
        opts = [kind.cls(params, **given.kwargs), SGD(params)]
        handles = [
            register_optimizer_step_pre_hook(noting(order, 0)),
            register_optimizer_step_post_hook(noting(order, 5)),
        ]
        for opt in opts:
            handles.append(opt.register_step_pre_hook(noting(order, 1)))
            handles.append(opt.register_step_post_hook(noting(order, 2)))
        for n, opt in enumerate((opts[0], opts[1], opts[0]), 1):
            opt.step()
            assert order == [0, 1, 2, 5] * n
        for handle in handles:
            handle.remove()
        for opt in opts:
            opt.step()
        assert order == [0, 1, 2, 5] * 3
