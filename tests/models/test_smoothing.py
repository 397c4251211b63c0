"""SmoothQuant scales: folding them changes nothing but what 8 bits lose."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qops.models import load_model, quantize_model, save_model
from qops.models.decoder import DecoderLayer
from qops.models.replacement import Norms, norm_style
from qops.models.smoothing import plan_smoothing, smoothing_scales
from qops.testing import assert_bitwise, generator
from tests.support.models.families import FUSED, IDS, random_model

DOUBLE = torch.float64


def random_scales(model, seed=0):
    """For every linear of every layer; from 1/30 to 30."""
    rng, scales = generator(seed), {}
    for index, layer in enumerate(model.model.layers):
        head_dim, prefix = layer.self_attn.head_dim, f"model.layers.{index}."
        kv, heads = model.config.num_key_value_heads, model.config.num_attention_heads

        def draw(*shape):
            return 30 ** (2 * torch.rand(shape, generator=rng) - 1)

        before, mlp, inner, each = (
            draw(n) for n in (*[model.config.hidden_size] * 2, layer.mlp.up_proj.out_features, 0)
        )
        scales |= dict.fromkeys((f"{prefix}self_attn.{part}_proj" for part in "qkv"), before)
        scales |= dict.fromkeys((f"{prefix}mlp.{part}_proj" for part in ("gate", "up")), mlp)
        scales[f"{prefix}mlp.down_proj"] = inner
        each = draw(kv, 1, head_dim).expand(kv, heads // kv, head_dim)
        scales[f"{prefix}self_attn.o_proj"] = each.flatten()
    return scales


def fold(model, scales):
    """The dense model with the scales in it."""
    smoothing = plan_smoothing("test", model, scales, Norms())
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, smoothing.linear(name, module))
        elif name in smoothing.norms:
            module.weight.data = smoothing.norm(name, module)
    return smoothing


def maxima_of(model, ids):
    """As SmoothQuant's `get_act_scales` collects them."""
    found = {}

    def hook(name):
        return lambda _, inputs: found.__setitem__(name, inputs[0].flatten(0, -2).abs().amax(0).float())

    hooks = [m.register_forward_pre_hook(hook(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    model(ids)
    for each in hooks:
        each.remove()
    return found


# Phi-3 has no linear for q, k or v alone.
@pytest.mark.parametrize("family", [family for family in FUSED if family != "phi3"])
def test_a_folded_model_computes_the_same(family):
    model = random_model(family).to(DOUBLE)
    folded = copy.deepcopy(model)
    smoothing = fold(folded, random_scales(model))
    assert len(smoothing.into) == 7 * len(model.model.layers)
    norm = folded.model.layers[0].input_layernorm.weight
    assert not torch.allclose(norm, model.model.layers[0].input_layernorm.weight, rtol=0.1)
    # Transformers' norms and rotary are float32 in every model; Gemma's weight is rounded to it inside.
    torch.testing.assert_close(folded(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_rounding_of_a_norm_is_made_up_for_in_the_columns(family):
    model = random_model(family, dtype=torch.bfloat16)
    norm = model.model.layers[0].input_layernorm
    norm.weight.data[3] = 0
    offset = norm_style(norm)["weight_offset"]
    scales = random_scales(model)
    smoothing = plan_smoothing("test", model, scales, Norms())
    new = smoothing.norms["model.layers.0.input_layernorm"]
    columns = smoothing.columns["model.layers.0.self_attn.q_proj"]
    assert new.dtype == torch.bfloat16
    product = (new.double() + offset) * columns
    torch.testing.assert_close(product, norm.weight.double() + offset, rtol=1e-14, atol=0)
    # Near what was asked for: bfloat16 rounds w / s to 2^-9 of it; Gemma's w / s - 1, of up to 1, to 30 times as much.
    asked = scales["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(columns.float(), asked, rtol=2**-8 * (30 if offset else 1), atol=0)


def with_outliers(dtype=torch.float32):
    """A few channels behind each norm are 40 times as large as the others, and their weights no smaller."""
    model = random_model("llama", dtype=dtype, initializer_range=0.05)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[5::20] *= 40
    return model


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_smoothed_int8_is_closer_to_the_dense_model(dtype, tmp_path):
    model = with_outliers(dtype)
    exact = copy.deepcopy(model).float()(IDS).logits
    torch.save(maxima_of(model, IDS), tmp_path / "act_scales.pt")
    scales = smoothing_scales(model, tmp_path / "act_scales.pt")
    plain = quantize_model(copy.deepcopy(model), "int8")
    smooth = quantize_model(copy.deepcopy(model), "int8", smoothing=scales)
    assert all(isinstance(layer, DecoderLayer) for layer in smooth.model.layers)
    errors = [(m(IDS).logits.float() - exact).norm() / exact.norm() for m in (plain, smooth)]
    assert errors[1] < 0.75 * errors[0], errors


def test_the_formula_of_smoothquant():
    model = random_model("llama")
    maxima = {
        name: 5 * torch.rand(value.shape, generator=generator(1)) for name, value in maxima_of(model, IDS).items()
    }
    name = "model.layers.1.mlp."
    mlp = model.model.layers[1].mlp
    mlp.gate_proj.weight.data[:, 2] = mlp.up_proj.weight.data[:, 2] = 0
    maxima[f"{name}gate_proj"][1] = maxima[f"{name}up_proj"][1] = 0
    scales = smoothing_scales(model, maxima, 0.8)
    w = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).abs().amax(0)
    x = torch.maximum(maxima[f"{name}gate_proj"], maxima[f"{name}up_proj"])
    want = x.double() ** 0.8 / w.clamp(min=1e-5).double() ** 0.2
    want[1] = 1e-5
    torch.testing.assert_close(scales[f"{name}up_proj"].double(), want, rtol=1e-5, atol=0)
    assert_bitwise(scales[f"{name}up_proj"], scales[f"{name}gate_proj"])
    # q, k, v, gate and up of each layer, not o, down or lm_head.
    assert len(scales) == 5 * len(model.model.layers)
    for key in (f"{name}gate_proj", f"{name}up_proj"):
        del maxima[key]
    with pytest.raises(ValueError, match=r"maxima must have one of model\.layers\.1\.mlp\.gate_proj, .*got none"):
        smoothing_scales(model, maxima)
    with pytest.raises(ValueError, match=r"alpha must be in 0 \.\.\. 1, got 2"):
        smoothing_scales(model, maxima, 2)


def test_fused_and_alone_a_file_and_a_mapping_give_the_same_bits(tmp_path):
    scales = random_scales(random_model("llama"))
    save_file({name: s.contiguous().clone() for name, s in scales.items()}, tmp_path / "s.safetensors")
    source = random_model("llama", mlp_bias=False)
    models = [
        quantize_model(copy.deepcopy(source), "int8", smoothing=given, fuse=fuse)
        for given, fuse in ((scales, True), (str(tmp_path / "s.safetensors"), True), (scales, False))
    ]
    states = [model.state_dict() for model in models]
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        for name, tensor in states[0].items():
            assert_bitwise(other[name], tensor, name)
    save_model(models[0], tmp_path / "saved")
    assert_bitwise(load_model(tmp_path / "saved", torch.float32)(IDS).logits, models[0](IDS).logits)


def test_the_report_says_what_was_folded():
    model = random_model("gemma2")
    report = quantize_model(model, "int8", smoothing=random_scales(model)).quantization_report
    assert report.smoothed["model.layers.1.self_attn.k_proj"] == "model.layers.1.input_layernorm"
    assert report.smoothed["model.layers.1.mlp.gate_proj"] == "model.layers.1.pre_feedforward_layernorm"
    assert report.smoothed["model.layers.1.mlp.down_proj"] == "model.layers.1.mlp.up_proj"
    assert (
        "smoothing of 21 linears folded: 9 into input_layernorm, 6 into pre_feedforward_layernorm, 3 into v_proj, "
        "3 into up_proj"
    ) in str(report)


def test_linears_that_stay_dense_are_folded_too():
    model = random_model("llama")
    twin, scales = copy.deepcopy(model), random_scales(model)
    fold(twin, scales)
    quantised = quantize_model(model, "int8", skip=("up_proj", "o_proj"), smoothing=scales)
    state = quantised.state_dict()
    for name in ("self_attn.o_proj", "mlp.up_proj"):
        for index in range(len(twin.model.layers)):
            dense = twin.get_submodule(f"model.layers.{index}.{name}")
            assert_bitwise(state[f"model.layers.{index}.{name}.weight"], dense.weight.data)
            assert_bitwise(state[f"model.layers.{index}.{name}.bias"], dense.bias.data)


LAYER = "model.layers.0."


def without(scales, name):
    del scales[name]


def unequal(scales, name):
    scales[name] = scales[name] * 2


def one_head(scales, name):
    scales[name] = scales[name].clone()
    scales[name][0] *= 2


def put(value):
    return lambda scales, name: scales.__setitem__(name, value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "self_attn.k_proj",
            without,
            r"must name all of .*q_proj.*or none, got none for model\.layers\.0\.self_attn\.k_p",
        ),
        ("self_attn.k_proj", unequal, r"q_proj, .*k_proj, .*v_proj must be equal, as all read .*input_layernorm"),
        ("mlp.up_proj", unequal, r"gate_proj, .*up_proj must be equal, as all read .*post_attention_layernorm"),
        (
            "self_attn.o_proj",
            one_head,
            r"self_attn\.o_proj must be equal over the 2 query heads that read one head of .*self_attn\.v_proj",
        ),
        ("mlp.down_proj", put(torch.ones(3)), r"mlp\.down_proj must be a tensor of shape \[K\] = \[96\], got \[3\]"),
        ("mlp.down_proj", put(2.0), r"mlp\.down_proj must be a tensor of shape \[K\] = \[96\], got float"),
        ("mlp.down_proj", put(torch.zeros(96)), r"smoothing of .*mlp\.down_proj must be positive"),
        ("mlp.down_proj", put(torch.full((96,), torch.nan)), r"mlp\.down_proj must be finite"),
        (
            "mlp.down_proj",
            put(torch.full((96,), 1e30)),
            r"must leave .*mlp\.down_proj inside the range of torch.float16",
        ),
        (
            "mlp.act_fn",
            put(torch.ones(96)),
            r"must name linears that read a norm .*got 'model\.layers\.0\.mlp\.act_fn'",
        ),
    ],
)
def test_what_cannot_be_folded_is_an_error_that_leaves_the_model_as_it_is(name, change, message):
    model = random_model("llama", dtype=torch.float16)
    before, scales = copy.deepcopy(model.state_dict()), random_scales(model)
    change(scales, LAYER + name)
    with pytest.raises(ValueError, match="qops.quantize_model: .*" + message):
        quantize_model(model, "int8", smoothing=scales)
    for key, tensor in model.state_dict().items():
        assert_bitwise(tensor, before[key], key)


def test_norms_out_of_range_other_models_schemes_and_files(tmp_path):
    model = random_model("llama", dtype=torch.float16)
    scales = {name: s * 1e9 for name, s in random_scales(model).items() if "q_" in name or "k_" in name or "v_" in name}
    with pytest.raises(
        ValueError, match=r"must leave model\.layers\.0\.input_layernorm inside the range of torch\.float16"
    ):
        quantize_model(model, "int8", smoothing=scales)
    with pytest.raises(ValueError, match="smoothing must be None with 'int4'"):
        quantize_model(model, "int4", smoothing=scales)
    with pytest.raises(ValueError, match=r"needs to know what a linear reads: the q, k and v of Phi3.* are one"):
        quantize_model(random_model("phi3"), "int8", smoothing=scales)
    with pytest.raises(FileNotFoundError):
        quantize_model(model, "int8", smoothing=tmp_path / "none.pt")
    for name in ("broken.pt", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"no tensors")
        with pytest.raises(ValueError, match=rf"{name} must be a \.safetensors or \.pt file of tensors"):
            quantize_model(model, "int8", smoothing=tmp_path / name)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="must hold a dict of tensors, got list"):
        quantize_model(model, "int8", smoothing=tmp_path / "list.pt")


def test_code_in_a_file_is_not_run(tmp_path):
    class Planted:
        def __reduce__(self):
            return (tmp_path / "run").touch, ()

    torch.save({"model.layers.0.mlp.down_proj": Planted()}, tmp_path / "planted.pt")
    with pytest.raises(ValueError, match=r"planted\.pt must be a \.safetensors or \.pt file of tensors"):
        quantize_model(random_model("llama"), "int8", smoothing=tmp_path / "planted.pt")
    assert not (tmp_path / "run").exists()


def test_maxima_that_do_not_fit_are_named():
    model = random_model("llama")
    maxima, name = maxima_of(model, IDS), "model.layers.0.self_attn.q_proj"
    maxima[name] = maxima[name][:-1]
    with pytest.raises(ValueError, match=rf"^qops\.models\.smoothing_scales: maxima of {name} must be a tensor of"):
        smoothing_scales(model, maxima)
