"""Issue slots of the kernels' steady paths, held against what is checked in; needs nvcc, no GPU."""

from __future__ import annotations

import pytest

from tests.cuda.sass import report
from tests.cuda.sass.disassembly import Kernel, kernels_of
from tests.cuda.sass.machine import machine_of
from tests.cuda.sass.report import Row
from tests.support.cuda import cuda_tools
from tests.support.cuda.cuda_tools import ROOT, checked

OBJECTS = ROOT / "build/cuda-check/csrc/cuda/CMakeFiles/_C_cuda.dir"
HINT = f"If that is meant: {report.REGENERATE}"


@pytest.mark.slow
class TestBuild:
    @pytest.fixture(scope="class")
    def kernels(self, log) -> list[Kernel]:
        cuda_tools.require_cuobjdump()
        budgets = report.read_budget()
        archs = {arch for counts in budgets.values() for arch in counts}
        # .ci/full builds for more architectures than are looked at here.
        found = [k for k in kernels_of(sorted(OBJECTS.glob("*.cu.o"))) if k.arch in archs]
        assert found, f"nothing was built for any of {sorted(archs)}"
        if (release := found[0].compiler) != report.read_compiler():
            pytest.skip(f"the budget is that of nvcc {report.read_compiler()}, and this is {release}")
        return found

    @pytest.fixture(scope="class")
    def rows(self, kernels) -> list[Row]:
        return report.rows_of(kernels)

    def test_no_kernel_has_grown(self, rows):
        problems = report.grown(report.read_budget(), report.budget_of(rows))
        assert not problems, "\n".join(["", *problems, HINT])

    def test_the_page_says_what_was_built(self, rows):
        page = report.sections_of(report.PAGE.read_text())
        for arch, section in report.sections(rows).items():
            assert page.get(arch) == section, f"{report.PAGE.name} is old: sm_{arch}. {HINT}"

    def test_occupancy_is_that_of_nvidias_header(self, kernels, tmp_path):
        program, include = tmp_path / "occupancy", cuda_tools.require_cuda_include()
        checked("g++", "-O1", f"-I{include}", str(ROOT / "tests/support/cuda/occupancy.cpp"), "-o", str(program))
        asked = {(k.arch, k.registers, k.static_shared, k.max_threads) for k in kernels if k.max_threads}
        assert len(asked) > 100
        text = ""
        for arch, registers, shared, threads in sorted(asked):
            number = arch.rstrip("af")
            text += f"{number[:-1]} {number[-1]} {registers} {shared} {threads}\n"
        (tmp_path / "questions").write_text(text)
        answers = checked("sh", "-c", f"{program} < {tmp_path}/questions").split()
        ours = [
            machine_of(arch).occupancy(registers, shared, threads) for arch, registers, shared, threads in sorted(asked)
        ]
        assert list(map(int, answers)) == ours


def test_growth_is_told():
    budget = {"a_kernel<1>": {"80": 100.0, "90a": 200.0}, "b_kernel": {"80": 50.0}}
    assert report.grown(budget, budget) == []
    assert report.grown(budget, {"a_kernel<1>": {"80": 103.0}, "b_kernel": {"80": 10.0}}) == []
    problems = report.grown(budget, {"a_kernel<1>": {"80": 103.1, "90a": 200.0}, "c_kernel": {"80": 7.0}})
    assert problems == [
        "a_kernel<1> (sm_80): 103 instructions a unit, 3.1 % more than its budget of 100",
        "c_kernel (sm_80): no budget; it takes 7 instructions a unit",
        "b_kernel (sm_80): is gone",
    ]


def test_the_page_is_put_together_from_its_architectures():
    sections = {arch: f"## sm_{arch}: a GPU\n\ntext\n\n### a kernel, sm_{arch}\n" for arch in ("120", "80", "90a")}
    page = report.page_of(sections)
    assert "Static bounds, not measurements" in page and report.sections_of(page) == sections
    assert page.index("sm_80") < page.index("sm_90a") < page.index("sm_120")
    assert report.page_of(report.sections_of(page)) == page


def test_the_checked_in_page_and_budget_belong_together():
    archs = {arch for counts in report.read_budget().values() for arch in counts}
    assert archs >= {"80", "90a"} and set(report.sections_of(report.PAGE.read_text())) == archs
