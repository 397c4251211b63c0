"""tests/emulator on its own: kernels that must never raise an alarm, planted bugs that must be caught, PTX, layouts."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.cuda import cuda_tools
from tests.support.cuda.cuda_tools import ARCHITECTURES, EMULATOR, ROOT, build_emulator, checked

POLICIES = ("fifo", "random", "prio")
PTX = (ROOT / "csrc/cuda/ptx.cuh").read_text()
PTX_EMU = (EMULATOR / "ptx/ptx_emu.h").read_text()
README = (EMULATOR / "README.md").read_text()


@pytest.fixture(scope="session")
def plain() -> Path:
    return build_emulator() / "emulator_tests"


@pytest.fixture(scope="session")
def sanitized() -> Path:
    return build_emulator("address,undefined") / "emulator_tests"


@dataclass(frozen=True)
class Run:
    case: str
    policy: str
    seed: int
    outcome: str
    message: str


def run_cases(
    program: Path, seeds: int, *cases: str, policies: tuple[str, ...] = POLICIES, without: str = ""
) -> tuple[list[Run], str]:
    """Every run of every case, and what a sanitizer had to say where it ended the process."""
    verb = ["without", without] if without else ["run"]
    command = [str(program), *verb, f"0:{seeds}", ",".join(policies), *cases]
    # Kernels of an abandoned launch leave what they hold.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    environment.pop("LD_PRELOAD", None)
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, errors="replace")
    runs = []
    for line in result.stdout.splitlines():
        case, policy, seed, *rest = line.split(" ", maxsplit=4)
        runs.append(Run(case, policy, int(seed), *([*rest, "", ""] if rest else ["ended", ""])[:2]))
    assert result.returncode == 0 or runs, f"{command}: {result.stderr}"
    return runs, result.stderr if result.returncode else ""


def cases_of(program: Path, kind: str) -> list[str]:
    lines = checked(str(program), "list").splitlines()
    return [name for line in lines for this, name in [line.split()] if this == kind]


# --- sound kernels ---------------------------------------------------------------------------------------------------


def assert_no_alarm(program: Path, seeds: int) -> None:
    cases = cases_of(program, "sound")
    assert len(cases) >= 10
    runs, report = run_cases(program, seeds, *cases)
    assert not report, report
    assert [run for run in runs if run.outcome != "ok"] == []
    assert Counter(run.case for run in runs) == dict.fromkeys(cases, seeds * len(POLICIES))


def test_sound_kernels_raise_no_alarm(plain):
    assert_no_alarm(plain, seeds=2 * SEEDS)


@pytest.mark.slow
def test_sound_kernels_raise_no_alarm_under_sanitizers(sanitized):
    assert_no_alarm(sanitized, SEEDS)


def test_a_seed_and_a_policy_replay_a_run(plain):
    case = "split_sum_missing_barrier"  # wrong in some runs alone
    first, _ = run_cases(plain, 20, case)
    again, _ = run_cases(plain, 20, case)
    assert first == again
    assert {run.outcome for run in first} == {"ok", "wrong"}


# --- planted bugs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Caught:
    """How a bug shows: by a fault whose message matches, by a wrong result, or in a sanitizer's report."""

    fault: str = ""
    wrong: bool = False
    sanitizer: str = ""
    always: bool = True  # in every run, or else in some of SEEDS seeds under some policy
    race: bool = False  # in the tracer's build alone: test_tracer.py


SEEDS = 10
OVERFLOW = "AddressSanitizer: heap-buffer-overflow"
GUARD = "AddressSanitizer: use-after-poison"

PLANTED = {
    "row_sums_missing_barrier": Caught(wrong=True),
    "row_sums_missing_reuse_barrier": Caught(wrong=True, always=False),
    "row_sums_barrier_in_branch": Caught(fault=r"divergent collective: .* __syncthreads .*: another place"),
    "row_sums_shuffle_in_branch": Caught(fault=r"divergent collective: .* __shfl_xor_sync"),
    "row_sums_lane_outside_mask": Caught(fault=r"lane 31(,| calls it) .* the mask 0x7fffffff"),
    "row_sums_width_not_power_of_two": Caught(fault=r"width must be a power of two up to 32, got 24"),
    "row_sums_vector_past_end": Caught(sanitizer=OVERFLOW),
    "row_sums_misaligned_vectors": Caught(sanitizer=r"misaligned address .* for type 'const struct float4'"),
    "transpose_missing_barrier": Caught(wrong=True),
    "transpose_row_past_end": Caught(sanitizer=OVERFLOW),
    "transpose_unpadded_tile": Caught(fault=r"has written to offset \d+ of float\[.*, which has 4096 bytes"),
    "transpose_static_past_limit": Caught(fault=r"53376 bytes of static shared memory: 49152 are possible"),
    "scan_no_bound": Caught(wrong=True),
    "scan_missing_barrier": Caught(wrong=True, always=False),
    "scan_divergent_collective": Caught(fault=r"divergent collective: .*__(ballot|shfl)_sync.*another collective"),
    "scan_reads_exited_lane": Caught(fault=r"reads lane 31, which has exited"),
    "split_sum_missing_barrier": Caught(wrong=True, always=False),
    "split_sum_missing_flag_barrier": Caught(sanitizer="load of value 255, which is not a valid value for type 'bool'"),
    "split_sum_counter_not_reset": Caught(wrong=True),
    "split_sum_one_early": Caught(wrong=True),
    "split_sum_waits_for_all_blocks": Caught(
        fault=r"hangs: no thread has ended in \d+ switches.*warp 0: lane 0 can run;"
    ),
    "dependent_no_wait": Caught(fault="the end of the thread comes before griddepcontrol.wait"),
    "dependent_idle_threads_leave": Caught(
        fault=r"thread \((4\d|5\d|6[0-3]),0,0\): the end of the thread comes before"
    ),
    "dependent_reads_before": Caught(race=True),
    "dependent_loads_before": Caught(
        fault="ld.global.nc comes before griddepcontrol.wait, in a kernel that depends on"
    ),
    "dependent_writes_before": Caught(fault="st.global.cs comes before griddepcontrol.wait"),
    "handoff_no_wait_for_empty": Caught(fault="deadlock", always=False),
    "handoff_no_arrival": Caught(fault=r"deadlock: .*warp 1: all waiting in bar.sync \(barrier 1, 64 threads\)"),
    "handoff_counts_differ": Caught(fault=r"barrier 1 expects \d+ threads here, and \d+ at handoff.cuh:\d+"),
    "handoff_count_too_large": Caught(fault="bar.arrive: waits for 128 threads, the block has 96"),
    "handoff_count_not_warps": Caught(fault="must be a multiple of 32, got 48"),
    "handoff_seventeenth_barrier": Caught(fault="a block has barriers 0 to 15, got 16"),
    "pipeline_waits_too_little": Caught(fault="the thread exits with 1 copies in flight"),
    "pipeline_missing_barrier": Caught(wrong=True),
    "pipeline_refills_stage_being_read": Caught(wrong=True),
    "pipeline_missing_commit": Caught(fault="the thread exits with 6 copies in flight"),
    "pipeline_no_final_wait": Caught(fault=r"the thread exits with \d+ copies in flight"),
    "pipeline_tail_read_whole": Caught(sanitizer=OVERFLOW),
    "pipeline_tail_size_too_large": Caught(fault="cp.async: reads 32 bytes to write 16"),
    "pipeline_misaligned_source": Caught(fault="cp.async: the address .* must be a multiple of 16"),
    "pipeline_misaligned_destination": Caught(fault="cp.async: the shared address .* must be a multiple of 16"),
    "pipeline_writes_source": Caught(fault="its source has changed while it was in flight"),
    "pipeline_writes_destination": Caught(fault="its destination was written while it was in flight"),
    "gemm_missing_barrier": Caught(wrong=True, always=False),
    "gemm_registers_swapped": Caught(wrong=True),
    "gemm_unswizzled_read": Caught(wrong=True),
    "gemm_mma_in_branch": Caught(fault=r"divergent collective: .*mma.m16n8k16.f16"),
    "gemm_place_of_mma_differs": Caught(fault=r"divergent collective: .*another place"),
    "gemm_misaligned_matrix": Caught(fault=r"ldmatrix.x4: the shared address 0x\w+8 must be a multiple of 16"),
    "gemm_matrix_past_end": Caught(fault=r"ldmatrix.x4: 0x\w+ is not in the block's shared memory"),
    "gemm_row_past_end": Caught(sanitizer=OVERFLOW),
    "dequantize_wrong_mask": Caught(wrong=True),
    "dequantize_wrong_table": Caught(wrong=True),
    "dequantize_wrong_selector": Caught(wrong=True),
    "flip_missing_syncwarp": Caught(wrong=True),
    "flip_missing_last_syncwarp": Caught(wrong=True),
    "flip_not_transposed": Caught(wrong=True),
    "flip_on_sm_80": Caught(fault="stmatrix.x4 needs sm_90, this is sm_80"),
    "launch_1025_threads": Caught(fault=r"a block of \(1025,1,1\) threads: 1 to 1024"),
    "launch_grid_too_high": Caught(fault=r"a grid of \(1,65536,1\) blocks"),
    "launch_shared_past_sm_80": Caught(fault="166913 bytes of shared memory: sm_80 has 166912"),
    "attribute_of_dependence_on_sm_89": Caught(fault="a dependent launch needs sm_90, this is sm_89"),
    "attribute_of_no_such_launch": Caught(fault=r"cudaLaunchKernelEx: no attribute \d+ here"),
    "limit_past_sm_89": Caught(fault="101377 bytes of dynamic shared memory: beside 0 static ones sm_89 has 101376"),
    "limit_past_sm_90": Caught(fault="232449 bytes of dynamic shared memory: beside 0 static ones sm_90 has 232448"),
    "limit_missing": Caught(fault=r"49153 bytes of dynamic shared memory: 49152 are allowed \(cudaFuncSetAttribute\)"),
    "limit_of_another_gpu": Caught(fault="102400 bytes of dynamic shared memory: 49152 are allowed"),
    "limit_lowered": Caught(fault="lowers a limit from 204800 to 102400 bytes"),
    "limit_without_room_for_static_memory": Caught(
        fault="232448 bytes of dynamic shared memory( were allowed|: beside 1024 static ones sm_90 has 231424)"
    ),
    "stream_of_nobody": Caught(fault=r"a launch on stream \S+: the caller's on this GPU is 0x57\w+"),
    "stream_of_another_gpu": Caught(fault=r"a launch on stream 0x57\w+: the caller's on this GPU is 0x57\w+"),
    "capture_default_stream": Caught(fault="a launch on the default stream: another one is being captured"),
    "capture_malloc": Caught(fault="cudaMalloc: a stream is being captured"),
    "capture_free": Caught(fault="cudaFree: a stream is being captured"),
    "capture_synchronise_stream": Caught(fault="cudaStreamSynchronize: a stream is being captured"),
    "capture_synchronise_device": Caught(fault="cudaDeviceSynchronize: a stream is being captured"),
    "launch_shared_past_sm_120": Caught(fault="102400 bytes of shared memory: sm_120 has 101376"),
    "shared_one_past_end": Caught(fault="to offset 33 of the dynamic shared memory, which has 33 bytes"),
    "shared_one_before": Caught(fault="to offset -1 of the dynamic shared memory, which has 33 bytes"),
    "loads_shared_as_global": Caught(fault="ld.global.nc: the address .* is in shared memory"),
    "hint_without_policy": Caught(fault="0x0 is no cache policy"),
    "setmaxnreg_by_half_a_warp": Caught(fault=r"setmaxnreg.inc: (needs all 32 lanes|a lane exits)"),
}


# No schedule is at fault.
OF_A_LAUNCH = ("limit_", "stream_", "capture_", "attribute_")


def test_every_planted_bug_is_in_the_table(plain):
    assert sorted(cases_of(plain, "planted")) == sorted(PLANTED)
    assert len(PLANTED) >= 20


def is_caught(run: Run, how: Caught) -> bool:
    if how.wrong:
        return run.outcome == "wrong"
    return run.outcome == "fault" and re.search(how.fault, run.message) is not None


@pytest.mark.parametrize("bug", [name for name, how in PLANTED.items() if not (how.sanitizer or how.race)])
def test_planted_bug_is_caught(plain, bug):
    how = PLANTED[bug]
    runs, report = run_cases(plain, SEEDS, bug)
    assert not report and len(runs) == SEEDS * len(POLICIES)
    missed = [run for run in runs if not is_caught(run, how)]
    if how.always:
        assert not missed
    else:
        assert len(missed) < len(runs)
    for run in runs:
        if run.outcome == "fault" and not bug.startswith(OF_A_LAUNCH):
            assert f"[seed {run.seed}, policy {run.policy}]" in run.message


@pytest.mark.slow
@pytest.mark.parametrize("bug", [name for name, how in PLANTED.items() if how.sanitizer])
@pytest.mark.parametrize("policy", POLICIES)
def test_planted_bug_is_caught_by_sanitizers(sanitized, bug, policy):
    _, report = run_cases(sanitized, SEEDS, bug, policies=(policy,))
    assert re.search(PLANTED[bug].sanitizer, report), report
    assert any(bug.startswith(path.stem) and path.stem in report for path in EMULATOR.glob("cases/kernels/*.cuh"))


@pytest.mark.slow
def test_sanitizers_change_no_schedule(plain, sanitized):
    """Faults pass a sanitized build's fibers as they do a plain one's, and its runs replay those of the plain one."""
    stopped = (
        "transpose_unpadded_tile",
        "shared_one_past_end",
        "shared_one_before",
    )  # by a sanitizer, before the fault
    bugs = [name for name, how in PLANTED.items() if not how.sanitizer and name not in stopped]
    runs, report = run_cases(sanitized, 2, *bugs)
    assert not report, report
    outcomes = [(run.case, run.policy, run.seed, run.outcome) for run in runs]
    assert outcomes == [(run.case, run.policy, run.seed, run.outcome) for run in run_cases(plain, 2, *bugs)[0]]


@pytest.mark.slow
@pytest.mark.parametrize("bug", ["shared_one_past_end", "shared_one_before"])
def test_sanitizers_see_the_guards_of_shared_memory(sanitized, bug):
    assert GUARD in run_cases(sanitized, 1, bug)[1]


def test_every_synchronisation_is_needed(plain):
    """Sound kernels with one barrier, wait, commit or arrival left out at a time: each must be missed in some run."""
    cases = cases_of(plain, "sound")
    unnoticed, places = [], set()
    for case in cases:
        lines = checked(str(plain), "synchronisations", case).splitlines()
        for place in [line.split()[0] for line in lines if ".cuh:" in line]:
            places.add(place)
            runs, _ = run_cases(plain, SEEDS, case, without=place)
            if all(run.outcome == "ok" for run in runs):
                unnoticed.append((case, place))
    assert not unnoticed
    assert len(places) >= 25


# --- the README ------------------------------------------------------------------------------------------------------


def test_readme_counts_what_is_there(plain):
    sound = len(cases_of(plain, "sound"))
    text = " ".join(README.split())
    assert f"{len(PLANTED)} planted bugs" in text and f"the {sound} sound kernels" in text
    assert f"{len(PLANTED)} planted bugs" in " ".join((ROOT / "CHANGELOG.md").read_text().split())


def test_readme_example_runs(plain, tmp_path):
    """As by somebody who takes the emulator along: against its library, with the flags of the README."""
    example = re.search(r"```cpp\n(.*?)```", README, flags=re.DOTALL)[1]
    kernel, _, use = example.partition("emu::options()")
    source = tmp_path / "example.cpp"
    source.write_text(
        f"#include <vector>\n{kernel}"
        "int main() {\n"
        "  std::vector<float> from(256), to(256, -1.0f);\n"
        "  for (int i = 0; i < 256; ++i) from[i] = i;\n"
        "  const float* x = from.data();\n  float* y = to.data();\n  cudaStream_t stream{};\n"
        f"  emu::options(){use}"
        "  for (int i = 0; i < 256; ++i) {\n    if (to[i] != 255 - i) return 1;\n  }\n}\n"
    )
    flags = re.search(r"take `(-std=[^`]*)`", README)[1].split()
    include = ["-I", str(ROOT / "csrc"), "-I", str(ROOT / "tests"), "-isystem", str(cuda_tools.require_cuda_include())]
    program = tmp_path / "example"
    checked("g++", *flags, *include, str(source), str(plain.parent / "libemulator.a"), "-o", str(program))
    checked(str(program))


# --- PTX -------------------------------------------------------------------------------------------------------------


def declarations(header: str) -> list[str]:
    """Return type, name, parameters and constraint of every function, in the order of the file."""
    code = re.sub(r"//[^\n]*|#[^\n]*", "", header)
    code = re.sub(r"__device__ __forceinline__|,?\s*Site at = Site::current\(\)", "", code)
    code = " ".join(code.split())
    found = re.findall(
        r"((?:template <[^>]*> requires\([^{;]*?\) )?(?:void|u?int\d+_t|uint[24]) \w+\([^;{]*\)) ?(?:;|\{)", code
    )
    return [declaration.strip() for declaration in found]


def test_ptx_and_its_emulation_declare_the_same():
    shared_by_templates = {"cp_async", "set_max_registers"}
    ours = declarations(PTX)
    emulated = [d for d in declarations(PTX_EMU) if not re.search(rf" ({'|'.join(shared_by_templates)})\(", d)]
    assert len(ours) >= 45
    assert emulated == ours


def test_comparison_of_declarations_can_fail():
    one = "__device__ __forceinline__ void f(uint32_t shared) { asm(); }"
    assert declarations(one) == declarations("void f(uint32_t shared, Site at = Site::current());")
    assert declarations(one) != declarations("void f(int shared, Site at = Site::current());")
    assert declarations(one) != declarations("void g(uint32_t shared, Site at = Site::current());")
    constrained = "template <int k>\n  requires(k >= 0 && k <= 255)\n__device__ __forceinline__ uint4 f(int a) {"
    assert declarations(constrained) == ["template <int k> requires(k >= 0 && k <= 255) uint4 f(int a)"]


def test_every_ptx_function_is_documented_assembled_and_run():
    instances = (EMULATOR / "cases/ptx_instances.cu").read_text()
    kernels = "".join(path.read_text() for path in EMULATOR.glob("cases/kernels/*.cuh"))
    names = {re.search(r"(\w+)\([^()]*(?:\([^()]*\)[^()]*)*\)$", d)[1] for d in declarations(PTX)}
    assert {"ldmatrix_x4", "st_cs", "cp_async_wait", "setmaxnreg_inc"} <= names
    for name in names:
        assert re.search(rf"\bptx::{name}\b", instances), f"{name} is not in ptx_instances.cu"
        assert re.search(rf"\bptx::{name}\b", kernels), f"no kernel of the emulator's tests uses {name}"
        # Instruction and architecture stand in the comment above the function.
        comment = re.search(rf"// ([^\n]*)\n(?:template [^\n]*\n  requires[^\n]*\n)?__device__[^\n]* {name}\(", PTX)
        assert comment and re.match(r"[a-z].*sm_\d+", comment[1]), name


def compile_with_nvcc(source: str, target: Path, architectures: tuple[str, ...]) -> None:
    nvcc = str(cuda_tools.require_nvcc())
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]
    command = [nvcc, "-std=c++20", "-Werror", "all-warnings", *include, *targets, "-c", "-o", str(target), source]
    checked(*command)


def test_every_ptx_function_assembles_for_every_architecture(tmp_path):
    compile_with_nvcc(str(EMULATOR / "cases/ptx_instances.cu"), tmp_path / "ptx.o", ARCHITECTURES)


def test_emulated_kernels_compile_with_nvcc(tmp_path):
    compile_with_nvcc(str(EMULATOR / "cases/kernels.cu"), tmp_path / "kernels.o", ("80", "90a"))


@pytest.mark.slow
def test_the_cases_compile_for_a_gpu(tmp_path):
    """test_cuda_gpu.py runs them where there is one."""
    program = cuda_tools.build_hardware_tests(tmp_path)
    result = subprocess.run([str(program), "1"], capture_output=True, text=True, check=False)
    assert re.search(r"^\d+ runs, \d+ wrong$", result.stdout, flags=re.MULTILINE), result.stderr


REFUSALS = """
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
template <int k> concept Copies = requires { qops::ptx::cp_async_ca<k>(0u, nullptr); };
template <int k> concept Waits = requires { qops::ptx::cp_async_wait<k>(); };
template <int k> concept Looks = requires { qops::ptx::lop3<k>(0u, 0u, 0u); };
template <int k> concept Grows = requires { qops::ptx::setmaxnreg_inc<k>(); };
template <int k> concept Shrinks = requires { qops::ptx::setmaxnreg_dec<k>(); };
static_assert(Copies<4> && Copies<8> && Copies<16> && !Copies<2> && !Copies<12> && !Copies<32>);
static_assert(Waits<0> && Waits<7> && !Waits<-1>);
static_assert(Looks<0> && Looks<255> && !Looks<-1> && !Looks<256>);
static_assert(Grows<24> && Grows<256> && !Grows<16> && !Grows<257> && !Grows<100>);
static_assert(Shrinks<24> && Shrinks<256> && !Shrinks<16> && !Shrinks<257> && !Shrinks<100>);
void kernel(float);
template <class Stream> concept Launches = requires(Stream s) { qops::cuda::launch(kernel, 1, 1, 0, s, 1.0f); };
static_assert(Launches<cudaStream_t> && !Launches<std::nullptr_t> && !Launches<int>);
"""


def test_refusals_of_the_compiler(tmp_path):
    """Immediates that ptxas refuses, a literal for a stream: what must not compile does not."""
    source = tmp_path / "refusals.cpp"
    source.write_text(REFUSALS)
    include = ["-I", str(ROOT / "csrc"), "-I", str(ROOT / "tests"), "-isystem", str(cuda_tools.require_cuda_include())]
    checked("g++", "-std=c++20", "-fsyntax-only", *include, str(source))


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_fragment_layouts_are_those_of_cute(tmp_path):
    includes = cuda_tools.cute_includes()
    if includes is None:
        pytest.skip("needs `pip install nvidia-cutlass`, and cuda/std of a toolkit or of nvidia-cuda-cccl")
    program = tmp_path / "oracle"
    folders = [argument for folder in [cuda_tools.cuda_include(), *includes] for argument in ("-isystem", str(folder))]
    checked(
        "g++",
        "-std=c++17",
        "-I",
        str(ROOT / "tests"),
        *folders,
        str(EMULATOR / "cases/cute_oracle.cpp"),
        "-o",
        str(program),
    )
    lines = checked(str(program)).splitlines()
    found = [re.fullmatch(r"(.*) (\d+) compared (\d+) mismatches", line) for line in lines]
    mismatches = {match[1]: int(match[3]) for match in found}
    assert len(mismatches) == 22 and all(int(match[2]) >= 64 for match in found)
    assert mismatches.pop("deliberately wrong") > 0
    assert set(mismatches.values()) == {0}, mismatches
