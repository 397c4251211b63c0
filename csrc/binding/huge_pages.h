// Pages of 2 MiB for large results on the CPU.
//
// glibc's malloc gets more than 32 MiB, and several results of less, from the system in every call and gives it back
// after it; and the system hands out each page, zeroed, at its first touch. To write 32 MiB so takes two threads of a
// virtual Sapphire Rapids 13.8 ms in pages of 4 KiB, 5.5 in those of 2 MiB, and 1.0 where the pages are there (`out=`):
// the first is more than any operator on rows computes. numpy asks for huge pages from 4 MiB on, torch where
// THP_MEM_ALLOC_ENABLE=1.
#pragma once

#include <sys/mman.h>

#include <cstdint>

namespace qops::binding {

inline constexpr int64_t kLeastForHugePages = 4 << 20;

// For memory that is about to be written for the first time: the whole huge pages inside of it, so that it does not
// grow. Pages that are there already stay as they are, and so does all where the system has no huge ones.
inline void ask_for_huge_pages(void* memory, int64_t bytes) {
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

}  // namespace qops::binding
