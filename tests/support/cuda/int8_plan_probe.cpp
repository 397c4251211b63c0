// What tests/cuda/test_cuda_int8_gemm.py asks about the plans of int8_config.h.
//
//   check                         every property that kernels rely on, over many shapes and GPUs; prints what fails
//   plan M N K SMS SHARED_BYTES   prints tokens, split, blocks, bytes of w under way on a multiprocessor, live tokens
//   times N K SMS SHARED_BYTES LAST   prints the model's times of M = 1 .. LAST
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <vector>

#include "cuda/int8_config.h"

using namespace qops::cuda;

namespace {

constexpr Gpu kGpus[] = {{1, 99 * 1024}, {3, 99 * 1024}, {108, 163 * 1024}, {128, 99 * 1024}, {132, 227 * 1024}};
constexpr Gpu kH100 = kGpus[4];

[[noreturn]] void fail(const char* what, const int8::Plan& p) {
  std::printf("%s: tiles of %d tokens, %lld x %lld, %d blocks of K, split %d, %lld blocks\n", what, p.tokens,
              static_cast<long long>(p.token_tiles), static_cast<long long>(p.row_tiles), p.k_blocks, p.split,
              static_cast<long long>(p.blocks));
  std::exit(1);
}

// Every token belongs to one tile of eight of one warp, and no tile of tokens is empty.
void check_tokens(const int8::Plan& p, int64_t m) {
  const int warps = int8::tile_shape(p.tokens).token_warps, room = int8::tile_shape(p.tokens).token_tiles();
  if (p.live_tokens % 8 != 0 || p.live_tokens > p.tokens || p.token_tiles_of_warp(warps) > room) fail("no room", p);
  int64_t tokens = 0;
  for (int64_t tile = 0; tile < p.token_tiles; ++tile) {
    if (p.tokens_of(tile) <= 0 || p.tokens_of(tile) > p.live_tokens) fail("an empty or overfull tile", p);
    tokens += p.tokens_of(tile);
    int next = 0;
    for (int warp = 0; warp < warps; ++warp) {
      if (p.live_tiles(tile, warp, warps) > 0 && warp * p.token_tiles_of_warp(warps) != next) fail("a gap", p);
      next += p.live_tiles(tile, warp, warps);
    }
    if (next != (p.tokens_of(tile) + 7) / 8) fail("tokens of no warp", p);
    // A block whose tile is full skips nothing.
    if (p.tokens_of(tile) == p.tokens && p.live_tiles(tile, warps - 1, warps) != room) fail("a full tile", p);
  }
  if (tokens != m) fail("tokens without a tile", p);
}

void check(const int8::Plan& p, int64_t m) {
  check_tokens(p, m);
  // Each unit belongs to one block; what blocks have of shared tiles lies apart, and is added once.
  std::vector<int> covered(static_cast<size_t>(p.units()));
  std::vector<std::set<int64_t>> sharing(static_cast<size_t>(p.tiles()));
  std::set<int64_t> slots;
  int64_t tiles = 0;
  for (int64_t block = 0; block < p.blocks; ++block) {
    const int8::Part part = p.part(block);
    if (part.first_tile >= part.end_tile || part.end_tile > p.tiles()) fail("an empty part", p);
    for (int64_t tile = part.first_tile; tile < part.end_tile; ++tile) {
      const int begin = tile == part.first_tile ? part.first_k : 0;
      const int end = tile + 1 == part.end_tile ? part.end_k : p.k_blocks;
      if (begin >= end && p.k_blocks > 0) fail("an empty range of K", p);
      for (int k = begin; k < end; ++k) ++covered[static_cast<size_t>(tile * p.k_blocks + k)];
      if (begin == 0 && end == p.k_blocks) {
        ++tiles;
        continue;
      }
      if (!p.split) fail("a tile of two blocks without a split", p);
      sharing[static_cast<size_t>(tile)].insert(block);
      const int64_t slot = p.slot(block, tile);
      if (!slots.insert(slot).second || slot < 0) fail("a slot of two tiles", p);
      if ((slot + 1) * p.slot_sums() * 4 > p.scratch_bytes()) fail("a slot past the scratch", p);
    }
  }
  for (const int times : covered) {
    if (times != 1) fail("a unit that is not computed once", p);
  }
  for (int64_t block = 1; p.split && block < p.blocks; ++block) {
    const int8::Split split = p.split_at(block);
    if (split.last < split.first) continue;
    std::set<int64_t> blocks;
    for (int64_t b = split.first; b <= split.last; ++b) blocks.insert(b);
    if (blocks != sharing[static_cast<size_t>(split.tile)]) fail("a tile added from the wrong blocks", p);
    sharing[static_cast<size_t>(split.tile)].clear();
    ++tiles;
  }
  if (tiles != p.tiles()) fail("a tile that is not finished once", p);
  std::set<std::pair<int64_t, int64_t>> places;
  for (int64_t tile = 0; tile < p.tiles(); ++tile) {
    const TilePosition at = p.position(tile);
    if (at.token_tile < 0 || at.token_tile >= p.token_tiles || at.row_tile < 0 || at.row_tile >= p.row_tiles) {
      fail("a tile outside", p);
    }
    places.insert({at.token_tile, at.row_tile});
  }
  if (static_cast<int64_t>(places.size()) != p.tiles()) fail("two tiles at one place", p);
}

int64_t bytes_under_way(const int8::Plan& p, Gpu gpu) {
  const int8::TileShape tile = int8::tile_shape(p.tokens);
  const int64_t resident =
      min_of(int8::model::blocks_per_multiprocessor(tile, gpu), ceil_div(p.blocks, gpu.multiprocessors));
  return resident * (p.stages - 1) * int8::kWeightBytes;
}

int check_all() {
  for (const Gpu gpu : kGpus) {
    for (const int64_t m : {1, 7, 8, 9, 17, 33, 64, 65, 129, 300, 1100}) {
      for (const int64_t n : {8, 120, 136, 576, 1000, 4096}) {
        for (const int64_t k : {0, 8, 72, 576, 4096, 8200}) {
          for (const int8::TokenLimit limit : int8::kTokenLimits) {
            check(int8::model::plan(m, n, k, limit, false, gpu), m);
            if (k > 0) check(int8::model::plan(m, n, k, limit, true, gpu), m);
          }
          const int8::Plan best = int8::plan_int8_gemm(m, n, k, gpu);
          if (best.blocks == 0) fail("no plan", best);
        }
      }
    }
  }
  // Of divisors and numbers at their ends, and around each multiple.
  for (const uint32_t divisor : {1u, 2u, 3u, 5u, 7u, 64u, 65u, 131u, 264u, 2047u, 2049u, 65535u, 65537u, 1000003u,
                                 (1u << 30) - 1, 1u << 30, (1u << 30) + 1, (1u << 31) - 1}) {
    const Division by(divisor);
    for (uint64_t of = 0; of < (uint64_t{1} << 31); of += divisor * (1 + (uint64_t{1} << 31) / divisor / 1000)) {
      for (const uint64_t n : {of, of + divisor - 1, of + divisor / 2, of == 0 ? 0 : of - 1}) {
        if (n < uint64_t{1} << 31 && by(static_cast<uint32_t>(n)) != n / divisor) fail("a wrong quotient", {});
      }
    }
    for (uint32_t n = (1u << 31) - 1000; n < 1u << 31; ++n) {
      if (by(n) != n / divisor) fail("a wrong quotient", {});
    }
  }
  // Total, up to the tiles that 31 bits number; nothing overflows.
  for (const int log_m : {0, 20, 37}) {
    const int64_t m = int64_t{1} << log_m, n = int64_t{1} << (37 - log_m);
    const int8::Plan p = int8::plan_int8_gemm(m, n, 131064, kH100);
    if (p.blocks <= 0 || p.units() <= 0 || p.part(p.blocks - 1).end_tile != p.tiles()) fail("overflow", p);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "check") == 0) return check_all();
  if (argc != 7) return 2;
  int64_t v[5];
  for (int i = 0; i < 5; ++i) v[i] = std::atoll(argv[i + 2]);
  if (std::strcmp(argv[1], "times") == 0) {
    for (int64_t m = 1; m <= v[4]; ++m) {
      std::printf("%lld\n", static_cast<long long>(int8::plan_int8_gemm(m, v[0], v[1], {v[2], v[3]}).time));
    }
    return 0;
  }
  const Gpu gpu{v[3], v[4]};
  const int8::Plan p = int8::plan_int8_gemm(v[0], v[1], v[2], gpu);
  std::printf("%d %d %lld %lld %d\n", p.tokens, p.split, static_cast<long long>(p.blocks),
              static_cast<long long>(bytes_under_way(p, gpu)), p.live_tokens);
  return 0;
}
