"What decides the outcome of a run, and nothing else does: its seed, its batches, its key; and whose code is compared."

import hashlib
import zipfile
from dataclasses import replace

import pytest
import torch
from run_files import outcome

from sgd_sai.analysis.control import SCALES, Pairing, one_per_task
from sgd_sai.analysis.differences import verdict
from sgd_sai.analysis.grids import tolerance
from sgd_sai.experiments import peers, train
from sgd_sai.experiments.compare import summary_frame
from sgd_sai.experiments.run_specs import make_spec
from sgd_sai.experiments.runs import RunSpec, load_run, save_run
from sgd_sai.experiments.spread import Spread
from sgd_sai.experiments.sweep import Sweep, best_of_runs, expand
from sgd_sai.experiments.tasks.registry import get_task
from sgd_sai.experiments.tasks.task import POINTS, digest


@pytest.fixture(scope="module")
def digits():
    task = get_task("digits-vit")
    return task, task.load()


def initial_weights(task, data, spec):
    accelerator = train.make_accelerator("no", "cpu")
    return [p.detach().clone() for p in train._prepare(task, data, spec, accelerator).bare_model.parameters()]


def test_the_seed_decides_about_the_initial_weights(digits):
    task, data = digits
    found = {}
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        torch.manual_seed(len(found))  # whatever was drawn before
        found[name] = initial_weights(task, data, make_spec(task, data, "sgdm", seed=seed, steps=2))
    assert all(torch.equal(p, q) for p, q in zip(found["one"], found["again"], strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(found["one"], found["other"], strict=True) if p.std() > 0)


def test_the_seed_decides_about_the_first_loss(digits):
    task, data = digits
    losses = []
    for seed in (1, 1, 2):
        record = train.train(task, data, make_spec(task, data, "sgdm", seed=seed, steps=1), device="cpu")
        losses.append(record["history"][0]["val_loss"])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("size", [64, 100, 1000])
def test_every_batch_is_whole_and_an_epoch_has_no_item_twice(digits, size):
    "The last items of an epoch that fill no batch are left out."
    task, data = digits
    items = torch.utils.data.TensorDataset(torch.arange(1438), torch.zeros(1438))
    stream = train.batches(task, data._replace(train=items), make_spec(task, data, "sgdm", batch_size=size))
    for _ in range(2):
        epoch = [next(stream)[0] for _ in range(1438 // size)]
        assert {len(batch) for batch in epoch} == {size} and len(torch.cat(epoch).unique()) == size * len(epoch)


def test_keys_do_not_depend_on_the_order_of_hyperparameters(tmp_path):
    given = {"lr": 0.1, "weight_decay": 0.2, "betas": (0.9, 0.99), "nested": {"b": 1, "a": 2}}
    other = {"nested": {"a": 2, "b": 1}, "betas": [0.9, 0.99], "weight_decay": 0.2, "lr": 0.1}
    one = RunSpec("digits-vit", "adamw", given, 0, 240, 64, 24, 1.0, "no", "0" * 12)
    again = replace(one, hyperparameters=other)
    assert one.key == again.key and one.key != replace(one, hyperparameters={**given, "lr": 0.2}).key
    save_run(tmp_path, one, outcome())
    assert load_run(tmp_path, again)["key"] == one.key


def test_the_key_of_a_run_never_changes():
    "Keys stand in results/ and in other people's folders."
    spec = RunSpec("digits-vit", "adamw", {"lr": 0.003, "weight_decay": 0.1}, 1, 240, 64, 24, 1.0, "no", "0" * 12)
    assert spec.key == "13d1e0c01500ece2"


def test_digests_are_of_all_parts_in_their_order():
    a, b = torch.arange(3), b"text"
    assert digest(a, b) == digest(a, b) == hashlib.sha256(a.numpy().tobytes() + b).hexdigest()[:12]
    assert len({digest(a), digest(b), digest(a, b), digest(b, a)}) == 4


# --- steps and evaluations -------------------------------------------------------------------------------------------


def test_the_warm_up_is_the_same_share_of_every_run(digits):
    task, data = digits
    assert task.warmup / task.steps == 0.1
    lengths = {steps: make_spec(task, data, "sgdm", steps=steps).warmup for steps in (2, 60, 240, 480)}
    assert lengths == {2: 1, 60: 6, 240: 24, 480: 48}
    assert make_spec(replace(task, warmup=0), data, "sgdm", steps=60).warmup == 0


def test_an_evaluation_is_the_mean_over_items(digits):
    "The last batch is smaller, and counts as its items do."
    task, _ = digits
    losses, right = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1, 0, 1])

    def loss(model, batch):
        return losses[batch[0]].mean(), right[batch[0]].sum()

    loader = [(torch.tensor([0, 1]),), (torch.tensor([2]),)]
    found = train.evaluate(replace(task, loss=loss), torch.nn.Linear(1, 1), loader)
    assert found == {"val_loss": 3.0, "accuracy": pytest.approx(2 / 3)}


def test_a_step_uses_the_gradient_of_its_own_batch(digits):
    "Not those of the steps before."
    task, data = digits
    seen = []

    def look(step, model):
        p = next(model.parameters())
        seen.append((step, p.grad.clone(), p.detach().clone()))

    spec = make_spec(task, data, "sgdm", steps=3, lr=1e-12, momentum=0.0)
    train.train(task, data, spec, device="cpu", on_gradients=look)
    stream = train.batches(task, data, spec)
    torch.manual_seed(spec.seed)
    model = task.build(data.sizes).train()
    for step, grad, _ in seen:
        model.zero_grad()
        task.loss(model, next(stream))[0].backward()
        torch.testing.assert_close(grad, next(model.parameters()).grad, rtol=1e-3, atol=1e-6)
        assert step <= 3
    assert len(seen) == 3


def test_a_summary_has_the_state_of_each_optimizer(digits):
    task, data = digits
    runs = []
    for name, state in (("sgdm", 40), ("adamw", 80)):
        spec = make_spec(task, data, name)
        runs.append({**vars(spec), "key": spec.key, **outcome(state_bytes=state)})
    frame = summary_frame(task, runs).set_index("optimizer")
    assert frame.state_bytes.to_dict() == {"sgdm": 40, "adamw": 80}


# --- which setting is the best ---------------------------------------------------------------------------------------


def finished(task, lr, seed, **final):
    return {"optimizer": "adamw", "hyperparameters": {"lr": lr}, "seed": seed, "status": "finished", "final": final}


def test_the_best_setting_has_the_lowest_loss_or_the_highest_accuracy():
    loss, accuracy = get_task("pydoc-gpt"), get_task("digits-vit")
    runs = [finished(loss, lr, 0, val_loss=value, accuracy=value) for lr, value in ((0.1, 0.5), (0.2, 0.7), (0.3, 0.6))]
    assert best_of_runs(loss, runs) == {"adamw": {"lr": 0.1}} and best_of_runs(accuracy, runs) == {"adamw": {"lr": 0.2}}
    ties = [finished(accuracy, lr, 0, val_loss=value, accuracy=0.9) for lr, value in ((0.1, 0.7), (0.2, 0.5))]
    assert best_of_runs(accuracy, ties) == {"adamw": {"lr": 0.2}}  # few images: the loss decides


def test_a_sweep_multiplies_lr_and_comes_to_every_setting_before_the_next_seed(digits):
    task, data = digits
    sweep = Sweep(
        task.name, ["adamw", "adahessian"], seeds=2, steps=[2, 4], lr_factor=[0.5, 2], grid={"adamw": {"lr": 0.1}}
    )
    specs = expand(sweep, data)
    rates = {spec.hyperparameters["lr"] for spec in specs if spec.optimizer == "adamw"}
    assert rates == {0.05, 0.2} and [spec.seed for spec in specs] == [0] * 8 + [1] * 8
    first = [(spec.optimizer, spec.steps) for spec in specs[:8]]
    assert first[:2] == [("adahessian", 4)] * 2 and first[-2:] == [("adamw", 2)] * 2  # the expensive ones first


def test_tolerance_is_counted_from_the_lowest_loss():
    task = get_task("pydoc-gpt")
    runs = [finished(task, lr, 0, val_loss=value) for lr, value in ((0.1, 0.50), (0.2, 0.54), (0.3, 0.70))]
    row = tolerance(task, runs).loc["AdamW"]
    assert (row["best"], row["cells"]) == (0.5, 3) and row["near"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("name, chosen", [("digits-vit", 0.2), ("pydoc-gpt", 0.1)])
def test_of_each_task_the_pair_of_settings_that_ends_best_is_shown(name, chosen):
    task = get_task(name)
    pairs = []
    for lr, value in ((0.1, 0.5), (0.2, 0.7)):
        both = {scale: {0: {"final": {task.metric: value}}} for scale in SCALES}
        pairs.append(Pairing(task.name, {"lr": lr}, 9, 8, both))
    assert [pair.hyperparameters["lr"] for pair in one_per_task(pairs)] == [chosen]


@pytest.mark.parametrize("mean, std, n, said", [  # t is 3.182 for four values, so half of the interval is 1.591 std
    (0.0131, 0.008, 4, "better"),
    (-0.0131, 0.008, 4, "worse"),
    (0.0125, 0.008, 4, "open"),  # 0 is within the interval
    (0.003, 0.001, 4, "even"),  # for certain more than 0, and no more than what counts as none
    (0.0031, 0.001, 4, "better"),
    (0.0, 0.0043, 4, "even"),
    (0.0, 0.0045, 4, "open"),  # up to 0.72 points either way
    (0.5, float("nan"), 1, "open"),
])  # fmt: skip
def test_a_difference_is_told_by_its_interval(mean, std, n, said):
    assert verdict(Spread(mean, std, n), POINTS) == said


# --- whose code is compared ------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "A cache with a wheel of the right name and other contents."
    monkeypatch.setenv("SGD_SAI_CACHE", str(tmp_path))
    monkeypatch.delitem(peers.sys.modules, "sgd_sai_authors", raising=False)
    wheel = tmp_path / f"sgd_sai-{peers.AUTHORS_VERSION}-py2.py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("sgd_sai/sgd_sai.py", "import pathlib\npathlib.Path(__name__).touch()\nclass SGD_sai: pass\n")
    return wheel


def test_a_wheel_that_is_not_the_published_one_is_not_run(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="is not the published file"):
        peers.authors_sgd_sai()
    assert [path.name for path in tmp_path.iterdir()] == [cache.name] and "sgd_sai_authors" not in peers.sys.modules


def test_the_published_wheel_is_told_by_its_digest(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peers, "_AUTHORS_SHA256", hashlib.sha256(cache.read_bytes()).hexdigest())
    assert peers.authors_sgd_sai().__name__ == "SGD_sai"
    del peers.sys.modules["sgd_sai_authors"]


def test_a_wheel_that_cannot_be_had_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("SGD_SAI_CACHE", str(tmp_path))
    monkeypatch.delitem(peers.sys.modules, "sgd_sai_authors", raising=False)

    class Done:
        stderr = "no network"

    monkeypatch.setattr(peers.subprocess, "run", lambda *_, **__: Done)
    with pytest.raises(RuntimeError, match="cannot fetch the authors' package.*\n.*no network"):
        peers.authors_sgd_sai()
