"""Machine code as NVIDIA's tools print it, and what a cubin says of its kernels beside it."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# A line of cuobjdump -sass and the one below it: address, instruction, and the two halves of its 128 bits.
_LINE = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;\n]*?)\s*;?\s*/\* 0x([0-9a-f]{16}) \*/"
    r"\n\s*/\* 0x([0-9a-f]{16}) \*/"
)
_NO_BARRIER = 7


class Control(NamedTuple):
    """What the compiler tells the scheduler with each instruction since Volta: bits 105 to 125 of its 128."""

    stall: int  # cycles until this warp may issue its next instruction
    yields: bool
    write_barrier: int | None  # of six: released when the result is there
    read_barrier: int | None  # released when the operands have been read
    waits: int  # a bit for each barrier that has to be released before
    reuse: int  # a bit for each operand that stays in the operand cache


def control_of(high: int) -> Control:
    """high: the upper 64 bits of an instruction."""
    bits = high >> 41
    write, read = bits >> 5 & 7, bits >> 8 & 7
    return Control(
        stall=bits & 15,
        yields=not bits >> 4 & 1,
        write_barrier=None if write == _NO_BARRIER else write,
        read_barrier=None if read == _NO_BARRIER else read,
        waits=bits >> 11 & 63,
        reuse=bits >> 17 & 15,
    )


class Instruction(NamedTuple):
    address: int
    guard: str  # "@!P0", or nothing
    opcode: str  # with its modifiers: "LDGSTS.E.BYPASS.128"
    operands: str
    high: int = 0

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def control(self) -> Control:
        return control_of(self.high)

    @property
    def target(self) -> int | None:
        """Of a branch or call."""
        found = re.search(r"(?<![\w-])0x([0-9a-f]+)$", self.operands)
        return int(found[1], 16) if found else None

    @property
    def is_conditional(self) -> bool:
        """Of a branch or exit: its guard, or a condition among its operands ("BRA P0, 0x120", "BRA.DIV UR4, 0x90")."""
        return bool(self.guard or (self.name in ("BRA", "JMP", "EXIT") and re.match(r"[!~]?U?[PR]", self.operands)))


@dataclass
class Kernel:
    """One kernel of one cubin."""

    symbol: str
    arch: str  # "90a"
    code: list[Instruction]
    registers: int = 0
    static_shared: int = 0
    max_threads: int | None = None  # of __launch_bounds__
    compiler: str = ""  # "13.0"
    tables: bytes = b""  # constant bank 2: where the jump tables of BRX are
    name: str = field(default="")  # demangled


def instructions_of(text: str) -> list[Instruction]:
    return [
        # What never executes takes its slot and nothing else: "@!PT LDS" stands before many copies.
        Instruction(int(address, 16), guard, "NOP" if guard == "@!PT" else opcode, operands, int(high, 16))
        for address, guard, opcode, operands, _, high in _LINE.findall(text)
    ]


def functions_of(text: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Symbol and code of each function that cuobjdump -sass has printed."""
    for function in re.split(r"\n\s*Function : (?=\S)", text)[1:]:
        symbol, _, code = function.partition("\n")
        yield symbol.strip(), instructions_of(code)


# --- a cubin ---------------------------------------------------------------------------------------------------------

_ELF_CUDA = 190  # e_machine
_NOBITS = 8
RESERVED_SHARED = 1 << 10  # bytes of each block that CUDA keeps
_REGCOUNT, _MAX_THREADS = 0x2F, 0x05  # EIATTR_* of .nv.info, as cuobjdump -elf names them


def sections_of(elf: bytes) -> dict[str, tuple[int, bytes]]:
    """Size and content of each section of a 64-bit ELF file."""
    (offset,) = struct.unpack_from("<Q", elf, 40)
    size, count, names_at = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, offset + i * size) for i in range(count)]
    names = headers[names_at][4]
    sections = {}
    for name, kind, _, _, at, length, *_ in headers:
        text = elf[names + name : elf.index(b"\0", names + name)].decode()
        sections[text] = (length, b"" if kind == _NOBITS else elf[at : at + length])
    return sections


def _attributes(info: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and value of what a section .nv.info holds: two bytes each for format and number, then a value or size."""
    at = 0
    while at + 4 <= len(info):
        kind, number, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if kind == 4:
            yield number, info[at : at + size]
            at += size


def _describe(kernels: list[Kernel], elf: bytes) -> None:
    sections = sections_of(elf)
    symbols = sections[".symtab"][1]
    strings = sections[".strtab"][1]
    registers: dict[str, int] = {}
    for number, value in _attributes(sections[".nv.info"][1]):
        if number == _REGCOUNT:
            symbol, count = struct.unpack("<II", value)
            (at,) = struct.unpack_from("<I", symbols, 24 * symbol)
            registers[strings[at : strings.index(b"\0", at)].decode()] = count
    release = re.search(rb"Cuda compilation tools, release (\d+\.\d+)", sections.get(".note.nv.tkinfo", (0, b""))[1])
    for kernel in kernels:
        kernel.compiler = release[1].decode() if release else ""
        kernel.registers = registers[kernel.symbol]
        kernel.static_shared = sections.get(f".nv.shared.{kernel.symbol}", (0, b""))[0]
        if int(kernel.arch.rstrip("af")) >= 90 and kernel.static_shared:
            kernel.static_shared -= RESERVED_SHARED  # counted there since sm_90
        kernel.tables = sections.get(f".nv.constant2.{kernel.symbol}", (0, b""))[1]
        for number, value in _attributes(sections[f".nv.info.{kernel.symbol}"][1]):
            if number == _MAX_THREADS:
                x, y, z = struct.unpack("<III", value)
                kernel.max_threads = x * y * z


# --- NVIDIA's tools --------------------------------------------------------------------------------------------------


def tool(name: str) -> str:
    """cuobjdump or nvdisasm: of a toolkit, else of PyPI's nvidia-cuda-{cuobjdump,nvdisasm}.

    Raises:
        FileNotFoundError: where there is none.
    """
    folders = [Path(found).parent for found in [shutil.which(name)] if found] + [Path("/usr/local/cuda/bin")]
    for packages in dict.fromkeys([sysconfig.get_path("purelib"), *sys.path]):
        folders += sorted(Path(packages).glob("nvidia/cu*/bin"))
    for folder in folders:
        # cuobjdump calls its neighbour.
        if (folder / name).is_file() and (folder / "nvdisasm").is_file():
            return str(folder / name)
    raise FileNotFoundError(f"{name}: a toolkit, or `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`")


def _run(*command: str, cwd: str | None = None) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout


def demangle(symbols: Iterable[str]) -> list[str]:
    names = "\n".join(symbols)
    return subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout.splitlines()


def _kernels_of_cubin(cubin: Path) -> list[Kernel]:
    elf = cubin.read_bytes()
    text = _run(tool("cuobjdump"), "-sass", str(cubin))
    arch = re.search(r"code for sm_(\w+)", text)
    if arch is None:
        return []
    named = {name.partition(".text.")[2] for name in sections_of(elf) if name.startswith(".text.")}
    kernels = [Kernel(symbol, arch[1], code) for symbol, code in functions_of(text) if symbol in named]
    _describe(kernels, elf)
    return kernels


def kernels_of(paths: Iterable[Path], archs: Iterable[str] = ()) -> list[Kernel]:
    """All kernels of cubins, objects, libraries and programs; of the architectures `archs` ("90a"), or of all."""
    wanted = set(archs)
    with tempfile.TemporaryDirectory() as folder:
        cubins: list[Path] = []
        for index, path in enumerate(paths):
            header = path.read_bytes()[:20]
            if header[:4] == b"\x7fELF" and struct.unpack_from("<H", header, 18)[0] == _ELF_CUDA:
                cubins.append(path)
                continue
            extracted = Path(folder) / str(index)
            extracted.mkdir()
            _run(tool("cuobjdump"), "-xelf", "all", str(path.resolve()), cwd=str(extracted))
            cubins += sorted(extracted.iterdir())
        if wanted:
            # cuobjdump names what it extracts "file.2.sm_90a.cubin".
            cubins = [c for c in cubins if not (arch := re.search(r"\.sm_(\w+)\.cubin$", c.name)) or arch[1] in wanted]
        with ThreadPoolExecutor(2) as pool:
            kernels = [kernel for found in pool.map(_kernels_of_cubin, cubins) for kernel in found]
    for kernel, name in zip(kernels, demangle(kernel.symbol for kernel in kernels), strict=True):
        kernel.name = name
    return kernels
