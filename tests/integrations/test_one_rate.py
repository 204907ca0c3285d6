"""Programs write one learning rate into all groups: OneCycleLR(max_lr), a loop over the groups, skorch's `set_params`,
Lightning's search for a rate. The parts of MuonSaI keep the relation of their rates all the same."""

import pytest
import torch
from programs import SETTINGS, STEPS, Net, build, plain, train

PEAK = 0.02
WAYS = ["OneCycleLR", "CyclicLR", "a loop over the groups"]


def one_rate(way, opt):
    "A schedule that gives every group the same rate."
    if way == "OneCycleLR":
        return torch.optim.lr_scheduler.OneCycleLR(opt, PEAK, STEPS, cycle_momentum=False)
    if way == "CyclicLR":
        return torch.optim.lr_scheduler.CyclicLR(opt, PEAK / 10, PEAK, 2, cycle_momentum=False)
    return Loop(opt)


class Loop:
    "What nanoGPT does: a function of the step, written into all groups."

    def __init__(self, opt):
        self.opt, self.count = opt, -1
        self.step()

    def step(self):
        self.count += 1
        for group in self.opt.param_groups:
            group["lr"] = PEAK / (1 + self.count)


def rates(way):
    "The rate of each step."
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule, found = one_rate(way, opt), []
    for _ in range(STEPS):
        found.append(opt.param_groups[0]["lr"])
        opt.step()
        schedule.step() if len(found) < STEPS else None
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", SETTINGS, ids=lambda cls: cls.__name__)
def test_one_rate_for_all_groups(cls, way):
    "As a schedule by factors, which knows the rate of each group."
    expected = rates(way)
    model = Net()
    opt = build(cls, model, lr=PEAK)
    schedule = one_rate(way, opt)
    for step in range(STEPS):
        train(model, opt, start=step, stop=step + 1)
        if step + 1 < STEPS:
            schedule.step()

    def by_factors(opt):
        factors = [rate / PEAK for rate in expected] + [1.0]
        return torch.optim.lr_scheduler.LambdaLR(opt, lambda step: factors[step])

    wanted = plain(lambda model: build(cls, model, lr=PEAK), by_factors)
    assert len({round(rate, 9) for rate in expected}) > 2
    for (name, p), q in zip(model.named_parameters(), wanted.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
