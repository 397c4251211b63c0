// Which tile int8_gemm uses on a GPU, and which part of the product each block computes: pure functions of the shape
// and of the GPU, that know nothing of epilogues. Sums are exact integers, so no plan changes a bit of the result.
//
// A unit is one tile of tokens x 128 rows of w over one block of 64 columns of K. Units are counted tile by tile, K
// first, and the count is cut into equal ranges, one for each block of the grid: every multiprocessor has the same
// work, whatever the shape (N = 4096 in tiles of one block each would leave most of them idle). A range may begin and
// end inside a tile; what it has of such a tile goes to scratch, and a second kernel adds. Where tiles fill the GPU
// well enough, ranges are whole tiles and there is no second kernel.
//
// Tokens are spread evenly over their tiles, eight at a time: M = 513 may be 8 tiles of 72, which fill an H100 twice
// where N = 4096, and is never 4 of 128 and one of a single token. Warps skip the tokens that a tile has not got.
//
// The times are those of gpu.h's model.
#pragma once

#include "cuda/gpu.h"
#include "int8_layout.h"

namespace qops::cuda::int8 {

using namespace qops::int8;

inline constexpr int kTileTokens[] = {8, 16, 32, 64, 128};
// How many tokens a tile may be given: up to 32, all that it has room for, as weights bound the product.
struct TokenLimit {
  int tile, tokens;
};
inline constexpr TokenLimit kTokenLimits[] = {{8, 8},    {16, 16},  {32, 32},  {64, 48},   {64, 64},
                                              {128, 72}, {128, 80}, {128, 96}, {128, 112}, {128, 128}};
// 64 columns of a token.
inline constexpr int kTokenBytes = kBlockColumns;
inline constexpr int kWeightBytes = kTileStrips * kBlockBytes;  // of a stage

// How a tile is shared by warps, and how many stages of K are in shared memory where two blocks are on a
// multiprocessor. Up to 32 tokens weights bound the product: a warp for each strip. Beyond, a warp multiplies 4 strips
// by 64 tokens (2 strips where there are no more tokens): 12 reads of 512 bytes for 64 instructions, which is what
// shared memory can do beside the tensor cores.
struct TileShape {
  int tokens, strips_of_warp, token_warps, stages;

  QOPS_ALWAYS_INLINE constexpr int strip_warps() const { return kTileStrips / strips_of_warp; }
  QOPS_ALWAYS_INLINE constexpr int warps() const { return token_warps * strip_warps(); }
  QOPS_ALWAYS_INLINE constexpr int threads() const { return 32 * warps(); }
  QOPS_ALWAYS_INLINE constexpr int token_tiles() const { return tokens / 8 / token_warps; }  // of a warp
  // Whether a warp skips tiles of eight tokens without tokens: where the tensor cores bound the product.
  QOPS_ALWAYS_INLINE constexpr bool skips() const { return tokens >= 64; }
  QOPS_ALWAYS_INLINE constexpr int stage_bytes() const { return kWeightBytes + tokens * kTokenBytes; }
  // Sums of 8 tokens by the rows of a warp, on their way to memory. 2 * stride = 8 modulo 32 makes the stores of a
  // fragment, lanes 4 g + t at row 2 t and column g, free of bank conflicts.
  QOPS_ALWAYS_INLINE constexpr int sum_stride() const { return strips_of_warp * kStripRows + 4; }
  QOPS_ALWAYS_INLINE constexpr int shared_bytes(int of_stages) const {
    return of_stages * stage_bytes() + warps() * 8 * sum_stride() * 4;
  }
  // Where weights bound the product.
  QOPS_ALWAYS_INLINE constexpr bool can_be_deep() const { return tokens <= 64; }
};
// Where a block has a multiprocessor to itself: 72 KiB of weights under way, as two blocks together have 80 and more.
inline constexpr int kDeepStages = 10;
constexpr TileShape tile_shape(int tokens) {
  if (tokens == 128) return {128, 4, 2, 4};
  if (tokens == 64) return {64, 2, 1, 6};
  return {tokens, 1, 1, tokens == 32 ? 7 : 8};
}

// Where 16 bytes of a token lie in a stage, two tokens in 128 bytes: permuted so that eight tokens of one column of
// chunks, which ldmatrix reads at a time, are in different banks.
QOPS_ALWAYS_INLINE constexpr int token_place(int token, int chunk) {
  return token * kTokenBytes + ((chunk ^ token >> 1) & 3) * 16;
}
// What `lane` gives to ldmatrix for two tiles of eight tokens (lanes 0 .. 15 for one): the B operands of one of the two
// fragments. The second is kNextFragment away, by exclusive or.
QOPS_ALWAYS_INLINE constexpr int token_address(int lane, int fragment = 0) {
  return token_place(lane / 16 * 8 + lane % 8, 2 * fragment + lane / 8 % 2);
}
inline constexpr uint32_t kNextFragment = 32;

// --- the plan --------------------------------------------------------------------------------------------------------

// What a block computes: tiles first_tile .. end_tile - 1, of the first one from block first_k of K on, of the last one
// up to end_k.
struct Part {
  int first_tile, end_tile;
  int first_k, end_k;
};

// A tile that blocks first .. last share; none where last < first.
struct Split {
  int64_t tile;
  int64_t first, last;
};

struct Plan {
  int tokens;       // of the kernel's tile
  int live_tokens;  // that a tile has got of them, a multiple of 8
  int last_tokens;  // that the last tile has got, of any number
  int stages;
  bool split;  // ranges may end inside of tiles
  int k_blocks;
  int64_t token_tiles, row_tiles;
  int64_t blocks;
  int64_t time;  // by the model
  // By prepare(): tiles, or units of a split plan, of a block; how many blocks have one more; and how to divide.
  uint32_t each, more;
  Division by_blocks, by_k;

  constexpr void prepare() {
    const int64_t all = split ? units() : tiles();
    each = static_cast<uint32_t>(all / blocks);
    more = static_cast<uint32_t>(all % blocks);
    by_blocks = Division(static_cast<uint32_t>(blocks));
    by_k = Division(static_cast<uint32_t>(max_of(k_blocks, 1)));
  }

  QOPS_ALWAYS_INLINE constexpr int64_t tiles() const { return token_tiles * row_tiles; }
  QOPS_ALWAYS_INLINE constexpr bool has_second_kernel() const { return split && blocks > 1; }
  QOPS_ALWAYS_INLINE constexpr int64_t units() const { return tiles() * k_blocks; }
  // Of the range of a block, of a split plan: units * block / blocks.
  QOPS_ALWAYS_INLINE constexpr uint32_t first_unit(uint32_t block) const {
    return each * block + by_blocks(more * block);
  }

  // Whole tiles: one more for each of the first blocks. Multiprocessor i runs blocks i and i + multiprocessors as a
  // rule, so that none has more than one tile more than the others.
  QOPS_ALWAYS_INLINE constexpr Part part(uint32_t block) const {
    if (!split) {
      const uint32_t first = block * each + (block < more ? block : more);
      return {static_cast<int>(first), static_cast<int>(first + each + (block < more ? 1 : 0)), 0, k_blocks};
    }
    const uint32_t of_tile = static_cast<uint32_t>(k_blocks), begin = first_unit(block), end = first_unit(block + 1);
    const uint32_t tile = by_k(begin), last = by_k(end - 1);
    return {static_cast<int>(tile), static_cast<int>(last + 1), static_cast<int>(begin - tile * of_tile),
            static_cast<int>(end - last * of_tile)};
  }

  // The block that computes a unit, of a split plan.
  QOPS_ALWAYS_INLINE constexpr int64_t block_of(int64_t unit) const { return ((unit + 1) * blocks - 1) / units(); }

  // The tile that the range of `block` begins inside of, told for one block of each such tile.
  QOPS_ALWAYS_INLINE constexpr Split split_at(uint32_t block) const {
    const uint32_t unit = first_unit(block);
    const int64_t tile = by_k(unit);
    if (unit == tile * k_blocks) return {tile, 0, -1};
    const int64_t first = block_of(tile * k_blocks);
    if (block != first + 1) return {tile, 0, -1};
    return {tile, first, block_of((tile + 1) * k_blocks - 1)};
  }

  // Sums [slot][token][row] of tiles that blocks share: a block has two at most, the first and the last of its range.
  QOPS_ALWAYS_INLINE constexpr int64_t slot(uint32_t block, int64_t tile) const {
    return 2 * int64_t{block} + (tile == by_k(first_unit(block)) ? 0 : 1);
  }
  QOPS_ALWAYS_INLINE constexpr int64_t slot_sums() const { return int64_t{live_tokens} * kTileRows; }
  constexpr int64_t scratch_bytes() const { return split ? 2 * blocks * slot_sums() * 4 : 0; }

  QOPS_ALWAYS_INLINE constexpr TilePosition position(int64_t tile) const {
    return tile_position(tile, token_tiles, row_tiles);
  }

  QOPS_ALWAYS_INLINE constexpr int tokens_of(int64_t token_tile) const {
    return token_tile + 1 == token_tiles ? last_tokens : live_tokens;
  }
  // Tiles of eight tokens that each of `warps` warps takes one after the other, and how many of them have tokens.
  QOPS_ALWAYS_INLINE constexpr int token_tiles_of_warp(int warps) const {
    return (live_tokens / 8 + warps - 1) / warps;
  }
  QOPS_ALWAYS_INLINE constexpr int live_tiles(int64_t token_tile, int warp, int warps) const {
    const int each = token_tiles_of_warp(warps), left = (tokens_of(token_tile) + 7) / 8 - warp * each;
    return left < 0 ? 0 : left < each ? left : each;
  }
};

namespace model {

using namespace cuda::model;

// From memory, of any GPU: what a multiprocessor gets, and what if others leave theirs.
inline constexpr int64_t kBytesPerCycle = 16, kMostBytesPerCycle = 20;
// A block is not worth its start for fewer; and ranges are numbers of 32 bits.
inline constexpr int64_t kLeastUnits = 4, kMostUnits = int64_t{1} << 30;

constexpr int64_t blocks_per_multiprocessor(TileShape tile, Gpu gpu) {
  return max_of(1, min_of(2, (gpu.shared_bytes + kReserved) / (tile.shared_bytes(tile.stages) + kReserved)));
}

// Never less for more tokens, but for the one place where a second tile of tokens begins to read the weights, M = 9.
constexpr Plan plan(int64_t m, int64_t n, int64_t k, TokenLimit limit, bool split, Gpu gpu) {
  const TileShape tile = tile_shape(limit.tile);
  Plan p{};
  p.tokens = limit.tile;
  p.split = split;
  p.k_blocks = static_cast<int>(int8::blocks(k));
  p.token_tiles = ceil_div(m, limit.tokens);
  p.live_tokens = static_cast<int>(ceil_div(ceil_div(m, p.token_tiles), 8) * 8);
  p.last_tokens = static_cast<int>(m - (p.token_tiles - 1) * p.live_tokens);
  p.row_tiles = ceil_div(n, kTileRows);
  const int64_t resident = gpu.multiprocessors * blocks_per_multiprocessor(tile, gpu);
  p.blocks = min_of(split ? ceil_div(p.units(), kLeastUnits) : p.tiles(), resident);
  const bool deep = tile.can_be_deep() && p.blocks <= gpu.multiprocessors;
  p.stages = deep && tile.shared_bytes(kDeepStages) <= gpu.shared_bytes ? kDeepStages : tile.stages;
  const int64_t of_multiprocessor = split ? ceil_div(p.units(), p.blocks) * ceil_div(p.blocks, gpu.multiprocessors)
                                          : ceil_div(p.tiles(), gpu.multiprocessors) * p.k_blocks;
  // By the limit and not by what the tiles have got, which falls where there is one tile more.
  const int64_t token_tiles = ceil_div(limit.tokens / 8, tile.token_warps) * tile.token_warps;
  const int64_t mma = token_tiles * kTileStrips * kFragments * kCyclesPerMma;
  const int64_t from_memory = kWeightBytes / (kMostBytesPerCycle * p.token_tiles);
  const int64_t from_l2 = (kWeightBytes + limit.tokens * kTokenBytes) / l2_bytes_per_cycle(gpu);
  const int64_t memory = strips(n) * strip_bytes(k) / (kBytesPerCycle * gpu.multiprocessors);
  p.time = kStart + max_of(of_multiprocessor * max_of(max_of(mma, from_memory), from_l2), memory);
  if (split) {
    const int64_t slots = p.blocks + min_of(p.blocks, p.tiles());
    const int64_t sums = slots * min_of(m, limit.tokens) * kTileRows * 4;  // written and read
    p.time += second_kernel(sums, gpu);
  }
  p.prepare();
  return p;
}

}  // namespace model

// Total: a plan for every M and N above 0 and every K, on every GPU with 99 KiB of shared memory.
constexpr Plan plan_int8_gemm(int64_t m, int64_t n, int64_t k, Gpu gpu) {
  Plan best{};
  for (const TokenLimit limit : kTokenLimits) {
    for (int splits = 0; splits < (k == 0 ? 1 : 2); ++splits) {
      const Plan p = model::plan(m, n, k, limit, splits == 1, gpu);
      if (p.split && p.units() > model::kMostUnits) continue;
      if (best.blocks == 0 || p.time <= best.time) best = p;
    }
    if (m <= limit.tokens) break;
  }
  return best;
}

namespace proof {

// Phases of eight lanes, 16 bytes each, touch all 32 banks once.
template <class F>
constexpr bool covers_the_banks(int lanes, const F& address) {
  for (int phase = 0; phase < lanes; phase += 8) {
    int units = 0;
    for (int lane = phase; lane < phase + 8; ++lane) units |= 1 << address(lane) / 16 % 8;
    if (units != 0xff) return false;
  }
  return true;
}
static_assert(covers_the_banks(32, [](int lane) { return token_address(lane); }));
static_assert(covers_the_banks(32, [](int lane) { return token_address(lane, 1); }));
static_assert(covers_the_banks(512, [](int piece) { return token_place(piece / 4, piece % 4); }));  // the copies
static_assert(covers_the_banks(32, [](int lane) { return lane * kLaneBytes; }));                    // fragments of w

constexpr bool fragments_are_apart() {
  for (int lane = 0; lane < 32; ++lane) {
    if (token_address(lane, 1) != (token_address(lane) ^ static_cast<int>(kNextFragment))) return false;
  }
  return true;
}
static_assert(fragments_are_apart());

constexpr bool shapes_fit() {
  for (const int tokens : kTileTokens) {
    const TileShape t = tile_shape(tokens);
    // Two blocks on an A100's 164 KiB, one on the 99 KiB of the smallest.
    const int bytes = t.shared_bytes(t.stages);
    if (t.tokens != tokens || 2 * (bytes + 1024) > 164 * 1024 || bytes > 99 * 1024) return false;
    if (t.token_tiles() * t.token_warps * 8 != tokens || 2 * t.sum_stride() % 32 != 8) return false;
    if (t.stages < 4 || tokens * 4 % 32 != 0) return false;
  }
  for (const TokenLimit limit : kTokenLimits) {
    if (limit.tokens % 8 != 0 || limit.tokens > limit.tile) return false;
  }
  return true;
}
static_assert(shapes_fit());

}  // namespace proof
}  // namespace qops::cuda::int8
