"skorch: groups by patterns of names, parameters that change during training, nets that are saved and go on."

import pytest
import torch
from programs import BATCH, DECAYED, HIDDEN, SETTINGS, STEPS, Net, assert_same, batch, names_by, plain, train

from sgd_sai import Adan, MuonSaI, SGDSaI

NO_DECAY = [("*norm*", dict(weight_decay=0.0)), ("*.bias", dict(weight_decay=0.0))]
BIASES = ["head.bias", "down.bias", "up.bias"]
NAMES = ["SGDSaI", "Adan", "MuonSaI"]
MARKED = [("up.weight", dict(muon=True)), ("down.weight", dict(muon=True))]


@pytest.fixture
def net():
    "A function that makes a net for one class of optimizer."
    skorch = pytest.importorskip("skorch")

    class Losses(skorch.NeuralNet):
        def get_loss(self, output, *args, **more):
            return output["loss"]

    def make(cls, param_groups, **more):
        settings = dict(max_epochs=1, batch_size=BATCH, train_split=None, iterator_train__shuffle=False, verbose=0)
        given = settings | SETTINGS[cls] | dict(optimizer=cls, optimizer__param_groups=param_groups) | more
        return Losses(Net, torch.nn.CrossEntropyLoss, **given)

    return make


def data(start=0, stop=STEPS):
    parts = [batch(step) for step in range(start, stop)]
    return dict(x=torch.cat([x for x, _ in parts]), labels=torch.cat([y for _, y in parts]))


@pytest.mark.parametrize("cls", [SGDSaI, Adan], ids=lambda cls: cls.__name__)
def test_groups_by_pattern(cls, net):
    "As the plain loop with the same groups, in skorch's order."
    made = net(cls, NO_DECAY, optimizer__weight_decay=0.1).fit(data())
    assert made.module_.passes == STEPS  # skorch steps with a closure, which is called once
    assert names_by("weight_decay", made.optimizer_, made.module_)[0.0] == {"norm.weight", "norm.bias", *BIASES}

    def same(model):
        named = dict(model.named_parameters())
        parts = [["norm.bias", "norm.weight"], BIASES, [name for name in named if name in DECAYED]]
        groups = [dict(params=[named[name] for name in names], weight_decay=0.0) for names in parts]
        groups[-1].pop("weight_decay")
        return cls(groups, weight_decay=0.1, **SETTINGS[cls])

    assert_same(made.module_, plain(same))


def test_muon_is_marked_by_patterns(net):
    "Without marks it is refused; a pattern per group is the way out."
    with pytest.raises(ValueError, match="muon"):
        net(MuonSaI, NO_DECAY).initialize()
    made = net(MuonSaI, MARKED).fit(data())
    assert names_by("muon", made.optimizer_, made.module_)[True] == HIDDEN

    def same(model):
        named = dict(model.named_parameters())
        rest = [p for name, p in named.items() if name not in HIDDEN]
        hidden = [dict(params=[named[f"{name}.weight"]], muon=True) for name in ("up", "down")]
        return MuonSaI([*hidden, dict(params=rest, muon=False)], **SETTINGS[MuonSaI])

    assert_same(made.module_, plain(same))


@pytest.mark.parametrize("cls, groups", [(SGDSaI, NO_DECAY), (Adan, NO_DECAY), (MuonSaI, MARKED)], ids=NAMES)
def test_a_net_goes_on(cls, groups, net, tmp_path):
    "Three batches, `save_params(f_optimizer=...)`, a new net, `partial_fit` on three more."
    made = net(cls, groups).fit(data(0, 3))
    files = dict(f_params=tmp_path / "params.pt", f_optimizer=tmp_path / "optimizer.pt")
    made.save_params(**files)
    again = net(cls, groups).initialize()
    again.load_params(**files)
    for one in (made, again):
        one.partial_fit(data(3))
    assert_same(again.module_, made.module_)


def test_a_rate_that_is_set_between_epochs(net):
    "`set_params(lr=..., optimizer__weight_decay=...)` writes into all groups; the next epoch steps with it."
    made = net(SGDSaI, []).fit(data(0, 3))
    made.set_params(lr=0.001, optimizer__weight_decay=0.2)
    made.partial_fit(data(3))
    model = Net()
    opt = SGDSaI(model.parameters(), lr=0.01)
    train(model, opt, stop=3)
    opt.param_groups[0].update(lr=0.001, weight_decay=0.2)
    train(model, opt, start=3)
    assert_same(made.module_, model)
