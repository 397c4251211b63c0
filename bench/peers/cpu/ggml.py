"""ggml's matrix product out of the libraries of llama.cpp and of ik_llama.cpp, as their models call it.

Weights are Q4_0 and Q4_1: groups of 32 with 16-bit scales, which larger groups repeat; ggml quantises x to 8 bits in
groups of 32. llama.cpp repacks weights into the first extra buffer type that takes the product; ik_llama.cpp reads them
as they are. Both are found as their Python packages find them: LLAMA_CPP_LIB_PATH, a folder, and
IK_LLAMA_CPP_LIB_PATH, a file, name others.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.peers import layouts
from bench.problems import Axes, Result
from bench.problems.int4_gemm import Int4Gemm
from bench.problems.shared.provider import Provider

GROUP = 32
F32, Q4_0, Q4_1 = 0, 2, 3  # enum ggml_type
# Of the context of all products of a process, which holds no data; ik_llama.cpp has no more than 64 contexts.
CONTEXT_BYTES = 1 << 28
LOG_WARN, LOG_ERROR = 3, 4  # enum ggml_log_level
_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _POINTER)


class _Parameters(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool))


# Result and arguments, as declared in ggml.h, ggml-cpu.h and ggml-backend.h.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ggml_init": (_POINTER, _Parameters),
    "ggml_new_tensor_2d": (_POINTER, _POINTER, ctypes.c_int, _INT64, _INT64),
    "ggml_mul_mat": (_POINTER, _POINTER, _POINTER, _POINTER),
    "ggml_get_data": (_POINTER, _POINTER),
    "ggml_new_graph_custom": (_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_bool),
    "ggml_build_forward_expand": (None, _POINTER, _POINTER),
    "ggml_backend_cpu_init": (_POINTER,),
    "ggml_backend_cpu_set_n_threads": (None, _POINTER, ctypes.c_int),
    "ggml_backend_cpu_buffer_type": (_POINTER,),
    "ggml_backend_buft_get_alloc_size": (ctypes.c_size_t, _POINTER, _POINTER),
    "ggml_backend_buft_alloc_buffer": (_POINTER, _POINTER, ctypes.c_size_t),
    "ggml_backend_buffer_get_base": (_POINTER, _POINTER),
    "ggml_backend_buffer_free": (None, _POINTER),
    "ggml_backend_tensor_alloc": (None, _POINTER, _POINTER, _POINTER),
    "ggml_backend_tensor_set": (None, _POINTER, _POINTER, ctypes.c_size_t, ctypes.c_size_t),
    "ggml_backend_graph_compute": (ctypes.c_int, _POINTER, _POINTER),
}
# Of llama.cpp alone.
_EXTRA_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ggml_backend_get_device": (_POINTER, _POINTER),
    "ggml_backend_dev_backend_reg": (_POINTER, _POINTER),
    "ggml_backend_reg_get_proc_address": (_POINTER, _POINTER, ctypes.c_char_p),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, _POINTER, _POINTER),
    "ggml_log_set": (None, _LOG, _POINTER),
}


@_LOG
def _log(level: int, text: bytes, _: Any) -> None:
    """Not which tensor was repacked."""
    if level in (LOG_WARN, LOG_ERROR):
        sys.stderr.write(text.decode(errors="replace"))


def _llama_libraries() -> list[Path]:
    folder = os.environ.get("LLAMA_CPP_LIB_PATH") or _package("llama_cpp") / "lib"
    return [Path(folder) / f"lib{name}.so" for name in ("ggml-base", "ggml-cpu")]


def _ik_libraries() -> list[Path]:
    llama = os.environ.get("IK_LLAMA_CPP_LIB_PATH")
    if llama is None:
        return [_package("ik_llama_cpp") / "lib/libggml.so"]
    # Beside it where it is installed, and in the build tree of ggml where it is not.
    beside = Path(llama).with_name("libggml.so")
    return [beside if beside.exists() else Path(llama).parents[1] / "ggml/src/libggml.so"]


def _package(name: str) -> Path:
    """Its folder; importing it would load llama's library as well."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


class Library:
    """ggml's functions, and a backend for as many threads as torch has."""

    def __init__(self, paths: list[Path], has_extra_buffers: bool) -> None:
        loaded = [ctypes.CDLL(str(path)) for path in paths]
        self.functions: dict[str, Any] = {}
        wanted = {**_SIGNATURES, **(_EXTRA_SIGNATURES if has_extra_buffers else {})}
        for name, (result, *arguments) in wanted.items():
            function = next(getattr(library, name) for library in loaded if hasattr(library, name))
            function.restype, function.argtypes = result, arguments
            self.functions[name] = function
        self.backend = self("ggml_backend_cpu_init")
        self("ggml_backend_cpu_set_n_threads", self.backend, torch.get_num_threads())
        self.plain = self("ggml_backend_cpu_buffer_type")
        self.extra = self._extra_buffer_types() if has_extra_buffers else []
        self.context = self("ggml_init", _Parameters(CONTEXT_BYTES, None, True))

    def __call__(self, name: str, *arguments: Any) -> Any:
        return self.functions[name](*arguments)

    def _extra_buffer_types(self) -> list[int]:
        """Those of the CPU, best first."""
        self("ggml_log_set", _log, None)
        self.device = self("ggml_backend_get_device", self.backend)
        registry = self("ggml_backend_dev_backend_reg", self.device)
        address = self("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
        found = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(address)(self.device)
        types: list[int] = []
        while found[len(types)]:
            types.append(found[len(types)])
        return types

    def allocate(self, tensor: int, buffer_type: int) -> int:
        """A buffer for it alone."""
        size = self("ggml_backend_buft_get_alloc_size", buffer_type, tensor)
        buffer = self("ggml_backend_buft_alloc_buffer", buffer_type, size)
        if not buffer:
            raise MemoryError(f"ggml has no {size} bytes")
        self("ggml_backend_tensor_alloc", buffer, tensor, self("ggml_backend_buffer_get_base", buffer))
        return buffer

    def takes(self, product: int, buffer_type: int) -> bool:
        """Whether the backend computes it of weights in this type of buffer; the plain one is always taken."""
        return buffer_type == self.plain or self("ggml_backend_dev_supports_op", self.device, product)


@functools.cache
def _library(name: str) -> Library:
    return Library(_llama_libraries(), True) if name == "llama.cpp" else Library(_ik_libraries(), False)


class Product:
    """One product: weights, x and y in memory of ggml's, and a graph of one node."""

    def __init__(self, library: Library, form: int, blocks: np.ndarray, x: Tensor) -> None:
        (m, k), n = x.shape, blocks.shape[0]
        given = library("ggml_new_tensor_2d", library.context, F32, k, m)
        for buffer_type in [*library.extra, library.plain]:
            weight = library("ggml_new_tensor_2d", library.context, form, k, n)
            buffer = library.allocate(weight, buffer_type)
            y = library("ggml_mul_mat", library.context, weight, given)
            if library.takes(y, buffer_type):
                break
            library("ggml_backend_buffer_free", buffer)
        buffers = [buffer, library.allocate(given, library.plain), library.allocate(y, library.plain)]
        self._library, self._graph = library, library("ggml_new_graph_custom", library.context, 4, False)
        library("ggml_build_forward_expand", self._graph, y)
        # ggml counts the bytes of weights that it is given in the form of the file, not in the one of the buffer.
        for tensor, values in ((weight, blocks), (given, x.float().contiguous().numpy())):
            library("ggml_backend_tensor_set", tensor, values.ctypes.data, 0, values.nbytes)
        memory = (ctypes.c_float * (m * n)).from_address(library("ggml_get_data", y))
        # It lives as long as the result is looked at.
        weakref.finalize(memory, _free, library, buffers)
        self._result = torch.frombuffer(memory, dtype=torch.float32).view(m, n)

    def __call__(self) -> Tensor:
        if status := self._library("ggml_backend_graph_compute", self._library.backend, self._graph):
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return self._result


def _free(library: Library, buffers: list[int]) -> None:
    for buffer in buffers:
        library("ggml_backend_buffer_free", buffer)


def quantised(p: Int4Gemm) -> tuple[int, np.ndarray]:
    """The type of ggml, and its blocks [N, K / 32, bytes]: scale, what Q4_1 adds, and two halves of 16 codes."""
    n, k = p.qweight.shape[0], 2 * p.qweight.shape[1]
    codes = layouts.codes(p).view(n, k // GROUP, 2, GROUP // 2)
    parts = [codes[:, :, 0] | codes[:, :, 1] << 4]
    floats = [p.scales.float()]
    if p.zeros is not None:
        zeros = p.zeros.float()
        floats.append(zeros if p.kind == "offset" else -p.scales.float() * zeros)
    for values in reversed(floats):
        repeated = values.repeat_interleave(k // values.shape[1] // GROUP, dim=1).half()
        parts.insert(0, repeated[..., None].view(torch.uint8))
    return Q4_0 if p.zeros is None else Q4_1, torch.cat(parts, dim=-1).numpy()


def int4_gemm(name: str, p: Int4Gemm) -> Callable[[], Result]:
    return Product(_library(name), *quantised(p), p.x)


def _unsupported(device: str, axes: Axes) -> str | None:
    if int(axes["K"]) % GROUP or int(axes["G"]) % GROUP:
        return f"groups of {GROUP} and their multiples only"
    return layouts.unsupported(kinds=("symmetric", "zero_point", "offset"))(device, axes)


PROVIDERS = [
    Provider(
        name,
        op,
        ("cpu",),
        functools.partial(int4_gemm, name),
        "int8 activations per group, fp16 scales; float32 in and out",
        (requires,),
        unsupported=_unsupported,
        rebuilt=True,
    )
    for op in ("int4_gemm", "int4_int8_gemm")
    for name, requires in (("llama.cpp", "llama_cpp_python"), ("ik_llama.cpp", "ik_llama_cpp_python"))
]
