"""quantize_model on small random models of every family, and on models whose layers qops does not know."""

from __future__ import annotations

import copy
import gc
import json
import logging
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache

import qops
from qops.models import QuantizationReport, dense_model, load_model, quantize_model, save_model
from qops.models.decoder import cache_keyword
from qops.models.replacement import is_fused, norm_style
from qops.nn import Int4Linear, Int8Embedding, RMSNorm
from qops.testing import assert_bitwise
from tests.support.models.families import FAMILIES, FUSED, IDS, OTHER, PARTLY, VOCAB, random_model
from tests.support.models.layerwise import assert_int8_layers_accurate, assert_layers_accurate, hidden_states

SCHEMES = ("int4", "int8")
DTYPES = (torch.float32, torch.bfloat16)


# Against float64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_int4_layer_by_layer(family, dtype):
    # Of the first Mixtral two experts are so near to a tie that bfloat16 decides which one a token takes.
    ours = quantize_model(random_model(family, seed=int(family == "mixtral"), dtype=dtype), qops.Int4(16))
    report = ours.quantization_report
    assert (report.not_fused is None, report.own == {}) == (family not in OTHER, family not in PARTLY)
    assert_layers_accurate(ours, IDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_layer_by_layer(family):
    assert_int8_layers_accurate(quantize_model(random_model(family), "int8"), IDS)


# Fused = one by one --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", [*FUSED, *PARTLY])
def test_fused_layers_have_the_bits_of_linears_and_norms_alone(family, scheme, monkeypatch):
    # Transformers computes SiLU by another polynomial; with ours, nothing else may differ in float32.
    monkeypatch.setattr(nn.functional, "silu", lambda x, inplace=False: qops.silu_mul(x, torch.ones_like(x)))
    source = random_model(family)
    for layer in source.model.layers:
        for act in {"act_fn", "activation_fn"} & set(dir(layer.mlp)):
            if torch.equal(getattr(layer.mlp, act)(IDS.float()), nn.functional.silu(IDS.float())):
                setattr(layer.mlp, act, nn.SiLU())
    fused = quantize_model(copy.deepcopy(source), scheme)
    alone = quantize_model(source, scheme, fuse=False)
    assert is_fused(fused) and not is_fused(alone)
    assert alone.quantization_report.not_fused == "fuse=False"
    for a, b in zip(hidden_states(fused, IDS), hidden_states(alone, IDS), strict=True):
        assert_bitwise(a, b, family)
    assert_bitwise(fused(IDS).logits, alone(IDS).logits, family)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", [*FUSED, *PARTLY])
def test_decoding_with_a_cache_equals_the_whole_sequence(family, scheme):
    model = quantize_model(random_model(family), scheme)
    whole = model(IDS, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    steps = [IDS[:, :5], *IDS[:, 5:].split(1, dim=1)]
    pieces = torch.cat(
        [model(step, **{cache_keyword(type(model)): cache}, use_cache=True).logits for step in steps], dim=1
    )
    # A code that falls to the other side of a half moves an int8 model by a part of a quantum.
    torch.testing.assert_close(pieces, whole, atol=2e-5 if scheme == "int4" else 0.02 * whole.abs().max(), rtol=2e-5)


def test_the_int8_chain_quantises_only_what_no_operator_before_it_can():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls: dict[str, int] = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name().startswith("qops::"):
                self.calls[func.name()] = self.calls.get(func.name(), 0) + 1
            return func(*args, **(kwargs or {}))

    model = quantize_model(random_model("llama"), "int8")
    with Count() as count:
        model(IDS)
    assert count.calls == {
        "qops::rms_norm_int8": 6,
        "qops::rms_norm": 1,  # the norm before the dense output layer
        "qops::int8_gemm": 3,  # q, k and v
        "qops::int8_gemm.fused": 9,  # o and down, which add the residual; gate and up, which end in SiLU-mul
        "qops::rotary_": 3,
        "qops::quantize_int8": 6,  # what attention puts out, and SiLU-mul
    }


def test_a_part_that_is_skipped_gets_dense_activations():
    skip = ("k_proj", "model.layers.1.mlp.*")
    model = quantize_model(random_model("llama"), "int8", skip=skip)
    layers = model.model.layers
    assert [layer.input_layernorm.int8 for layer in layers] == [None, None, None]
    assert [layer.post_attention_layernorm.int8 for layer in layers] == ["127", None, "127"]
    skipped = [name for name, reason in model.quantization_report.kept.items() if reason == "skipped"]
    assert len(skipped) == 3 + 3
    assert isinstance(layers[1].mlp.down_proj, nn.Linear)
    alone = quantize_model(random_model("llama"), "int8", skip=tuple(skipped), fuse=False)
    torch.testing.assert_close(model(IDS).logits, alone(IDS).logits, atol=1e-3, rtol=1e-3)


# Ties, state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["llama", "gemma", "olmo2"])
@pytest.mark.parametrize("skip", [True, False], ids=["dense table", "quantised table"])
def test_tied_tables_stay_tied(family, scheme, skip, tmp_path):
    model = quantize_model(random_model(family, tie_word_embeddings=True), scheme, skip_default=skip)
    assert model.config.tie_word_embeddings
    save_model(model, tmp_path)
    for tied in (model, load_model(tmp_path, torch.float32)):
        embedding, output = tied.get_input_embeddings(), tied.get_output_embeddings()
        scale = getattr(embedding, "embed_scale", 1.0)
        ids = torch.arange(VOCAB)
        if skip:
            assert output.weight is embedding.weight
        elif scheme == "int8" and family != "gemma":
            assert isinstance(embedding, Int8Embedding) and output.weight is embedding.weight
        else:
            assert_bitwise(embedding(ids), output.weight.dequantize() * scale)
        dense = dense_model(tied, torch.float32)
        assert dense.lm_head.weight is dense.model.embed_tokens.weight


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_folders_round_trip(family, scheme, tmp_path):
    model = quantize_model(random_model(family, dtype=torch.bfloat16), scheme, skip=("*v_proj",))
    model.generation_config.max_length = 77
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model) and loaded.dtype == torch.bfloat16
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert loaded.generation_config.max_length == 77
    assert_bitwise(loaded(IDS).logits, model(IDS).logits)
    assert {key: value.shape for key, value in loaded.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    for key, value in model.state_dict().items():
        assert_bitwise(loaded.state_dict()[key], value, key)
    assert [str(module) for module in loaded.model.layers] == [str(module) for module in model.model.layers]


@pytest.mark.parametrize("scheme", (qops.Int4(32), qops.Int8WeightOnly(32)), ids=str)
def test_offsets_are_stored_under_their_own_name(tmp_path, scheme):
    model = quantize_model(random_model("llama"), scheme)
    linear = model.model.layers[0].mlp.down_proj
    offset = {"kind": "offset", "zeros": torch.randn(linear.weight.canonical()["scales"].shape)}
    linear.weight = type(linear.weight).from_canonical(**linear.weight.canonical(), **offset)
    save_model(model, tmp_path)
    from safetensors import safe_open

    kinds = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["weights"]
    scheme_name = type(linear).scheme
    assert kinds["model.layers.0.mlp.down_proj"] == f"{scheme_name} offset"
    assert kinds["model.layers.1.mlp.down_proj"] == f"{scheme_name} symmetric"

    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("model.layers.0.mlp.down_proj.weight.")]  # noqa: SIM118
        assert sorted(name.rpartition(".")[2] for name in names) == ["offsets", "scales"]
    assert_bitwise(load_model(tmp_path, torch.float32)(IDS).logits, model(IDS).logits)


def test_models_pickle_into_another_process(tmp_path):
    model = quantize_model(random_model("qwen3"), "int8")
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    torch.save(model(IDS).logits, tmp_path / "logits.pt")
    torch.save(IDS, tmp_path / "ids.pt")
    code = (
        "import pickle, sys, torch; folder = sys.argv[1]\n"
        "model = pickle.load(open(folder + '/model.pickle', 'rb'))\n"
        "logits = model(torch.load(folder + '/ids.pt')).logits\n"
        "assert torch.equal(logits, torch.load(folder + '/logits.pt'))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.mark.parametrize("fused", [True, False])
def test_the_int8_model_traces(fused):
    model = quantize_model(random_model("qwen3"), "int8", fuse=fused)
    with torch.inference_mode(False), torch.no_grad():
        compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_casts_leave_the_frequencies_alone(family):
    def frequencies(model):
        return [buffer for name, buffer in model.named_buffers() if "inv_freq" in name]

    wanted = frequencies(random_model(family))
    before = quantize_model(random_model(family).bfloat16())
    after = quantize_model(random_model(family)).bfloat16()
    for model in (before, after, copy.deepcopy(after)):
        assert len(wanted) == len(frequencies(model)) > 0
        for a, b in zip(wanted, frequencies(model), strict=True):
            assert_bitwise(a, b)


# Memory, progress, report --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dense_weights_are_freed_layer_by_layer(scheme, fuse, monkeypatch):
    model = random_model("llama", num_hidden_layers=6)
    linears = [
        (int(name.split(".")[2]), weakref.ref(module.weight))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    kind = qops.Int4Weight if scheme == "int4" else qops.Int8Weight
    quantize, alive = kind.quantize, []

    def spy(weight, *args, **kwargs):
        for index, ref in linears:
            if ref() is not None and ref().data_ptr() == weight.data_ptr():
                alive.append((index, {layer for layer, other in linears if other() is not None}))
        return quantize(weight, *args, **kwargs)

    monkeypatch.setattr(kind, "quantize", spy)
    # Reference counts alone must free them: the collector may run late.
    gc.disable()
    try:
        quantize_model(model, scheme, fuse=fuse)
    finally:
        gc.enable()
    # The layer of the proof is taken over.
    assert len(alive) == 6 * 7
    for index, layers in alive:
        assert min(layers) >= index - 1, f"layers {layers} are alive while layer {index} is converted"
    assert all(ref() is None for _, ref in linears)


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_the_progress_bar_is_asked_for_or_on_a_terminal(progress, shown, capsys):
    quantize_model(random_model("llama"), progress=progress)
    captured = capsys.readouterr()
    assert ("| 0/3" in captured.err) == shown
    assert captured.out == ""


def test_the_report_says_everything(caplog):
    source = random_model("qwen3", tie_word_embeddings=True)
    names = {name for name, module in source.named_modules() if isinstance(module, nn.Linear) or "norm" in name}
    names.add("model.embed_tokens.weight")
    before = sum(p.numel() * 4 for p in source.parameters())
    with caplog.at_level(logging.INFO, logger="qops"):
        model = quantize_model(source, "int8", count_passes=True)
    report = model.quantization_report
    assert isinstance(report, QuantizationReport)
    assert {*report.replaced, *report.kept} == names
    assert report.kept == {
        "lm_head": "a head; skip_default=False quantises it",
        "model.embed_tokens.weight": "a parameter of Embedding, which is neither a linear nor an RMSNorm",
    }
    assert report.kept_bytes == dict.fromkeys(report.kept, VOCAB * 64 * 4)
    assert report.proof.startswith("layer 0 of 3 in float32: relative error ")
    assert report.replaced["model.layers.1.self_attn.q_proj"] == "merged Int8Linear"
    assert report.replaced["model.layers.1.mlp.down_proj"] == "Int8Linear"
    assert report.replaced["model.layers.1.input_layernorm"] == "RMSNorm that emits int8"
    assert report.replaced["model.layers.1.self_attn.k_norm"] == "RMSNorm"
    assert abs(report.bytes_before - before) < 1024  # and a few buffers
    codes = sum(m.numel() for n, m in random_model("qwen3").named_parameters() if "proj" in n)
    assert codes < report.bytes_after - 4 * VOCAB * 64 < 1.2 * codes
    # q/k/v, o, gate/up, down; norm, norm; quantising what attention and SiLU-mul made; head norms, rotary; attention.
    assert report.passes_before is not None and report.passes_before > 30 and report.passes_after == 7
    text = str(report)
    assert text in caplog.text
    size, left = report.bytes_before / 1e6, report.bytes_after / 1e6
    for part in (
        "Qwen3ForCausalLM, int8:",
        "15 x merged Int8Linear",
        "decoder layers: fused",
        "proof: layer 0 of 3",
        "lm_head: a head; skip_default=False quantises it (0.0 MB)",
        f"weights: {size:.1f} MB -> {left:.1f} MB ({size / left:.2f}x)",
        f"passes over memory per layer: {report.passes_before:.0f} -> 7",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("family", "scheme", "passes"),
    [
        ("llama", "int4", 6),  # norm, q/k/v, rotary, attention, o, and the MLP as one block
        ("llama", "int8", 7),
        ("gemma", "int4", 10),  # GELU, and a product with up
    ],
)
def test_passes_over_memory(family, scheme, passes):
    report = quantize_model(random_model(family), scheme, count_passes=True).quantization_report
    assert report.passes_after == passes < report.passes_before / 3
    report = quantize_model(random_model(family), scheme).quantization_report
    assert report.passes_before is report.passes_after is None  # which takes forwards that nobody asked for


def test_models_of_unknown_architecture_say_so():
    model = quantize_model(random_model("glm"))
    report = model.quantization_report
    assert report.not_fused == "GlmForCausalLM is not an architecture whose layers qops knows"
    assert "not fused: GlmForCausalLM" in str(report)
    layer = model.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, Int4Linear) and isinstance(layer.input_layernorm, RMSNorm)


def test_what_cannot_be_replaced_stays_and_the_report_says_why():
    class Linear(nn.Linear):
        pass

    class ScaledNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64))
            self.eps = 1e-6

        def forward(self, x):
            return 2 * x * self.weight

    source = random_model("llama", intermediate_size=100)
    source.model.layers[0].self_attn.q_proj.__class__ = Linear
    source.model.layers[1].input_layernorm = ScaledNorm()
    expected = copy.deepcopy(source)
    with pytest.warns(UserWarning, match=r"stay Transformers' own, .* model\.layers\.0\.self_attn\.q_proj: Linear is"):
        model = quantize_model(source, "int8")
    kept = model.quantization_report.kept
    assert kept["model.layers.0.self_attn.q_proj"] == "Linear is a linear of another kind"
    assert kept["model.layers.1.input_layernorm"] == "ScaledNorm is not an RMSNorm that qops computes"
    assert kept["model.layers.2.mlp.down_proj"] == "K = 100 must be a multiple of 8"
    assert model.quantization_report.not_fused == "model.layers.0.self_attn.q_proj: Linear is a linear of another kind"
    want = expected(IDS).logits
    assert (model(IDS).logits - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("pattern", ["lm_haed", "layers.0.mlp.down_proj", "model.layers.0", "*.gate"])
def test_a_name_to_skip_that_names_no_linear_is_an_error(pattern):
    source = random_model("llama")
    with pytest.raises(ValueError, match=r"skip must name linears of the model, '.*' names none"):
        quantize_model(source, skip=("o_proj", pattern))
    assert type(source.model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize("skip", [None, 3, ("o_proj", 3)])
def test_names_to_skip_are_strings(skip):
    with pytest.raises(ValueError, match="skip must be a tuple of names, got"):
        quantize_model(random_model("llama"), skip=skip)


@pytest.mark.parametrize(("columns", "size"), [(256, 128), (192, 64), (96, 32), (208, 16), (104, 104)])
def test_group_sizes_follow_the_linears(columns, size):
    layer = quantize_model(random_model("llama", intermediate_size=columns)).model.layers[0]
    assert layer.mlp.down_proj.weight.group_size == size and layer.self_attn.o_proj.weight.group_size == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scheme": "int3"},
            "scheme must be one of 'int4', 'w4a8', 'int8', 'int8_weight_only', a scheme such .*, got 'int3'",
        ),
        ({"scheme": qops.Int4}, "scheme must be one of .*, got <class"),
        ({"scheme": {"*": qops.Int8(), "q_proj": 8}}, r"scheme\['q_proj'\] must be one of .*, got 8"),
        ({"scheme": {"*.gate": "int8", "*": "int4"}}, r"scheme must name linears of the model, '\*\.gate' names none"),
        ({"scheme": {"*": "int8", "o_proj": "int4"}}, "narrower patterns first, those before 'o_proj' take all"),
        ({"scheme": {}}, "model must have linears to quantise"),
        ({"scheme": {"*": None}}, "model must have linears to quantise"),
        ({"smoothing": {}}, "smoothing must be None with 'int4', which leaves activations as they are"),
        ({"scheme": "int8_weight_only", "smoothing": {}}, "smoothing must be None with 'int8_weight_only'"),
        ({"skip": "lm_head"}, "skip must be a tuple of names, got the string 'lm_head'"),
        ({"skip": ("*",)}, "model must have linears to quantise"),
        ({"scheme": qops.Int4(48)}, "model.layers.0.self_attn.q_proj: .*group_size .* got 48"),
    ],
)
def test_bad_arguments_change_nothing(changes, message):
    model = random_model("llama")
    before = model(IDS).logits
    with pytest.raises(ValueError, match=message):
        quantize_model(model, **changes)
    assert_bitwise(model(IDS).logits, before)
    assert not hasattr(model, "quantization_report")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: model.double(), "must be in float32, bfloat16 or float16, got torch.float64"),
        (lambda model: model.to("meta"), "q_proj: weight must have data, got a tensor on the meta device"),
    ],
)
def test_models_that_no_kernel_runs_are_refused(spoil, message):
    model = spoil(random_model("llama"))
    with pytest.raises(ValueError, match=message):
        quantize_model(model)
    assert not any(isinstance(module, (RMSNorm, Int4Linear)) for module in model.modules())


# Norms ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 64, 576])
@pytest.mark.parametrize(
    ("module", "style"),
    [
        ("llama.modeling_llama.LlamaRMSNorm", {"weight_offset": 0.0, "rounding": "hf"}),
        ("gemma.modeling_gemma.GemmaRMSNorm", {"weight_offset": 1.0, "rounding": "fp32"}),
        ("olmo2.modeling_olmo2.Olmo2RMSNorm", {"weight_offset": 0.0, "rounding": "fp32"}),
    ],
)
def test_norms_are_recognised_by_what_they_compute(module, style, size):
    path, _, name = f"transformers.models.{module}".rpartition(".")
    norm = getattr(__import__(path, fromlist=[name]), name)(size, eps=1e-5)
    assert norm_style(norm) == style
    assert norm_style(norm.to("meta")) == style


def test_a_config_with_kinds_that_are_no_text_is_refused(tmp_path):
    save_model(quantize_model(random_model("llama")), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["weights"]["model.layers.0.mlp.up_proj"] = 4
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weights must map names to kinds"):
        load_model(tmp_path)


def test_a_folder_of_a_class_that_transformers_lacks_is_refused(tmp_path):
    save_model(quantize_model(random_model("llama")), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in ("NoSuchModel", "pipeline", None, 3):
        path.write_text(json.dumps(config | {"architectures": [name]}))
        with pytest.raises(ValueError, match="architectures"):
            load_model(tmp_path)


def test_saving_a_model_of_a_class_of_ones_own_is_refused(tmp_path):
    class Mine(transformers.LlamaForCausalLM):
        pass

    model = quantize_model(Mine(random_model("llama").config))
    assert "Mine is not an architecture" in model.quantization_report.not_fused
    with pytest.raises(ValueError, match=r"must (be of|name) a"):
        save_model(model, tmp_path)
    assert not any(tmp_path.iterdir())
