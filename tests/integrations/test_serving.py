"""Exported models: here, in a process that has the operators alone, in a program in C++, and in servers."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import types
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import qops
from qops.integrations import serving
from qops.integrations.serving import export_decoder, export_logits, libraries
from tests.support.cuda import cuda_tools
from tests.support.models.families import FUSED, random_model

ROOT = Path(__file__).parents[2]
FAMILIES = ("llama", "qwen3", "gemma3")
NEW, CACHE = 9, 24
PROMPTS = ([5, 9, 33, 12, 64], [7], [11, 3, 3, 40, 41, 42, 43, 44, 45, 46, 47])


@functools.cache
def small_model(family: str, scheme: str = "int4") -> Any:
    # Windows of four positions would end generation: Transformers' exporter has none.
    changes = {"sliding_window": CACHE} if "sliding_window" in FUSED[family][2] else {}
    return qops.quantize_model(random_model(family, num_hidden_layers=2, **changes), scheme)


def generated(model: Any, prompt: list[int], new: int = NEW) -> list[int]:
    settings = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    return model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()


def decoded(call: Any, prompt: list[int], new: int = NEW) -> list[int]:
    """By a program with a cache, greedily and never the end."""
    found, ids, position = list[int](), list(prompt), 0
    for _ in range(new):
        logits = call(input_ids=torch.tensor([ids]), cache_position=torch.arange(position, position + len(ids)))
        position += len(ids)
        logits[0, -1, 2] = -torch.inf  # the end, which generate() leaves out as well
        ids = [int(logits[0, -1].argmax())]
        found += ids
    return found


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if str(node.target).startswith("qops.")}


# torch.export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["int4", "int8", "w4a8"])
def test_logits_of_any_batch_and_length(family, scheme):
    model = small_model(family, scheme)
    program = export_logits(model)
    product = {"int4": "int4_gemm", "int8": "int8_gemm", "w4a8": "int4_int8_gemm"}[scheme]
    assert any(name.startswith(f"qops.{product}.") for name in operators(program))
    for shape in ((1, 1), (1, 6), (3, 1), (4, 9)):
        ids = torch.randint(3, 72, shape, generator=torch.Generator().manual_seed(sum(shape)))
        want = model(ids, use_cache=False).logits
        # Of int8, another float32 order of torch's own operators may move a code.
        torch.testing.assert_close(program.module()(ids), want, rtol=0, atol=(1e-5 if scheme == "int4" else 0.05))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_generates_what_the_model_does(family):
    model = small_model(family)
    before = model.generation_config.to_dict()
    program = export_decoder(model, max_cache_len=CACHE)
    assert model.generation_config.to_dict() == before
    call = program.module()
    for prompt in (*PROMPTS, PROMPTS[0]):  # a new sequence each, in the cache of the one before
        assert decoded(call, prompt) == generated(model, prompt), prompt


def test_a_decoder_of_two_sequences():
    model = small_model("llama")
    call, prompts = (
        export_decoder(model, max_cache_len=CACHE, batch_size=2).module(),
        torch.tensor([[5, 6, 7], [8, 9, 9]]),
    )
    torch.testing.assert_close(
        call(input_ids=prompts, cache_position=torch.arange(3)), model(prompts).logits, rtol=0, atol=1e-5
    )


def test_bad_sizes_are_refused():
    model = small_model("llama")
    with pytest.raises(ValueError, match=r"export_decoder: max_cache_len must be at least 2, got 1$"):
        export_decoder(model, max_cache_len=1)
    with pytest.raises(ValueError, match=r"export_decoder: batch_size must be at least 1, got 0$"):
        export_decoder(model, max_cache_len=4, batch_size=0)


def test_libraries_are_those_of_this_installation():
    assert [Path(path).name for path in libraries()] == [
        "_C.abi3.so",
        *(["_C_cuda.abi3.so"] if qops.build_info()["cuda"] else []),
    ]
    assert all(Path(path).is_file() for path in libraries())


# AOTInductor: a new process, and C++ ---------------------------------------------------------------------------------

FRESH = """
import json, sys, torch
libraries, package, prompts, new = json.loads(sys.argv[1])
for library in libraries:
    torch.ops.load_library(library)
model, found = torch._inductor.aoti_load_package(package), []
for prompt in prompts:
    ids, position = prompt, 0
    found.append([])
    for _ in range(new):
        logits = model(input_ids=torch.tensor([ids]), cache_position=torch.arange(position, position + len(ids)))
        position += len(ids)
        ids = [int(logits[0, -1].argmax())]
        found[-1] += ids
print(json.dumps([found, "qops" in sys.modules]))
"""


def in_a_new_process(folder: Path, *arguments: Any, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FRESH, json.dumps([libraries(), *arguments])]
    return subprocess.run(command, cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> str:
    """Of a decoder; `generate` of C++ stops nowhere, so the model must not prefer the end."""
    path = tmp_path_factory.mktemp("package") / "decoder.pt2"
    program = export_decoder(small_model("llama"), max_cache_len=CACHE)
    return torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.slow
def test_a_package_runs_with_the_operators_alone(package, tmp_path):
    """In a new process that has never imported qops."""
    done = in_a_new_process(tmp_path, package, PROMPTS, NEW)
    assert done.returncode == 0, done.stderr
    found, has_qops = json.loads(done.stdout)
    assert found == [greedy(small_model("llama"), prompt) for prompt in PROMPTS] and not has_qops


@pytest.mark.slow
def test_a_package_refuses_what_does_not_fit(package, tmp_path):
    """More positions than the cache has, and an ISA level that there is not; AOTInductor keeps most of the reason."""
    done = in_a_new_process(tmp_path, package, [[3] * (CACHE - 3)], NEW)
    assert done.returncode != 0 and done.stdout == ""
    done = in_a_new_process(tmp_path, package, [[3]], 1, QOPS_ISA="avx1024")
    assert done.returncode != 0 and "QOPS_ISA must be one of" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_package_runs_in_a_program_without_python(package, tmp_path):
    """docs/serving, built and run."""
    cmake = cuda_tools.cmake()
    configure = [f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}", "-DCMAKE_BUILD_TYPE=Release"]
    configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={cuda_tools.ninja()}"]
    for command in (["-S", str(ROOT / "docs/serving"), "-B", str(tmp_path), *configure], ["--build", str(tmp_path)]):
        done = subprocess.run([cmake, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    program = str(tmp_path / "generate")
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in linked and "libpython" not in linked
    for prompt in PROMPTS:
        command = [program, libraries()[0], package, str(NEW), *map(str, prompt)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert list(map(int, done.stdout.split())) == greedy(small_model("llama"), prompt)
    done = subprocess.run(
        [program, str(tmp_path / "none.so"), package, "1", "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "none.so" in done.stderr


# Triton Inference Server ---------------------------------------------------------------------------------------------


def test_the_model_of_logits_for_triton(tmp_path):
    (tmp_path / "m.pt2").write_bytes(b"what AOTInductor has written")
    folder = serving.write_triton_logits(tmp_path / "models", "logits", tmp_path / "m.pt2", torch.bfloat16)
    assert (folder / "1/model.pt2").read_bytes() == b"what AOTInductor has written"
    assert (folder / "config.pbtxt").read_text() == (
        'name: "logits"\nplatform: "torch_aoti"\nmax_batch_size: 0\n'
        'input [\n  { name: "INPUT__0", data_type: TYPE_INT64, dims: [-1, -1] }\n]\n'
        'output [\n  { name: "OUTPUT__0", data_type: TYPE_BF16, dims: [-1, -1, -1] }\n]\n'
    )
    with pytest.raises(FileExistsError):
        serving.write_triton_logits(tmp_path / "models", "logits", tmp_path / "m.pt2", torch.bfloat16)


def test_triton_parses_what_is_written(tmp_path, generator_folder):
    definition = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    (tmp_path / "m.pt2").touch()
    logits = serving.write_triton_logits(tmp_path / "models", "logits", tmp_path / "m.pt2", torch.float32)
    for folder, inputs in ((logits, ["INPUT__0"]), (generator_folder, ["input_ids", "new_tokens"])):
        config = text_format.Parse((folder / "config.pbtxt").read_text(), definition.ModelConfig())
        assert config.name == folder.name and [tensor.name for tensor in config.input] == inputs
        assert {definition.DataType.Name(tensor.data_type) for tensor in config.input} == {"TYPE_INT64"}


class _Utils(types.ModuleType):
    """What Triton's Python backend lends to a model."""

    class Tensor:
        def __init__(self, name: str, values: np.ndarray) -> None:
            self.name, self._values = name, values

        def as_numpy(self) -> np.ndarray:
            return self._values

    class TritonError(Exception):
        pass

    class InferenceResponse:
        def __init__(self, output_tensors: Any = (), error: Any = None) -> None:
            self.output_tensors, self.error = list(output_tensors), error

    @staticmethod
    def get_input_tensor_by_name(request: dict[str, Any], name: str) -> Any:
        return _Utils.Tensor(name, request[name])


@pytest.fixture
def generator_folder(tmp_path) -> Path:
    qops.save_model(small_model("llama"), tmp_path / "checkpoint")
    return serving.write_triton_generator(tmp_path / "models", "llama", tmp_path / "checkpoint", 16)


def test_the_model_that_generates_in_triton(generator_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", _Utils("triton_python_backend_utils"))
    monkeypatch.delitem(sys.modules, "qops.integrations.triton_model", raising=False)
    given: dict[str, Any] = {}
    exec((generator_folder / "1/model.py").read_text(), given)
    text = (generator_folder / "config.pbtxt").read_text()
    parameters = dict(re.findall(r'parameters \{ key: "(\w+)" value: \{ string_value: "([^"]+)" \} \}', text))
    model = given["TritonPythonModel"]()
    config = {"parameters": {key: {"string_value": value} for key, value in parameters.items()}}
    model.initialize({"model_config": json.dumps(config)})

    def request(ids: list[list[int]], new: int) -> dict[str, np.ndarray]:
        return {"input_ids": np.array(ids, dtype=np.int64), "new_tokens": np.array([new], dtype=np.int64)}

    bad = ([[5, 72]], 1), ([[5, -1]], 1), ([[]], 1), ([[5]], 17), ([[5]], 0)
    requests = [request([PROMPTS[0]], NEW), *(request(*each) for each in bad), request([[5, 6], [7, 8]], 2)]
    first, *refused, last = model.execute(requests)
    assert first.error is None and first.output_tensors[0].name == "output_ids"
    assert first.output_tensors[0].as_numpy().tolist() == [generated(small_model("llama"), PROMPTS[0])]
    assert last.output_tensors[0].as_numpy().shape == (2, 2)
    names = ["input_ids"] * 3 + ["new_tokens"] * 2
    assert [str(each.error).split()[1] for each in refused] == names and not any(r.output_tensors for r in refused)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def answer(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read() or b"{}")


def wait_until_ready(server: subprocess.Popen, port: int, path: str, log: Path) -> None:
    until = time.monotonic() + 120
    while True:
        assert server.poll() is None and time.monotonic() < until, log.read_text()[-9000:]
        try:
            answer(port, path)
            return
        except OSError:
            time.sleep(0.3)


@pytest.mark.slow
def test_triton_serves_the_model_that_generates(generator_folder, tmp_path):
    """The server that nvidia-pytriton brings along, with its backend for Python."""
    pytriton = pytest.importorskip("pytriton")
    home = Path(pytriton.__file__).parent / "tritonserver"
    # The stub of this Python beside its backend.
    backends = tmp_path / "backends"
    shutil.copytree(home / "backends", backends)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(home / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
    port, log = free_port(), tmp_path / "log"
    command = [str(home / "bin/tritonserver"), "--model-repository", str(generator_folder.parent)]
    command += ["--backend-directory", str(backends), "--http-port", str(port), "--http-address", "127.0.0.1"]
    command += ["--allow-grpc", "false", "--allow-metrics", "false"]
    # The stub has a Python inside, which is to be this one; it does not read PYTHONPATH.
    paths = [str(home.parents[1] / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
    env = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths), "PYTHONHOME": sys.base_prefix}
    model = generator_folder / "1/model.py"
    model.write_text(f"import sys\nsys.path[:0] = {list(filter(None, sys.path))}\n{model.read_text()}")
    with log.open("w") as stream:
        server = subprocess.Popen(command, env=env, stdout=stream, stderr=stream)
    try:
        wait_until_ready(server, port, "/v2/health/ready", log)
        inputs = [
            {"name": "input_ids", "datatype": "INT64", "shape": [1, len(PROMPTS[0])], "data": PROMPTS[0]},
            {"name": "new_tokens", "datatype": "INT64", "shape": [1], "data": [NEW]},
        ]
        (output,) = answer(port, "/v2/models/llama/infer", {"inputs": inputs})["outputs"]
        assert output["shape"] == [1, NEW] and output["data"] == generated(small_model("llama"), PROMPTS[0])
    finally:
        server.terminate()
        server.wait(60)


# Transformers' own server, and continuous batching -------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_continuous_batching_generates_what_generate_does(family):
    model = small_model(family)
    settings = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": -1, "pad_token_id": 0}
    config = type(model.generation_config)(**settings)
    # By default the cache takes most of the memory that there is.
    few = ContinuousBatchingConfig(block_size=16, num_blocks=16, max_batch_tokens=64)
    prompts = [list(prompt) for prompt in PROMPTS]
    with torch.inference_mode(False), torch.no_grad():  # as users have it: its thread has its own mode
        found = model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=few)
    assert [output.error for output in found.values() if output.error] == []
    by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in found.values()}
    assert len(by_prompt) == len(PROMPTS)
    for prompt in PROMPTS:
        want = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
        assert by_prompt[tuple(prompt)] == want, prompt


PAGED = ("--continuous-batching", "--cb-block-size", "16", "--cb-num-blocks", "16", "--cb-max-batch-tokens", "64")
CLI = "import qops.integrations.transformers, transformers.cli.transformers as cli; cli.main()"


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), PAGED], ids=str)
def test_transformers_serve_answers_from_a_qops_folder(tmp_path, more):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from qops.integrations.transformers import config_for

    model = small_model("llama")
    qops.save_model(model, tmp_path / "model")
    config_for(tmp_path / "model").save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(72)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0").save_pretrained(tmp_path / "model")
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-c", CLI, "serve", str(tmp_path / "model"), "--port", str(port), "--host", "127.0.0.1"]
    with log.open("w") as stream:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
        server = subprocess.Popen([*command, "--device", "cpu", *more], env=env, stdout=stream, stderr=stream)
    try:
        wait_until_ready(server, port, "/health", log)
        prompt = PROMPTS[0]
        body = {"prompt": " ".join(f"w{i}" for i in prompt), "max_tokens": NEW, "temperature": 0}
        body |= {"model": str(tmp_path / "model")}
        text = answer(port, "/v1/completions", body)["choices"][0]["text"]
        want = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW)[0, len(prompt) :].tolist()
        assert [int(word[1:]) for word in text.split()] == [i for i in want if i not in (0, 2)], log.read_text()[-2000:]
    finally:
        server.terminate()
        server.wait(60)
