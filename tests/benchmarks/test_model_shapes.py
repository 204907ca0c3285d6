"Shapes of models: parameters by name, models of the libraries, configurations, wrong names."

import json

import pytest
from typer.testing import CliRunner

from sgd_sai.benchmarks import model_shapes as model_shapes_page
from sgd_sai.benchmarks.model_shapes import MODELS, meta_model, model_shapes, named_shapes
from sgd_sai.benchmarks.step_memory import process_memory
from sgd_sai.cli.app import app


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], terminal_width=100)


def total(names):
    return sum(s.numel() for s in model_shapes(names))


@pytest.mark.parametrize(
    "name, count",
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("llama2-7b", 6_738_415_616),
        ("vit_s16", 22_050_664),
        ("vit_h14", 632_045_800),
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
    ],
)
def test_parameters_of_named_models(name, count):
    assert name in MODELS and total(name) == count


@pytest.mark.parametrize(
    "name, count",
    [
        ("convnext_tiny", 28_589_128),
        ("regnet_y_16gf", 83_590_140),
        ("inception_v3", 27_161_264),
        ("bert", 109_482_240),
        ("t5", 60_506_624),
    ],
)
def test_parameters_of_models_of_the_libraries(name, count):
    model = meta_model(name)
    assert sum(p.numel() for p in model.parameters()) == count and all(p.is_meta for p in model.parameters())


def test_classifiers_of_torchvision_can_be_built_without_a_warning(recwarn):
    names = model_shapes_page._torchvision_names()
    assert len(names) >= 80
    for name in {*names[::4], "googlenet", "inception_v3", "regnet_x_400mf"}:
        assert total(name) > 1e5, name
    assert not [w for w in recwarn if "initialization" in str(w.message)]


def test_nothing_is_allocated():
    meta_model("gpt2")  # imports transformers
    before = process_memory()[0]
    model = meta_model("llama2-7b")
    assert process_memory()[0] - before < 100e6 < 4 * sum(p.numel() for p in model.parameters())


def test_a_folder_with_a_configuration_is_a_model(tmp_path):
    (tmp_path / "tiny").mkdir()
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 8,
        "vocab_size": 10,
        "n_positions": 4,
    }
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    shapes = named_shapes(str(tmp_path / "tiny"))
    assert shapes["transformer.wte.weight"] == (10, 8) and "lm_head.weight" not in shapes  # shared with the embedding


def test_a_hub_id_that_cannot_be_had_is_an_error_of_the_system(monkeypatch):
    from transformers import AutoConfig

    def offline(*args, **kwargs):
        raise OSError("no network\nsecond line")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    with pytest.raises(OSError, match=r"'somebody/something'.*no network$"):
        model_shapes("somebody/something")
    done = cli("memory", "somebody/something")
    assert done.exit_code == 1 and "somebody/something" in done.output


def test_unknown_models_are_answered_with_the_nearest():
    for wrong, near in (("vit_s61", "vit_s16"), ("resnet51", "resnet50"), ("lama2-7b", "llama2-7b")):
        with pytest.raises(KeyError, match=f"did you mean {near}"):
            model_shapes(wrong)
