"""What nvcc and ptxas make of the CUDA kernels; needs nvcc, no GPU.

The preset cuda-check is built with warnings, spills and local memory as errors; its report and its machine code are
then held against what is checked in.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cuda.sass.disassembly import kernels_of
from tests.support.cuda import cuda_tools
from tests.support.cuda.cuda_budgets import BUDGETS, KERNELS, budget, shape_of
from tests.support.cuda.cuda_tools import ROOT, checked
from tests.support.house import rules

pytestmark = pytest.mark.slow
BUILD = ROOT / "build/cuda-check"
OBJECTS = BUILD / "csrc/cuda/CMakeFiles/_C_cuda.dir"
MODULE = BUILD / "qops/_C_cuda.abi3.so"


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture."""

    instance: str
    arch: str  # "90a"
    registers: int
    shared_bytes: int

    @property
    def shape(self) -> str:
        return shape_of(self.instance)


@pytest.fixture(scope="module")
def compiled(log) -> list[Compiled]:
    entry = r"Compiling entry function '(\w+)' for 'sm_(\w+)'"
    used = r"Used (\d+) registers, used \d+ barriers(?:, (\d+) bytes smem)?"
    rows = re.findall(rf"{entry}(?:(?!Compiling entry)[\s\S])*?{used}", log)
    assert len(rows) == len(re.findall(entry, log)) > 0
    names = checked("c++filt", *(row[0] for row in rows)).splitlines()
    return [
        Compiled(name, arch, int(registers), int(shared or 0))
        for (_, arch, registers, shared), name in zip(rows, names, strict=True)
    ]


def occupancy(kernels: list[Compiled], folder: Path) -> list[int]:
    """Blocks that a multiprocessor holds, by NVIDIA's header."""
    program = folder / "occupancy"
    include = cuda_tools.require_cuda_include()
    checked("g++", "-O1", f"-I{include}", str(ROOT / "tests/support/cuda/occupancy.cpp"), "-o", str(program))
    text = ""
    for kernel in kernels:
        number = kernel.arch.rstrip("af")
        threads = budget(kernel.shape)["threads"]
        text += f"{number[:-1]} {number[-1]} {kernel.registers} {kernel.shared_bytes} {threads}\n"
    result = subprocess.run([str(program)], input=text, capture_output=True, text=True, check=True)
    return [int(line) for line in result.stdout.split()]


def planted(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """A source of its own, compiled as the preset compiles rms_norm.cu."""
    commands = json.loads((BUILD / "compile_commands.json").read_text())
    command = next(entry["command"] for entry in commands if entry["file"].endswith("rms_norm.cu"))
    words = [str(source) if word.endswith("rms_norm.cu") else word for word in shlex.split(command)]
    words[words.index("-o") + 1] = str(target)
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=BUILD)


# What the preset has to refuse. An array that is indexed at run time lives in memory; so many live values spill.
REFUSED = {
    "local memory": """
__global__ void kernel(int* x, int i) {
  int a[32];
  for (int k = 0; k < 32; ++k) a[(k * i) & 31] = x[k];
  x[i] = a[x[i] & 31];
}""",
    "spills": """
__global__ void __launch_bounds__(1024, 2) kernel(float* x) {
  float a[96];
#pragma unroll
  for (int k = 0; k < 96; ++k) a[k] = x[k * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 96; ++k) x[k * 1024 + threadIdx.x] = a[95 - k] * a[(k * 7) % 96];
}""",
    "a warning of nvcc": "__global__ void kernel(float* x) { int unused; x[0] = 1; }",
    "a warning of the host compiler": """
__global__ void kernel(float* x) { x[0] = 1; }
int host(int a, unsigned b) { return a < b; }""",
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_preset_refuses(log, what, tmp_path):
    source, fine = tmp_path / "planted.cu", tmp_path / "fine.cu"
    fine.write_text("__global__ void kernel(float* x) { x[0] = 1; }")
    source.write_text(REFUSED[what])
    for path in (fine, source):
        result = planted(path, tmp_path / "planted.o")
        assert (result.returncode == 0) == (path == fine), result.stderr


def test_nothing_is_ignored_or_injected(log):
    # Information of ptxas, no warning: a setmaxnreg that has no effect, a wait that serialises.
    assert re.findall(r".*C75\d\d.*", log) == []
    assert set(re.findall(r"(\d+) bytes spill", log)) == {"0"}
    assert set(re.findall(r"(\d+) bytes stack frame", log)) == {"0"}


def test_registers_shared_memory_and_occupancy_are_within_budget(compiled, tmp_path):
    """The budgets hold for every architecture and element type: registers as they are allocated, in eights."""
    assert {c.shape for c in compiled} >= set(KERNELS), "kernels are gone that have budgets"
    blocks = occupancy(compiled, tmp_path)
    measured: dict[str, dict[str, int]] = {}
    for c, resident in zip(compiled, blocks, strict=True):
        row = measured.setdefault(c.shape, {"registers": 0, "shared_bytes": 0, "threads_per_sm": 1 << 20})
        row["registers"] = max(row["registers"], -(-c.registers // 8) * 8)
        row["shared_bytes"] = max(row["shared_bytes"], c.shared_bytes)
        row["threads_per_sm"] = min(row["threads_per_sm"], resident * budget(c.shape)["threads"])
    over = {
        shape: row
        for shape, row in measured.items()
        if row["registers"] > budget(shape)["registers"]
        or row["shared_bytes"] > budget(shape)["shared_bytes"]
        or row["threads_per_sm"] < budget(shape)["threads_per_sm"]
    }
    assert not over, f"over {BUDGETS.name}: {json.dumps(over)}"


def test_launch_bounds_are_the_threads_that_are_launched(log):
    """Of the machine code: fewer, and the driver refuses the launch; more, and registers are kept for nobody."""
    found: dict[str, set[int | None]] = {}
    for path in sorted(OBJECTS.glob("*.cu.o")):
        dump = checked(str(cuda_tools.require_cuobjdump()), "-elf", str(path))
        sections = re.findall(r"^\.nv\.info\.(\S+)\n((?:(?!\.).*\n)*)", dump, flags=re.MULTILINE)
        if "__global__" not in (ROOT / "csrc/cuda" / path.stem).read_text():
            continue
        names = checked("c++filt", *(name for name, _ in sections)).splitlines()
        assert sections, path
        for name, (_, attributes) in zip(names, sections, strict=True):
            bounds = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(\w+) 0x1 0x1\b", attributes)
            found.setdefault(shape_of(name), set()).add(int(bounds[1], 16) if bounds else None)
    assert set(found) >= set(KERNELS) and found == {shape: {budget(shape)["threads"]} for shape in found}


CONTRACTIBLE = """
__global__ void kernel(float* x) { x[0] = x[1] * x[2] + x[3]; }
float host(const float* x) { return x[1] * x[2] + x[3]; }"""


def test_products_and_sums_are_rounded_one_by_one(log, tmp_path):
    """A contracted product and sum would round once where the contracts round twice."""
    commands = json.loads((BUILD / "compile_commands.json").read_text())
    sources = [entry["command"] for entry in commands if entry["file"].endswith(".cu")]
    assert len(sources) == len(list((ROOT / "csrc/cuda").glob("*.cu")))
    for command in sources:
        assert "-fmad=false" in shlex.split(command) and re.search(r"-Xcompiler=\S*-ffp-contract=off", command), command
        assert not re.search(r"fast.?math|-ftz=|-prec-", command), command
    (source := tmp_path / "planted.cu").write_text(CONTRACTIBLE)
    result = planted(source, tmp_path / "planted.o")
    assert result.returncode == 0, result.stderr
    sass = checked(str(cuda_tools.require_cuobjdump()), "-sass", str(tmp_path / "planted.o"))
    assert "FMUL" in sass and "FADD" in sass and "FFMA" not in sass


def test_the_number_of_gemm_kernels_is_within_budget(compiled):
    """120 for each architecture with those of int8 x int8, which are 10."""
    params = re.compile("WeightOnlyGemmParams|Int4Int8")
    for arch in {c.arch for c in compiled}:
        assert sum(c.arch == arch and params.search(c.instance) is not None for c in compiled) <= 110, arch


def machine_code(source: str) -> list[tuple[str, str]]:
    """Name and code of each kernel of a file, none of which may use local memory."""
    sass = checked(str(cuda_tools.require_cuobjdump()), "-sass", str(OBJECTS / f"{source}.o"))
    functions = re.split(r"\n\s*Function : (?=\S)", sass)[1:]
    names = checked("c++filt", *(function.split(maxsplit=1)[0] for function in functions)).splitlines()
    assert functions
    for name, code in zip(names, functions, strict=True):
        assert not re.search(r"\b(LDL|STL)\b", code), name
    return list(zip(names, functions, strict=True))


def test_packed_weights_move_16_bytes_at_a_time(log):
    for name, code in machine_code("weight_pack_int4.cu"):
        # Canonical words of 4 bytes on the other side; for sm_120 nvcc does not see that they are global.
        packed, words = ("STG", r"LDG?") if "pack_kernel<true>" in name else ("LDG", "STG")
        assert set(re.findall(rf"\b{packed}\.E\S*", code)) == {f"{packed}.E.128"}, name
        assert re.search(rf"\b{words}\.E ", code), name
    for name, code in machine_code("int4_dequantize.cu"):
        if "row_factor_kernel" in name:
            continue  # reads scales alone
        assert "LDG.E.128" in code and set(re.findall(r"\bSTG\.E\S*", code)) == {"STG.E.128"}, name


@pytest.mark.parametrize(("op", "prefix"), [("int4_gemm", ""), ("int8_weight_only_gemm", "int8_")])
def test_gemm_loops_hold_what_they_have_to(log, op, prefix):
    """Of kernels whose groups are whole blocks of 64 columns: the code of each loop from the first to the last mma. How
    many instructions there are is the budget's, tests/data/cuda_slots.json."""
    # The tiled kernel has a second loop that leaves out tiles of tokens.
    for kernel, copies_of_loop in (("decode", 1), ("tiled", 2)):
        loops = 0
        for name, code in machine_code(f"{op}_{kernel}.cu"):
            *sizes, is_fine, has_offset = re.search(
                rf"\b{prefix}{kernel}_kernel<\w+, (\d+), (?:(\d+), )?(\w+), (\w+)>", name
            ).groups()
            tile = int(sizes[0])
            tiles, strips = (
                (tile, int(sizes[1] or 2)) if kernel == "decode" else (tile // 8, 1) if tile <= 64 else (tile // 16, 2)
            )
            instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([\w.]+)", code, flags=re.MULTILINE)
            if tile == 128 and len(instructions) < 50:
                continue  # for an architecture on which it is not used
            mma = [i for i, instruction in enumerate(instructions) if instruction.startswith("HMMA.16816.F32")]
            # Each fragment of codes meets each tile of tokens, and so does that of ones.
            of_loop = 4 * tiles * (strips + (has_offset == "true"))
            assert len(mma) == of_loop * copies_of_loop, name
            copies = {instruction for instruction in instructions if instruction.startswith("LDGSTS")}
            assert copies == {"LDGSTS.E.BYPASS.128"}, f"{name}: {copies}"
            if is_fine == "true":
                continue
            for index in range(copies_of_loop):
                first, last = mma[index * of_loop], mma[(index + 1) * of_loop - 1]
                loop = [instruction.split(".")[0] for instruction in instructions[first : last + 1]]
                assert loop.count("HMMA") == of_loop, name
                # Rows of x for codes of 8 bits are read by 8 bytes a lane: LDSM has no such order.
                assert loop.count("LDSM") <= (2 * tiles if op == "int4_gemm" else 0), name
                assert not {"I2F", "F2F", "F2FP", "LDG", "DADD", "BAR"} & set(loop), name
                loops += 1
        assert loops > 0


def test_dependent_kernels_wait_before_they_touch_global_memory(log):
    """Of griddepcontrol's two instructions machine code makes PREEXIT and ACQBULK."""
    waiting = 0
    for kernel in kernels_of(sorted(OBJECTS.glob("int*_gemm*.cu.o"))):
        instructions = [i.name for i in kernel.code]
        if len(instructions) < 50:
            continue  # for an architecture on which it is not used
        is_product = re.search(r"\b((int8_)?(decode|tiled)|int8_gemm|int4_int8_gemm)_kernel<", kernel.name) is not None
        adds = re.search(r"\b(finish|int8_gemm_add|int4_int8_add)_kernel\b", kernel.name) is not None
        is_new = int(kernel.arch.rstrip("af")) >= 90
        where = f"{kernel.name}, sm_{kernel.arch}"
        assert ("PREEXIT" in instructions) == (is_product and is_new), where
        assert ("ACQBULK" in instructions) == (adds and is_new), where
        if adds and is_new:
            before = set(instructions[: instructions.index("ACQBULK")])
            assert not before & {"LD", "LDG", "ST", "STG", "LDGSTS", "RED", "ATOM", "ATOMG", "EXIT"}, where
            waiting += 1
    assert waiting >= 5


def test_norms_move_16_bytes_at_a_time(log):
    wide_stores = 0
    for name, code in machine_code("rms_norm.cu"):
        element, is_aligned, is_int8 = re.search(
            r"norm_kernel<(\w+), .*RowShape<\d+, \d+, (true|false)>, (true|false)>", name
        ).groups()
        if is_aligned == "false":
            continue
        # A vector of eight 16-bit elements or half of one of float32; eight codes take 8 bytes.
        assert "LDG.E.128" in code, f"{element}: {name}"
        assert ("STG.E.64" if is_int8 == "true" else "STG.E.128") in code, name
        wide_stores += 1
    assert wide_stores > 0


def test_int8_gemm_multiplies_on_tensor_cores_from_a_ring(log):
    sass = checked(str(cuda_tools.require_cuobjdump()), "-sass", str(OBJECTS / "int8_gemm_tiled.cu.o"))
    functions = re.split(r"\n\s*Function : (?=\S)", sass)[1:]
    names = checked("c++filt", *(function.split(maxsplit=1)[0] for function in functions)).splitlines()
    found = 0
    for name, code in zip(names, functions, strict=True):
        assert not re.search(r"\b(LDL|STL)\b", code), name
        instance = re.search(r"int8_gemm_kernel<(\d+), (true|false)>", name)
        if not instance:
            continue
        # Of one block of 64 columns: two fragments of each strip of a warp by its tiles of eight tokens; from 64 tokens
        # on, without zero points, in a loop for full tiles and in one for others. With zero points there is more to
        # multiply, four columns at a time. Both operands come past L1, 16 bytes at a time.
        products = {"8": 2, "16": 4, "32": 8, "64": 32, "128": 64}[instance[1]]
        loops = 2 if int(instance[1]) >= 64 and instance[2] == "false" else 1
        assert len(re.findall(r"\bIMMA\.16832\.S8\.S8\b", code)) == loops * products, name
        assert bool(re.search(r"\bIDP\.4A\.S8\.S8\b", code)) == (instance[2] == "true"), name
        assert "LDGSTS.E.BYPASS.128" in code and "LDSM.16.M88" in code and "LDS.128" in code, name
        found += 1
    assert found > 0 and found % 10 == 0


def test_the_module_needs_what_every_torch_with_cuda_has(log):
    listed = (ROOT / "tests/data/torch_2_11_symbols.txt").read_text().split()
    undefined = checked("nm", "--dynamic", "--undefined-only", str(MODULE))
    assert rules.foreign_symbols(undefined, [*listed, "aoti_torch_get_current_cuda_stream"]) == []
    dynamic = checked("readelf", "--dynamic", str(MODULE))
    assert re.findall(r"\[(lib(?:torch|cud|c10)\w*\.so[.\d]*)\]", dynamic) == ["libtorch_cpu.so", "libtorch_cuda.so"]
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    # Its CUDA runtime is its own: a process that has loaded another must not take these calls.
    exported = checked("nm", "--dynamic", "--defined-only", str(MODULE))
    assert not re.search(r"\bcuda[A-Z]\w+$", exported, flags=re.MULTILINE)
    assert "PyInit__C_cuda" in exported
