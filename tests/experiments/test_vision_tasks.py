"""Diffusion, and the vision recipes of the SGD-SaI paper.

Every task loads data of its form, trains, evaluates and writes a run file, on fabricated data.
"""

import base64
import io
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from sgd_sai.experiments.run_specs import check_spec, epoch_steps, make_spec
from sgd_sai.experiments.runs import load_run, save_run
from sgd_sai.experiments.tasks.diffusion import (
    DIFFUSION_TASKS,
    Denoiser,
    Noised,
    build_lora_denoiser,
    judge_samples,
    load_fashion_ddpm,
    load_fashion_lora,
    sample,
    sample_grid,
)
from sgd_sai.experiments.tasks.image_scores import frechet_distance, png_text
from sgd_sai.experiments.tasks.paper_recipes import (
    CIFAR10_RESNET18,
    IMAGENET_VIT_S16,
    PAPER_GRIDS,
    RECIPE_TASKS,
    build_cifar_resnet18,
    build_vit_s16,
    load_imagenet,
)
from sgd_sai.experiments.tasks.task import Data
from sgd_sai.experiments.train import batches, evaluate, schedule, train

DDPM, LORA = DIFFUSION_TASKS


def two_steps(task, data, optimizer, folder, **changes):
    "A run of two steps, written to a file and read again."
    spec = make_spec(task, data, optimizer, steps=2, **changes)
    save_run(folder, spec, train(task, data, spec, device="cpu"))
    run = load_run(folder, spec)
    assert run["status"] == "finished" and run["history"][-1]["step"] == 2 and run["best"]
    return run


def test_settings_can_be_used_and_recipes_have_the_length_of_the_paper():
    for task in DIFFUSION_TASKS + RECIPE_TASKS:
        for optimizer in task.settings:
            check_spec(make_spec(task, Data(range(2000), [], {}, ""), optimizer))
    assert CIFAR10_RESNET18.steps == epoch_steps(Data(range(50_000), [], {}, ""), 200, 128)
    assert IMAGENET_VIT_S16.steps == epoch_steps(Data(range(1_281_167), [], {}, ""), 90, 1024)
    epoch = CIFAR10_RESNET18.steps // 200
    factors = [
        schedule(n * epoch + shift, CIFAR10_RESNET18.steps, 0, milestones=CIFAR10_RESNET18.milestones)
        for n in (80, 160)
        for shift in (-1, epoch)
    ]
    assert factors == pytest.approx([1, 0.1, 0.1, 0.01])
    for task in RECIPE_TASKS:  # what the paper reports lies in its grid
        assert all(
            task.settings["sgdm"][key] in values and task.settings["sgd_sai"][key] in values
            for key, values in PAPER_GRIDS[task.name].items()
        )


# --- the paper's recipes ----------------------------------------------------------------------------------------------


def test_parameter_counts_are_those_of_the_paper():
    with torch.device("meta"):
        assert sum(p.numel() for p in build_cifar_resnet18({}).parameters()) == 11_173_962
        assert sum(p.numel() for p in build_vit_s16({}).parameters()) == 22_050_664


def test_resnet18_recipe_runs_on_cifar_of_the_same_form(cifar, tmp_path):
    data = CIFAR10_RESNET18.load(cifar)
    data = data._replace(val=Subset(data.val, range(4)))
    run = two_steps(CIFAR10_RESNET18, data, "sgd_sai", tmp_path / "runs", batch_size=4)
    assert run["parameters"] == 11_173_962 and 0 <= run["final"]["accuracy"] <= 1


@pytest.fixture
def imagenet(tmp_path):
    "A folder with two classes of JPEG files, three of each to train and one to validate."
    random = np.random.default_rng(0)
    for part, n in (("train", 3), ("val", 1)):
        for name in ("n01440764", "n02102040"):
            (tmp_path / "imagenet" / part / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(random.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(
                    tmp_path / "imagenet" / part / name / f"{i}.JPEG"
                )
    return tmp_path


def test_vit_recipe_runs_on_folders_of_the_same_form(imagenet, tmp_path):
    data = IMAGENET_VIT_S16.load(imagenet)
    assert (len(data.train), len(data.val), data.sizes) == (6, 2, {"classes": 2})
    run = two_steps(replace(IMAGENET_VIT_S16, loader_workers=0), data, "sgd_sai", tmp_path / "runs", batch_size=2)
    assert run["parameters"] == 22_050_664 - 998 * 385


def test_first_gradient_reaches_every_tensor_of_the_vit(monkeypatch):
    "torchvision's head of zeros would let none through."
    import torchvision.models

    small = partial(torchvision.models.VisionTransformer, 32, 16, 1, 2, 8, 16)
    monkeypatch.setattr(
        torchvision.models, "VisionTransformer", lambda **sizes: small(num_classes=sizes["num_classes"])
    )
    for model, reached in ((small(num_classes=5), False), (build_vit_s16({"classes": 5}), True)):
        torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
        assert (model.conv_proj.weight.grad.abs().max() > 0) == reached
        assert model.heads.head.weight.grad.abs().max() > 0


def test_random_crops_of_workers_depend_on_the_seed_alone(imagenet):
    data, task = load_imagenet(imagenet), replace(IMAGENET_VIT_S16, loader_workers=2)

    def drawn(seed, disturb=lambda: None):
        stream = batches(task, data, make_spec(task, data, "sgdm", steps=4, batch_size=2, seed=seed))
        found = []
        for _ in range(4):  # into the second epoch
            found.append(next(stream)[0][:, :, ::32, ::32])
            disturb()
        return torch.stack(found)

    first = drawn(0)
    assert torch.equal(first, drawn(0, disturb=lambda: torch.rand(5))) and not torch.equal(first, drawn(1))
    assert len({image.sum().item() for image in first.flatten(0, 1)}) == 8


def test_missing_imagenet_says_what_to_put_where(imagenet, tmp_path):
    with pytest.raises(FileNotFoundError, match="image-net.org") as error:
        load_imagenet(tmp_path / "elsewhere")
    assert str((tmp_path / "elsewhere" / "imagenet" / "val").resolve()) in str(error.value)
    (imagenet / "imagenet" / "val" / "n02102040").rename(imagenet / "imagenet" / "val" / "other")
    with pytest.raises(FileNotFoundError, match="names differ"):
        load_imagenet(imagenet)


# --- diffusion --------------------------------------------------------------------------------------------------------


def quick(task):
    "The task with a classifier, a base and samples that cost nothing."
    load = (
        partial(load_fashion_ddpm, classifier_steps=3)
        if task is DDPM
        else partial(load_fashion_lora, base_steps=3, classifier_steps=3)
    )
    return replace(task, load=load, extra=partial(judge_samples, n=32))


@pytest.mark.parametrize("task", [quick(task) for task in DIFFUSION_TASKS], ids=lambda task: task.name)
def test_diffusion_task_trains_and_keeps_its_samples(fashion, tmp_path, task):
    data = task.load(fashion)
    for optimizer in ("adahessian", "adam_mini", "muon_sai"):
        two_steps(replace(task, extra=None), data, optimizer, tmp_path / "runs", batch_size=8)
    run = two_steps(task, data, "sgd_sai", tmp_path / "runs", batch_size=8)
    assert run["extra"]["frechet"] > 0 and sum(run["extra"]["classes"]) == 32
    picture = Image.open(io.BytesIO(base64.b64decode(run["extra"]["samples"])))
    assert picture.size == (8 * 16, 4 * 16) and picture.mode == "L" and len(run["extra"]["samples"]) < 15_000
    assert np.array_equal(np.asarray(sample_grid(run).axes[0].images[0].get_array()), np.asarray(picture))
    plt.close("all")


@pytest.mark.parametrize("task", [quick(task) for task in DIFFUSION_TASKS], ids=lambda task: task.name)
def test_diffusion_task_is_repeatable(fashion, tmp_path, task):
    "The same run twice, from files and models that are trained in one case and found in the other."
    first, second = [
        two_steps(task, task.load(fashion), "sgd_sai", tmp_path / f"runs{i}", batch_size=8) for i in range(2)
    ]
    assert first["key"] == second["key"] and first["extra"] == second["extra"] and first["final"] == second["final"]


def test_precisions_of_the_denoiser(fashion, tmp_path):
    task = quick(DDPM)
    data = task.load(fashion)
    for precision in ("bf16", "bf16-true"):
        assert (
            two_steps(task, data, "adamw", tmp_path / "runs", batch_size=8, precision=precision)["extra"]["frechet"] > 0
        )


def test_validation_loss_is_one_number_for_a_model():
    torch.manual_seed(0)
    model, images = Denoiser(width=8), torch.rand(32, 1, 16, 16) * 2 - 1
    losses = []
    for _ in range(2):
        torch.rand(7)
        losses.append(evaluate(DDPM, model, torch.utils.data.DataLoader(Noised(images, seed=0), 16))["val_loss"])
    assert losses[0] == losses[1]


def test_training_noise_depends_on_the_seed_and_not_on_the_optimizer(fashion):
    task = quick(DDPM)
    data = task.load(fashion)

    def seen(optimizer, seed=0):
        "The batches that the loss is given while this optimizer trains."
        batches_seen = []

        def spy(model, batch):
            if model.training:
                batches_seen.append([part.clone() for part in batch])
            return task.loss(model, batch)

        train(
            replace(task, loss=spy, extra=None),
            data,
            make_spec(task, data, optimizer, steps=3, batch_size=8, seed=seed),
            device="cpu",
        )
        return batches_seen

    reference = seen("sgd_sai")
    assert len(reference) == 3 and not torch.equal(reference[0][2], reference[1][2])
    for optimizer in ("adamw", "adahessian"):  # the second draws random numbers itself
        assert all(
            torch.equal(a, b)
            for one, other in zip(reference, seen(optimizer), strict=True)
            for a, b in zip(one, other, strict=True)
        )
    assert not torch.equal(reference[0][2], seen("sgd_sai", seed=1)[0][2])


def test_only_adapters_learn_and_start_as_the_base(fashion):
    task = quick(LORA)
    data = task.load(fashion)
    model, base = build_lora_denoiser(data.sizes), Denoiser()
    base.load_state_dict(torch.load(data.sizes["base"], weights_only=True))
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in name for name in learning)
    assert {name.split(".")[-4] for name in learning} >= {"to_q", "to_k", "to_v", "conv1", "conv2"}
    x, t = torch.randn(4, 1, 16, 16), torch.tensor([0, 10, 500, 999])
    torch.testing.assert_close(model(x, t), base(x, t))
    task.loss(model, next(iter(torch.utils.data.DataLoader(data.train, 8))))[0].backward()
    first = {
        kind: [p.grad.abs().max().item() for name, p in model.named_parameters() if f"lora_{kind}" in name]
        for kind in "AB"
    }
    assert max(first["A"]) == 0 < min(first["B"])  # the case in which the authors' code freezes A


def test_shoes_are_adapted_to_and_clothes_are_not(fashion):
    raw = fashion / "FashionMNIST" / "raw"
    shoes = [
        sum(label in (5, 7, 9) for label in (raw / f"{part}-labels-idx1-ubyte").read_bytes()[8:])
        for part in ("train", "t10k")
    ]
    data = quick(LORA).load(fashion)
    assert [len(data.train), len(data.val)] == shoes and data.train.images.shape[1:] == (1, 16, 16)
    assert data.train.images.min() >= -1 and data.train.images.max() <= 1
    assert len(list(fashion.glob("*.pt"))) == 2 and not list(fashion.glob(".part-*"))


def test_frechet_distance_of_gaussians_is_the_closed_form():
    torch.manual_seed(0)
    n, d = 5000, 4
    white = torch.randn(n, d, dtype=torch.float64)
    white = torch.linalg.qr(white - white.mean(0)).Q * (n - 1) ** 0.5  # mean 0 and covariance 1, exactly
    P, Q = torch.randn(d, d, dtype=torch.float64), torch.randn(d, d, dtype=torch.float64)
    a, b = white @ P.T, white @ Q.T + 2
    A, B = P @ P.T, Q @ Q.T  # tr sqrt(AB) is the sum of the roots of its eigenvalues, which are real and positive
    expected = 4 * d + A.trace() + B.trace() - 2 * torch.linalg.eigvals(A @ B).real.sqrt().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6) == frechet_distance(b, a)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_sampling_inverts_noise_for_a_known_image():
    "A network that knows the one image there is finds it."
    image = torch.linspace(-0.9, 0.9, 256).view(1, 1, 16, 16)
    share = Noised(image, seed=0).process.alphas_cumprod

    class Knows(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, t):
            a = share[t].view(-1, 1, 1, 1)
            return (x - a.sqrt() * image) / (1 - a).sqrt()

    torch.testing.assert_close(sample(Knows(), 3), image.expand(3, -1, -1, -1), atol=0.02, rtol=0)


def test_png_holds_the_images():
    images = torch.rand(8, 1, 16, 16) * 2 - 1
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(png_text(images, columns=4)))))
    assert picture.shape == (32, 64) and np.abs(picture[16:, :16] / 127.5 - 1 - images[4, 0].numpy()).max() < 0.005
