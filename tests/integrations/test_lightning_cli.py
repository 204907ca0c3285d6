"LightningCLI builds the optimizer from its dotted name and the options of the command line or a YAML file."

import logging

import pytest
import torch
from programs import SETTINGS, STEPS, Net, assert_same, batch, lightning_module, plain

from sgd_sai import AdaHessian, Adan, MuonSaI, SGDSaI


@pytest.fixture
def run(tmp_path):
    "A function that trains by the command line, returns the LightningCLI; `kind` is mixed into the module."
    lightning = pytest.importorskip("lightning")
    pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse[signatures]")
    pytest.importorskip("typeshed_client", reason="LightningCLI needs jsonargparse[signatures]")
    from lightning.pytorch.cli import LightningCLI

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)

    Module = lightning_module(lightning)

    class Curved(Module):
        def backward(self, loss):
            loss.backward(create_graph=True)

    def fit(*options, curved=False, max_steps=STEPS):
        quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1)
        settings = quiet | dict(max_steps=max_steps, default_root_dir=str(tmp_path))
        return LightningCLI(
            Curved if curved else Module,
            args=["fit", *options],
            trainer_defaults=settings,
            save_config_callback=None,
            seed_everything_default=False,
        )

    return fit


@pytest.mark.parametrize("cls", [SGDSaI, Adan, AdaHessian], ids=lambda cls: cls.__name__)
def test_by_dotted_name(cls, run, tmp_path):
    "As the plain loop; then once more from the checkpoint after three of six steps."
    lr = SETTINGS[cls]["lr"]
    options = ["--optimizer", f"sgd_sai.{cls.__name__}", f"--optimizer.lr={lr}"]
    expected = plain(lambda model: cls(model.parameters(), lr=lr))
    made = run(*options, curved=cls is AdaHessian)
    assert type(made.trainer.optimizers[0]) is cls
    assert made.model.net.passes == STEPS  # Lightning steps with a closure, which is called once
    assert_same(made.model.net, expected)
    path = str(tmp_path / "half.ckpt")
    half = run(*options, curved=cls is AdaHessian, max_steps=3)
    half.trainer.save_checkpoint(path)
    again = run(*options, "--ckpt_path", path, "--weights_only=false", curved=cls is AdaHessian)
    assert_same(again.model.net, expected)


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "bfloat16"])
def test_options_of_every_sort(run, dtype):
    "A switch, a choice, a number without a value, several numbers, a dtype."
    made = run(
        *("--optimizer", "sgd_sai.SGDSaI", "--optimizer.nesterov=true", "--optimizer.scale=sqrt_numel"),
        *("--optimizer.max_ratio=null", f"--optimizer.state_dtype={dtype}"),
        max_steps=1,
    )
    (group,) = made.trainer.optimizers[0].param_groups
    expected = dict(nesterov=True, scale="sqrt_numel", max_ratio=None, state_dtype=torch.bfloat16)
    assert {key: group[key] for key in expected} == expected
    made = run("--optimizer", "sgd_sai.Adan", "--optimizer.betas=[0.97,0.9,0.98]", max_steps=1)
    assert made.trainer.optimizers[0].param_groups[0]["betas"] == (0.97, 0.9, 0.98)


def test_one_cycle(run):
    "Learning rate and momentum of a schedule that LightningCLI builds too, one that steps by epochs."
    made = run(
        *("--optimizer", "sgd_sai.SGDSaI", "--lr_scheduler", "OneCycleLR"),
        *("--lr_scheduler.max_lr=0.02", "--lr_scheduler.total_steps=4"),
    )
    (group,) = made.trainer.optimizers[0].param_groups
    assert group["max_lr"] == 0.02 and group["initial_lr"] == pytest.approx(0.02 / 25)


def test_muon_wants_the_model(run):
    "LightningCLI gives parameters without groups: the error says what MuonSaI has to be given."
    with pytest.raises((TypeError, ValueError), match="give it the model"):
        run("--optimizer", "sgd_sai.MuonSaI")


def test_a_module_builds_muon_itself(tmp_path):
    "The way out: `configure_optimizers`."
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, given, index):
            return self.net(*given)["loss"]

        def configure_optimizers(self):
            return MuonSaI(self.net, lr=0.02)

    module = Module()
    loop = lightning.Trainer(
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
    )
    loop.fit(module, torch.utils.data.DataLoader([batch(step) for step in range(STEPS)], batch_size=None))
    assert_same(module.net, plain(lambda model: MuonSaI(model, lr=0.02)))
