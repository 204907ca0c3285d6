"""timm's train.py finds an optimizer by name in a registry, whose entries may be dotted names, and makes the groups.

Its options are text: `--opt-kwargs state_dtype=bfloat16`."""

import argparse
import copy

import pytest
import torch
from programs import DECAYED, HIDDEN, SETTINGS, STEPS, Net, assert_same, batch, build, names_by, plain, train, trainable

from sgd_sai import AdaHessian, Adan, MuonSaI, SGDSaI
from sgd_sai.muon_groups import muon_groups

DECAY = 0.1
each_class = pytest.mark.parametrize("cls", [SGDSaI, Adan, AdaHessian], ids=lambda cls: cls.__name__)


@pytest.fixture
def create(monkeypatch):
    "A function of the command line, the model and more arguments: what timm's train.py does to make an optimizer."
    timm_optim = pytest.importorskip("timm.optim")
    from timm.optim._optim_factory import default_registry
    from timm.utils import ParseKwargs

    monkeypatch.setattr(default_registry, "_optimizers", dict(default_registry._optimizers))
    for cls in SETTINGS:
        entry = timm_optim.OptimInfo(
            name=f"our{cls.__name__}",
            opt_class=f"sgd_sai.{cls.__name__}",
            description="by its dotted name",
            has_betas=cls in (Adan, AdaHessian),
            has_momentum=cls is SGDSaI,
        )
        default_registry.register(entry)
    parser = argparse.ArgumentParser()
    parser.add_argument("--opt")
    for name in ("lr", "weight-decay", "momentum", "opt-eps", "layer-decay"):
        parser.add_argument(f"--{name}", type=float)
    parser.set_defaults(momentum=0.9, weight_decay=2e-5)
    parser.add_argument("--opt-betas", type=float, nargs="+")
    parser.add_argument("--opt-kwargs", nargs="*", default={}, action=ParseKwargs)

    def make(line, model, **more):
        options = parser.parse_args(line.split())
        given = timm_optim.optimizer_kwargs(cfg=options) | options.opt_kwargs | more
        return timm_optim.create_optimizer_v2(model, **given)

    return make


def by_ndim(model):
    "The groups that timm makes."
    return [
        dict(params=[(name, p) for name, p in trainable(model) if name not in DECAYED], weight_decay=0.0),
        dict(params=[(name, p) for name, p in trainable(model) if name in DECAYED], weight_decay=DECAY),
    ]


@each_class
def test_by_dotted_name(cls, create):
    "The groups that timm means, and the training of the plain loop."
    model = Net()
    opt = create(f"--opt our{cls.__name__} --lr {SETTINGS[cls]['lr']} --weight-decay {DECAY}", model)
    assert type(opt) is cls
    assert names_by("weight_decay", opt, model)[DECAY] == DECAYED
    train(model, opt)
    assert_same(model, plain(lambda model: cls(by_ndim(model), **SETTINGS[cls])))


def test_options_by_text(create):
    "What train.py makes of its command line: numbers, and text where it sees no number."
    model = Net()
    opt = create("--opt oursgdsai --lr 0.01 --opt-eps 1e-6 --opt-kwargs state_dtype=bfloat16 nesterov=true", model)
    train(model, opt, stop=1)
    assert {(group["state_dtype"], group["nesterov"], group["eps"]) for group in opt.param_groups} == {
        (torch.bfloat16, True, 1e-6)
    }
    assert {state["momentum_buffer"].dtype for state in opt.state.values()} == {torch.bfloat16}
    opt = create("--opt ouradan --lr 0.01 --opt-betas 0.97 0.9 0.98 --opt-kwargs no_prox=true", Net())
    assert {(group["betas"], group["no_prox"]) for group in opt.param_groups} == {((0.97, 0.9, 0.98), True)}
    with pytest.raises(ValueError, match="state_dtype"):
        create("--opt oursgdsai --lr 0.01 --opt-kwargs state_dtype=small", Net())


def test_muon_takes_its_groups_from_a_function(create):
    "timm's own groups say nothing of hidden matrices and are refused; `param_group_fn` is the way out."
    with pytest.raises(ValueError, match="muon"):
        create("--opt ourmuonsai --lr 0.02", Net())
    model = Net()
    line = f"--opt ourmuonsai --lr 0.02 --weight-decay {DECAY}"
    opt = create(line, model, param_group_fn=muon_groups)
    assert names_by("muon", opt, model)[True] == HIDDEN
    train(model, opt)
    assert_same(model, plain(lambda model: MuonSaI(model, lr=0.02, weight_decay=DECAY)))


@pytest.mark.parametrize("cls", SETTINGS, ids=lambda cls: cls.__name__)
def test_lookahead_keeps_its_slow_weights_in_our_state(cls, create):
    "`--opt lookahead_...`: six steps, then six more from a checkpoint, among which the slow weights count."
    more = dict(param_group_fn=muon_groups) if cls is MuonSaI else {}

    def make(model):
        return create(f"--opt lookahead_our{cls.__name__} --lr {SETTINGS[cls]['lr']}", model, **more)

    def both(model, opt, start, stop):
        for step in range(start, stop):
            opt.zero_grad()
            model(*batch(step))["loss"].backward(create_graph=cls is AdaHessian)
            opt.step()

    model = Net()
    opt = make(model)
    both(model, opt, 0, STEPS + 1)
    weights, state = copy.deepcopy((model.state_dict(), opt.state_dict()))
    both(model, opt, STEPS + 1, 2 * STEPS)
    again = Net(seed=9)
    resumed = make(again)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    both(again, resumed, STEPS + 1, 2 * STEPS)
    assert_same(again, model)


@each_class
def test_a_resumed_training_goes_on(cls, create, tmp_path):
    "timm's own checkpoint: `CheckpointSaver` writes it, `resume_checkpoint` reads it."
    from timm.models import resume_checkpoint
    from timm.utils import CheckpointSaver

    line = f"--opt our{cls.__name__} --lr {SETTINGS[cls]['lr']} --weight-decay {DECAY}"
    model = Net()
    opt = create(line, model)
    train(model, opt, stop=3)
    CheckpointSaver(model, opt, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)).save_checkpoint(0)
    train(model, opt, start=3)
    again = Net(seed=9)
    resumed = create(line, again)
    resume_checkpoint(again, str(tmp_path / "last.pth.tar"), resumed, log_info=False)
    train(again, resumed, start=3)
    assert_same(again, model)


class Layers(Net):
    "The network with what timm asks a model for: which parameters make a layer."

    def group_matcher(self, coarse=False):
        return dict(stem=r"^embed", blocks=[(r"^norm|^up", (0,)), (r"^down", (1,))])


@each_class
def test_layer_decay_and_schedule_keep_the_proportions(cls, create):
    "`--layer-decay` makes a group per layer with a factor, which timm's schedule multiplies into every rate."
    from timm.scheduler import CosineLRScheduler

    model = Layers()
    opt = create(f"--opt our{cls.__name__} --lr 0.01 --weight-decay {DECAY} --layer-decay 0.5", model)
    schedule = CosineLRScheduler(opt, t_initial=STEPS, warmup_t=2, warmup_lr_init=1e-3, t_in_epochs=False)
    factors = [group["lr_scale"] for group in opt.param_groups]
    rates = []

    def after_step():
        rates.append([group["lr"] / factor for group, factor in zip(opt.param_groups, factors, strict=True)])
        schedule.step_update(len(rates))

    train(model, opt, after_step=after_step)
    assert len(set(factors)) == 4 and len({round(row[0], 9) for row in rates}) > 2
    assert all(max(row) == pytest.approx(min(row), rel=1e-9) for row in rates)


@pytest.mark.parametrize("cls", SETTINGS, ids=lambda cls: cls.__name__)
def test_train_py_keeps_the_graph_for_second_order(cls, create):
    "train.py calls backward(create_graph=True) for an optimizer that says `is_second_order`."
    more = dict(param_group_fn=muon_groups) if cls is MuonSaI else {}
    model = Net()
    opt = create(f"--opt our{cls.__name__} --lr {SETTINGS[cls]['lr']} --weight-decay 0", model, **more)
    second_order = getattr(opt, "is_second_order", False)
    for step in range(STEPS):
        opt.zero_grad()
        model(*batch(step))["loss"].backward(create_graph=second_order)
        opt.step()
    assert second_order == (cls is AdaHessian)
    assert_same(model, plain(lambda model: build(cls, model, weight_decay=0.0)))
