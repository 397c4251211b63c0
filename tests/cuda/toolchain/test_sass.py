"""The stopwatch of tests/cuda/sass on planted code: written by hand, and made by nvcc where there is one."""

from __future__ import annotations

import ast
import itertools
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.sass import kernels, machine
from tests.cuda.sass.count import Work, guess, measure, steady
from tests.cuda.sass.disassembly import Control, Kernel, control_of, functions_of, instructions_of, kernels_of
from tests.cuda.sass.flow import Flow, Goal, NoPath, are_opposite
from tests.support.cuda import cuda_tools
from tests.support.cuda.cuda_tools import ROOT

PRINTED = """
\tcode for sm_80

\t\tFunction : _Z6kernelPf
\t.headerflags\t@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;        /* 0x00000a00ff017624 */
                                                                                  /* 0x000fe400078e00ff */
        /*0010*/                   I2F.U32.RP R0, c[0x0][0x2d4] ;                 /* 0x0000b50000007b06 */
                                                                                  /* 0x000e620000209000 */
        /*0020*/                   MUFU.RCP R0, R0 ;                              /* 0x0000000000007308 */
                                                                                  /* 0x002e660000001000 */
        /*0030*/              @!PT LDS RZ, [RZ] ;                                 /* 0x00000000fffff984 */
                                                                                  /* 0x000fe20000000800 */
        /*0040*/              @!P0 BRA P1, 0x20 ;                                 /* 0x0000000000007947 */
                                                                                  /* 0x000fea0003800000 */
        /*0050*/                   EXIT ;                                         /* 0x000000000000794d */
                                                                                  /* 0x000fea0003800000 */
\t\t..........
"""


def assembled(*lines: str) -> str:
    """Lines of code as cuobjdump prints them. `name:` is a label; branches and calls name one; [n] are stall cycles."""
    places: dict[str, int] = {}
    code = [line for line in lines if not line.endswith(":")]
    at = 0
    for line in lines:
        if line.endswith(":"):
            places[line[:-1]] = 16 * at
        else:
            at += 1
    text = ""
    for i, line in enumerate(code):
        stall = re.match(r"\[(\d+)\] ", line)
        line = line[stall.end() :] if stall else line
        line = re.sub(r"\b[a-z]+$", lambda found: hex(places[found[0]]), line)
        # No barrier is released or waited for.
        high = (0x7F << 4 | 1 << 4 | int(stall[1] if stall else 1)) << 41
        text += f"        /*{16 * i:04x}*/   {line} ;   /* 0x{i:016x} */\n       /* 0x{high:016x} */\n"
    return text


def flow_of(*lines: str, arch: str = "90a", tables: bytes = b"") -> Flow:
    return Flow(Kernel("planted", arch, instructions_of(assembled(*lines)), tables=tables, name="planted"))


def slots(flow: Flow, goal: Goal, in_loop: bool = True) -> int:
    return steady(flow, goal, in_loop).slots


# --- the printed text ------------------------------------------------------------------------------------------------


def test_instructions_are_read_with_their_control_codes():
    ((symbol, code),) = functions_of(PRINTED)
    assert symbol == "_Z6kernelPf" and [i.address for i in code] == [0, 16, 32, 48, 64, 80]
    move, convert, reciprocal, never, branch, leave = code
    assert (move.opcode, move.name, move.operands) == ("IMAD.MOV.U32", "IMAD", "R1, RZ, RZ, c[0x0][0x28]")
    assert move.control == Control(2, False, None, None, 0, 0)
    # What takes a number of cycles that is not known releases a barrier, for which who reads its result waits.
    assert convert.control == Control(1, False, 1, None, 0, 0)
    assert reciprocal.control == Control(3, False, 1, None, 0b10, 0)
    assert never.name == "NOP"
    assert (branch.guard, branch.target, branch.is_conditional) == ("@!P0", 0x20, True)
    assert leave.name == "EXIT" and not leave.is_conditional


def test_control_codes_yield_read_and_reuse():
    assert control_of(1 << 41 + 17 + 1 | 2 << 41 + 8 | 7 << 41 + 5 | 15 << 41) == Control(15, True, None, 2, 0, 2)


def test_registers_are_no_conditions():
    back, table, apart, taken = instructions_of(
        assembled("RET.REL.NODEC R34 0x0", "BRX R6 -0x50", "BRA.DIV UR4, 0x10", "BRA 0x10")
    )
    assert [i.is_conditional for i in (back, table, apart, taken)] == [False, False, True, False]
    assert table.target is None and apart.target == 0x10


# --- paths -----------------------------------------------------------------------------------------------------------

LOOP = (
    "MOV R1, R2",
    "loop:",
    "LDGSTS.E.BYPASS.128 [R4], [R2.64]",
    "LDS.128 R8, [R4]",
    "[4] LOP3.LUT R5, R6, 0xf, RZ, 0xc0, !PT",
    "[4] FFMA R1, R2, R3, R1",
    "[6] FFMA R1, R2, R3, R1",
    "IMAD R1, R2, R3, R1",
    "MUFU.EX2 R1, R1",
    "HMMA.16816.F32.BF16 R8, R4, R6, R8",
    "UIADD3 UR4, UR4, 0x1, URZ",
    "@P0 BRA loop",
    "EXIT",
)


def test_a_loop_is_counted_by_pipe():
    flow = flow_of(*LOOP)
    count = measure(flow.kernel, Work("a turn", ((1, Goal()),)), flow)
    assert count.slots == 10 and count.stalls == 21
    want = {"lsu": 2, "alu": 1, "fma": 2, "imad": 1, "xu": 1, "tensor": 1, "uniform": 1, "control": 1}
    assert count.pipes == want
    cycles = {"issue": 2.5, "lsu": 2, "alu": 0.5, "fma": 0.75, "imad": 0.5, "xu": 2, "shared": 8, "tensor": 2048 / 1270}
    assert count.cycles == pytest.approx(cycles) and count.bound == "shared"
    # Warps that share a unit, units that a path does, bytes.
    work = Work("some", ((1, Goal()),), units=2, warps=4, dram=1300, l2=240)
    count = measure(flow.kernel, work, flow)
    assert count.slots == 20 and count.stalls == 10.5 and count.bound == "dram"
    assert count.cycles["l2"] == 10 and count.cycles["dram"] == pytest.approx(1300 / 13, rel=0.01)


def test_paths_have_shares():
    flow = flow_of(
        "loop:", "HMMA.16816.F32 R8, R4, R6, R8", "@P1 BRA on", *["FADD R1, R1, R2"] * 4, "on:", "@P0 BRA loop"
    )
    work = Work("a turn", ((0.75, Goal()), (0.25, Goal(most=("FADD",)))))
    count = measure(flow.kernel, work, flow)
    assert count.slots == 0.75 * 3 + 0.25 * 7 and count.stalls == count.slots and count.opcodes["FADD"] == 1


def test_a_branch_around_a_rare_block_is_taken():
    flow = flow_of(
        "loop:", "HMMA.16816.F32 R8, R4, R6, R8", "@!P1 BRA on", *["FADD R1, R1, R2"] * 9, "on:", "@P0 BRA loop", "EXIT"
    )
    assert slots(flow, Goal()) == 3
    assert slots(flow, Goal(most=("FADD",))) == slots(flow, Goal(most=(), least={"FADD": 4})) == 12


def test_a_predicated_instruction_takes_its_slot():
    flow = flow_of("loop:", "@P1 HMMA.16816.F32 R8, R4, R6, R8", "@P2 FADD R1, R1, R2", "@P0 BRA loop", "EXIT")
    assert slots(flow, Goal()) == 3


def test_of_two_opposite_instructions_one_executes():
    pair = ("@P1 LDGSTS.E.128 [R4], [R2.64]", "@!P1 LDGSTS.E.128 [R4], [R6.64]")
    flow = flow_of("loop:", *pair, "@P2 LDGSTS.E.128 [R5], [R2.64]", "@P0 BRA loop", "EXIT")
    path = steady(flow, Goal(), True)
    assert path.count("COPY") == 2 and path.slots == 4
    always, again, once, twice, never = instructions_of(
        assembled(*["FADD R1, R1, R2"] * 2, *["@P1 FADD R1, R1, R2"] * 2, "@!P1 FADD R1, R1, R2")
    )
    assert are_opposite(twice, never) and are_opposite(never, twice)
    assert not any(are_opposite(*pair) for pair in ((always, again), (again, once), (once, twice), (always, never)))


def test_copies_are_asked_for_up_to_a_number():
    # Three copies, of which the last is rare: with it the path is longer, without any it is shortest.
    flow = flow_of(
        "loop:",
        "@!P1 BRA done",
        "LDGSTS.E.128 [R4], [R2.64]",
        "LDGSTS.E.128 [R4], [R2.64]",
        "@!P2 BRA done",
        "LDGSTS.E.128 [R4], [R2.64]",
        "done:",
        "HMMA.16816.F32 R8, R4, R6, R8",
        "@P0 BRA loop",
        "EXIT",
    )
    assert slots(flow, Goal(most=(), least={"TENSOR": 1})) == 3
    assert slots(flow, Goal(most=(), least={"TENSOR": 1, "COPY": 2})) == 6
    assert slots(flow, Goal()) == slots(flow, Goal(most=(), least={"TENSOR": 1, "COPY": 3})) == 7
    with pytest.raises(NoPath, match="3 of 4 COPY"):
        slots(flow, Goal(most=(), least={"TENSOR": 1, "COPY": 4}))


def test_loads_from_shared_memory_have_widths():
    flow = flow_of(
        "loop:", "@P1 BRA wide", "LDS R1, [R2]", "PRMT R3, R1, R1", "BRA on", "wide:", "LDS.64 R2, [R2]", "on:",
        "LDS.U16 R5, [R2]", "@P0 BRA loop", "EXIT",
    )  # fmt: skip
    assert slots(flow, Goal(most=("LDS",))) == 4
    assert slots(flow, Goal(most=("LDS", "LDS.32"))) == slots(flow, Goal(most=(), least={"LDS.32": 1})) == 6
    assert (
        slots(flow, Goal(most=("LDS", "LDS.64"))) == 4 and steady(flow, Goal(most=("LDS.16",)), True).count("LDS") == 2
    )


def test_what_excludes_each_other_is_no_path():
    flow = flow_of(
        "loop:",
        "@P1 BRA other",
        "FADD R1, R1, R2",
        "BRA on",
        "other:",
        "FMUL R1, R1, R2",
        "on:",
        "@P0 BRA loop",
        "EXIT",
    )
    assert slots(flow, Goal(most=(), least={"FMUL": 1})) == 3
    with pytest.raises(NoPath):
        slots(flow, Goal(most=(), least={"FMUL": 1, "FADD": 1}))


NESTED = (
    "S2R R0, SR_TID.X",
    "outer:",
    "FADD R1, R1, R2",
    "inner:",
    "LDG.E.128 R4, [R2.64]",
    "FMUL R1, R1, R4",
    "@P1 BRA inner",
    "STG.E [R2.64], R1",
    "@P0 BRA outer",
    "EXIT",
)


def test_inner_loops_turn_as_often_as_the_goal_says():
    flow = flow_of(*NESTED)
    assert len(flow.loops) == 2
    assert slots(flow, Goal(most=("STORE",))) == 6
    assert slots(flow, Goal(most=("STORE",), trips={"LDG": 5})) == 3 + 5 * 3
    assert slots(flow, Goal(most=("STORE",), trips={"FADD": 5})) == 6
    # The loop that does the work is the innermost one that has all of it; once through it is once.
    assert slots(flow, Goal(most=("LOAD",))) == 3
    assert slots(flow, Goal(most=(), least={"LOAD": 1}, trips={"LOAD": 5})) == 3
    path = steady(flow, Goal(most=(), least={"LOAD": 4}, trips={"*": 4}), in_loop=False)
    assert path.slots == path.stalls == 1 + 1 + 4 * 3 + 2 + 1 and path.count("FMUL") == 4


def test_of_several_loops_the_one_with_the_products_is_steady():
    copying = ("copy:", *["LDGSTS.E.128 [R4], [R2.64]"] * 5, "@P0 BRA copy")
    wide = ("wide:", *["HMMA.16816.F32 R8, R4, R6, R8"] * 4, "NOP", "@P0 BRA wide")
    narrow = ("narrow:", *["HMMA.16816.F32 R8, R4, R6, R8"] * 4, "@P0 BRA narrow")
    flow = flow_of(*copying, *wide, *narrow, "EXIT")
    assert slots(flow, Goal()) == 5


def test_kernels_without_a_row_are_guessed():
    moving = flow_of(*NESTED)
    assert guess(moving.kernel, moving).unit == "a turn of the loop"
    assert measure(moving.kernel, guess(moving.kernel, moving), moving).slots == 3
    straight = flow_of("LDG.E R1, [R2.64]", "@P0 BRA end", "FADD R1, R1, R2", "STG.E [R2.64], R1", "end:", "EXIT")
    work = guess(straight.kernel, straight)
    assert not work.in_loop and measure(straight.kernel, work, straight).slots == 5
    products = flow_of(*LOOP)
    assert measure(products.kernel, guess(products.kernel, products), products).slots == 10
    empty = flow_of("EXIT")
    assert measure(empty.kernel, guess(empty.kernel, empty), empty).slots == 1


def test_calls_count_with_the_cheapest_way_through():
    # Division: a fast path, and a function for the others, which is cheaper where its own cost is forgotten.
    flow = flow_of(
        "LDG.E R1, [R2.64]",
        "@!P0 BRA fast",
        "CALL.REL.NOINC divide",
        "BRA on",
        "fast:",
        *["FMUL R1, R1, R2"] * 4,
        "on:",
        "STG.E [R2.64], R1",
        "EXIT",
        "divide:",
        "@P1 BRA slow",
        *["FFMA R1, R1, R2, R3"] * 3,
        "RET.REL.NODEC R34 0x0",
        "slow:",
        *["FADD R1, R1, R2"] * 20,
        "RET.REL.NODEC R34 0x0",
    )
    goal = Goal(most=(), least={"STORE": 1})
    assert slots(flow, goal, in_loop=False) == 1 + 1 + 4 + 2
    called = steady(flow, Goal(most=("CALL",)), in_loop=False)
    assert called.slots == 1 + 1 + 2 + 5 + 2 and called.opcodes["FFMA"] == 3


def test_a_call_that_never_returns_is_a_jump():
    flow = flow_of(
        "loop:", "LDG.E R1, [R2.64]", "@!P0 CALL.REL.NOINC out", "BRA loop", "out:", "STG.E [R2.64], R1", "EXIT"
    )
    assert len(flow.loops) == 1 and flow.callees == []
    assert slots(flow, Goal(most=("LOAD",))) == 3
    assert slots(flow, Goal(most=(), least={"LOAD": 1, "STORE": 1}), in_loop=False) == 4


def test_a_loop_that_is_left_at_its_header_is_passed_once():
    flow = flow_of("loop:", "@P0 EXIT", "LDG.E R1, [R2.64]", "STG.E [R2.64], R1", "BRA loop")
    assert slots(flow, Goal(most=(), least={"STORE": 1}), in_loop=False) == 4
    left = flow_of("loop:", "@P0 BRA out", "LDG.E R1, [R2.64]", "BRA loop", "out:", "STG.E [R2.64], R1", "EXIT")
    goal = Goal(most=(), least={"LOAD": 3, "STORE": 1}, trips={"LOAD": 3})
    assert slots(left, goal, in_loop=False) == 3 * 3 + 2


def test_a_function_that_calls_itself_ends():
    flow = flow_of("CALL.REL.NOINC again", "EXIT", "again:", "CALL.REL.NOINC again", "RET.REL.NODEC R2 0x0")
    assert slots(flow, Goal(most=()), in_loop=False) == 4


def test_a_kernel_may_leave_early():
    flow = flow_of("@P0 EXIT", "LDG.E R1, [R2.64]", "EXIT")
    assert slots(flow, Goal(most=()), in_loop=False) == 1
    assert slots(flow, Goal(most=("LOAD",)), in_loop=False) == 3


def test_jump_tables_are_followed():
    # Two tables in constant bank 2, of two and of one entry.
    code = (
        "LDC R6, c[0x2][R6]",
        "BRX R6 -0x20",
        "FADD R1, R1, R2",
        "LDC R6, c[0x2][R6+0x8]",
        "BRX R6 -0x50",
        "FMUL R1, R1, R2",
        "EXIT",
        "STG.E [R2.64], R1",
        "EXIT",
    )
    flow = flow_of(*code, tables=struct.pack("<3I", 0x20, 0x50, 0x70))
    first = next(block for block in flow.blocks if block.code[-1].name == "BRX")
    assert [flow.blocks[s].code[0].address for s in first.successors] == [0x20, 0x50]
    assert slots(flow, Goal(most=()), in_loop=False) == 4
    assert slots(flow, Goal(most=("STORE",)), in_loop=False) == 7


def test_the_prologue_ends_with_the_first_load():
    flow = flow_of(
        "MOV R1, R2",
        "@P0 BRA short",
        *["IADD3 R1, R1, R2, R3"] * 9,
        "short:",
        "IADD3 R1, R1, R2, R3",
        "@!P1 LDGSTS.E.128 [R4], [R2.64]",
        "EXIT",
    )
    assert flow.prologue() == 4 and flow_of("EXIT").prologue() is None


# --- pipes and rates -------------------------------------------------------------------------------------------------


def test_wavefronts_are_those_of_the_bytes_of_a_warp():
    want = {"LDS.128": 4, "LDS.U.64": 2, "LDS.U16": 1, "STS": 1, "LDGSTS.E.BYPASS.128": 4, "LDSM.16.M88.4": 4}
    want |= {"LDSM.16.M88.2": 2, "LDSM.16.M88": 1, "LDG.E.128": 0, "ATOMS.ADD": 1}
    assert {opcode: machine.wavefronts_of(opcode) for opcode in want} == want


def test_products_of_tensor_instructions():
    assert machine.mma_macs("HMMA.16816.F32.BF16") == (2048, 16)
    assert machine.mma_macs("IMMA.16832.S8.S8") == (4096, 8)
    assert machine.mma_macs("HGMMA.64x128x16.F32.BF16") == (64 * 128 * 16 // 4, 16)
    assert machine.mma_macs("IGMMA.64x8x32.S8.S8") == (64 * 8 * 32 // 4, 8)
    # 8 n cycles for 128 rows and 128 columns of bfloat16, as wgmma's peak has it.
    hopper = machine.machine_of("90a")
    of_four_warps = {"HGMMA.64x128x16.F32.BF16": 4 * 2 * 8}
    assert machine.cycles_of(of_four_warps, hopper)["tensor"] == 8 * 128
    assert machine.cycles_of({"HMMA.16816.F32": 512}, machine.machine_of("80"))["tensor"] == 1024


def test_rates_of_half_numbers_and_integers_differ_by_architecture():
    opcodes = {"HADD2.BF16_V2": 8, "IADD3": 8}
    cycles = {arch: machine.cycles_of(opcodes, machine.machine_of(arch)) for arch in ("80", "89", "90a", "120")}
    assert {arch: (c["fma"], c["alu"]) for arch, c in cycles.items()} == {
        "80": (4, 4),
        "89": (4, 4),
        "90a": (2, 4),
        "120": (4, 2),
    }


def test_other_instructions_are_named():
    assert machine.unknown(["FROB.X", "NOP", "BAR.SYNC", "LOP3.LUT", "UFROB"]) == {"FROB"}


def test_the_tool_can_be_lifted_out():
    known = {"disassembly", "flow", "machine", "count"}
    for path in (ROOT / "tests/cuda/sass").glob("*.py"):
        if path.stem not in known:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom | ast.Import):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                ours = {module.removeprefix("tests.cuda.sass.") for module in modules if module.startswith("tests.")}
                others = {module.partition(".")[0] for module in modules if not module.startswith("tests.")}
                assert ours <= known and others <= sys.stdlib_module_names, f"{path.name}: {modules}"


def test_every_kernel_has_a_row():
    sources = "".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu"))
    names = set(re.findall(r"__global__ void\s+(?:__launch_bounds__\([^;{]*?\)\s+)?(\w+)\(", sources))
    assert len(names) >= 15
    in_table = {re.match(r"\w+", pattern)[0] for pattern in kernels._TABLE}
    assert names == in_table
    shape = "qops::cuda::RowShape<32, 1, true>"
    assert kernels.short(f"void qops::cuda::(anonymous namespace)::norm_kernel<__half, {shape}, false>(int)") == (
        "norm_kernel<half, RowShape<32, 1, true>, false>"
    )
    assert len(kernels.works_of(f"void norm_kernel<__half, {shape}, false>(int)", "80") or []) == 2
    assert kernels.works_of("void another_norm_kernel<float>(int)", "80") is None
    large = "void tiled_kernel<__half, 128, true, false>(int)"
    assert len(kernels.works_of(large, "90a") or []) == 1 and kernels.works_of(large, "120") == []


# --- what nvcc makes -------------------------------------------------------------------------------------------------

SOURCE = """
__global__ void __launch_bounds__(96) chain(float* x, int n) {
  float a = x[threadIdx.x];
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    asm volatile("fma.rn.f32 %0, %0, %0, %0; fma.rn.f32 %0, %0, %0, %0; fma.rn.f32 %0, %0, %0, %0;" : "+f"(a));
    asm volatile("fma.rn.f32 %0, %0, %0, %0; fma.rn.f32 %0, %0, %0, %0;" : "+f"(a));
  }
  x[threadIdx.x] = a;
}

__global__ void products(float* x, int n) {
  float c[4] = {};
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %4, %4, %4}, {%4, %4},"
          " {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(i));
    }
    if (x[i] > 0.0f) {
#pragma unroll 1
      for (int k = 0; k < n; ++k) x[k] = x[k] / c[k & 1];
    }
  }
  x[threadIdx.x] = c[0] + c[1] + c[2] + c[3];
}

__global__ void quotient(long long* x, long long by) { x[threadIdx.x] = x[threadIdx.x] / by; }
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", ("80", "90a", "120"))
def test_code_of_nvcc(arch, tmp_path: Path):
    nvcc = cuda_tools.require_nvcc()
    cuda_tools.require_cuobjdump()
    (tmp_path / "planted.cu").write_text(SOURCE)
    command = [str(nvcc), f"-arch=sm_{arch}", "-cubin", "planted.cu", "-o", "planted.cubin"]
    subprocess.run(command, cwd=tmp_path, check=True)
    found = {kernel.name.partition("(")[0]: kernel for kernel in kernels_of([tmp_path / "planted.cubin"])}
    assert set(found) == {"chain", "products", "quotient"}
    assert all(k.arch == arch and 0 < k.registers <= 255 and k.compiler for k in found.values())
    assert (found["chain"].max_threads, found["products"].max_threads) == (96, None)

    flow = Flow(found["chain"])
    path = steady(flow, Goal(most=("FFMA",)), True)
    assert path.count("FFMA") == 5 and path.slots < 12
    # The next of a chain may issue after four cycles, on each of these architectures.
    loop = [i for number in path.blocks for i in flow.blocks[number].code]
    places = [n for n, i in enumerate(loop) if i.name == "FFMA"]
    for first, second in itertools.pairwise(places):
        assert sum(i.control.stall for i in loop[first:second]) == 4
    # Who reads what has been loaded waits for the barrier that the load releases.
    load = next(i for i in found["chain"].code if i.name == "LDG")
    barrier = load.control.write_barrier
    assert barrier is not None and any(
        i.control.waits >> barrier & 1 for i in loop[: places[0] + 1] + found["chain"].code
    )

    flow = Flow(found["products"])
    path = steady(flow, Goal(), True)
    assert path.count("HMMA") == 3 and path.count("STORE") == 0
    assert steady(flow, Goal(most=("TENSOR", "STORE")), True).count("STORE") == 1
    assert measure(found["products"], guess(found["products"], flow), flow).slots == path.slots

    # 64 bits are divided in 32 where both fit, else by a function.
    flow = Flow(found["quotient"])
    assert flow.callees or arch == "120"
    path = steady(flow, Goal(most=(), least={"STORE": 1}), False)
    assert path.count("CALL") == 0 and path.slots < 60
