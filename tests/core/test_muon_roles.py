"""Roles of parameters: each kind of layer in a small model, overrides and their errors, layouts, the table."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from sgd_sai.model_layers import layer_parameters, repeated_blocks
from sgd_sai.muon_role_table import RoleRow, RoleTable, role_table
from sgd_sai.muon_roles import ROLES, parameter_roles
from sgd_sai.weight_layouts import WeightLayout, layout_words, matrix_shapes, weight_layout


def roles_of(model, **kwargs):
    return {row.name: row.role for row in parameter_roles(model, **kwargs)}


def weights_of(model, **kwargs):
    "The roles of parameters with two or more dimensions."
    return {row.name: row.role for row in parameter_roles(model, **kwargs) if row.param.ndim >= 2}


def row_of(model, name, **kwargs):
    return next(row for row in parameter_roles(model, **kwargs) if row.name == name)


def between(*layers, width=8):
    "Layers between an embedding and a head."
    return nn.Sequential(nn.Embedding(9, width), *layers, nn.Linear(width, 9))


def quietly(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


# --- first, last and between ----------------------------------------------------------------------------------------


def test_first_last_and_between():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    assert roles_of(model) == {
        "0.weight": "embedding",
        "0.bias": "vector",
        "1.weight": "matrix",
        "1.bias": "vector",
        "2.weight": "vector",
        "2.bias": "vector",
        "3.weight": "head",
        "3.bias": "vector",
    }
    assert list(roles_of(model)) == [name for name, _ in model.named_parameters()]
    assert all(row.param is model.get_parameter(row.name) for row in parameter_roles(model))


def test_frozen_parameters_are_listed_and_count_for_first_and_last():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    expected = roles_of(model)
    for layer in (model[0], model[2]):
        layer.requires_grad_(False)
    assert roles_of(model) == expected


def test_after_an_embedding_the_first_layer_is_hidden():
    assert weights_of(between(nn.Linear(8, 8))) == {"0.weight": "embedding", "1.weight": "matrix", "2.weight": "head"}
    several = nn.ModuleDict({"words": nn.EmbeddingBag(9, 8), "positions": nn.Embedding(5, 8), "body": nn.Linear(8, 8)})
    assert list(weights_of(several).values()) == ["embedding", "embedding", "head"]


@pytest.mark.parametrize("first", ["embedding", "head"])
def test_a_tied_weight_is_a_head_and_says_with_what(first):
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
    model[2].weight = model[0].weight
    if first == "head":
        model = nn.Sequential(model[2], model[0], model[1])
    row = parameter_roles(model)[0]
    assert row.role == "head" and row.why == {"embedding": "tied with 2.weight", "head": "tied with 1.weight"}[first]


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


class Body(nn.Module):
    "Blocks in a list, with what is put around them."

    def __init__(self, blocks, **others):
        super().__init__()
        self.blocks = blocks
        for name, module in others.items():
            setattr(self, name, module)


def in_a_list():
    return nn.ModuleList([Block(), Block()])


def in_a_sequence():
    return nn.Sequential(Block(), Block())


def test_blocks_in_a_list_are_hidden_whatever_comes_before_and_after():
    assert set(weights_of(Body(in_a_list())).values()) == {"matrix"}
    model = Body(in_a_sequence())
    assert weights_of(model)["blocks.0.up.weight"] == "embedding"  # a sequence may begin with the data
    assert weights_of(model)["blocks.1.down.weight"] == "matrix"
    assert weights_of(Body(in_a_list(), head=nn.Linear(8, 2)))["head.weight"] == "head"
    assert repeated_blocks(model) == {"blocks.0", "blocks.1"}


def test_single_layers_in_a_list_and_nested_sequences_are_no_blocks():
    layers = [nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)]
    for model in (Body(nn.ModuleList(layers)), nn.Sequential(*(nn.Sequential(layer, nn.ReLU()) for layer in layers))):
        assert list(weights_of(model).values()) == ["embedding", "matrix", "head"]
        assert repeated_blocks(model) == set()


def test_one_composite_layer_in_a_sequence_is_no_repeated_block():
    model = nn.Sequential(nn.Linear(4, 8), Block())
    assert list(weights_of(model).values()) == ["embedding", "matrix", "head"] and repeated_blocks(model) == set()


def test_a_pooler_is_no_head():
    model = Body(in_a_list(), pooler=nn.Linear(8, 8))
    assert weights_of(model)["pooler.weight"] == "matrix"


def test_names_of_heads():
    tagged = Body(in_a_list(), classifier=nn.Linear(8, 2), extra=nn.Linear(8, 8))
    assert weights_of(tagged)["classifier.weight"] == "head" and weights_of(tagged)["extra.weight"] == "matrix"
    # fc and head say so beside the last layer alone
    early = Body(in_a_list(), fc=nn.Linear(8, 8), out=nn.Linear(8, 2))
    assert weights_of(early)["fc.weight"] == "matrix" and weights_of(early)["out.weight"] == "head"
    two = Body(in_a_list(), head=nn.Linear(8, 2), head_dist=nn.Linear(8, 2))
    assert weights_of(two)["head.weight"] == weights_of(two)["head_dist.weight"] == "head"
    apart = Body(in_a_list(), gate=nn.ModuleDict({"fc": nn.Linear(8, 8)}), fc=nn.Linear(8, 2))
    assert weights_of(apart)["gate.fc.weight"] == "matrix" and weights_of(apart)["fc.weight"] == "head"
    inside = Body(nn.ModuleList([Body(in_a_list(), classifier=nn.Linear(8, 8))]), out=nn.Linear(8, 2))
    assert weights_of(inside)["blocks.0.classifier.weight"] == "matrix"
    # proj_out beside the blocks of the network, not of a part of it
    part = Body(in_a_list(), part=nn.ModuleDict({"proj_out": nn.Linear(8, 8)}), proj_out=nn.Linear(8, 2))
    assert weights_of(part)["part.proj_out.weight"] == "matrix" and weights_of(part)["proj_out.weight"] == "head"


def test_the_output_embedding_of_a_model():
    class Language(Body):
        def get_output_embeddings(self):
            return self.to_words

    model = Language(in_a_list(), to_words=nn.Linear(8, 9), after=nn.Linear(8, 8))
    assert row_of(model, "to_words.weight").why == "output embedding"
    assert weights_of(model)["to_words.weight"] == "head" and weights_of(model)["after.weight"] == "matrix"


def test_base_models_have_no_head():
    class SomeModel(Body):
        base_model_prefix = "some"

        @property
        def base_model(self):
            return self

    class SomeForClasses(SomeModel):
        pass

    for kind, expected in ((SomeModel, "matrix"), (SomeForClasses, "head")):
        assert weights_of(kind(in_a_list(), projection=nn.Linear(8, 8)))["projection.weight"] == expected


def test_names_of_heads_mean_nothing_in_attention_and_among_embeddings():
    for place in ("attention", "embeddings"):
        parts = {place: nn.ModuleDict({"text_projection": nn.Linear(8, 8)})}
        assert (
            weights_of(Body(in_a_list(), **parts, head=nn.Linear(8, 2)))[f"{place}.text_projection.weight"] == "matrix"
        )


# --- convolutions ---------------------------------------------------------------------------------------------------


def test_convolutions_that_read_pictures():
    two_towers = nn.ModuleDict(
        {"text": between(nn.Linear(8, 8)), "picture": nn.Conv2d(3, 8, 4), "last": nn.Linear(8, 2)}
    )
    assert weights_of(two_towers)["picture.weight"] == "embedding"
    assert row_of(two_towers, "picture.weight").why == "convolution that reads the data"
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3), nn.Linear(8, 2))
    assert list(weights_of(plain).values()) == ["embedding", "matrix", "head"]  # 4 channels that the first one wrote
    stages = Body(nn.ModuleList([nn.ModuleDict({"patch": nn.Conv2d(3, 8, 4), "next": nn.Linear(8, 8)})]))
    assert list(weights_of(stages).values()) == ["embedding", "matrix"]  # first of all, in a block
    assert list(weights_of(between(stages)).values())[1:3] == ["matrix", "matrix"]  # not first
    assert weights_of(between(nn.Conv2d(4, 8, 3, groups=2)))["1.weight"] == "matrix"


def test_depthwise_and_grouped_convolutions():
    depthwise, grouped = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 3, groups=4)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), depthwise, grouped, nn.ConvTranspose2d(12, 6, 3, groups=3), nn.Linear(6, 2)
    )
    rows = parameter_roles(model)
    assert [(row.role, row.split, row.transposed) for row in rows if row.param.ndim >= 2] == [
        ("embedding", None, False),
        ("vector", None, False),
        ("matrix", 3, False),  # four matrices of three outputs
        ("matrix", 4, False),  # three of four inputs, which come first
        ("head", None, False),
    ]
    assert row_of(model, "1.weight").why == "depthwise convolution"
    one_channel = nn.Sequential(nn.Conv1d(1, 8, 3), nn.Conv1d(8, 8, 3), nn.Linear(8, 2))
    assert weights_of(one_channel)["0.weight"] == "embedding"  # one group of one channel is not depthwise


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_transposed_convolutions_have_their_outputs_second(kind):
    layer = kind(6, 4, 3)
    row = row_of(nn.Sequential(nn.Linear(6, 6), layer, nn.Linear(4, 2)), "1.weight")
    assert row.transposed and matrix_shapes(layer.weight.shape, row) == [(4, layer.weight.numel() // 4)]


# --- weights in parts -----------------------------------------------------------------------------------------------

PARTS = {
    "weight_norm": (parametrizations.weight_norm, ["matrix", "vector"]),
    "weight_norm, old": (nn.utils.weight_norm, ["matrix", "vector"]),
    "weight_norm of all, old": (lambda layer: nn.utils.weight_norm(layer, dim=None), ["matrix"]),
    "spectral_norm": (parametrizations.spectral_norm, ["matrix"]),
    "spectral_norm, old": (nn.utils.spectral_norm, ["matrix"]),
    "orthogonal": (parametrizations.orthogonal, ["matrix"]),
}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: nn.Conv2d(8, 8, 3)], ids=["linear", "convolution"])
def test_weights_in_parts(kind, make):
    wrap, expected = PARTS[kind]
    model = quietly(lambda: nn.Sequential(nn.Embedding(9, 8), wrap(make()), nn.Linear(8, 9)))
    found = {name: role for name, role in weights_of(model).items() if name.startswith("1.")}
    assert sorted(found.values()) == expected
    assert all(role == "vector" for name, role in found.items() if name.endswith(("_g", "original0")))
    assert roles_of(model)["1.bias"] == "vector"


def test_parts_have_the_role_of_their_layer():
    wrap = parametrizations.weight_norm
    model = nn.Sequential(wrap(nn.Linear(4, 4)), nn.Linear(4, 4), wrap(nn.Linear(4, 2)))
    direction, gain = "parametrizations.weight.original1", "parametrizations.weight.original0"
    found = roles_of(model)
    assert (found[f"0.{direction}"], found["1.weight"], found[f"2.{direction}"]) == ("embedding", "matrix", "head")
    assert row_of(model, f"0.{gain}").why == "gain of a normalised weight"


def test_parts_of_fused_weights_are_split():
    attention = Body(nn.ModuleList(), qkv=parametrizations.spectral_norm(nn.Linear(8, 24)))
    assert row_of(between(attention), "1.qkv.parametrizations.weight.original").split == (8, 8, 8)
    attention = Body(nn.ModuleList(), qkv=quietly(lambda: nn.utils.spectral_norm(nn.Linear(8, 24))))
    assert row_of(between(attention), "1.qkv.weight_orig").split == (8, 8, 8)


def test_a_layer_in_parts_is_no_block():
    wrap = parametrizations.weight_norm
    model = Body(nn.ModuleList([wrap(nn.Linear(4, 8)), nn.Linear(8, 8), wrap(nn.Linear(8, 2))]))
    roles = [role for role in roles_of(model).values() if role != "vector"]
    assert roles == ["embedding", "matrix", "head"]


def test_a_whole_weight_is_a_matrix_however_narrow():
    narrow = quietly(lambda: nn.utils.spectral_norm(nn.Linear(8, 1)))
    assert weights_of(between(narrow, nn.Linear(1, 8)))["1.weight_orig"] == "matrix"
    assert list(weights_of(between(nn.Linear(8, 1), nn.Linear(1, 8))).values())[1:3] == ["matrix", "matrix"]


# --- parameters of no layer, and no matrices ------------------------------------------------------------------------


class Loose(nn.Module):
    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def test_parameters_of_no_layer():
    loose = Loose(
        cls_token=(1, 1, 8),
        pos_embed=(1, 5, 8),
        table=(5, 3),
        layer_scale=(8, 1, 1),
        gamma=(1, 1, 8),
        temperature=(4, 1, 1),
        expert_bias=(4, 8),
        bias_table=(7, 2),
        text_projection=(8, 5),
        A_log=(8, 4),
        logit=(),
    )
    assert list(roles_of(loose).values()) == [
        "embedding",
        "embedding",
        "embedding",
        "vector",
        "vector",
        "vector",
        "vector",
        "embedding",
        "head",
        "vector",
        "vector",
    ]
    block = nn.ModuleDict({"mix": Loose(time_mix=(1, 1, 8)), "up": nn.Linear(8, 8)})
    assert roles_of(Body(nn.ModuleList([block])))["blocks.0.mix.time_mix"] == "vector"  # no token inside a block


def test_norms_of_more_dimensions_are_vectors():
    class GRN(Loose):
        pass

    found = weights_of(between(nn.LayerNorm((4, 8)), GRN(weight=(1, 1, 1, 8)), nn.Linear(8, 8)))
    assert list(found.values()) == ["embedding", "vector", "vector", "vector", "matrix", "head"]


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_empty_tensors(shape):
    model = between(Loose(weight=shape), Loose(loose=shape), nn.Linear(8, 8))
    assert roles_of(model)["1.weight"] == ("vector" if len(shape) == 1 else "matrix")
    assert len(role_table(model)) == len([*model.parameters()])
    empty = nn.Sequential(nn.Linear(4, 4), quietly(lambda: nn.Linear(0, 4)), nn.Linear(4, 2))
    assert weights_of(empty)["1.weight"] == "matrix" and len(repr(role_table(empty))) > 0


def test_lazy_parameters_are_refused():
    with pytest.raises(ValueError, match="'0.weight' has no shape yet: run the model on a batch first"):
        parameter_roles(nn.Sequential(nn.LazyLinear(4)))


def test_models_without_matrices_or_parameters():
    assert parameter_roles(nn.ReLU()) == [] and repr(role_table(nn.ReLU()))
    assert weights_of(nn.Linear(3, 3)) == {"weight": "head"}
    assert weights_of(nn.Embedding(3, 3)) == {"weight": "embedding"}


# --- stacks ---------------------------------------------------------------------------------------------------------


def test_stacks_of_experts():
    model = between(Loose(w1=(4, 16, 8), w2=(4, 8, 16)), Loose(weight=(3, 8, 8)), Loose(weight=(2, 2, 8, 8)))
    rows = [row for row in parameter_roles(model) if row.name.startswith(("1", "2", "3"))]
    assert [(row.role, row.stacked) for row in rows] == [("matrix", True)] * 3 + [("matrix", False)]
    assert weights_of(between(Loose(q=(16, 4, 8), k=(16, 4, 8))))["1.q"] == "embedding"  # more "matrices" than rows
    assert weights_of(between(nn.Linear(8, 8), Loose(prompts=(4, 8, 8))))["2.prompts"] == "embedding"


def test_a_module_of_experts_is_told_by_its_name():
    class Experts(Loose):
        pass

    assert weights_of(between(Experts(up=(4, 16, 8))))["1.up"] == "matrix"
    assert weights_of(between(Loose(up=(4, 16, 8))))["1.up"] == "embedding"


def test_nothing_is_computed_or_changed():
    torch.manual_seed(0)
    parts = {"gate_up_proj": nn.Linear(8, 32), "down_proj": nn.Linear(16, 8)}
    model = between(nn.ModuleDict({name: parametrizations.spectral_norm(layer) for name, layer in parts.items()}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    role_table(model, by_head=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def expert_layout(name, **shapes):
    holder = Loose(**shapes)
    return weight_layout(getattr(holder, name), holder, name)


def test_how_experts_are_stored():
    usual, swapped = (
        dict(gate_up_proj=(4, 32, 8), down_proj=(4, 8, 16)),
        dict(gate_up_proj=(4, 8, 32), down_proj=(4, 16, 8)),
    )
    assert expert_layout("gate_up_proj", **usual)[:3] == (True, False, (16, 16))
    assert expert_layout("down_proj", **usual)[:3] == (True, False, None)
    assert expert_layout("gate_up_proj", **swapped)[:3] == (True, True, (16, 16))
    assert expert_layout("down_proj", **swapped)[:3] == (True, True, None)
    # as many inputs as gates and ups together: the other weight decides
    assert not expert_layout("gate_up_proj", gate_up_proj=(4, 8, 8), down_proj=(4, 8, 4)).transposed
    assert expert_layout("gate_up_proj", gate_up_proj=(4, 8, 8), down_proj=(4, 4, 8)).transposed
    # biases decide
    assert expert_layout("w1", w1=(4, 8, 16), w1_bias=(4, 16)).transposed
    assert not expert_layout("w1", w1=(4, 16, 8), w1_bias=(4, 16)).transposed


def test_experts_that_say_how_they_are_stored():
    holder = Loose(gate_up_proj=(4, 8, 32), down_proj=(4, 16, 8))
    holder.is_transposed, holder.is_concatenated = True, False
    assert weight_layout(holder.gate_up_proj, holder, "gate_up_proj")[:3] == (True, True, (1, 1))
    holder.is_transposed = False
    assert weight_layout(holder.gate_up_proj, holder, "gate_up_proj")[:3] == (True, False, None)


# --- several matrices in one weight ---------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, name, inputs, outputs, **attributes):
        super().__init__()
        setattr(self, name, nn.Linear(inputs, outputs))
        vars(self).update(attributes)


FUSED = {
    "thirds": (Attention("qkv", 8, 24), "qkv", (8, 8, 8)),
    "more than inputs": (Attention("to_qkv", 8, 48, heads=4), "to_qkv", (16, 16, 16)),
    "fewer keys": (Attention("qkv_proj", 8, 16, num_heads=4, num_kv_heads=2, head_dim=2), "qkv_proj", (8, 4, 4)),
    "key and value": (Attention("c_attn", 8, 16), "c_attn", (8, 8)),
    "unknown": (Attention("Wqkv", 8, 20), "Wqkv", None),
    "another in_proj": (Attention("in_proj", 8, 16), "in_proj", None),
    "no such name": (Attention("up", 8, 24), "up", None),
}


@pytest.mark.parametrize("kind", FUSED)
def test_query_key_and_value_in_one_weight(kind):
    attention, name, expected = FUSED[kind]
    row = row_of(between(attention), f"1.{name}.weight")
    assert row.role == "matrix" and row.split == expected
    assert ("unknown" in row.why) == (kind == "unknown")


def test_by_head():
    fused, apart = Attention("qkv", 8, 24, num_heads=4), Attention("k_proj", 8, 4, head_dim=2)
    model = between(fused, apart, nn.MultiheadAttention(8, 2), Attention("up", 8, 8, head_dim=2))
    split = {row.name: row.split for row in parameter_roles(model, by_head=True)}
    assert (split["1.qkv.weight"], split["2.k_proj.weight"], split["3.in_proj_weight"]) == (2, 2, 4)
    assert split["3.out_proj.weight"] is split["4.up.weight"] is None
    assert row_of(model, "3.in_proj_weight").split == (8, 8, 8)
    assert row_of(between(Attention("qkv", 8, 24)), "1.qkv.weight", by_head=True).split == (8, 8, 8)  # size unknown
    assert row_of(between(Attention("k_proj", 8, 2, head_dim=2)), "1.k_proj.weight", by_head=True).split is None


def test_gate_and_up_in_one_weight():
    model = between(nn.ModuleDict({"gate_up_proj": nn.Linear(8, 32), "down_proj": nn.Linear(16, 8)}))
    assert row_of(model, "1.gate_up_proj.weight").split == (16, 16)
    model = between(nn.ModuleDict({"gate_up_proj": nn.Linear(8, 32), "down_proj": nn.Linear(32, 8)}))
    assert row_of(model, "1.gate_up_proj.weight").split is None


class Conv1D(nn.Module):
    "As in transformers."

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight = nf, nn.Parameter(torch.zeros(nx, nf))


def test_conv1d_is_transposed():
    model = between(nn.ModuleDict({"c_attn": Conv1D(24, 8), "c_fc": Conv1D(16, 8)}))
    attention, mlp = row_of(model, "1.c_attn.weight"), row_of(model, "1.c_fc.weight")
    assert (attention.transposed, attention.split) == (True, (8, 8, 8))
    assert (mlp.transposed, mlp.split) == (True, None) and layout_words((8, 16), mlp) == "1 matrix of 16 x 8"


def test_another_class_of_that_name_is_not_transposed():
    layer = Conv1D(16, 8)
    layer.nf = 8  # the outputs come first
    assert not row_of(between(nn.ModuleDict({"c_fc": layer})), "1.c_fc.weight").transposed


def test_heads_of_the_keys_without_their_size():
    apart = Attention("k_proj", 8, 4, num_heads=4, num_kv_heads=2)
    assert row_of(between(apart), "1.k_proj.weight", by_head=True).split == 2


def test_empty_fused_weights():
    holder = Loose(gate_up_proj=(4, 0, 8), down_proj=(4, 8, 0))
    assert weight_layout(holder.gate_up_proj, holder, "gate_up_proj") == WeightLayout()


def test_shapes_of_matrices():
    assert matrix_shapes((12, 4), WeightLayout(split=(2, 1, 1))) == [(6, 4), (3, 4), (3, 4)]
    assert matrix_shapes((2, 3, 8, 4), WeightLayout(stacked=True)) == [(8, 4)] * 6
    assert matrix_shapes((3, 8, 4), WeightLayout(stacked=True, transposed=True, split=2)) == [(2, 8)] * 6
    assert matrix_shapes((8, 12, 3, 3), WeightLayout(transposed=True)) == [(12, 72)]
    assert layout_words((12, 4), WeightLayout(split=(2, 1, 1))) == "1 matrix of 6 x 4 and 2 matrices of 3 x 4"
    for shape, layout in [((12, 4), dict(split=5)), ((12, 4), dict(split=(5, 5))), ((12, 4), dict(split=()))]:
        with pytest.raises(ValueError, match="does not divide the 12 outputs"):
            matrix_shapes(shape, WeightLayout(**layout))


# --- LoRA -----------------------------------------------------------------------------------------------------------


def test_lora():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=8, n_head=2, n_layer=1, vocab_size=9, n_positions=4, tie_word_embeddings=False
    )
    wanted = peft.LoraConfig(r=2, target_modules=["c_attn", "wte", "lm_head"], use_dora=False, fan_in_fan_out=True)
    model = quietly(lambda: peft.get_peft_model(transformers.GPT2LMHeadModel(config), wanted))
    rows = {row.name.removeprefix("base_model.model."): row for row in parameter_roles(model)}
    role = {name: row.role for name, row in rows.items()}
    layer, wte = "transformer.h.0.attn.c_attn", "transformer.wte"
    assert [role[f"{layer}.{key}.weight"] for key in ("base_layer", "lora_A.default", "lora_B.default")] == [
        "matrix"
    ] * 3
    assert [
        role[f"{wte}.{key}"] for key in ("base_layer.weight", "lora_embedding_A.default", "lora_embedding_B.default")
    ] == ["embedding"] * 3
    assert [role[f"lm_head.{key}.weight"] for key in ("base_layer", "lora_A.default", "lora_B.default")] == ["head"] * 3
    assert rows[f"{layer}.base_layer.weight"][5:7] == (True, (8, 8, 8))
    assert rows[f"{layer}.lora_B.default.weight"][4:7] == (False, False, None)


def test_dora_magnitudes_are_vectors():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 8), nn.Linear(8, 2))
    wanted = peft.LoraConfig(r=2, target_modules=["1", "2"], use_dora=True)
    rows = parameter_roles(quietly(lambda: peft.get_peft_model(model, wanted)))
    magnitudes = [row for row in rows if "magnitude" in row.name]
    assert len(magnitudes) == 2 and any(row.param.ndim > 1 for row in magnitudes)
    assert {row.role for row in magnitudes} == {"vector"}
    assert {row.role for row in rows if "lora_A" in row.name or "lora_B" in row.name} == {"matrix"}


# --- overrides ------------------------------------------------------------------------------------------------------


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))


def test_overrides_by_patterns_and_by_a_function():
    for roles in (
        {"^1.weight": "head", "weight": {"lr_factor": 0.5}},  # the first that is found counts
        lambda name, p: ("head" if name == "1.weight" else {"lr_factor": 0.5}) if p.ndim >= 2 else None,
    ):
        rows = {row.name: row for row in parameter_roles(net(), roles)}
        assert (rows["1.weight"].role, rows["1.weight"].why, rows["1.weight"].settings) == ("head", "asked for", {})
        assert (rows["2.weight"].role, rows["2.weight"].settings) == ("matrix", {"lr_factor": 0.5})
        assert "between others" in rows["2.weight"].why  # the rule still gave the role
        assert (rows["2.bias"].role, rows["2.bias"].settings) == ("vector", {})


def test_overrides_of_layouts():
    rows = {row.name: row for row in parameter_roles(net(), {"1.weight": {"split": [2, 1], "transposed": True}})}
    assert rows["1.weight"][4:] == (False, True, (2, 1), {})
    # a matrix by request is taken apart as the rule would, unless the request says otherwise
    model = between(nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 8))
    assert row_of(model, "1.weight", roles={"1.weight": "matrix"}).split == 1
    assert row_of(model, "1.weight", roles={"1.weight": {"role": "matrix", "split": None}}).split is None
    hidden = between(Attention("qkv", 8, 24))
    assert row_of(hidden, "1.qkv.weight", roles={"qkv.weight": "vector"}).split is None
    assert row_of(hidden, "1.qkv.weight", roles={"qkv.weight": {"momentum": 0.8}}).split == (8, 8, 8)


def test_settings_are_copied():
    wanted = {"role": "head", "lr_factor": 0.5}
    assert parameter_roles(net(), lambda name, p: wanted)[0].settings == {"lr_factor": 0.5}
    assert wanted == {"role": "head", "lr_factor": 0.5}
    plain = parameter_roles(net())
    assert plain[0].settings == {} and plain[0].settings is not plain[1].settings


WRONG = {
    "a pattern that nothing has": ({"1.wieght": "head"}, r"'1.wieght' is found in no parameter's name; .*'1.weight'"),
    "no regular expression": ({"(1": "head"}, r"'\(1' is no regular expression"),
    "an unknown role": ({"1.weight": "matrx"}, "'1.weight' .* 'matrx'; there are matrix, embedding, head, vector"),
    "an unknown role in settings": ({"1.weight": {"role": 3}}, "to have the role 3; there are matrix"),
    "no role at all": ({"1.weight": 3}, "'1.weight' is to be 3; give a role, a dictionary of settings, or None"),
    "a matrix of one dimension": ({"1.bias": "matrix"}, r"'1.bias': a tensor of shape \(6,\) is not a matrix"),
    "a stack of two dimensions": ({"1.weight": {"stacked": True}}, r"shape \(6, 6\) is not a stack of matrices"),
    "a split that does not divide": ({"1.weight": {"split": 4}}, "a split of 4 does not divide the 6 outputs"),
    "parts that do not divide": ({"1.weight": {"split": (4, 4)}}, r"a split of \(4, 4\) does not divide the 6 outputs"),
    "a split of nothing": ({"1.weight": {"split": 0}}, "a split of 0 does not divide"),
    "a split in words": ({"1.weight": {"split": "heads"}}, "'1.weight': split has to be None, a number or a tuple"),
    "a layout of no matrix": ({"3.weight": {"split": 1}}, "split is for the role 'matrix', and its role is 'head'"),
    "a switch in words": ({"1.weight": {"transposed": "yes"}}, "transposed has to be True or False, but is 'yes'"),
    "a pattern of biases too": ({"^1": {"split": 2}}, "'1.bias'.* ends in 'weight' leaves out the biases"),
    "nearly a key": ({"1.weight": {"stack": True}}, "'stack': did you mean 'stacked'"),
    "a list": ([("1.weight", "head")], "has to be a function, a dictionary or None"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_overrides_are_named(kind):
    roles, message = WRONG[kind]
    with pytest.raises(ValueError, match=message):
        parameter_roles(net(), roles)


def test_hyperparameters_of_groups_are_not_taken_for_misspelt_keys():
    names = """rest lr_factor weight_decay lr momentum nesterov adjust_lr ns_steps ns_coefficients scale eps maximize
    foreach fused capturable state_dtype rounding max_ratio""".split()
    row = row_of(net(), "1.weight", roles={"1.weight": dict.fromkeys(names, 1)})
    assert list(row.settings) == names


# --- the table ------------------------------------------------------------------------------------------------------


def test_the_table_says_what_the_roles_are():
    model = between(Attention("qkv", 8, 24), nn.Linear(8, 8))
    table = role_table(model)
    assert [row.name for row in table] == [name for name, _ in model.named_parameters()]
    assert table[1][:6] == ("1.qkv.weight", (24, 8), "matrix", None, None, "3 matrices of 8 x 8")
    header, _, qkv, bias, *_ = repr(table).splitlines()
    assert header.split() == ["name", "shape", "role", "why"]  # rate and rule are an optimizer's
    assert qkv == "1.qkv.weight  24 x 8  matrix     q, k, v in one: 3 matrices of 8 x 8"
    assert {row.role for row in table} == set(ROLES)
    assert role_table(model, {"qkv.weight": "head"})[1].role == "head"
    assert role_table(between(nn.MultiheadAttention(8, 2)), by_head=True)[1].matrices == "6 matrices of 4 x 8"


def test_the_table_with_rates():
    rows = RoleTable([RoleRow("a <b>", (), "vector", 0.02, "sgd_sai", "", "x" * 200)])
    text = repr(rows).splitlines()
    assert text[0].split() == ["name", "shape", "role", "rate", "rule", "why"]
    assert (
        text[1].startswith("a <b>  scalar  vector  0.02  sgd_sai  xxx") and len(text[1]) == 120 and text[1][-1] == "…"
    )
    html = rows._repr_html_()
    assert "<td>a &lt;b&gt;</td>" in html and "x" * 200 in html and "<th>matrices</th>" in html
    assert "<th>rate</th>" not in role_table(net())._repr_html_()


def test_the_table_as_a_data_frame():
    pytest.importorskip("pandas")
    frame = role_table(net()).to_pandas()
    assert list(frame.columns) == list(RoleRow._fields) and list(frame.role)[::2] == [
        "embedding",
        "matrix",
        "matrix",
        "head",
    ]


def test_a_parameter_is_listed_once_for_each_of_its_layers():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    model[1].weight = model[0].weight
    assert [(part.name, part.layer) for part in layer_parameters(model)] == [("0.weight", "0"), ("1.weight", "1")]
    assert len(parameter_roles(model)) == 1
