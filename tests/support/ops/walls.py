"""Memory that ends a process which reads behind it: sanitizers do not see what AMX tiles read."""

from __future__ import annotations

import ctypes
import mmap

import torch


def before_a_wall(t: torch.Tensor) -> torch.Tensor:
    """A copy that ends where a page without access begins: a read behind it ends the process."""
    page = mmap.PAGESIZE
    size = (t.nbytes + page - 1) // page * page
    memory = mmap.mmap(-1, size + page)
    wall = ctypes.c_char.from_buffer(memory, size)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(ctypes.addressof(wall)), ctypes.c_size_t(page), 0) == 0
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=size - t.nbytes).view(t.shape)
    return copy.copy_(t)
