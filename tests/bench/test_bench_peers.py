"""The adapters of ``bench/peers``: imported without their packages, right where these are installed, carried whole."""

from __future__ import annotations

import functools
import importlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from bench import problems
from bench.peers import MODULES, collect, install, layouts, libraries, pins, providers
from bench.peers.cuda import vllm_gemm
from bench.problems.int4_gemm import Int4Gemm
from bench.problems.shared.provider import OURS, Provider, version

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "bench" / "peers" / "README.md").read_text()
# Theirs are the tests of the harness.
OWN = ("bench.peers.ours", "bench.peers.pytorch.compiled")
PACKAGES = (
    *("onnxruntime", "onnx", "openvino", "zentorch", "vllm", "sgl_kernel", "fbgemm_gpu"),
    *("llama_cpp", "ik_llama_cpp", "humming", "gemlite", "quack", "flashinfer", "liger_kernel", "triton"),
)
# K = 576 and N = 192 are multiples of 64 alone; one group over K; several rows.
GEMM_SHAPES = ((1, 256, 512, 64), (5, 192, 576, 32), (3, 128, 256, 256))
ROW_SHAPES = ((1, 64), (5, 576))


def peers() -> list[Provider]:
    modules = [importlib.import_module(name) for name in MODULES if name not in OWN]
    return [provider for module in modules for provider in module.PROVIDERS]


# --- adapters --------------------------------------------------------------------------------------------------------


def test_importing_needs_no_peer():
    code = f"""
import importlib, sys
for name in {PACKAGES}: sys.modules[name] = None
from bench.peers import MODULES
for name in MODULES: assert importlib.import_module(name).PROVIDERS
"""
    paths = [str(ROOT), *sys.path]
    run = [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}"]
    assert subprocess.run(run, capture_output=True, text=True, check=False).stderr == ""


def test_providers_are_told_apart():
    found = peers()
    assert len({(p.name, p.op) for p in found}) == len(found) > 40
    for p in found:
        assert p.op in problems.OPS and p.accuracy and p.name
        assert p.devices in (("cpu",), ("cuda",), ("cpu", "cuda"))
        # A peer of its own distribution names it; what torch has needs nothing.
        assert p.requires or p.name.startswith("torch ")
    for op in problems.OPS:
        for device in ("cpu", "cuda"):
            assert providers.all(op, device)[0].name == OURS


def axes_of(op: str) -> list[dict[str, int | str]]:
    """Small cases of what peers on the CPU do."""
    dtypes = [{"dtype": dtype, "cache": "cold"} for dtype in ("bfloat16", "float16")]
    if op in ("rms_norm", "add_rms_norm"):
        return [{"T": t, "H": h} | dtype for t, h in ROW_SHAPES for dtype in dtypes]
    shapes = [dict(zip("MNKG", shape, strict=True)) | dtype for shape in GEMM_SHAPES for dtype in dtypes]
    kinds = ("symmetric", "zero_point", "offset") if op in ("int4_gemm", "int4_int8_gemm") else ("",)
    return [shape | ({"kind": kind} if kind else {}) for shape in shapes for kind in kinds]


@pytest.mark.parametrize("provider", [p for p in peers() if "cpu" in p.devices], ids=lambda p: f"{p.name}-{p.op}")
def test_cpu_peers_compute_the_operator(provider, monkeypatch):
    if provider.missing():
        pytest.skip(f"not installed: {', '.join(provider.missing())}")
    # Some adapters set it, which is harmless in a worker of its own.
    monkeypatch.setattr(torch.backends.quantized, "engine", torch.backends.quantized.engine)
    ran = 0
    for axes in axes_of(provider.op):
        if provider.unsupported("cpu", axes) is None:
            problem = problems.make(provider.op, axes)
            outputs = provider.build(problem)()
            expected = problems.reference(provider.op, problem)
            for got, want in zip(problems.sample(provider.op, problem, outputs), expected, strict=True):
                error = float((got.double() - want).abs().max() / want.abs().max())
                assert error <= (
                    1e-5 if "fp32 sums; float32" in provider.accuracy else problems.largest_error(provider)
                ), axes
            ran += 1
    assert ran


def test_limits_of_a_weight_only_gemm():
    reason = layouts.unsupported(groups=(64, 128), per_channel=False, multiple_of=layouts.multiples(128, 64))
    case = {"N": 256, "K": 512, "G": 64, "dtype": "bfloat16", "kind": "symmetric"}
    assert reason("cuda", case) is None
    for change, text in (
        ({"kind": "offset"}, "no offset weights"),
        ({"dtype": "float32"}, "no float32 activations"),
        ({"G": 32}, "group sizes 64, 128 only"),
        ({"G": 512}, "no scales per channel"),
        ({"N": 192}, "N % 128 = 0 and K % 64 = 0 only"),
    ):
        assert reason("cuda", case | change) == text


@pytest.mark.parametrize("kind", ("symmetric", "zero_point", "offset"))
def test_zeros_as_floats(kind):
    axes = {"M": 1, "N": 16, "K": 64, "G": 32, "dtype": "bfloat16", "kind": kind}
    problem = problems.make("int4_gemm", axes)
    assert isinstance(problem, Int4Gemm)
    centred = layouts.codes(problem).double().view(16, 2, 32) - layouts.SYMMETRIC_ZERO
    weight = problem.scales.double()[..., None] * centred + layouts.added_to_centred(problem).double()[..., None]
    # b is rounded to float32.
    torch.testing.assert_close(weight.flatten(1), problem.dequantize().double(), rtol=0, atol=1e-8)


def test_marlin_order():
    """Against the order as the format is described: of 64 columns, those of one residue modulo 8 together."""
    scales = torch.arange(2 * 128).view(2, 128).T.contiguous()
    grouped = vllm_gemm.marlin_scales(scales, single_group=False)
    assert grouped[0, :10].tolist() == [0, 8, 16, 24, 32, 40, 48, 56, 1, 9] and grouped[1, 64] == 128 + 64
    single = vllm_gemm.marlin_scales(scales, single_group=True)
    assert single[0, :10].tolist() == [0, 1, 8, 9, 16, 17, 24, 25, 2, 3] and single[0, 32] == 32
    zeros = vllm_gemm.marlin_zeros((scales % 16).to(torch.uint8))
    words = [[(int(word) >> (4 * i)) & 15 for i in range(8)] for word in zeros[0, :2]]
    assert zeros.shape == (2, 16) and words == [[0, 0, 0, 0, 8, 8, 8, 8], [1, 1, 1, 1, 9, 9, 9, 9]]
    # From vLLM's own class: uint4b8, uint4, uint8b128.
    ids = [vllm_gemm.scalar_type_id(bits, bias) for bits, bias in ((4, 8), (4, 0), (8, 128))]
    assert ids == [1125899907892224, 1125899906843648, 1125899923621888]


# --- carried to another machine --------------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A stage "fake" of one wheel with a shared object, and what ``collect`` is told of it."""
    content = bytes(range(256)) * 64
    path = tmp_path / "fake_peer-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fake_peer/_C.so", content)
        archive.writestr("fake_peer/__init__.py", "raise ImportError")
        archive.writestr("fake_peer-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: fake-peer\nVersion: 1.0\n")
    stage = pins.Stage((pins.Pin("fake-peer", "1.0", cut=("fake_peer/_C.so",)),), links=(("alias", "qops_peers"),))
    monkeypatch.setattr(collect, "download", lambda pin, folder: path)
    return functools.partial(collect.collect, "fake", stage, part_bytes=100), content


def test_parts_make_the_whole(wheel, tmp_path, monkeypatch):
    collected, content = wheel
    parts = collected(folder=tmp_path)
    assert len(parts) > 2 and all(part.stat().st_size <= 100 for part in parts)
    site = tmp_path / "site"
    assert install.install(tmp_path, site) == ["fake-peer==1.0"]
    assert (
        (site / "qops_peers/fake_peer/_C.so").read_bytes() == content == (site / "alias/fake_peer/_C.so").read_bytes()
    )
    assert not (site / "fake_peer").exists()
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    assert libraries.find("fake_peer/_C.so") == site / "qops_peers/fake_peer/_C.so"
    assert version("fake-peer") == "1.0"
    assert json.loads((tmp_path / "fake.json").read_text())["distributions"][0]["file"].startswith("fake_peer-1.0")


def test_archives_are_reproducible(wheel, tmp_path):
    collected, _ = wheel
    first = [part.read_bytes() for part in collected(folder=tmp_path)]
    assert first == [part.read_bytes() for part in collected(folder=tmp_path)]


@pytest.mark.parametrize("damage", ("changed", "missing", "another schema"))
def test_damaged_archive_is_refused(wheel, tmp_path, damage, capsys):
    parts = wheel[0](folder=tmp_path)
    if damage == "changed":
        parts[-1].write_bytes(parts[-1].read_bytes()[:-1] + b"?")
    elif damage == "missing":
        parts[1].unlink()
    else:
        (tmp_path / "fake.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"is damaged|needs fake\.tar\.xz\.01|is not a manifest"):
        install.main([str(tmp_path), "--to", str(tmp_path / "site")])
    assert not (tmp_path / "site").exists()


def test_library_that_is_nowhere():
    with pytest.raises(FileNotFoundError, match=r"no nobody/_C\.so on PYTHONPATH; python -m bench\.peers\.install"):
        libraries.load("nobody/_C.so")


def test_cut_that_is_not_in_the_wheel(wheel, tmp_path):
    stage = pins.Stage((pins.Pin("fake-peer", "1.0", cut=("fake_peer/_D.so",)),))
    with pytest.raises(FileNotFoundError, match=r"has no fake_peer/_D\.so"):
        collect.collect("fake", stage, tmp_path, 100)


# --- calls that are held against packages ----------------------------------------------------------------------------


def test_wrong_calls_are_found(tmp_path):
    """Schemas and functions that fit, and such as another release might have."""
    library = tmp_path / "qops_peers" / "vllm" / "_C_stable_libtorch.abi3.so"
    library.parent.mkdir(parents=True)
    schemas = (
        b"rms_norm(Tensor! result, Tensor input, Tensor weight, float epsilon) -> ()",
        b"silu_and_mul(Tensor! result, Tensor input, int limit) -> ()",
        b"cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, str a_scales, Tensor b_scales, Tensor? bias) -> ()",
        b"auto operator()(int) -> int",
    )
    library.write_bytes(b"\x7fELF\0" + b"\0\xff\0".join(schemas) + b"\0")
    package = tmp_path / "liger_kernel" / "ops"
    package.mkdir(parents=True)
    (package / "rms_norm.py").write_text("import triton\ndef rms_norm_forward(X, W, eps, offset, casting, row): ...\n")
    (package / "rope.py").write_text("from .rotary import forward as rope_forward\n")
    (package / "rotary.py").write_text("def forward(q, k, cos, *, sin): ...\n")
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    command = [sys.executable, "-m", "bench.peers.check", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    found = dict(line.split(": ", 1) for line in run.stdout.splitlines() if ": " in line)
    assert run.returncode == 1, run.stderr
    assert found["vllm, rms_norm"] == found["liger, rms_norm"] == "ok"
    assert found["vllm, silu_mul"].startswith("RuntimeError: _C::silu_and_mul() is missing value for argument 'limit'")
    assert "a_scales" in found["vllm cutlass, int8_gemm"]
    assert found["vllm, quantize_int8"].startswith("AttributeError")
    assert found["liger, rotary"].startswith("TypeError: liger_kernel.ops.rope.rope_forward(q, k, cos, *, sin)")
    assert found["liger, silu_mul"].startswith("ModuleNotFoundError")
    assert found["fbgemm, int4_gemm"].startswith("FileNotFoundError")


# --- the table -------------------------------------------------------------------------------------------------------


def rows() -> list[list[str]]:
    lines = [line for line in README.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_table_has_every_provider_and_its_operators():
    listed = {
        (name, op)
        for names, _, _, _, ops, *_ in rows()
        for name in re.findall(r"`([^`]+)`", names)
        for op in re.findall(r"\w+", ops)
        if op in problems.OPS
    }
    assert listed == {(p.name, p.op) for p in peers()}


def test_table_has_the_pinned_releases():
    pinned = {pin.name: pin.version for stage in pins.STAGES.values() for pin in stage.pins}
    required = {name for p in peers() if p.devices == ("cuda",) for name in p.requires}
    assert required <= set(pinned)
    table = {package: version for _, package, version, *_ in rows() if package in pinned}
    assert table == {name: pinned[name] for name in required}
    stages = {stage for row in rows() for stage in re.findall(r"stage `(\w+)`", row[3])}
    assert stages == set(pins.STAGES)


def test_extra_has_the_releases_of_the_table():
    extra = re.search(r"^bench-peers = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert extra is not None
    found = dict(re.findall(r'"([\w-]+)==([\d.]+)"', extra[1]))
    versions = {package: version for _, package, version, how, *_ in rows() if how.startswith("pip")}
    versions |= dict(re.findall(r"pip, with (\w+) ([\d.]+)", README))
    assert found == versions
    built = {package.replace("-", "_") for _, package, _, how, *_ in rows() if "whole-models" in how}
    assert set(found) == {name for p in peers() if p.devices == ("cpu",) for name in p.requires} - built and built
