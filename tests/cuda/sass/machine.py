"""Which pipe an instruction goes to, and how many a multiprocessor can take in a cycle.

Sources of the rates, by the letters below:

- G: CUDA C++ Best Practices Guide 13, "Throughput of Native Arithmetic Instructions": results a cycle and
  multiprocessor, by compute capability; 32 results are an instruction of a warp.
- N: Nsight Compute's documentation, "Pipelines": which pipe executes what. IMAD and dot products go to the heavy half
  of the FMA pipe, 16 lanes a scheduler; conversions share a unit with MUFU.
- W: NVIDIA's whitepapers and data sheets of A100, H100, Ada and RTX Blackwell: peaks of the tensor cores, bandwidths,
  multiprocessors and clocks.
- M: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking"
  (arXiv 2402.13499): mma.sync reaches 62 % of what wgmma does on an H100.

No rate of the uniform datapath and of branches is published; they take issue slots and bound nothing of their own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tests.cuda.sass.disassembly import RESERVED_SHARED
from tests.cuda.sass.flow import TENSOR

# --- pipes -----------------------------------------------------------------------------------------------------------

_PIPES = {
    "alu": "LOP3 LOP SHF SHL SHR PRMT SEL ISETP FSETP HSETP2 FSEL FSWZADD LEA PLOP3 P2R R2P MOV MOV32I VIADD VIMNMX "
    "VIMNMX3 VIADDMNMX IADD3 IADD IADD32I IMNMX FMNMX FMNMX3 HMNMX2 VHMNMX IABS FCHK BMSK SGXT F2FP I2FP I2IP ICMP "
    "VABSDIFF CS2R",
    "fma": "FFMA FMUL FADD FFMA32I FFMA2 FADD2 FMUL2 HFMA2 HADD2 HMUL2 HADD2_32I FADD32I FMUL32I",
    "imad": "IMAD IMAD32I IMUL IDP IDP4A XMAD",
    "xu": "MUFU I2F F2I F2IP F2F FRND POPC FLO BREV I2I",
    "lsu": "LDS STS LDSM STSM LDG LD STG ST LDGSTS LDL STL RED REDG ATOM ATOMG ATOMS SHFL MATCH LDC UBLKCP UBLKPF "
    "UTMALDG UTMASTG UTMAPF SYNCS CCTL",
    "fp64": "DADD DMUL DFMA DSETP DMNMX",
    "control": "BRA BRX JMP JMX CALL RET EXIT BSSY BSYNC BREAK WARPSYNC YIELD KILL NANOSLEEP BMOV ENDCOLLECTIVE ELECT",
}
_PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names.split()}
PIPES = ("alu", "fma", "imad", "xu", "lsu", "tensor", "uniform", "control", "other")


def pipe_of(opcode: str) -> str:
    """One of PIPES, or "fp64"; barriers, waits, NOP and special registers are "other"."""
    name = opcode.partition(".")[0]
    if name in TENSOR:
        return "tensor"
    if name in _PIPE_OF:
        return _PIPE_OF[name]
    # The uniform datapath's are those of the others behind a U; and what moves between the two.
    if name in ("R2UR", "S2UR", "REDUX", "CREDUX") or name[0] == "U":
        return "uniform"
    return "other"


def wavefronts_of(opcode: str) -> int:
    """Of shared memory, 128 bytes a cycle: as many as the bytes of a whole warp need. What takes more is found by the
    emulator's tracer, whose test names each such place."""
    name, *modifiers = opcode.split(".")
    if name in ("LDSM", "STSM"):
        return int(modifiers[-1]) if modifiers[-1].isdigit() else 1
    if name in ("LDS", "STS", "LDGSTS"):
        width = next((int(m) for m in modifiers if m in ("64", "128")), 32)
        return width // 32
    if name == "ATOMS":
        return 1
    return 0


def mma_macs(opcode: str) -> tuple[int, int]:
    """Products of one tensor instruction, and the bits of an operand."""
    name = opcode.partition(".")[0]
    bits = {"I": 8, "Q": 8, "B": 1, "D": 64, "O": 4}.get(name[0], 16)
    large = re.search(r"\.(\d+)x(\d+)x(\d+)", opcode)
    if large:  # of a warpgroup: a quarter is each warp's
        m, n, k = map(int, large.groups())
        return m * n * k // 4, bits
    small = re.search(r"\.(16|8)(8)(\d+)(?:\.|$)", opcode)
    if small is None:
        raise ValueError(f"no shape in {opcode}")
    m, n, k = map(int, small.groups())
    return m * n * k, bits


# --- GPUs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """A multiprocessor, in instructions of a warp a cycle, and its share of the GPU that it is part of."""

    gpu: str
    rates: Mapping[str, float]  # of pipes, and of instructions that are slower or faster than theirs
    macs: Mapping[int, int]  # of the tensor cores a cycle, by bits of an operand; mma.sync
    warps: int  # resident
    blocks: int
    shared: int  # bytes
    dram: float  # bytes a cycle, 0.9 of the data sheet's
    l2: float  # bytes a cycle; 0 where nothing is known
    macs_of_warpgroup: Mapping[int, int] = field(default_factory=dict)
    schedulers: int = 4

    def occupancy(self, registers: int, static_shared: int, threads: int, most: int | None = None) -> int:
        """Blocks that fit, by registers (allocated to warps in units of 256), threads and static shared memory; no more
        than `most`, which dynamic shared memory may allow."""
        warps = -(-threads // 32)
        of_warp = -(-registers * 32 // 256) * 256
        by_registers = 65536 // of_warp // self.schedulers * self.schedulers // warps if of_warp else self.blocks
        limits = [self.blocks, self.warps // warps, by_registers]
        limits.append(self.shared // (-(-static_shared // 128) * 128 + RESERVED_SHARED))
        return min([*limits, *([most] if most is not None else [])])


def _per_cycle(gigabytes: float, multiprocessors: int, gigahertz: float) -> float:
    return 0.9 * gigabytes / multiprocessors / gigahertz


_AMPERE = {"issue": 4, "alu": 2, "imad": 2, "xu": 0.5, "lsu": 1, "fp64": 1 / 16}  # G, N: alike from 8.0 to 9.0
_HALVES = {"fma": 4, "HADD2": 2, "HFMA2": 2, "HMUL2": 2, "BF16": 2}  # G: no more results of 16 bits than of 32
MACHINES: dict[str, Machine] = {
    "80": Machine(
        "A100 80 GB SXM",
        # G: 64 results of float32, 256 of half2 as two each, 128 of bfloat16.
        {**_AMPERE, "fma": 2, "HADD2": 4, "HFMA2": 4, "HMUL2": 4, "BF16": 2, "fp64": 1},
        {16: 1024, 8: 2048, 64: 64},  # W
        64,
        32,
        164 << 10,
        _per_cycle(2039, 108, 1.41),
        5120 / 108,  # W: 5120 bytes a cycle of all
    ),
    "86": Machine(
        "A40",
        {**_AMPERE, **_HALVES},
        {16: 512, 8: 1024},
        48,
        16,
        100 << 10,
        _per_cycle(696, 84, 1.74),
        0,
    ),
    "89": Machine(
        "L40S",
        {**_AMPERE, **_HALVES},
        {16: 512, 8: 1024},
        48,
        24,
        100 << 10,
        _per_cycle(864, 142, 2.52),
        0,
    ),
    "90": Machine(
        "H100 SXM",
        {**_AMPERE, "fma": 4, "BF16": 4, "fp64": 2},
        {16: 1270, 8: 2540, 64: 128},  # M: of 2048 and 4096
        64,
        32,
        228 << 10,
        _per_cycle(3350, 132, 1.755),
        24,  # what is known to be reached of its L2, 5.5 TB/s
        {16: 2048, 8: 4096},  # W
    ),
    "100": Machine(
        "B200",
        {**_AMPERE, **_HALVES, "fp64": 2},
        {16: 1024, 8: 2048},  # of mma.sync as much as an A100 has; the rest is tcgen05's
        64,
        32,
        228 << 10,
        _per_cycle(8000, 148, 1.85),
        0,
    ),
    "120": Machine(
        "RTX 5090",
        # G: integer additions, minima and comparisons at full rate; 2 results of float to int a cycle.
        {
            **_AMPERE,
            **_HALVES,
            **dict.fromkeys(("IADD3", "VIADD", "IMNMX", "VIMNMX", "VIADDMNMX", "ISETP"), 4),
            "F2I": 1 / 16,
        },
        {16: 256, 8: 1024},  # W: with float32 sums
        48,
        24,
        100 << 10,
        _per_cycle(1792, 170, 2.41),
        0,
    ),
}


def machine_of(arch: str) -> Machine:
    """arch: "90a"."""
    number = arch.rstrip("af")
    return MACHINES.get(number) or MACHINES[{"87": "86", "103": "100", "110": "100", "121": "120"}.get(number, "80")]


def cycles_of(opcodes: Mapping[str, float], machine: Machine) -> dict[str, float]:
    """The least cycles that a multiprocessor takes for these instructions of warps, by what executes them; the largest
    of them bounds the rest: they run side by side."""
    cycles: defaultdict[str, float] = defaultdict(float)
    for opcode, n in opcodes.items():
        cycles["issue"] += n / machine.rates["issue"]
        pipe, name = pipe_of(opcode), opcode.partition(".")[0]
        if pipe == "tensor":
            macs, bits = mma_macs(opcode)
            rates = machine.macs_of_warpgroup if name[1:] == "GMMA" and machine.macs_of_warpgroup else machine.macs
            cycles["tensor"] += n * macs / rates[bits]
        elif pipe in machine.rates:
            rate = machine.rates.get("BF16") if ".BF16" in opcode and pipe == "fma" else machine.rates.get(name)
            cycles[pipe] += n / (rate or machine.rates[pipe])
            if pipe == "imad":
                cycles["fma"] += n / machine.rates["fma"]
        cycles["shared"] += n * wavefronts_of(opcode)
    return dict(cycles)


def by_pipe(opcodes: Mapping[str, float]) -> dict[str, float]:
    counts: defaultdict[str, float] = defaultdict(float)
    for opcode, n in opcodes.items():
        pipe = pipe_of(opcode)
        counts[pipe if pipe in PIPES else "other"] += n
    return dict(counts)


def unknown(opcodes: Iterable[str]) -> set[str]:
    """Names that no pipe is known for, beyond barriers, waits and special registers."""
    known = {"NOP", "BAR", "DEPBAR", "LDGDEPBAR", "S2R", "CS2UR", "MEMBAR", "ERRBAR", "FENCE", "WARPGROUP", "ACQBULK"}
    known |= {"PREEXIT", "GETLMEMBASE", "SETCTAID", "USETMAXREG", "VOTE", "ARRIVES", "CCTLL", "LEPC", "B2R", "R2B"}
    return {name for opcode in opcodes if pipe_of(name := opcode.partition(".")[0]) == "other" and name not in known}
