"""The house: names, contracts, documents, the built module. The rules stand in tests/support/house/rules.py."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import json
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest
import torch

import qops
from docs import build
from qops import _native
from qops.formats import _transformers
from tests.support.house import rules
from tests.support.house.tree import (
    BINDING,
    CONTRIBUTING,
    CPP,
    FILES,
    OPS,
    PAGES,
    PUBLIC_OPS,
    PYTHON,
    README,
    ROOT,
    SCHEMAS,
    STEMS,
    assert_none,
)
from tests.support.importers import importers, transformers_tests
from tests.support.odr import shared_symbols

MODULE = Path(_native._C.__file__)


# --- text ------------------------------------------------------------------------------------------------------------


def test_the_whole_tree_is_looked_at():
    for path in (
        "README.md",
        ".ci/run",
        "setup.py",
        "csrc/kernels.h",
        "tests/house/test_house.py",
        "docs/templates/module.html.jinja2",
        "python/qops/__init__.py",
    ):
        assert path in FILES
    assert not [path for path in FILES if "__pycache__" in path or path.endswith(".so")]


def test_no_notes_to_self():
    for word in ("TO" + "DO", "FIX" + "ME", "HA" + "CK"):
        assert rules.notes_to_self(f"int x;\n// {word}: y")
    assert not rules.notes_to_self("todos and prefixes")
    assert_none({path: rules.notes_to_self(text) for path, text in FILES.items()})


def test_no_paths_of_one_machine():
    for folder in ("home", "root", "tmp", "work"):
        assert rules.machine_paths(f'open("/{folder}/x")')
        assert rules.machine_paths(f"cd /{folder}/x")
    assert not rules.machine_paths("https://example.org/home/x  build/tmp/x ~/work/x ${a}/home/x")
    assert_none({path: rules.machine_paths(text) for path, text in FILES.items()})


def test_files_are_short():
    assert rules.too_long("x\n" * (rules.MAX_LINES + 1)) and not rules.too_long("x\n" * rules.MAX_LINES)
    code = {
        path: text for path, text in FILES.items() if path.endswith((".h", ".cpp", ".cu", ".cuh", ".py", ".ci/run"))
    }
    assert_none({path: rules.too_long(text) for path, text in code.items()})


def test_folders_are_small(tmp_path):
    folder = tmp_path / "whole" / "part"
    (folder / "__pycache__").mkdir(parents=True)
    for number in range(rules.MAX_ENTRIES):
        (folder / f"{number}.py").touch()
    (folder / "module.so").touch()
    assert not rules.crowded(tmp_path)
    (folder / "folder").mkdir()
    assert rules.crowded(folder) == rules.crowded(tmp_path) == ["part: 17 entries, at most 16"]
    assert_none({folder: rules.crowded(ROOT / folder) for folder in ("bench", "tests", "python/qops")})


# --- operators -------------------------------------------------------------------------------------------------------


def test_schemas_are_found():
    snippet = 'm.def("a(Tensor x, str r=\\"hf\\") -> Tensor");\n// m.def("b() -> ()");\n'
    snippet += 'm.def(\n    "c.out(Tensor x, "\n    "int n) -> ()");'
    found = rules.schemas(snippet)
    assert found == ['a(Tensor x, str r="hf") -> Tensor', "c.out(Tensor x, int n) -> ()"]
    assert [rules.op_name(schema) for schema in found] == ["a", "c"]
    assert "rms_norm" in OPS


def test_registered_operators_are_those_of_the_list():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("qops::")}
    assert registered == {"qops::" + schema.partition("(")[0] for schema in SCHEMAS}


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.partition("(")[0])
def test_operator_has_kernels(schema):
    name = "qops::" + schema.partition("(")[0]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"), "no CPU kernel"
    fake = torch._library.simple_registry.singleton.find(name).fake_impl
    assert fake.kernel is not None, "no fake kernel"


def test_kernels_are_found():
    binding = {
        "a.cpp": 'QOPS_REGISTER(m) {\n  m.impl("a.out", F(&a));\n  // m.impl("no", x);\n}\n',
        "b.cpp": '#if !defined(QOPS_CUDA)\nQOPS_REGISTER(m) { m.impl("b", F(&b)); }\n\n#endif\n',
        "c.cpp": 'void c(Library& m) {\n  m.impl("c", F(&c));\n}\n',
    }
    assert rules.kernels(binding, "CPU") == {"a.out", "b"} and rules.kernels(binding, "CUDA") == {"a.out"}
    # Of this device the dispatcher says the same, which the test before has asked.
    assert rules.kernels(BINDING, "CPU") == {schema.partition("(")[0] for schema in SCHEMAS}


def test_cmake_finds_every_kernel():
    files = ["csrc/cpu/a.cpp", "csrc/cpu/a_amx.cpp", "csrc/cuda/a_decode.cu", "csrc/cpu/a.h"]
    assert not rules.left_out_of_the_build(["a", "b"], files)
    assert len(rules.left_out_of_the_build(["a"], ["csrc/cpu/a_avx2.cpp", "csrc/cpu/c.cpp", "csrc/cuda/c.cu"])) == 3
    assert rules.operators_built("set(QOPS_OPERATORS\n  a\n  b)\n") == {"a", "b"}
    assert rules.operators_built(FILES["csrc/operators.cmake"]) == STEMS
    assert not rules.left_out_of_the_build(STEMS, CPP)


def test_one_name_on_every_layer():
    complete = set(rules.files_of("a"))
    assert len(complete) == 5 and not rules.missing_files(["a"], complete.__contains__)
    for file in complete:
        assert rules.missing_files(["a"], (complete - {file}).__contains__) == [f"a: {file} is missing"]
    for file in ("csrc/binding/b.cpp", "python/qops/ops/b.py", "bench/problems/b.py"):
        assert rules.nameless_files(["a"], [*complete, file]) == [f"{file} belongs to no operator"]
    assert rules.files_of("add_rms_norm") == rules.files_of("rms_norm")
    assert_none({"layers": rules.missing_files(OPS, FILES.__contains__) + rules.nameless_files(OPS, FILES)})


def test_no_stale_names():
    assert set(rules.FILES_OF) | rules.INTERNAL_OPS <= set(OPS)
    assert {stem for _, stem in rules.LAYER_FILES_OF} <= STEMS


GOOD_CONTRACT = """Sum.

    Args:
        a, b: numbers.
        c: another.

    Returns:
        a + b + c

    Numerics:
        Exact.

    Raises:
        TypeError: no numbers.

    Source:
        Euclid.

    Example:
        >>> 1 + 1
        2
    """


def test_contract_rule():
    def function(a, b, c):
        return a + b + c

    assert rules.contract_violations(function) == ["no docstring"]
    function.__doc__ = GOOD_CONTRACT
    assert not rules.contract_violations(function)
    for section in rules.CONTRACT_SECTIONS:
        function.__doc__ = GOOD_CONTRACT.replace(f"    {section}:\n", "")
        assert f"no section {section}" in rules.contract_violations(function)
    function.__doc__ = GOOD_CONTRACT.replace("a, b:", "a:")
    assert rules.contract_violations(function) == ["Args does not name b"]
    function.__doc__ = GOOD_CONTRACT.replace(">>> ", "")
    assert rules.contract_violations(function) == ["Example holds no doctest"]
    function.__doc__ = (
        GOOD_CONTRACT.replace("Returns:", "Numerics :")
        .replace("Numerics:", "Returns:")
        .replace("Numerics :", "Numerics:")
    )
    assert any("order" in violation for violation in rules.contract_violations(function))


@pytest.mark.parametrize("op", PUBLIC_OPS)
def test_contract(op):
    function = getattr(qops, op)
    assert op in qops.__all__
    assert_none({op: rules.contract_violations(function)})
    assert function.__module__ == f"qops.ops.{rules.stem_of(op, 'python/qops/ops')}"


def test_docstring_rule():
    def function(self, a, *rest) -> int:
        raise ValueError

    def nothing(**rest):
        return 1

    class Thing:
        def __init__(self, size: int):
            raise ValueError

    violations = rules.docstring_violations
    assert violations(function) == violations(nothing) == violations(Thing) == ["no docstring"]
    function.__doc__ = "F.\n\n    Args:\n        a: x.\n\n    Returns:\n        y.\n\n    Raises:\n        E: z.\n    "
    Thing.__doc__ = "T.\n\n    Attributes:\n        size: x.\n\n    Raises:\n        E: z.\n    "
    nothing.__doc__ = "N."
    assert not (violations(function) or violations(Thing) or violations(nothing) or violations(1))
    assert violations(property(nothing)) == [] and violations(property(lambda self: 1)) == ["no docstring"]
    for thing, text, violation in (
        (function, "a: x", "Args does not name a"),
        (function, "Returns", "no section Returns"),
        (function, "Raises", "no section Raises"),
        (Thing, "size: x", "Args does not name size"),
        (Thing, "Raises", "no section Raises"),
    ):
        whole = thing.__doc__
        thing.__doc__ = whole.replace(text, "b")
        assert violations(thing) == [violation]
        thing.__doc__ = whole


@pytest.mark.parametrize("module", build.MODULES)
def test_public_names_are_documented(module):
    assert len(set(importlib.import_module(module).__all__)) == len(importlib.import_module(module).__all__)
    names = {name: value for name, value in build.public_api()[module].items() if name not in PUBLIC_OPS}
    assert names
    assert_none({f"{module}.{name}": rules.docstring_violations(value) for name, value in names.items()})


def test_public_names_are_sorted():
    others = sorted({*qops.__all__} - {*qops.ops.__all__}, key=lambda name: (not name.isupper(), name))
    assert qops.__all__ == [*others, *sorted(qops.ops.__all__)]


def run_doctests(text: str, name: str, globals_: dict[str, object]) -> int:
    """Number of examples that ran; fails with doctest's report."""
    report: list[str] = []
    test = doctest.DocTestParser().get_doctest(text, {"torch": torch, "qops": qops, **globals_}, name, name, 0)
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    assert result.failed == 0, "".join(report)
    return result.attempted


def modules() -> list[str]:
    """Every module of the package whose import does nothing else and needs nothing that tests lack, as vLLM."""
    missing = ("__main__", "_C", "torchao.handler", "vllm.config", "vllm.kernels")
    found = pkgutil.walk_packages(qops.__path__, "qops.")
    return [m.name for m in found if not m.name.endswith(missing)]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    module = importlib.import_module(name)
    for test in doctest.DocTestFinder().find(module, module.__name__):
        run_doctests(test.docstring or "", test.name, dict(vars(module)))


def test_doctests_can_fail():
    with pytest.raises(AssertionError, match="Expected"):
        run_doctests(">>> 1 + 1\n3\n", "wrong", {})
    assert run_doctests(">>> 1 + 1\n2\n", "right", {}) == 1


# --- the module ------------------------------------------------------------------------------------------------------


def tool_output(*command: str) -> str:
    return subprocess.check_output([*command, str(MODULE)], text=True)


def test_symbols_fit_torch_2_11():
    listed = [s for s in FILES["tests/data/torch_2_11_symbols.txt"].splitlines() if not s.startswith("#")]
    assert "aoti_torch_get_dim" in listed
    fine = "   U memcpy@GLIBC_2.14\n   U PyModule_Create2\n   U aoti_torch_get_dim\n   w __gmon_start__\n"
    assert not rules.foreign_symbols(fine, listed)
    for name in ("_ZN3c1010TensorImplD1Ev", "torch_new_in_a_later_version", "_ZN2at5emptyEv"):
        assert rules.foreign_symbols(f"{fine}   U {name}\n", listed) == [name]
    assert rules.foreign_symbols(tool_output("nm", "--dynamic", "--undefined-only"), listed) == []


def test_module_has_no_path_of_its_own():
    dynamic = tool_output("readelf", "--dynamic", "--wide")
    assert "NEEDED" in dynamic
    assert not re.search(r"R(UN)?PATH", dynamic)


def test_module_exports_its_init_alone():
    defined = {line.split()[-1] for line in tool_output("nm", "--dynamic", "--defined-only").splitlines()}
    # What the linker and the standard library's templates export starts with an underscore and names neither.
    assert {name for name in defined if name[0] != "_" or "qops" in name or "torch" in name} == {"PyInit__C"}


def installed_files() -> tuple[importlib.metadata.Distribution, list[importlib.metadata.PackagePath]]:
    try:
        distribution = importlib.metadata.distribution("qops")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("qops is on sys.path without being installed")
    if json.loads(distribution.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable"):
        pytest.skip("qops is installed from the tree (editable)")
    if Path(str(distribution.locate_file("qops"))).resolve() != Path(qops.__file__).parent.resolve():
        pytest.skip("the installed qops is not the one that is tested")
    return distribution, distribution.files or []


def test_wheel():
    distribution, files = installed_files()
    names = [str(file) for file in files]
    tag = re.search(r"^Tag: (.*)$", distribution.read_text("WHEEL") or "", flags=re.MULTILINE)
    assert tag and re.fullmatch(r"cp310-abi3-linux_\w+", tag[1])
    assert "qops/_C.abi3.so" in names and "qops/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "bench", "csrc"))]
    missing = {path.removeprefix("python/") for path in FILES if path.startswith("python/")} - set(names)
    assert not missing, missing
    assert sum(file.size or 0 for file in files) < 15e6  # not even compressed


# --- documents and settings ------------------------------------------------------------------------------------------


def test_readme_lines():
    blocks = rules.fenced_blocks(README, "sh")
    assert blocks == [
        "pip install torch==2.13.0 && pip install '.[demo]' && python -m qops.demo\n",
        "pip install torch==2.13.0 && pip install '.[test]' && pytest -n auto --dist worksteal\n",
    ]


@pytest.mark.parametrize("page", PAGES)
def test_readme_example(page):
    blocks = rules.fenced_blocks(FILES[page], "python")
    with torch.inference_mode(False), torch.enable_grad():  # as readers have it
        assert blocks and all(run_doctests(block, page, {}) > 0 for block in blocks)


def resolves(name: str) -> bool:
    value: object = qops
    for i, part in enumerate(name.split(".")[1:], start=2):
        try:
            value = getattr(value, part)
        except AttributeError:
            module = ".".join(name.split(".")[:i])
            try:
                value = importlib.import_module(module)
            except ImportError:
                return False
    return True


def test_resolving_can_fail():
    assert resolves("qops.testing.generator") and not resolves("qops.nothing")
    assert rules.names_in_strings('"see :func:`qops.a.b`, torch.ops.qops.c."\nf"{1}qops.d: qops._e"\nqops.f') == {
        "qops.a.b": 1,
        "qops.d": 2,
    }


def test_readme_names_exist():
    text = "".join(FILES[page] for page in PAGES)
    names = set(re.findall(r"`(qops(?:\.\w+)+)(?:\(\))?`", text)) - {"qops.name"}
    assert len(names) >= 4
    assert [name for name in sorted(names) if not resolves(name)] == []


def test_errors_and_docstrings_name_what_exists():
    found = {path: rules.names_in_strings(text) for path, text in PYTHON.items() if path.startswith("python/qops/")}
    assert sum(len(names) for names in found.values()) > 50
    assert_none(
        {
            path: [f"{line}: {name}" for name, line in names.items() if not resolves(name)]
            for path, names in found.items()
        }
    )


def test_readme_lists_the_operators():
    assert rules.operators_listed("## Operators\n| op |\n|---|\n| `a`, `a_` | `x` | yes |\n## More\n| `b` |\n") == {
        "a",
        "a_",
    }
    assert rules.operators_listed(README) <= set(PUBLIC_OPS)


@pytest.mark.parametrize("device", ["CPU", "CUDA"])
def test_readme_says_which_device_has_an_operator(device):
    """All of its overloads, or it is not there yet."""
    table = (
        "## Operators\n| op | CPU | CUDA |\n|---|---|---|\n| `a`, `a_` | yes | yes¹ |\n| `b` | yes | not yet |\n## C\n"
    )
    assert rules.operators_on(table, "CUDA") == {"a", "a_"} and rules.operators_on(table, "CPU") == {"a", "a_", "b"}
    names = {schema.partition("(")[0] for schema in SCHEMAS}
    missing = {rules.op_name(name) for name in names - rules.kernels(BINDING, device)}
    assert rules.operators_on(README, device) == rules.operators_listed(README) - missing


def test_a_page_shows_operators():
    """The docstring of each has an example of its own."""
    shown = "# Operators\n```python\n>>> y = qops.a(qops.W.quantize(x))\nqops.b(x)\n```\n## More\n>>> qops.c(x)\n"
    assert rules.operators_shown(shown) == {"a"}
    assert set() < rules.operators_shown(FILES["docs/operators.md"]) <= set(PUBLIC_OPS)


def test_contributing_counts_its_steps_and_names_what_exists():
    text = "## Adding a thing in two steps\n\n1. `a/<op>.py`\n   `c`\n2. `b`\n\n## More\n1. `d`\n"
    assert rules.numbered_steps(text) == ("two", ["`a/<op>.py`\n   `c`", "`b`"])
    count, steps = rules.numbered_steps(CONTRIBUTING)
    assert ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"].index(count) == len(
        steps
    )
    named = {name for step in steps for name in re.findall(r"`([\w<>]+/[\w<>/]+\.\w+|\w+\.md)`", step)}
    assert len(named) > 10 and not [name for name in named if not (ROOT / name.replace("<op>", "rms_norm")).exists()]


def test_readme_lists_the_environment_variables():
    reads = """os.environ.get("A_B") os.environ["CC"] os.getenv('EE') std::getenv("GG")"""
    reads += 'os.environ.setdefault("FF", "") "$ENV{HH}" "$ENV{PATH}"'
    assert rules.variables_read(reads + 'os.environ["DD"] = "1"') == {"A_B", "CC", "EE", "FF", "GG", "HH"}
    others = (text for path, text in FILES.items() if path != "tests/house/test_house.py")
    read = {name for text in others for name in rules.variables_read(text)}
    assert rules.variables_listed(README) == read


def test_tool_pins_are_one_set():
    assert rules.pins('["ruff==1.2", "pyright[nodejs]==3.4"]') == {"ruff==1.2", "pyright==3.4"}
    project, hooks = rules.pins(FILES["pyproject.toml"]), rules.pins(FILES[".pre-commit-config.yaml"])
    assert hooks and hooks <= project


def test_the_oldest_transformers_is_one():
    oldest = ".".join(map(str, _transformers.MINIMUM))
    project = FILES["pyproject.toml"]
    assert re.findall(r'"transformers(?:\[serving\])?([^"]*)"', project) == 5 * [f">={oldest}"]
    assert f"**transformers {oldest} or newer**" in README and f"`transformers` {oldest} or newer" in README
    (tested,) = re.findall(r"^transformers_releases=\((.*)\)$", FILES[".ci/run"], flags=re.MULTILINE)
    assert tested.split()[0] == f"{oldest}.0" and f"CI runs {tested.replace(' ', ', ')} and what pip resolves" in README


def test_changelog_starts_with_this_version():
    version = re.search(r'^version = "(.*)"', FILES["pyproject.toml"], flags=re.MULTILINE)
    latest = re.search(r"^## \[(.*?)\]", FILES["CHANGELOG.md"], flags=re.MULTILINE)
    assert version and latest and version[1] == latest[1]


def test_what_depends_on_transformers_is_found():
    library = {"qops.models.load": "def f():\n    import transformers", "qops.nn": "from qops.models.load import f"}
    tests = {
        "tests.helper": "from transformers.models import llama",
        "tests.test_a": "def test():\n    from qops.models import load",
        "tests.test_b": "from tests import helper",
        "tests.test_c": "from tests.test_b import x",
        "tests.test_d": "import qops.nn, transformers_other",
    }
    assert importers("transformers", library, tests) == {"tests.helper", "tests.test_a", "tests.test_b", "tests.test_c"}
    found = transformers_tests()
    assert {"tests/models/test_model.py", "tests/models/test_families.py", "tests/models/test_smollm2.py"} < set(found)
    assert not {"tests/ops/test_rms_norm.py", "tests/house/test_house.py"} & set(found)


# --- inline functions of the ISA levels: odr.py runs on a build, here on nm's words ----------------------------------


def test_odr_rule():
    own = """
0000000000000000 W qops::cpu::avx512::load(float const*)
0000000000000000 W void std::sort<qops::cpu::avx512::Pair*>(qops::cpu::avx512::Pair*, qops::cpu::avx512::Pair*)
0000000000000000 V DW.ref.__gxx_personality_v0
0000000000000010 T qops::not_inline()
0000000000000020 t qops::local()
"""
    assert not shared_symbols(own, "avx512")
    for symbol in ("W std::sqrt(float)", "W qops::f()", "u qops::cpu::avx2::table", "V vtable for X"):
        assert shared_symbols(f"{own}0000000000000030 {symbol}\n", "avx512") == [symbol[2:]]
