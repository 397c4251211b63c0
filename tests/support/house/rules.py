"""The rules of CONTRIBUTING.md as functions over text: each returns the violations that it finds.

tests/house applies them to the tree, and to small bad snippets, which shows that each of them can fail.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

MAX_LINES = 600
MAX_ENTRIES = 16
CONTRACT_SECTIONS = ("Args", "Returns", "Numerics", "Raises", "Source", "Example")

# Operators that share the files of another one, because they share its kernel or its layout.
FILES_OF = {
    "add_rms_norm": "rms_norm",
    "add_rms_norm_int8": "rms_norm_int8",
    "attention_block": "decoder_block",
    "decoder_plan": "decoder_layers",
    "mlp_block": "decoder_block",
    "quantize_int8_asym": "quantize_int8",
    "quantize_int8_static": "quantize_int8",
    "qk_norm_rotary_": "qk_norm_rotary",
    "rotary_": "rotary",
    "check_layout": "weight_pack",
    "int4_pack": "weight_pack",
    "int4_unpack": "weight_pack",
    "int8_pack": "weight_pack",
    "int8_unpack": "weight_pack",
}
# One layer's file for several of those: an operator and its form that emits int8 take the same arguments, as does
# rotary with and without norms; int4_gemm and its form that takes int8 share a weight. A benchmark's file has the name
# of an operator.
LAYER_FILES_OF = {
    ("bench", "decoder_block"): "attention_block",
    ("bench", "int4_int8_gemm"): "int4_gemm",
    ("csrc/cpu", "decoder_layers"): "decoder_block",
    ("python/qops/ops", "decoder_layers"): "decoder_block",
    ("python/qops/ops", "int4_int8_gemm"): "int4_gemm",
    ("python/qops/ops", "int8_embedding"): "weight_pack",
    ("csrc/binding", "qk_norm_rotary"): "rotary",
    ("csrc/binding", "rms_norm_int8"): "rms_norm",
    ("csrc/binding", "silu_mul_int8"): "silu_mul",
}
# Used through qops.Int4Weight, qops.Int8Weight and fused models alone: no public function, no benchmark.
INTERNAL_OPS = frozenset(
    {
        *("check_layout", "decoder_layers", "decoder_plan", "int8_embedding"),
        *("int4_pack", "int4_unpack", "int8_pack", "int8_unpack"),
    }
)
# Tests that stand elsewhere: of operators that weights or fused models alone call.
TESTS_OF = {
    "decoder_layers": "tests/ops/gemm/test_decoder_layers.py",
    "int8_embedding": "tests/weights/test_int8_weights.py",
    "weight_pack": "tests/weights/test_weights.py",
}
# What stands upon the problems, and what reads results without torch.
BENCH_LAYERS = {
    "bench/problems/": ("bench.peers", "bench.timing", "bench.reporting", "bench.run"),
    "bench/peers/": ("bench.timing", "bench.reporting", "bench.run"),
    "bench/reporting/": ("torch", "qops", "bench.problems", "bench.peers", "bench.timing", "bench.run"),
}


# --- text ------------------------------------------------------------------------------------------------------------


def authored_files(root: Path) -> Iterator[Path]:
    """Every text file that a person wrote, without caches, builds and environments, wherever those lie."""
    folders = [root / name for name in (".ci", "bench", "csrc", "docs", "python", "tests")]
    files = [path for path in root.iterdir() if path.is_file() and path.name != ".git"]
    files += [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    code, text = {".cmake", ".cpp", ".cu", ".cuh", ".h", ".py", ""}, {".css", ".jinja2", ".md", ".txt"}
    suffixes = code | text | {".json", ".toml", ".yaml"}
    for path in sorted(files):
        parts = path.relative_to(root).parts
        if path.suffix in suffixes and not any(p.startswith(("__pycache__", "build")) or ".egg" in p for p in parts):
            yield path


def strip_cpp_comments(text: str) -> str:
    """Without comments, lines kept; string literals stay (an include is one)."""
    pattern = r"""("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|//[^\n]*|/\*.*?\*/"""
    return re.sub(pattern, lambda m: m[1] or "\n" * m[0].count("\n"), text, flags=re.DOTALL)


def matching_lines(text: str, pattern: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if re.search(pattern, line):
            yield number, line.strip()


def notes_to_self(text: str) -> list[str]:
    return [f"{n}: {line}" for n, line in matching_lines(text, r"\b(T[O]DO|FIX[M]E|X{3}|HA[C]K)\b")]


def machine_paths(text: str) -> list[str]:
    """Absolute paths that exist on one machine only. What follows a word or another slash is part of a longer path."""
    pattern = r"(?<![\w.~/\]}])/(home|root|tmp|Users|work|opt|mnt|scratch)/"
    return [f"{n}: {line}" for n, line in matching_lines(text, pattern)]


def too_long(text: str) -> list[str]:
    lines = text.count("\n")
    return [f"{lines} lines, at most {MAX_LINES}"] if lines > MAX_LINES else []


def crowded(folder: Path) -> list[str]:
    """The folders in it, and itself, that have more files and folders than a reader takes in."""
    ours = (path for path in folder.iterdir() if not path.name.startswith((".", "__pycache__")))
    entries = [path for path in ours if path.suffix != ".so"]
    found = [f"{folder.name}: {len(entries)} entries, at most {MAX_ENTRIES}"] if len(entries) > MAX_ENTRIES else []
    return found + [violation for path in sorted(entries) if path.is_dir() for violation in crowded(path)]


# --- C++ layers ------------------------------------------------------------------------------------------------------

_STD = r"<(?!thread|mutex|future|condition_variable|shared_mutex|iostream|cstdio)[a-z_0-9]+>"
_OUTPUT = r"\b(printf|fprintf|puts|std::cout|std::cerr|std::exit|std::abort|abort\(|exit\()"


@dataclass(frozen=True)
class Layer:
    """Files whose path matches ``files``: which includes they may have, and which code they may not."""

    files: str
    includes: tuple[str, ...]
    never: dict[str, str]


_CUDA_INCLUDES = (
    _STD,
    r"<cuda\w*\.h(pp)?>",
    r'"(kernels|exp_poly|int[48]_layout|row_tree)\.h"',
    r'"cuda/\w+\.(h|cuh)"',
)
_CUDA_NEVER = {
    r"\btorch\b": "torch",
    r"cudaDeviceSynchronize": "device-wide synchronisation",
    r"cudaStream(Default|Legacy|PerThread)|\bcudaMem(cpy|set)(?!\w*Async)\w*\(": "the default stream",
}

# The emulator without its cases/, which test it: nothing of this project, so that others can take it along.
EMULATOR = Layer(
    r"tests/emulator/((ptx|tracer)/)?\w+\.(h|cpp)",
    (
        _STD,
        r"<(cstdio|mutex|cxxabi\.h|dlfcn\.h|link\.h|pthread\.h|sanitizer/\w+\.h|sys/mman\.h|unistd\.h)>",
        r"<(cuda_(bf16|fp16|runtime)|vector_types)\.h>",
        r'"emulator/((ptx|tracer)/)?\w+\.h"',
    ),
    {r"\bqops\b|QOPS_": "names of the project", r"\bstd::j?thread\b": "threads of its own"},
)

LAYERS = (
    Layer(
        r"csrc/(kernels|exp_poly|int[48]_layout|row_tree|cuda/(gpu|int[48]_config))\.h",
        (r"<cstd(int|def)>", r'"(cuda/)?[a-z0-9_]+\.h"'),
        {r"std::": "containers"},
    ),
    Layer(
        r"csrc/cpu/.*",
        (
            _STD,
            r"<immintrin\.h>",
            r"<(unistd|sys/syscall)\.h>",
            r'"(kernels|exp_poly|int[48]_layout|row_tree)\.h"',
            r'"cpu/\w+\.h"',
        ),
        {r"\btorch\b": "torch", r"#\s*pragma\s+omp|\bomp_|\bstd::j?thread\b": "threads of its own"},
    ),
    # What stands between kernels and nvcc, or g++ and the emulator.
    Layer(
        r"csrc/cuda/(port\.cuh|ptx\.cuh|launch\.h)",
        (*_CUDA_INCLUDES, r"<mutex>", r'"emulator/(cuda|ptx/ptx)_emu\.h"'),
        _CUDA_NEVER,
    ),
    Layer(r"csrc/cuda/.*", _CUDA_INCLUDES, _CUDA_NEVER),
    EMULATOR,
    Layer(
        r"csrc/binding/device\.h",  # streams and devices
        (
            _STD,
            r"<cuda_runtime_api\.h>",
            r"<torch/csrc/(stable|inductor/aoti_torch/c)/\w+\.h>",
            r'"binding/(checks|plan|thread_pool)\.h"',
        ),
        {},
    ),
    Layer(
        r"csrc/binding/team\.h",  # threads that wait for each other
        (_STD, r"<immintrin\.h>", r"<sched\.h>", r'"(kernels|binding/back_off)\.h"'),
        {},
    ),
    Layer(
        r"csrc/binding/huge_pages\.h",
        (_STD, r"<sys/mman\.h>"),
        {},
    ),
    Layer(
        r"csrc/binding/plan\.cpp",  # stderr, from any thread
        (_STD, r"<(cstdio|mutex)>", r'"binding/plan\.h"'),
        {},
    ),
    Layer(
        r"csrc/binding/.*",
        (
            _STD,
            r"<Python\.h>",
            r"<torch/(csrc/stable|headeronly)/[\w/.]+>",
            r'"(kernels|int[48]_layout)\.h"',
            r'"binding/\w+\.h"',
        ),
        {
            r"\bat::|\bc10::": "ATen and c10",
            r"\bSTD_TORCH_CHECK\b": "a message with a build path (use checks.h)",
            r"[!=]=\s*(\w+(\.|->))?(sizes|strides)\(\)(?!\.|\[)": "array refs compared (torch 2.11 has equals alone)",
            r"\b(sizes|strides)\(\)\s*[!=]=": "array refs compared (torch 2.11 has equals alone)",
        },
    ),
)
NOWHERE = r"$"
# Everywhere but in the named files.
CONFINED = {
    r"\b(asm|__asm__|__asm)\b": (
        r"csrc/cpu/simd\w*\.h|csrc/cuda/ptx\.cuh|tests/emulator/fiber\.cpp",
        "raw assembly",
    ),
    r"\b__shared__\b": (r"csrc/cuda/port\.cuh", "declarations of shared memory"),
    r"<(unistd|sys/\w+)\.h>": (
        r"csrc/cpu/cpu_dispatch\.cpp|csrc/binding/huge_pages\.h|tests/emulator/.*",
        "system calls",
    ),
    r"<<<": (NOWHERE, "kernel launches by syntax"),
    r"<Python\.h>": (r"csrc/binding/python\.h", "Python"),
    _OUTPUT: (r"csrc/binding/plan\.cpp", "output and exits"),
}


def cpp_layer_violations(path: str, text: str, ops: Iterable[str] = ()) -> list[str]:
    """Of a file of csrc/ or the emulator, by its path from the root; ``ops``: stems that have files of their own."""
    code = strip_cpp_comments(text)
    found = []
    for pattern, (home, what) in CONFINED.items():
        if not re.fullmatch(home, path):
            found += [f"{n}: {what} do not belong here: {line}" for n, line in matching_lines(code, pattern)]
    layer = next((layer for layer in LAYERS if re.fullmatch(layer.files, path)), None)
    if layer is None:
        return [*found, "belongs to no layer"]
    for pattern, what in layer.never.items():
        without_text = re.sub(r'#\s*include.*|"(?:\\.|[^"\\\n])*"', "", code)
        found += [f"{n}: never {what}: {line}" for n, line in matching_lines(without_text, pattern)]
    stem = Path(path).stem
    for n, line in matching_lines(code, r"#\s*include\b"):
        header = line.split(maxsplit=1)[-1].removeprefix("include").strip()
        if not any(re.fullmatch(allowed, header) for allowed in layer.includes):
            found.append(f"{n}: may not include {header}")
        other = re.fullmatch(r'"(?:cpu|cuda)/(\w+)\.\w+"', header)
        for op in ops if other else ():
            if other and other[1].startswith(op) and not stem.startswith(op):
                found.append(f"{n}: may not include the header of another operator: {header}")
    return found


# --- Python layers ---------------------------------------------------------------------------------------------------


# Modules of the package that need nothing but torch: what `import qops` takes, and what proves an installation.
TORCH_ALONE = ("__init__", "__main__", "_check_cases", "_numerics", "check", "nn", "testing", "weights")


# What the cases of an operator may import inside, with other operators' references.
CASES_NEED = ("qops._check_cases", "qops._numerics")


def python_imports(text: str) -> Iterator[tuple[int, str, bool]]:
    """(line, module, at module level) of every import; ``from a import b`` gives a.b, which may be a module."""
    tree = ast.parse(text)
    deferred = {
        id(node)
        for parent in ast.walk(tree)
        if isinstance(parent, ast.FunctionDef | ast.AsyncFunctionDef) or _is_type_checking(parent)
        for node in ast.walk(parent)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, id(node) not in deferred
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}", id(node) not in deferred


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _within(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def python_layer_violations(path: str, text: str) -> list[str]:
    """Of a file under python/, tests/ or bench/, by its path relative to the root."""
    found = []
    folder, stem = path.rpartition("/")[0], Path(path).stem
    for line, module, at_module_level in python_imports(text):
        top = module.split(".")[0]
        if module.startswith("."):
            found.append(f"{line}: relative import: {module}")
        elif folder == "python/qops/ops" and not stem.startswith("_"):
            own = ("torch", "qops._layout", "qops._native", "qops.ops._checks", "qops.weights", f"qops.ops.{stem}")
            if stem == "__init__":
                own = ("qops.ops",)
            elif not at_module_level:
                own += ("qops.ops", *CASES_NEED)
            if top not in sys.stdlib_module_names and not _within(module, own):
                found.append(f"{line}: an operator may not import {module}")
        elif path.startswith("python/qops/"):
            if _within(module, ["qops.testing"]):
                found.append(f"{line}: the package may not import {module}")
            if _within(module, ["qops.integrations"]) and not path.startswith("python/qops/integrations/"):
                found.append(f"{line}: the package may not import {module}")
            if _within(module, ["qops._numerics"]) and stem not in ("check", "_check_cases", "testing"):
                found.append(f"{line}: only the check and the tests may import {module}")
            if at_module_level and folder == "python/qops" and stem in TORCH_ALONE:
                allowed = (*sys.stdlib_module_names, "torch", "qops")
                if not _within(module, allowed):
                    found.append(f"{line}: {stem} may need torch alone, not {module}")
        elif any(path.startswith(below) and _within(module, above) for below, above in BENCH_LAYERS.items()):
            found.append(f"{line}: {folder} stands below {module}")
        elif path.startswith(("tests/", "bench/")) and re.match(r"(tests\.(\w+\.)*)?test_|(bench\.)?bench_", module):
            found.append(f"{line}: test and benchmark files may not import each other: {module}")
    return found


def prints(text: str) -> list[str]:
    calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    return [f"{call.lineno}: print()" for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


# --- operators -------------------------------------------------------------------------------------------------------


def schemas(registration: str) -> list[str]:
    """The schemas of schemas.h, string literals joined."""
    code = strip_cpp_comments(registration)
    calls = re.findall(r"m\.def\(\s*((?:\"(?:\\.|[^\"\\])*\"\s*)+)\)", code)
    return ["".join(re.findall(r"\"((?:\\.|[^\"\\])*)\"", call)).replace('\\"', '"') for call in calls]


def op_name(schema: str) -> str:
    """Without arguments and overload: ``silu_mul`` of ``silu_mul.apart(Tensor gate, ...) -> Tensor``."""
    return re.split(r"[.(]", schema, maxsplit=1)[0]


def kernels(binding: Mapping[str, str], device: str) -> set[str]:
    """Names, with overloads, of what the bindings register on a device; ``#if !defined(QOPS_CUDA)`` is the CPU's."""
    code = "\n".join(strip_cpp_comments(text) for text in binding.values())
    if device == "CUDA":
        code = re.sub(r"^#if !defined\(QOPS_CUDA\)\n.*?^#endif", "", code, flags=re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^QOPS_REGISTER\(m\) {([^}]*)}", code, re.MULTILINE)
    return {name for block in blocks for name in re.findall(r'm\.impl\(\s*"([\w.]+)"', block)}


def stem_of(op: str, layer: str = "") -> str:
    stem = FILES_OF.get(op, op)
    return LAYER_FILES_OF.get((layer, stem), stem)


def files_of(op: str) -> list[str]:
    """Where an operator lives, one file on every layer."""
    files = [f"{layer}/{stem_of(op, layer)}.cpp" for layer in ("csrc/binding", "csrc/cpu")]
    tests = TESTS_OF.get(stem_of(op), f"tests/ops/test_{stem_of(op)}.py")
    files += [f"python/qops/ops/{stem_of(op, 'python/qops/ops')}.py", tests]
    return files if op in INTERNAL_OPS else [*files, f"bench/problems/{stem_of(op, 'bench')}.py"]


def missing_files(ops: Iterable[str], exists: Callable[[str], bool]) -> list[str]:
    return [f"{op}: {file} is missing" for op in ops for file in files_of(op) if not exists(file)]


def nameless_files(ops: Iterable[str], files: Iterable[str]) -> list[str]:
    """Binding, wrapper and benchmark files that belong to no operator."""
    known = {file for op in ops for file in files_of(op)}
    known |= {f"csrc/binding/{stem}.cpp" for stem in ("checks", "plan", "registration", "registration_cuda")}
    pattern = r"csrc/binding/.*\.cpp|python/qops/ops/[^_].*\.py|bench/problems/[^_/]*\.py"
    return [f"{file} belongs to no operator" for file in files if re.fullmatch(pattern, file) and file not in known]


def operators_built(cmake: str) -> set[str]:
    """The list by whose names CMake finds the sources of operators."""
    listed = re.search(r"set\(QOPS_OPERATORS\s+([\w\s]+)\)", cmake)
    return set(listed[1].split()) if listed else set()


def left_out_of_the_build(ops: Iterable[str], files: Iterable[str]) -> list[str]:
    """Kernel files that no operator's name finds."""
    names = "|".join(ops)
    found = rf"csrc/cpu/(({names})(_amx)?|cpu_dispatch|kernel_table)\.cpp|csrc/cuda/({names})(_\w+)?\.cu"
    kernels = (file for file in files if re.fullmatch(r"csrc/c(pu|uda)/.*\.(cpp|cu)", file))
    return [f"{file} is not built" for file in kernels if not re.fullmatch(found, file)]


def sections(docstring: str) -> dict[str, str]:
    """Heading -> text, in their order."""
    parts = re.split(r"^([A-Z]\w+):$", docstring, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def documented(section: str) -> set[str]:
    """The names that entries like ``a, b: numbers.`` describe."""
    entries = re.findall(r"^ {4}(\S[^:]*):", section, flags=re.MULTILINE)
    return {name.strip(" *`") for entry in entries for name in entry.split(",")}


def contract_violations(function: Callable[..., object]) -> list[str]:
    """Sections that the docstring of an operator lacks, or parameters that its Args do not name."""
    text = inspect.getdoc(function) or ""
    if not text:
        return ["no docstring"]
    parts = sections(text)
    found = [f"no section {section}" for section in CONTRACT_SECTIONS if section not in parts]
    if not found and [name for name in parts if name in CONTRACT_SECTIONS] != list(CONTRACT_SECTIONS):
        found.append(f"sections must stand in the order {', '.join(CONTRACT_SECTIONS)}")
    if "Args" in parts:
        known = documented(parts["Args"])
        found += [f"Args does not name {name}" for name in inspect.signature(function).parameters if name not in known]
    if "Example" in parts and ">>>" not in parts["Example"]:
        found.append("Example holds no doctest")
    return found


def docstring_violations(value: object) -> list[str]:
    """What the docstring of another public function, class, method or property lacks.

    Args must name every parameter (Attributes may, for a class), Returns must stand where there are parameters and a
    result, Raises where the code raises. Constants need no docstring.
    """
    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    if not callable(function):
        return []
    text = inspect.cleandoc(function.__doc__ or "")
    if not text:
        return ["no docstring"]
    parts, signature = sections(text), inspect.signature(function)
    known = documented(parts.get("Args", ""))
    if inspect.isclass(function):
        known |= documented(parts.get("Attributes", ""))
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [p.name for p in signature.parameters.values() if p.kind not in kinds and p.name not in ("self", "cls")]
    found = [f"Args does not name {name}" for name in named if name not in known]
    result = signature.return_annotation not in (None, "None", inspect.Signature.empty)
    if named and result and not inspect.isclass(function) and "Returns" not in parts:
        found.append("no section Returns")
    code = vars(function).get("__init__") if inspect.isclass(function) else function
    if inspect.isfunction(code) and "Raises" not in parts and _raises(inspect.unwrap(code)):
        found.append("no section Raises")
    return found


def _raises(function: Callable[..., object]) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except OSError:  # made by a decorator, as a dataclass's __init__
        return False
    return any(isinstance(node, ast.Raise) for node in ast.walk(tree))


# --- the module ------------------------------------------------------------------------------------------------------


def foreign_symbols(nm_output: str, exported_by_torch: Iterable[str]) -> list[str]:
    """Undefined symbols (``nm -D --undefined-only``) that neither the system's libraries (they have a version), nor
    CPython's limited API, nor the given list of torch's provides. Weak ones (w, v) may stay undefined."""
    exported = set(exported_by_torch)
    found = []
    for line in nm_output.splitlines():
        kind, name = line.split()[-2:]
        if kind == "U" and "@" not in name and not name.startswith("Py") and name not in exported:
            found.append(name)
    return found


# --- documents -------------------------------------------------------------------------------------------------------


def numbered_steps(markdown: str) -> tuple[str, list[str]]:
    """How many a heading "... in <count> steps" announces, and the numbered ones below it."""
    count, section = re.findall(r"^## .* in (\w+) steps\n(.*?)(?=^## |\Z)", markdown, flags=re.MULTILINE | re.DOTALL)[0]
    steps = re.findall(r"^(\d+)\. (.*(?:\n   .*)*)", section, flags=re.MULTILINE)
    return count, [text for number, (at, text) in enumerate(steps, start=1) if int(at) == number]


def fenced_blocks(markdown: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", markdown, flags=re.MULTILINE | re.DOTALL)


def names_in_strings(text: str) -> dict[str, int]:
    """Public names `qops.a.b` in the strings of a Python file, with their lines; files of a model are no names."""
    strings = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    return {
        name: node.lineno
        for node in strings
        if isinstance(node.value, str)
        for name in re.findall(r"(?<![\w./-])qops(?:\.[A-Za-z]\w*)+", node.value)
        if not name.endswith(".safetensors")
    }


def files_named(text: str) -> set[str]:
    """Paths from the root of the tree in a document, as patterns: ``csrc/cpu/<op>.cpp`` is to fit one file at least."""
    found = re.findall(r"\b((?:\.ci|bench|csrc|docs|python|tests)/[\w./*<>-]*[\w/>])", text)
    return {re.sub(r"<\w+>", "*", path) for path in found}


def variables_read(text: str) -> set[str]:
    """Environment variables that Python, C++ or CMake code reads (or sets a default for) under a literal name."""
    python = r"""environ(?:\.get\(|\.setdefault\(|\.pop\(|\[)\s*["']([A-Z][A-Z0-9_]+)["'](?!\]\s*=[^=])"""
    cmake = r"|\$ENV\{(?!PATH\})([A-Z][A-Z0-9_]+)\}"
    found = re.findall(python + r"""|getenv\(\s*["']([A-Z][A-Z0-9_]+)["']""" + cmake, text)
    return {name for names in found for name in names if name}


def variables_listed(readme: str) -> set[str]:
    """The first column of the README's table of environment variables."""
    section = readme.partition("## Environment variables")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `([A-Z][A-Z0-9_]+)` \|", section, flags=re.MULTILINE))


def operators_listed(readme: str) -> set[str]:
    """The first column of the README's table of operators."""
    section = readme.partition("## Operators")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[a-z].*?) \|", section, flags=re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def operators_on(readme: str, device: str) -> set[str]:
    """Those of the README's table whose column of the device says yes, perhaps with a footnote; else "not yet"."""
    section = readme.partition("## Operators")[2].partition("\n## ")[0]
    header, _, *rows = [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in section.splitlines() if line[:1] == "|"]
    column = header.index(device)
    assert {row[column].rstrip("¹²³") for row in rows} <= {"yes", "not yet"}, rows
    return {name for row in rows if row[column][:3] == "yes" for name in re.findall(r"`(\w+)`", row[0])}


def operators_shown(page: str) -> set[str]:
    """The operators that the doctests of a page call."""
    blocks = "".join(fenced_blocks(page, "python"))
    return set(re.findall(r"^>>> .*?\bqops\.([a-z]\w*)\(", blocks, flags=re.MULTILINE))


def pins(text: str) -> set[str]:
    """Exact requirements: ``ruff==0.1.2`` in a TOML or YAML file, extras left out."""
    return {f"{name}=={version}" for name, version in re.findall(r'"([\w-]+)(?:\[\w+\])?==([\w.]+)"', text)}
