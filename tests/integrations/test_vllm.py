"""qops inside vLLM: its real engine, in processes of its own, on small checkpoints of each layout."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qops
from qops.integrations import vllm as plugin
from tests.support.formats import folders
from tests.support.formats.checkpoints import checkpoint
from tests.support.formats.folders import Written, write_as
from tests.support.models.families import VOCAB
from tests.support.models.vllm_engine import ROOT, environment_of, run_engines

pytest.importorskip("vllm")

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
# Of vLLM's Llama, with the rows that they have: q, k and v are one linear, as are gate and up.
ROWS = {"self_attn.qkv_proj": 256, "self_attn.o_proj": 128, "mlp.gate_up_proj": 384, "mlp.down_proj": 128}
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(7))
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def integers(strategy: str, dynamic: bool, symmetric: bool, bits: int = 8, group_size: int = -1) -> Any:
    inputs = {"num_bits": 8, "type": "int", "strategy": strategy, "dynamic": dynamic, "symmetric": symmetric}
    return folders.compressed_tensors(bits=bits, group_size=group_size, packed=False, inputs=inputs)


DYNAMIC, ASYMMETRIC = integers("token", True, True), integers("token", True, False)


def per_token(rule: str) -> Callable[[Tensor], Tensor]:
    def rounded(x: Tensor) -> Tensor:
        q, scale = qops.quantize_int8(x, rule)
        return q * scale[..., None]

    return rounded


def per_token_asymmetric(rule: str) -> Callable[[Tensor], Tensor]:
    def rounded(x: Tensor) -> Tensor:
        q, scale, zero_point = qops.quantize_int8_asym(x, rule)
        return (q.float() - zero_point[..., None]) * scale[..., None]

    return rounded


def static(x: Tensor) -> Tensor:
    """With the scale and zero point that folders.py writes."""
    scale, zero_point = torch.tensor(0.05).half().float(), torch.tensor(7, dtype=torch.int32)
    return (qops.quantize_int8_static(x, scale, zero_point, "compressed-tensors").float() - 7) * scale


# name -> writer, --quantization, scheme, what becomes of activations.
BY_METHOD: dict[str, tuple[Any, str | None, str, Callable[[Tensor], Tensor] | None]] = {
    "gptq": (folders.gptq(symmetric=True), "qops", "int4", None),
    "gptq, a scale per row": (folders.gptq(symmetric=True, group_size=-1), "qops", "int4", None),
    "gptq with zero points": (folders.gptq(), None, "int4", None),
    "gptq version 2 with zero points": (folders.gptq(version=2), None, "int4", None),
    "gptq in act-order": (folders.gptq(act_order=True, symmetric=True), None, "int4", None),
    "gptq of 8 bits": (folders.gptq(bits=8), "qops", "int8_weight_only", None),
    "awq": (folders.awq(), "qops", "int4", None),
    "awq gemv": (folders.awq("gemv"), "qops", "int4", None),
    "awq gemv_fast": (folders.awq("gemv_fast"), "qops", "int4", None),
    "compressed-tensors": (folders.compressed_tensors(), "qops", "int4", None),
    "compressed-tensors with zero points": (folders.compressed_tensors(symmetric=False), "qops", "int4", None),
    "w8a8": (DYNAMIC, "qops", "int8_compressed_tensors", per_token("compressed-tensors")),
    "w8a8 asymmetric": (
        ASYMMETRIC,
        "qops",
        "int8_asymmetric_compressed_tensors",
        per_token_asymmetric("compressed-tensors"),
    ),
    "w8a8 static": (integers("tensor", False, False), "qops", "int8_static_compressed_tensors", static),
    "w4a8 in act-order": (folders.gptq(act_order=True), "qops_w4a8", "w4a8", per_token("127")),
}
# Through vLLM's own methods, which then have no other kernel.
BY_KERNEL: dict[str, tuple[Any, str, Callable[[Tensor], Tensor] | None]] = {
    "gptq": (folders.gptq(symmetric=True), "int4", None),
    "awq": (folders.awq(), "int4", None),
    "compressed-tensors of 8 bits": (folders.compressed_tensors(bits=8), "int8_weight_only", None),
    "compressed-tensors": (folders.compressed_tensors(), "int4", None),
    "compressed-tensors with zero points": (folders.compressed_tensors(symmetric=False), "int4", None),
    "w8a8": (DYNAMIC, "int8", per_token("127")),
    "w8a8 asymmetric": (ASYMMETRIC, "int8_asymmetric", per_token_asymmetric("255")),
    "w4a8": (integers("token", True, True, bits=4, group_size=32), "w4a8", per_token("127")),
}
# Over two processes, which cut groups of 64 of down_proj's 192 columns.
IN_PARALLEL: dict[str, tuple[Any, str, str | None, Callable[[Tensor], Tensor] | None]] = {
    "gptq in act-order with zero points": (folders.gptq(act_order=True, group_size=64), "llama", None, None),
    "phi3, merged on disk": (folders.compressed_tensors(symmetric=False, group_size=64), "phi3", "qops", None),
    "w8a8": (DYNAMIC, "llama", "qops", per_token("compressed-tensors")),
}


def written_as(writer: Any, family: str = "llama") -> Written:
    return write_as(*writer, family=family, **SIZES)


def wanted(written: Written, rounded: Callable[[Tensor], Tensor] | None, processes: int = 1) -> Tensor:
    """Log-probabilities by Transformers of the dense twin; each process rounds what it has of an input."""

    def hook(parts: int) -> Any:
        return lambda module, args: torch.cat([rounded(part) for part in args[0].chunk(parts, -1)], -1)  # type: ignore

    for name, part in written.model.named_modules():
        if rounded is not None and type(part) is nn.Linear and name != "lm_head":
            part.register_forward_pre_hook(hook(processes if name.endswith(("o_proj", "down_proj")) else 1))
    return written.model(IDS).logits.float().log_softmax(-1)[:, :-1]


def require_ours(found: dict[str, Any], scheme: str, processes: int = 1) -> None:
    """Every linear, in every worker."""
    assert "error" not in found, found.get("error")
    assert len(found["workers"]) == processes
    for worker in found["workers"]:
        assert worker.keys() == {f"model.layers.{layer}.{name}" for layer in range(2) for name in ROWS}
        for name, linear in worker.items():
            rows = next(rows for suffix, rows in ROWS.items() if name.endswith(suffix))
            assert linear["schemes"] and set(linear["schemes"]) == {scheme}, (name, linear)
            assert linear["outputs"] == rows // (1 if name.endswith(("o_proj", "down_proj")) else processes), name
            assert linear["left"] == 0, (name, linear)


def require_near(found: dict[str, Any], logprobs: Tensor, tolerance: float) -> None:
    got = torch.tensor(found["logprobs"])
    assert got.shape == logprobs.shape and logprobs.min() < -5
    assert (got - logprobs).abs().max() <= tolerance


def require_those_of(found: dict[str, Any], make: Callable[[], Written], rounded: Any, processes: int = 1) -> None:
    """The log-probabilities of the twin, in float32: to 1e-4 where activations are dense. Where they are rounded, 1e-7
    before a tie makes another code of 1/127 of a row's largest element, which the tokens behind it see; the others are
    the twin's, and none is that of a twin that does not round."""
    if rounded is None:
        require_near(found, wanted(make(), None), 1e-4)
        return
    got, right = torch.tensor(found["logprobs"]), wanted(make(), rounded, processes)
    require_near(found, right, 0.2)
    assert (got - right).abs().amax(-1).min() <= 1e-4
    assert (got - wanted(make(), None)).abs().amax(-1).min() > 1e-3


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    """What vLLM's processes find the plugin by."""
    found = {entry.name: entry.value for entry in entry_points(group="vllm.general_plugins")}
    assert found.get("qops") == "qops.integrations.vllm:register", "qops must be installed beside vLLM: pip install ."


# By method -----------------------------------------------------------------------------------------------------------


def all_of(cases: dict[str, Any], run: Callable[[str, Path], dict[str, Any]], folder: Path, **more: str) -> Any:
    runs = [run(name, folder / name.replace(" ", "_")) for name in cases]
    return dict(zip(cases, run_engines(runs, IDS.tolist(), folder, more), strict=True))


@pytest.fixture(scope="module")
def by_method(tmp_path_factory) -> dict[str, Any]:
    def run(name: str, path: Path) -> dict[str, Any]:
        writer, quantization, *_ = BY_METHOD[name]
        return {"model": str(written_as(writer).write(path)), "quantization": quantization, "dtype": "float32"}

    return all_of(BY_METHOD, run, tmp_path_factory.mktemp("method"), **IN_PROCESS)


@pytest.mark.parametrize("name", BY_METHOD)
def test_a_checkpoint_of_each_layout_runs_on_qops(by_method, name):
    writer, _, scheme, rounded = BY_METHOD[name]
    require_ours(by_method[name], scheme)
    require_those_of(by_method[name], lambda: written_as(writer), rounded)


@pytest.fixture(scope="module")
def in_parallel(tmp_path_factory) -> dict[str, Any]:
    def run(name: str, path: Path) -> dict[str, Any]:
        writer, family, quantization, _ = IN_PARALLEL[name]
        model = str(written_as(writer, family).write(path))
        return {"model": model, "quantization": quantization, "dtype": "float32", "tensor_parallel_size": 2}

    folder = tmp_path_factory.mktemp("parallel")
    return all_of(IN_PARALLEL, run, folder, VLLM_CPU_OMP_THREADS_BIND="0|1")


@pytest.mark.parametrize("name", IN_PARALLEL)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="vLLM binds each process to cores of its own")
def test_two_processes_have_a_part_each(in_parallel, name):
    writer, family, _, rounded = IN_PARALLEL[name]
    require_ours(in_parallel[name], "int8_compressed_tensors" if name == "w8a8" else "int4", processes=2)
    require_those_of(in_parallel[name], lambda: written_as(writer, family), rounded, processes=2)
    padding = [worker["model.layers.0.mlp.down_proj"]["padding"] for worker in in_parallel[name]["workers"]]
    assert all(padding) == ("act-order" in name)


# By vLLM's own methods -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_kernel(tmp_path_factory) -> dict[str, Any]:
    plugin.register()

    def run(name: str, path: Path) -> dict[str, Any]:
        dtype = "float16" if BY_KERNEL[name][2] is None else "float32"
        return {"model": str(written_as(BY_KERNEL[name][0]).write(path)), "dtype": dtype}

    folder = tmp_path_factory.mktemp("kernel")
    return all_of(BY_KERNEL, run, folder, VLLM_DISABLED_KERNELS=plugin.in_tree_kernels(), **IN_PROCESS)


@pytest.mark.parametrize("name", BY_KERNEL)
def test_vllm_itself_has_qops_kernels_where_its_own_are_disabled(by_kernel, name):
    writer, scheme, rounded = BY_KERNEL[name]
    require_ours(by_kernel[name], scheme)
    if rounded is None:  # in float16, as vLLM's own methods ask for
        require_near(by_kernel[name], wanted(written_as(writer), None), 0.02)
    else:
        require_those_of(by_kernel[name], lambda: written_as(writer), rounded)


# What is refused, and what a broken plugin would look like -----------------------------------------------------------


@pytest.fixture(scope="module")
def refused(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("refused")
    head = write_as(*folders.gptq(symmetric=True), but=(), **SIZES).write(folder / "head")
    mixed = written_as(folders.gptq(symmetric=True))
    for key in ("qweight", "qzeros", "scales", "g_idx"):
        mixed.tensors.pop(f"model.layers.0.self_attn.k_proj.{key}", None)
    mixed.tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(64, 128, dtype=torch.float16)
    own = written_as(folders.gptq(symmetric=True))
    own.config["quantization_config"]["quant_method"] = "qops"
    runs = {
        "lm_head must be dense": {"model": str(head), "quantization": "qops"},
        "self_attn.k_proj must be quantised, as the others": {
            "model": str(mixed.write(folder / "mixed")),
            "quantization": "qops",
        },
        'qops.save_model(model, folder, format="compressed-tensors")': {"model": str(own.write(folder / "own"))},
        "must get all rows": {
            "model": str(written_as(folders.gptq(act_order=True)).write(folder / "good")),
            "load_format": "dummy",
        },
    }
    return dict(zip(runs, run_engines(list(runs.values()), IDS.tolist(), folder, IN_PROCESS), strict=True))


@pytest.mark.parametrize(
    "words",
    [
        "lm_head must be dense",
        "self_attn.k_proj must be quantised, as the others",
        'qops.save_model(model, folder, format="compressed-tensors")',
        "must get all rows",
    ],
)
def test_what_is_not_read_is_refused_by_name(refused, words):
    assert words in refused[words]["error"]


def test_without_the_plugin_nothing_is_ours(tmp_path):
    """What the other tests assert can fail; and vLLM refuses what they have it run."""
    runs = [
        {"model": str(written_as(writer).write(tmp_path / name))}
        for name, writer in (
            ("in_tree", folders.gptq(symmetric=True)),
            ("act_order", folders.gptq(act_order=True)),
            ("zero_points", folders.gptq()),
        )
    ]
    environment = {**IN_PROCESS, "VLLM_PLUGINS": "none"}
    in_tree, act_order, zero_points = run_engines(runs, IDS.tolist(), tmp_path, environment)
    with pytest.raises(AssertionError):
        require_ours(in_tree, "int4")
    assert in_tree["workers"][0]["model.layers.0.mlp.down_proj"]["method"] != "QopsLinearMethod"
    assert "desc_act" in act_order["error"] and "sym=False" in zero_points["error"]


def test_compiled(tmp_path):
    """As vLLM does unless it is told not to: one graph without breaks."""
    writer = folders.gptq(act_order=True)
    run = {"model": str(written_as(writer).write(tmp_path / "it")), "dtype": "float32", "enforce_eager": False}
    (found,) = run_engines([run], IDS.tolist(), tmp_path, IN_PROCESS)
    require_ours(found, "int4")
    require_those_of(found, lambda: written_as(writer), None)


# What producers have recorded ----------------------------------------------------------------------------------------

# By method "qops" unless it is taken without being asked for; W8A8 differs from a runtime that rounds to 8 bits and
# multiplies in float16 by roundings of its own.
RECORDED = {
    "gptq_v1_sym_g128": ("qops", 0.02),
    "gptq_v1_sym_g64_desc_act": (None, 0.02),
    "gptq_v2_asym_g32": (None, 0.02),
    "awq_gemm_asym_g32_autoround": ("qops", 0.02),
    "ct_w4a16_sym_g128": ("qops", 0.02),
    "ct_w8a8_int_dyn_token_sym": ("qops", 0.15),
}


@pytest.mark.parametrize("name", RECORDED)
def test_log_probs_are_those_of_the_producer(tmp_path, name):
    from safetensors.torch import load_file

    folder = checkpoint(name)
    recorded = load_file(folder / "ref_logits.safetensors")
    quantization, tolerance = RECORDED[name]
    run = {"model": str(folder / "checkpoint"), "quantization": quantization, "dtype": "float16"}
    (found,) = run_engines([run], recorded["input_ids"].tolist(), tmp_path, IN_PROCESS)
    assert "error" not in found, found.get("error")
    assert all(linear["schemes"] for linear in found["workers"][0].values())
    require_near(found, recorded["logits_runtime"].float().log_softmax(-1)[:, :-1], tolerance)


# The server ----------------------------------------------------------------------------------------------------------


def with_tokenizer(path: Path) -> Path:
    """Words w0 ... w71."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
    return path


@contextlib.contextmanager
def server(folder: Path, *arguments: str) -> Iterator[str]:
    """`vllm serve` on loopback; ended by its process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--max-model-len", "64", "--enforce-eager", *arguments]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment_of({})) as run,
    ):
        try:
            address, end = f"http://127.0.0.1:{port}", time.monotonic() + 300
            while True:
                assert run.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-4000:]
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                time.sleep(0.5)
            yield address
        finally:
            run.terminate()
            try:
                run.wait(60)
            except subprocess.TimeoutExpired:
                run.kill()


def test_the_server_answers(tmp_path):
    writer = folders.gptq(act_order=True)
    written = written_as(writer)
    path = with_tokenizer(written.write(tmp_path / "model"))
    prompt = [5, 9, 31, 40]
    with server(path, "--quantization", "qops", "--dtype", "float32") as address:
        asked = {"model": str(path), "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = json.load(answer)["choices"][0]["text"]
    tokens = list(prompt)
    for _ in range(6):
        tokens.append(int(written.model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert text.split() == [f"w{token}" for token in tokens[len(prompt) :]]


def test_the_example_of_the_page(tmp_path):
    page = (ROOT / "docs/vllm.md").read_text()
    _, _, rest = page.partition("```python\n")
    (tmp_path / "example.txt").write_text(rest.partition("```")[0])
    code = "import doctest, sys; f, n = doctest.testfile(sys.argv[1], False); sys.exit(f or n < 9)"
    command = [sys.executable, "-c", code, str(tmp_path / "example.txt")]
    environment = environment_of({"VLLM_LOGGING_LEVEL": "CRITICAL"})  # to stdout, which the example is compared with
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


# Registration --------------------------------------------------------------------------------------------------------


def registry() -> Any:
    return importlib.import_module("vllm.model_executor.kernels.linear")


def registered() -> tuple[Any, ...]:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    kernels = registry()
    lists = (kernels._POSSIBLE_KERNELS, kernels._POSSIBLE_INT8_KERNELS)
    names = [[kernel.__name__ for kernel in each] for platforms in lists for each in platforms.values()]
    return names, list(QUANTIZATION_METHODS)


def test_registering_again_changes_nothing():
    plugin.register()
    once = registered()
    plugin.register()
    assert registered() == once
    names, methods = once
    assert [methods.count(name) for name in ("qops", "qops_w4a8")] == [1, 1]
    # Of each kind, on CPUs and on GPUs, behind all others.
    for kernel in ("QopsMPLinearKernel", "QopsInt8ScaledMMLinearKernel"):
        assert [each.count(kernel) for each in names if kernel in each] == [1, 1]
        assert all(each[-1] == kernel for each in names if kernel in each)


def test_this_vllm_has_what_the_plugin_relies_on():
    assert plugin.differences() == []


def test_another_vllm_is_left_alone_with_a_warning(monkeypatch):
    linear = importlib.import_module("vllm.model_executor.layers.linear")

    def changed(self, param, weight):
        raise NotImplementedError

    monkeypatch.setattr(linear.RowParallelLinear, "weight_loader", changed)
    monkeypatch.delattr(registry(), "register_linear_kernel")
    before = registered()
    with pytest.warns(UserWarning, match=r"vLLM [\d.]+ differs .*register_linear_kernel.* has no loaded_weight"):
        plugin.register()
    assert registered() == before


def test_kernels_for_gpus_are_of_the_same_classes(monkeypatch):
    """No GPU is here: the choice alone, as vLLM makes it, in a build of qops that had its kernels."""
    plugin.register()
    kernels = importlib.import_module("qops.integrations.vllm.kernels")
    from vllm.platforms import PlatformEnum
    from vllm.scalar_type import scalar_types

    class Gpu:
        _enum = PlatformEnum.CUDA
        is_cpu = staticmethod(lambda: False)
        is_cuda = staticmethod(lambda: True)
        get_device_capability = staticmethod(lambda: (9, 0))

    chooser = registry()
    monkeypatch.setattr(chooser, "current_platform", Gpu)
    monkeypatch.setattr(kernels, "current_platform", Gpu)
    in_tree = [k.__name__ for k in chooser._POSSIBLE_KERNELS[PlatformEnum.CUDA] if k not in kernels.KERNELS]
    in_tree += [k.__name__ for k in chooser._POSSIBLE_INT8_KERNELS[PlatformEnum.CUDA] if k not in kernels.KERNELS]
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", ",".join(in_tree))
    monkeypatch.setattr(chooser, "prioritize_humming", lambda kernels, capability: kernels)
    config = chooser.MPLinearLayerConfig((128, 64), (128, 64), scalar_types.uint4b8, torch.bfloat16, 32, False)
    with pytest.raises(ValueError, match="this build of qops has no CUDA kernel of int4_gemm"):
        chooser.choose_mp_linear_kernel(config)
    monkeypatch.setattr(kernels, "without_cuda", frozenset())
    assert chooser.choose_mp_linear_kernel(config) is kernels.QopsMPLinearKernel
    int8 = chooser.Int8ScaledMMLinearLayerConfig(False, True, True)
    found = chooser.choose_scaled_mm_linear_kernel(int8, chooser._POSSIBLE_INT8_KERNELS, quantization="int8_w8a8")
    assert found is kernels.QopsInt8ScaledMMLinearKernel


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weight_type": "uint2b2"}, "weight type must be one of"),
        ({"act_type": torch.int8}, "activations must be"),
        ({"out_type": torch.float32}, "the output must be"),
        ({"partition_weight_shape": (128, 60)}, "multiples of 8, got 60 and 128"),
        ({"group_size": 24}, "group size must be a multiple of 16 that divides K = 128, got 24"),
    ],
)
def test_kernels_say_what_they_do_not_do(changes, reason):
    from vllm.scalar_type import scalar_types

    from qops.integrations.vllm.kernels import QopsMPLinearKernel

    given = {"weight_type": "uint4b8", "act_type": torch.bfloat16, "group_size": 32, "zero_points": False} | changes
    given["weight_type"] = getattr(scalar_types, given["weight_type"])
    shape = {"full_weight_shape": (128, 64), "partition_weight_shape": (128, 64)}
    possible, said = QopsMPLinearKernel.can_implement(registry().MPLinearLayerConfig(**(shape | given)))
    assert not possible and said is not None and reason in said


def test_static_activations_are_left_to_the_method():
    from qops.integrations.vllm.kernels import QopsInt8ScaledMMLinearKernel

    config = registry().Int8ScaledMMLinearLayerConfig(True, True, True)
    possible, said = QopsInt8ScaledMMLinearKernel.can_implement(config)
    assert not possible and said is not None and "which method qops takes" in said


def test_it_takes_what_vllm_refuses_and_nothing_else():
    from qops.integrations.vllm.config import QopsConfig, QopsW4A8Config

    def chosen(config: Any, user: str | None, **settings: Any) -> str | None:
        return config.override_quantization_method({"quant_method": "gptq", "bits": 4} | settings, user)

    refused: list[dict[str, Any]] = [{"sym": False}, {"desc_act": True, "group_size": 64, "sym": True}]
    fine: list[dict[str, Any]] = [{"sym": True}, {"desc_act": True, "group_size": -1}, {"quant_method": "awq"}]
    assert [chosen(QopsConfig, None, **each) for each in refused] == ["qops", "qops"]
    assert [chosen(QopsConfig, None, **each) for each in fine] == [None] * 3
    assert [chosen(QopsW4A8Config, None, **each) for each in (*refused, *fine)] == [None] * 5
    assert chosen(QopsConfig, "gptq", sym=False) is None and chosen(QopsConfig, "qops", sym=True) == "qops"
    assert chosen(QopsW4A8Config, "qops_w4a8", sym=True) == "qops_w4a8"
    with warnings.catch_warnings(), pytest.raises(ValueError, match="quant_method must be one of gptq, awq"):
        QopsConfig({"quant_method": "fp8"})
