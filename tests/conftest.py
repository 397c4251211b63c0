from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from qops._native import _C
from tests.support.cuda import cuda_tools
from tests.support.cuda.cuda_backend import POLICIES, Backend, a_gpu, configure, the_emulator

# One fixed set of calls for every day; `--hypothesis-profile=thorough` draws new ones each time.
settings.register_profile(
    "short",
    max_examples=50,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
settings.register_profile("thorough", settings.get_profile("short"), max_examples=2000, derandomize=False)
settings.load_profile("short")


# Background jobs of a shell ignore Ctrl-C, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulator-sanitizers", default="", help="of the emulated operators, e.g. address,undefined; preload them too"
    )
    parser.addoption(
        "--emulator-tracer", action="store_true", help="the emulated operators report races, which fail the test"
    )
    parser.addoption(
        "--cuda-archs", default="8.0 9.0a", help="what the compiler gates build for (test_cuda_compile.py)"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Workers and what they start share the cores: threads that wait must not spin meanwhile."""
    threads = max(2, len(os.sched_getaffinity(0)) // len(specs))
    os.environ.update({"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(threads), **os.environ})


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Results and torch.empty() are filled with NaN (or an odd integer), so that an element no kernel writes shows."""
    _C.poison_outputs(True)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with torch.inference_mode():
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Sets torch's thread count inside a test and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def emulated(request) -> ModuleType:
    """The module that registers the CUDA operators as torch.ops.qops_emu, and sets the emulator."""
    option = request.config.getoption
    variant = "traced" if option("--emulator-tracer") else option("--emulator-sanitizers")
    path = cuda_tools.build_emulated_operators(variant)
    spec = importlib.util.spec_from_file_location("qops_emulated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def emulator(emulated) -> Iterator[Backend]:
    """The backend, with the options of the emulator put back behind the test."""
    yield Backend(torch.ops.qops_emu, "cpu")
    configure(emulated)


@pytest.fixture(autouse=True)
def no_races(request) -> Iterator[None]:
    """Of the emulated operators, where they are traced."""
    if not request.config.getoption("--emulator-tracer"):
        yield
        return
    traced = request.getfixturevalue("emulated")
    yield
    if traced.races_seen():
        pytest.fail("\n".join(line for line in traced.take_trace() if line.startswith("race")))


@pytest.fixture(params=[*POLICIES, "gpu"])
def each(request) -> Iterator[Backend]:
    """The emulator with each policy, and a GPU."""
    if request.param == "gpu":
        yield a_gpu()
        return
    emulated = request.getfixturevalue("emulated")
    emulated.configure(1, POLICIES[request.param], "")
    yield the_emulator()
    emulated.configure(1, POLICIES["prio"], "")


@pytest.fixture(params=["emulated", "gpu"])
def backend(request) -> Backend:
    """The emulator, and a GPU."""
    if request.param == "gpu":
        return a_gpu()
    request.getfixturevalue("emulated").configure(1, POLICIES["prio"], "")
    return the_emulator()
