"What `gsnr_batches` leaves as it was, and how tables are averaged."

import pytest
import torch
from torch import nn

from sgd_sai import average_gsnr, gsnr_batches, gsnr_table
from sgd_sai.gsnr_of_models import GSNRTable

pytestmark = pytest.mark.usefixtures("seeded")


class Counting(nn.Module):
    "Replaces its buffer in each call instead of writing to it, and has one that is None."

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.calls = self.calls + 1
        return x * (1 + self.calls)


def model_and_batches():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), Counting(), nn.Linear(8, 3))
    model[2].eval()  # modes of parts are kept too
    model(torch.randn(4, 6)).square().mean().backward()
    return model, [torch.randn(4, 6) for _ in range(3)]


def loss_fn(model, x):
    model.train(), torch.rand(1)
    return nn.functional.dropout(model(x), 0.5).square().mean()


def failing(model, x):
    loss_fn(model, x).backward()
    raise KeyError("the loss")


def everything(model):
    "What a model holds, and the random state."
    modules, tensors = list(model.modules()), {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        [module.training for module in modules],
        {name: (id(t), t.detach().clone()) for name, t in tensors.items()},
        {name: (id(p.grad), p.grad.clone()) for name, p in model.named_parameters()},
        {"random": (0, torch.get_rng_state())},
    )


def assert_same(found, expected):
    assert found[0] == expected[0]
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert mine.keys() == theirs.keys()
        for name, (identity, value) in theirs.items():
            assert mine[name][0] == identity and torch.equal(mine[name][1], value), name


@pytest.mark.parametrize("given", [loss_fn, failing])
def test_gradients_buffers_modes_and_random_state_are_put_back(given):
    model, batches = model_and_batches()
    before = everything(model)
    if given is failing:
        with pytest.raises(KeyError, match="the loss"):
            gsnr_batches(model, given, batches)
    else:
        assert len(gsnr_batches(model, given, batches)) == 3
    assert_same(everything(model), before)


def test_training_goes_on_as_if_nothing_had_been_measured():
    ends = []
    for measured in (False, True):
        torch.manual_seed(1)
        model, batches = model_and_batches()
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in batches:
            if measured:
                gsnr_batches(model, loss_fn, iter(batches))
            opt.zero_grad()
            loss_fn(model, x).backward()
            opt.step()
        ends.append([t.clone() for t in model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_batches_may_be_drawn_while_they_are_measured():
    "A loader that draws random numbers: every batch is another one, and the state is put back in the end."
    model, _ = model_and_batches()
    seen, before = [], torch.get_rng_state()
    gsnr_batches(model, lambda model, x: (seen.append(x), loss_fn(model, x))[1], (torch.randn(4, 6) for _ in range(3)))
    assert len(seen) == 3 and not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_every_batch_finds_the_same_buffers():
    "The table of a batch does not depend on those before it, where no random numbers are drawn."
    model, batches = model_and_batches()

    def loss(model, x):
        return model.eval()(x).square().mean()

    alone = [gsnr_batches(model, loss, [x])[0] for x in batches]
    assert [list(t) for t in gsnr_batches(model, loss, batches)] == [list(t) for t in alone]


def test_random_numbers_go_on_from_batch_to_batch():
    "Dropout masks are a part of what differs between batches."
    model, (x, *_) = model_and_batches()
    first, second = gsnr_batches(model, loss_fn, [x, x])
    again, _ = gsnr_batches(model, loss_fn, [x, x])
    assert [row.gsnr for row in first] != [row.gsnr for row in second] and list(first) == list(again)


@pytest.mark.gpu
def test_random_state_of_the_gpu_is_put_back():
    model = nn.Linear(4, 4).cuda()
    torch.cuda.init()
    before = torch.cuda.get_rng_state()
    gsnr_batches(model, lambda model, x: nn.functional.dropout(model(x)).sum(), [torch.randn(2, 4, device="cuda")])
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_averages_leave_out_batches_without_a_gradient():
    "A tensor whose gradient is zero on a batch has no g-SNR there; all means are over the other batches."
    p, q = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    tables = []
    for g in ([1.0, 2.0, 3.0, 4.0], [0.0] * 4, [2.0, 2.0, -5.0, 1.0]):
        p.grad, q.grad = torch.tensor(g), torch.zeros(4)
        tables.append(gsnr_table([("p", p), ("q", q)]))
    average = average_gsnr(tables)
    assert isinstance(average, GSNRTable) and [row.name for row in average] == ["p", "q"]
    for key in ("norm", "mean", "std", "gsnr", "ratio"):
        expected = (getattr(tables[0][0], key) + getattr(tables[2][0], key)) / 2
        assert getattr(average[0], key) == pytest.approx(expected, rel=1e-12)
        assert getattr(average[1], key) == 0  # not measured on any batch
    assert average[0].numel == 4 and average[0].shape == (4,) and average[0].sqrt_numel == 2


def test_tables_of_other_tensors_are_not_averaged():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    for tables in ([], [gsnr_table([("a", p)]), gsnr_table([("b", p)])]):
        with pytest.raises(ValueError, match="must list the same tensors in the same order"):
            average_gsnr(tables)


def test_rows_of_the_table_by_hand():
    "Gradient 1, 2, 3, 4 of a matrix: norm sqrt 30, mean 5/2, standard deviation sqrt(5/3), G = sqrt 18."
    p = nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    (row,) = gsnr_table([("head.weight", p)], eps=0.0)
    assert (row.name, row.kind, row.shape, row.numel, row.sqrt_numel) == ("head.weight", "linear", (2, 2), 4, 2)
    found = (row.norm, row.mean, row.std, row.gsnr, row.ratio)
    assert found == pytest.approx((30**0.5, 2.5, (5 / 3) ** 0.5, 18**0.5, 18**0.5 / 2), rel=1e-6)


def test_kinds_of_layers():
    layers = {
        "linear": nn.Linear(3, 2),
        "conv": nn.Conv1d(2, 3, 3),
        "deconv": nn.ConvTranspose2d(2, 3, 3),
        "embedding": nn.Embedding(4, 3),
        "batch": nn.BatchNorm2d(3),
        "layer": nn.LayerNorm(3),
        "group": nn.GroupNorm(1, 3),
        "rms": nn.RMSNorm(3),
        "act": nn.PReLU(),
    }
    model = nn.ModuleDict(layers)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    kinds = {row.name: row.kind for row in gsnr_table(model)}
    expected = {"linear.weight": "linear", "conv.weight": "conv", "deconv.weight": "conv", "act.weight": "other"}
    expected |= {"embedding.weight": "embedding", "rms.weight": "norm"}
    expected |= {f"{name}.bias": "bias" for name in ("linear", "conv", "deconv")}
    expected |= {f"{name}.{key}": "norm" for name in ("batch", "layer", "group") for key in ("weight", "bias")}
    assert kinds == expected
