"""Which parameters weight decay leaves alone, told by the module that holds them and the part they play in it."""

import pytest
import torch
from torch import nn

from largebatch import optim, track
from largebatch.cli import main
from largebatch.errors import UserError
from largebatch.models import GPT
from largebatch.moments import is_shadow


def parameter(*shape):
    return nn.Parameter(torch.ones(shape))


class Affine(nn.Module):
    """A normalisation of its own, by its name alone."""

    def __init__(self, *shape):
        super().__init__()
        self.weight, self.offset = parameter(*shape), parameter(*shape)


class RMSNormGated2d(Affine):
    pass


class NormedLinear(Affine):
    pass


class NormalHead(Affine):
    pass


class UnitNormProjection(Affine):
    pass


class NormalizedNet(Affine):
    pass


class LayerNormLayer(nn.LayerNorm):
    pass


class PositionwiseEncoder(Affine):
    pass


class LearnedPositionalTable(nn.Embedding):
    pass


class Parts(nn.Module):
    """One of each."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.conv = nn.Conv2d(3, 3, 1, groups=3)
        self.layer_norm = nn.LayerNorm([4, 8, 8])
        self.group_norm, self.batch_norm, self.rms_norm = nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.RMSNorm((4, 8))
        self.own_norm, self.normed_linear, self.normal_head = RMSNormGated2d(4, 8), NormedLinear(4, 8), NormalHead(4, 8)
        self.projection, self.net, self.feed_forward = (
            UnitNormProjection(4, 8),
            NormalizedNet(4, 8),
            PositionwiseEncoder(4, 8),
        )
        self.norm_layer = LayerNormLayer(8)
        self.bias, self.q_bias, self.bias_table = parameter(1, 4, 1, 1), parameter(2, 4), parameter(9, 2)
        self.relative_attention_bias, self.users = nn.Embedding(9, 2), nn.Embedding(9, 2)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.layer_scale, self.gain, self.temperature = parameter(4, 1, 1), parameter(4, 1, 1, 1), parameter(2, 1, 1)
        self.cls_token, self.register_tokens, self.class_embedding = (
            parameter(1, 1, 4),
            parameter(1, 3, 4),
            parameter(1, 4),
        )
        self.pos_embed, self.rel_pos_h, self.wpe = parameter(1, 9, 4), parameter(9, 4), nn.Embedding(9, 4)
        self.embed_positions, self.learned = nn.Embedding(9, 4), LearnedPositionalTable(9, 4)
        self.pos_proj, self.positional_conv = nn.Linear(4, 4, bias=False), nn.Conv1d(4, 4, 3, bias=False)
        self.slope = nn.PReLU(4)
        self.recurrent = nn.LSTM(4, 1)
        self.named = nn.Linear(4, 4, bias=False)
        self.mixing = parameter(4, 4)
        self.part = Part()
        self.parametrized = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def no_weight_decay(self):
        return {"named.weight", "is_not_there"}


class Part(nn.Module):
    """Names its own, by the names that it has itself."""

    def __init__(self):
        super().__init__()
        self.inner, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def no_weight_decay(self):
        return ["inner.weight"]


DECAYED = {
    *(
        "linear.weight",
        "conv.weight",
        "normed_linear.weight",
        "normed_linear.offset",
        "normal_head.weight",
        "users.weight",
    ),
    *("normal_head.offset", "attention.in_proj_weight", "attention.out_proj.weight", "pos_proj.weight", "mixing"),
    *("positional_conv.weight", "recurrent.weight_ih_l0", "recurrent.weight_hh_l0", "part.other.weight"),
    "parametrized.parametrizations.weight.original1",
    *(f"{part}.{name}" for part in ("projection", "net", "feed_forward") for name in ("weight", "offset")),
}


@pytest.mark.parametrize("per", [None, "sample"])
def test_the_part_that_a_parameter_plays_tells(per):
    model = Parts()
    if per is not None:
        model = track(model, per)
    found = optim.undecayed(model)
    names = {name for name, p in model.named_parameters() if not is_shadow(p)}
    assert names - set(found) == DECAYED
    assert (
        found["layer_norm.weight"]
        == found["layer_norm.bias"].replace("bias", "norm")
        == found["own_norm.offset"]
        == "norm"
    )
    assert {found[name] for name in ("bias", "q_bias", "bias_table", "attention.bias_k", "conv.bias")} == {"bias"}
    assert found["relative_attention_bias.weight"] == "bias"
    assert {found[name] for name in ("layer_scale", "gain", "temperature", "slope.weight")} == {"scale"}
    assert {found[name] for name in ("cls_token", "register_tokens", "class_embedding")} == {"token"}
    positions = ("pos_embed", "rel_pos_h", "wpe.weight", "embed_positions.weight", "learned.weight")
    assert {found[name] for name in positions} == {"position embedding"}
    assert found["named.weight"] == found["part.inner.weight"] == "named by no_weight_decay()"


def test_a_step_without_gradients_shrinks_what_is_decayed_alone():
    """By 1 - lr * weight_decay, in closed form."""
    model = Parts().double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optim.AdamW(optim.param_groups(model, 0.1), lr=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 0.95 if name in DECAYED else 1.0
        torch.testing.assert_close(p.detach(), factor * before[name], rtol=1e-15, atol=0.0)


def test_a_shared_parameter_is_left_alone_where_one_of_its_names_says_so():
    model = nn.ModuleDict({"out": nn.Linear(4, 9, bias=False), "wpe": nn.Embedding(9, 4)})
    model["wpe"].weight = model["out"].weight
    assert optim.undecayed(model) == {"out.weight": "position embedding"}


def test_the_gpts_position_table_is_left_alone_and_its_token_table_is_not():
    found = optim.undecayed(GPT(11, 8, 1, 2, 16))
    assert found["wpe.weight"] == "position embedding" and "wte.weight" not in found


def test_all_are_decayed_where_the_config_says_so():
    (group,) = optim.param_groups(Parts(), 0.1, decay_norm_and_bias=True)
    assert len(group["params"]) == len(list(Parts().parameters()))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: "pos_embed", r"no_weight_decay\(\) of 'inner' \(Linear\): expected a set of parameter names, got str"),
        (lambda: [1], "expected a set of parameter names, got list"),
        (lambda: 1 / 0, r"no_weight_decay\(\) of 'inner' \(Linear\) fails: ZeroDivisionError"),
    ],
)
def test_a_no_weight_decay_that_gives_no_names_is_refused(method, message):
    model = Part()
    model.inner.no_weight_decay = method
    with pytest.raises(UserError, match=message):
        optim.param_groups(model, 0.1)


def parts(task):
    """A model for the plan."""
    return Parts()


def test_the_plan_says_what_is_decayed(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(
        "data: {name: digits}\nmodel: {name: 'test_decay:parts'}\nbatch: {reference_size: 32, size: 64}\n"
        "optimizer: {name: sgd, lr: 0.1, weight_decay: 0.1}\nschedule: {name: constant, epochs: 1}\n"
    )
    assert main(["plan", str(config)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"weight decay 0.1: of {len(DECAYED)} parameters (" in said
    assert "3 tokens (20 elements)" in said and "5 position embeddings (180 elements)" in said
    assert "2 parameters named by no_weight_decay() (32 elements)" in said
    assert main(["plan", str(config), "--optimizer.decay_norm_and_bias", "true"]) == 0
    assert "none of" not in capsys.readouterr().out
