"""The inline assembly that nvcc makes of csrc/cuda/ptx.cuh, against what is checked in: the emulator runs its own
functions in their place, so nothing else sees a wrong instruction, immediate or operand.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.cuda import cuda_tools
from tests.support.cuda.cuda_tools import EMULATOR, ROOT, checked

GOLDEN = (ROOT / "tests/data/ptx_instances.txt").read_text()
HEADER = (ROOT / "csrc/cuda/ptx.cuh").read_text()
# What sm_80 lacks.
NEWER = ("stmatrix.", "setmaxnreg.", "griddepcontrol.")


def ptx(folder: Path, header: str, arch: str) -> str:
    """Of ptx_instances.cu, with another text in the place of ptx.cuh."""
    (folder / "cuda").mkdir()
    (folder / "cuda/ptx.cuh").write_text(header)
    source, target = str(EMULATOR / "cases/ptx_instances.cu"), folder / "ptx_instances.ptx"
    include = [f"-I{path}" for path in (folder, ROOT / "csrc", ROOT / "tests")]
    checked(
        str(cuda_tools.require_nvcc()), "-std=c++20", *include, f"-arch=sm_{arch}", "-ptx", source, "-o", str(target)
    )
    return target.read_text()


def inline_assembly(ptx: str) -> str:
    """Each kernel's lines between `// begin inline asm` and `// end inline asm`.

    Registers, whose numbers vary with nvcc, are named by where their values come from: a parameter p, a word [p + 4] of
    what it points to, a literal; #2.1 is the second register that line 2 writes.
    """
    kernels = re.findall(r"^\.visible \.entry _Z(\d+)(\w+)\((.*?)^\}", ptx, flags=re.MULTILINE | re.DOTALL)
    assert kernels
    return "".join(f"{name[: int(length)]}\n" + "".join(lines_of(body)) for length, name, body in kernels)


def lines_of(kernel: str) -> list[str]:
    origins: dict[str, str] = {}
    lines: list[str] = []
    is_inline = False
    for line in (line.strip() for line in kernel.splitlines()):
        if line.startswith("//"):
            is_inline = line == "// begin inline asm"
        elif is_inline:
            written = dict.fromkeys(register for register in re.findall(r"%\w+", line) if register not in origins)
            origins |= {register: f"#{len(lines)}.{i}" for i, register in enumerate(written)}
            lines.append(f"  {named(line, origins)}\n")
        elif found := re.fullmatch(r"(?:ld\.param|ld\.global|mov|cvta\.to\.global|add)\.\w+\s+(%\w+), (.+);", line):
            where = re.sub(r"\[\w+_param_(\d+)\]", r"p\1", found[2])
            where = re.sub(r"_ZZ\w+E\d+(\w+)", r"\1", where)  # of shared memory
            where = re.sub(r", |\+", " + ", where)
            origins[found[1]] = named(where, origins)
    return lines


def named(text: str, origins: dict[str, str]) -> str:
    return re.sub(r"%\w+", lambda found: origins.get(found[0], "?"), text)


def test_inline_assembly_is_the_golden_one(tmp_path):
    assert inline_assembly(ptx(tmp_path, HEADER, "90a")) == GOLDEN


def test_older_gpus_get_the_same(tmp_path):
    lines = [line for line in GOLDEN.splitlines() if not line.strip().startswith(NEWER)]
    assert inline_assembly(ptx(tmp_path, HEADER, "80")).splitlines() == lines


# A text of ptx.cuh, what takes its place, and the line that shows it.
FAULTS = (
    ('"n"(kPending)', '"n"(kPending + 1)', "cp.async.wait_group 7;"),
    ('asm volatile("cp.async.commit_group;" ::: "memory");', "", "cp.async.commit_group;"),
    (".f32.bf16.bf16.f32", ".f32.f16.f16.f32", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {"),
    ('"r"(a), "r"(b), "r"(c), "n"', '"r"(b), "r"(a), "r"(c), "n"', "lop3.b32 #1.0, [p0], [p0 + 4], [p0 + 8], 234;"),
    ('"n"(kBytes), "r"(source_bytes)', '"n"(kBytes), "r"(kBytes)', "cp.async.ca.shared.global [p1], [p0], 8, p2;"),
    (
        '::"r"(barrier), "r"(threads) : "memory");\n}\n\n// setmaxnreg.inc',
        '::"r"(barrier), "r"(threads + 32) : "memory");\n}\n\n// setmaxnreg.inc',
        "bar.arrive 3, 64;",
    ),
    ("cvt.rni.sat", "cvt.rzi.sat", "cvt.rni.sat.s8.f32 "),
    ('"=r"(d[0]), "=r"(d[1])\n', '"=r"(d[1]), "=r"(d[0])\n', "st.global.cs.v2.u32 [p1], {#1.0, #1.1};"),
    ('"r"(a[0]), "r"(a[1]), "r"(a[2])', '"r"(a[0]), "r"(a[2]), "r"(a[1])', "{[p0], [p0 + 4], [p0 + 8], [p0 + 12]}"),
)


def test_planted_faults_show(tmp_path):
    header = HEADER
    for text, other, line in FAULTS:
        assert text in HEADER and line in GOLDEN, text
        header = header.replace(text, other)
    got = inline_assembly(ptx(tmp_path, header, "90a"))
    assert [line for _, _, line in FAULTS if line in got] == []
