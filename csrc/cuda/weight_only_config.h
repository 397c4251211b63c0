// How int4_gemm and int8_weight_only_gemm run on a GPU, and which part of the product each block computes: pure
// functions of the shape and of the GPU, that know nothing of epilogues. No plan of our kernels changes a bit of the
// result: the order of the sums is that of the 8 slices of K.
//
// The times are those of gpu.h's model. Each kind of plan takes longer for more rows, so the best one does, too.
#pragma once

#include "cuda/gpu.h"
#include "int4_layout.h"
#include "int8_layout.h"

namespace qops::cuda {

// The canonical order: K in 8 contiguous slices of whole blocks of 64 columns, summed one by one and added left to
// right. Some are empty where there are fewer blocks.
inline constexpr int kSlices = 8;
QOPS_ALWAYS_INLINE constexpr Range blocks_of_slice(int64_t blocks, int64_t slice) {
  return part_of({0, blocks}, slice, kSlices);
}

inline constexpr int kGemmThreads = 256;
inline constexpr int kGemmWarps = kGemmThreads / 32;
// How many stages a ring may have. The instruction that waits for copies has their number in it, and a choice among
// many would cost the loops many instructions.
inline constexpr int kRingStages[] = {10, 8, 6, 4, 3, 2};
// The most that fit; 0 if not two do.
constexpr int ring_stages(int64_t stage_bytes, int64_t room) {
  for (const int stages : kRingStages) {
    if (stages * stage_bytes <= room) return stages;
  }
  return 0;
}

// --- shared memory of one stage of a ring: one block of 64 columns ---------------------------------------------------

// Codes of 4 or 8 bits; strips and blocks of columns are the same of both.
static_assert(int4::kBlockColumns == int8::kBlockColumns && int4::kLaneBytes == int8::kLaneBytes);
QOPS_ALWAYS_INLINE constexpr int block_bytes(int bits) { return bits == 4 ? int4::kBlockBytes : int8::kBlockBytes; }
QOPS_ALWAYS_INLINE constexpr int64_t strip_bytes(int bits, int64_t k) { return int4::blocks(k) * block_bytes(bits); }

// Scales and zeros of a strip: of one group, or of the four that 64 columns can touch where groups are not multiples
// of 64. Each row takes up to 4 bytes for its scale and 4 for its zero.
inline constexpr int kGroupRowBytes = 4 * kStripRows;
QOPS_ALWAYS_INLINE constexpr int groups_of_stage(bool fine) { return fine ? 4 : 1; }
QOPS_ALWAYS_INLINE constexpr int scale_bytes_of_strip(bool fine) { return 2 * kGroupRowBytes * groups_of_stage(fine); }
QOPS_ALWAYS_INLINE constexpr int strip_stage_bytes(int bits, bool fine) {
  return block_bytes(bits) + scale_bytes_of_strip(fine);
}
// 64 columns of a row of x.
inline constexpr int kTokenStageBytes = 2 * int4::kBlockColumns;

// Where 16 bytes of x lie in a stage: rows of 8 chunks, permuted so that what is read at a time is in different banks.
// Beside codes of 4 bits these are eight rows of one column of chunks, by ldmatrix. Of 8 bits a lane's code words are
// four neighbouring columns (int8_layout.h), so it reads those of x, 8 bytes: half a warp, four rows of two chunks.
QOPS_ALWAYS_INLINE constexpr int x_place(int bits, int token, int chunk) {
  return token * kTokenStageBytes + ((chunk ^ (bits == 4 ? token : 2 * token)) & 7) * 16;
}

// What lane `lane` reads of k16 step `step` of eight tokens from `tile` on: of 4 bits the address that it gives to
// ldmatrix, for an even step and the next one.
QOPS_ALWAYS_INLINE constexpr int x_address(int bits, int tile, int step, int lane) {
  if (bits == 4) return x_place(4, 8 * tile + lane % 8, 2 * step + lane / 8);
  return x_place(8, 8 * tile + lane / 4, 2 * step + lane % 4 / 2) + lane % 2 * 8;
}

// Of a fragment of sums of 16 rows x 8 tokens: element i of a lane.
QOPS_ALWAYS_INLINE constexpr int sum_token(int lane, int i) { return lane % 4 * 2 + i % 2; }
QOPS_ALWAYS_INLINE constexpr int sum_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
// Floats between the tokens of a tile of sums in shared memory: 4 modulo 16, so that the lanes of a
// fragment, 2 tokens apart for each of 4, are in different banks.
QOPS_ALWAYS_INLINE constexpr int sum_stride(int strips) { return strips * kStripRows + 4; }

// Group sizes that are multiples of 64 (or K itself) need one scale per row and stage.
constexpr bool is_fine(int64_t k, int64_t group_size) {
  return group_size != k && group_size % int4::kBlockColumns != 0;
}

// --- the plan --------------------------------------------------------------------------------------------------------

// Whether the kernel for groups that end anywhere is the one. Of 8 bits it is that of all weights with offsets, too:
// these are few, and so are kernels to be.
constexpr bool has_fine_kernel(int bits, int64_t k, int64_t group_size, WeightKind kind) {
  return is_fine(k, group_size) || (bits == 8 && has_float_zeros(kind));
}

inline constexpr int kDecodeTokens = 24;  // rows of x up to which there is a decode kernel
// How many strips a warp of the decode kernel takes at a time, which share a fragment of x. Two of 8 bits are as many
// bytes as four of 4.
inline constexpr int kStripsOfWarp[] = {4, 2};
QOPS_ALWAYS_INLINE constexpr bool has_strips(int bits, int strips) { return bits == 4 || strips == 2; }
// More than 16 rows take twice as many instructions where groups are fine, and kernels are not to be too many.
QOPS_ALWAYS_INLINE constexpr bool has_decode_kernel(int bits, int64_t m, bool fine) {
  return m <= (fine || bits == 8 ? 16 : kDecodeTokens);
}
inline constexpr int kTileTokens[] = {32, 64, 128};
// The sums of x that offsets need do not fit beside those of a tile of 128 tokens (255 registers and 200 bytes
// spilled), and its shared memory does not fit on sm_120.
QOPS_ALWAYS_INLINE constexpr int max_tile_tokens(bool offset, int arch) { return offset || arch >= 120 ? 64 : 128; }
// Up to 32 tokens weights bound the product. A second block multiplies while the first waits at a barrier, and both
// together have enough bytes under way. (With the sums of x it would spill on sm_80.)
QOPS_ALWAYS_INLINE constexpr int blocks_of_multiprocessor(int tile_tokens, bool offset) {
  return tile_tokens == 32 && !offset ? 2 : 1;
}

// What kernels leave for the next one: what an L2 may hold.
inline constexpr int64_t kMostScratch = int64_t{32} << 20;

// A part of the tiled kernel's work: slices slice0 .. slice0 + slices - 1 of a tile.
struct Item {
  int64_t tile;
  int slice0, slices;
};

struct GemmPlan {
  enum class Kind { kDecode, kTiled, kDense };

  Kind kind;
  int stages;
  int64_t shared_bytes;
  int64_t blocks;
  int64_t time;  // by the model
  int tokens;    // of a tile that the kernel is compiled for: a multiple of 8
  int k_parts;   // 1, 2, 4 or 8 blocks share slices; above 1, a second kernel adds them
  // Decode: into how many ranges the strips are cut, one for each block of a part; how many strips a warp takes at a
  // time; and the stages of x: as many as of codes, or all of a slice where x is copied once for all strips. Dense:
  // strips that are dequantised at a time, and rows of x that are multiplied with them at a time.
  int64_t ranges;
  int64_t strips;
  int x_stages;
  bool keeps_x;
  int64_t rows;
  // Tiled: tiles of `live` tokens, in eights, x 128 rows of w. The kernel leaves out what it could hold beyond. The
  // first `whole` of them have a block each, the others k_parts. Blocks take items in turns.
  int live;
  int64_t token_tiles, row_tiles, whole;

  QOPS_ALWAYS_INLINE constexpr int64_t tiles() const { return token_tiles * row_tiles; }
  // Whether a second kernel adds what blocks leave of slices that they share.
  QOPS_ALWAYS_INLINE constexpr bool has_second_kernel() const {
    return kind == Kind::kDecode ? k_parts > 1 : whole < tiles();
  }
  QOPS_ALWAYS_INLINE constexpr int64_t items() const { return whole + (tiles() - whole) * k_parts; }
  QOPS_ALWAYS_INLINE constexpr Item item(int64_t index) const {
    if (index < whole) return {index, 0, kSlices};
    const uint32_t beyond = static_cast<uint32_t>(index - whole), parts = static_cast<uint32_t>(k_parts);
    const int slices = kSlices / k_parts;
    return {whole + beyond / parts, static_cast<int>(beyond % parts) * slices, slices};
  }

  QOPS_ALWAYS_INLINE constexpr TilePosition position(int64_t tile) const {
    return tile_position(tile, token_tiles, row_tiles);
  }

  // float32 sums between two kernels: [slice][M][S * 16] (decode), [slice][tile][live][128] of the tiles that blocks
  // share (tiled); or weights [strips * 16][K], sums [rows][strips * 16] and a factor of each column of these (dense).
  constexpr int64_t scratch_bytes(int64_t m, int64_t n, int64_t k) const {
    if (kind == Kind::kDense) return strips * kStripRows * (2 * k + 4 * rows + 4);
    if (k_parts == 1) return 0;
    return 4 * kSlices *
           (kind == Kind::kDecode ? m * int4::strips(n) * kStripRows : (tiles() - whole) * live * kTileRows);
  }

  bool operator==(const GemmPlan&) const = default;
};

namespace plan {

using namespace model;

// Instructions that a warp of the decode kernel issues for 64 columns: of up to 8, 16 and 24 rows of x, of 4 and of 2
// strips; and all warps of the tiled kernel: whatever the tokens, and for each 8 of them, of up to 64 and of up to 128.
inline constexpr int64_t kDecodeSlots[3][2] = {{296, 185}, {331, 208}, {367, 225}};
inline constexpr int64_t kTiledSlots = 924, kTiledSlotsOfEight[2] = {96, 112};
// Of 8 bits, of 2 strips.
inline constexpr int64_t kDecodeSlotsOfInt8[2] = {260, 285};
inline constexpr int64_t kTiledSlotsOfInt8 = 1152, kTiledSlotsOfEightOfInt8[2] = {112, 137};

// Blocks of the decode kernel, one for each multiprocessor: each takes some strips and all slices of its part.
constexpr GemmPlan decode(int bits, int64_t m, int64_t n, int64_t k, bool fine, int k_parts, int strips_of_warp,
                          Gpu gpu) {
  const int64_t strips = int4::strips(n), blocks = int4::blocks(k);
  GemmPlan p{};
  p.kind = GemmPlan::Kind::kDecode;
  p.tokens = static_cast<int>(8 * ceil_div(m, 8));
  p.k_parts = k_parts;
  p.strips = strips_of_warp;
  p.ranges = max_of(1, min_of(strips, gpu.multiprocessors / k_parts));
  p.blocks = p.ranges * k_parts;
  const int64_t of_block = ceil_div(strips, p.ranges), of_warp = ceil_div(of_block, k_parts);
  const int64_t passes = ceil_div(of_warp, p.strips), slice_blocks = ceil_div(blocks, kSlices);
  const int64_t sums = 4 * p.tokens * sum_stride(strips_of_warp);
  const int64_t codes = kGemmWarps * p.strips * strip_stage_bytes(bits, fine),
                x = kGemmWarps * p.tokens * kTokenStageBytes;
  // With a ring of x, and with all of x.
  p.stages = ring_stages(codes + x, gpu.shared_bytes - sums);
  const int beside_x = ring_stages(codes, gpu.shared_bytes - sums - slice_blocks * x);
  p.keeps_x = passes > 1 && beside_x >= max_of(2, p.stages);
  if (p.keeps_x) p.stages = beside_x;
  p.x_stages = p.keeps_x ? static_cast<int>(slice_blocks) : p.stages;
  p.shared_bytes = sums + p.stages * codes + p.x_stages * x;
  const int64_t code_bytes = of_block * strip_bytes(bits, k) / k_parts;
  const int64_t x_bytes = (p.keeps_x ? 1 : passes) * m * 2 * int4::kBlockColumns * blocks;
  // Of all warps, of which some may have one strip more than others, and of one alone.
  const int eights = p.tokens / 8 - 1;
  const int64_t slots =
      slice_blocks * (bits == 4 ? kDecodeSlots[eights][strips_of_warp == 2] : kDecodeSlotsOfInt8[eights]);
  const int64_t more = of_block % k_parts;
  const int64_t all =
      more * ceil_div(of_block / k_parts + 1, p.strips) + (k_parts - more) * ceil_div(of_block / k_parts, p.strips);
  const int64_t issue = max_of(cycles_of_slots(kSlices / k_parts * all * slots), passes * slots * kCyclesOfWarpSlot);
  const int64_t memory = max_of(code_bytes / bytes_per_cycle(gpu), (code_bytes + x_bytes) / l2_bytes_per_cycle(gpu));
  p.time = kStart + max_of(memory, issue);
  if (k_parts > 1) p.time += second_kernel(p.scratch_bytes(m, n, k), gpu);
  return p;
}

// What a tiled kernel is to a plan: tokens that it is compiled for, the most blocks of it on a multiprocessor, bytes of
// a stage of its ring, and for 64 columns the bytes of codes and of a token, instructions of all warps and cycles of
// the tensor cores.
struct TileCosts {
  int tokens;
  int64_t resident;
  int64_t stage_bytes, code_bytes, token_bytes;
  int64_t slots, mma;
};

// Tiles of `live` x 128. `in_waves`: as many tiles as fill the GPU some times over have a block each. part_blocks:
// blocks of 64 columns of the longest of the k_parts.
constexpr GemmPlan tiles(int64_t m, int64_t n, int64_t k, const TileCosts& costs, int live, int k_parts,
                         int64_t part_blocks, bool in_waves, Gpu gpu) {
  GemmPlan p{};
  p.kind = GemmPlan::Kind::kTiled;
  p.live = live;
  p.tokens = costs.tokens;
  p.k_parts = k_parts;
  p.strips = kTileStrips;
  p.token_tiles = ceil_div(m, live);
  p.row_tiles = ceil_div(n, kTileRows);
  const int64_t room = (gpu.shared_bytes + kReserved) / costs.resident - kReserved;
  const int64_t sums = 4 * p.tokens * sum_stride(kTileStrips);
  p.stages = ring_stages(costs.stage_bytes, room - sums);
  p.shared_bytes = sums + p.stages * costs.stage_bytes;

  const int64_t most_blocks = gpu.multiprocessors * costs.resident;
  p.whole = k_parts == 1 ? p.tiles() : in_waves ? p.tiles() / most_blocks * most_blocks : 0;
  p.blocks = min_of(p.items(), most_blocks);
  const int64_t shared_items = p.items() - p.whole;
  const int64_t of_multiprocessor = ceil_div(p.whole, gpu.multiprocessors) * int4::blocks(k) +
                                    ceil_div(shared_items, gpu.multiprocessors) * part_blocks;
  const int64_t copies = (costs.code_bytes + live * costs.token_bytes) / l2_bytes_per_cycle(gpu);
  const int64_t unit =
      max_of(max_of(costs.mma, cycles_of_slots(costs.slots)), max_of(copies, costs.code_bytes / bytes_per_cycle(gpu)));
  p.time = kStart + of_multiprocessor * unit;
  if (p.whole < p.tiles()) p.time += second_kernel(p.scratch_bytes(m, n, k), gpu);
  return p;
}

constexpr GemmPlan tiled(int bits, int64_t m, int64_t n, int64_t k, bool fine, bool offset, int live, int k_parts,
                         bool in_waves, Gpu gpu) {
  TileCosts c{};
  c.tokens = live <= kTileTokens[0] ? kTileTokens[0] : live <= kTileTokens[1] ? kTileTokens[1] : kTileTokens[2];
  c.resident = blocks_of_multiprocessor(c.tokens, offset);
  c.code_bytes = kTileStrips * block_bytes(bits);
  c.token_bytes = kTokenStageBytes;
  c.stage_bytes = kTileStrips * strip_stage_bytes(bits, fine) + c.tokens * kTokenStageBytes;
  c.slots = bits == 4 ? kTiledSlots + kTiledSlotsOfEight[c.tokens / 128] * (live / 8)
                      : kTiledSlotsOfInt8 + kTiledSlotsOfEightOfInt8[c.tokens / 128] * (live / 8);
  c.mma = int64_t{live} / 8 * kTileStrips * int4::kSteps * kCyclesPerMma;
  return tiles(m, n, k, c, live, k_parts, ceil_div(int4::blocks(k), k_parts), in_waves, gpu);
}

// cuBLAS on weights that int4_dequantize has made, and a kernel that finishes its float32 sums: some strips at a time,
// as many as scratch holds with the sums of all rows; if that is less than a tile of cuBLAS, a tile, and as many rows
// at a time as scratch holds then. For GPUs on which cuBLAS has instructions that the tiled kernel has not (wgmma of
// sm_90, tcgen05 of sm_100 and sm_103).
constexpr bool has_faster_cublas(Gpu gpu) { return gpu.arch >= 90 && gpu.arch < 120; }

// Not a share of the memory that is free: a call has the same plan, and bits, in every run.
inline constexpr int64_t kMostDenseScratch = int64_t{128} << 20;

// No plan (blocks = 0) where scratch does not hold the weights of a tile and enough rows: K of more than 500,000.
constexpr GemmPlan dense(int64_t m, int64_t n, int64_t k, Gpu gpu) {
  constexpr int64_t kMostOfPeak = 1600;  // multiplications of bf16 in a cycle, of wgmma's 2048
  constexpr int64_t kLeastStrips = 8;    // a tile of cuBLAS
  constexpr int64_t kLeastRows = 4096;   // fill any GPU with tiles of 128 x 128 sums
  GemmPlan p{};
  p.kind = GemmPlan::Kind::kDense;
  p.k_parts = 1;
  const int64_t strips = int4::strips(n), fitting = kMostDenseScratch / (kStripRows * (2 * k + 4 * m + 4));
  const int64_t at_most = max_of(kLeastStrips, fitting / kLeastStrips * kLeastStrips);
  const int64_t passes = ceil_div(strips, at_most);
  p.strips = min_of(strips, ceil_div(ceil_div(strips, passes), kLeastStrips) * kLeastStrips);
  const int64_t rows = (kMostDenseScratch / (p.strips * kStripRows) - 2 * k) / 4 - 1;
  if (rows < min_of(m, kLeastRows)) return p;
  const int64_t row_passes = ceil_div(m, rows);
  p.rows = ceil_div(m, row_passes);
  p.blocks = 1;
  const int64_t bytes = n * int4::blocks(k) * int4::kBlockBytes / kStripRows + 2 * 2 * n * k + 2 * 4 * m * n;
  p.time = passes * (1 + 2 * row_passes) * kNextKernel + bytes / (l2_bytes_per_cycle(gpu) * gpu.multiprocessors) +
           m * n * k / (kMostOfPeak * gpu.multiprocessors);
  return p;
}

}  // namespace plan

// What a plan depends on. may_round: whether the weights may be rounded to x's type, so that cuBLAS can multiply them;
// there is no kernel that does so with codes of 8 bits.
struct GemmShape {
  int bits;
  int64_t m, n, k, group_size;
  WeightKind kind;
  bool may_round;
  Gpu gpu;

  bool operator==(const GemmShape&) const = default;
};

// Total: some plan for every shape, of our kernels one with at least 2 stages, on every GPU with 99 KiB of shared
// memory.
constexpr GemmPlan plan_weight_only_gemm(const GemmShape& shape) {
  const auto [bits, m, n, k, group_size, kind, may_round, gpu] = shape;
  const bool fine = has_fine_kernel(bits, k, group_size, kind), offset = has_float_zeros(kind);
  GemmPlan best{};
  // Of equal plans the one with more blocks: it has more bytes under way.
  const auto consider = [&](const GemmPlan& p) {
    if (best.blocks == 0 || p.time < best.time || (p.time == best.time && p.blocks > best.blocks)) best = p;
  };
  const auto consider_ours = [&](const GemmPlan& p) {
    if (p.stages >= 2 && p.scratch_bytes(m, n, k) <= kMostScratch) consider(p);
  };
  for (int k_parts = 1; k_parts <= kSlices; k_parts *= 2) {
    for (const int strips : kStripsOfWarp) {
      if (!has_decode_kernel(bits, m, fine) || k_parts > gpu.multiprocessors) break;
      if (has_strips(bits, strips)) consider_ours(plan::decode(bits, m, n, k, fine, k_parts, strips, gpu));
    }
    for (int live = 16; live <= max_tile_tokens(offset, gpu.arch); live += 8) {
      consider_ours(plan::tiled(bits, m, n, k, fine, offset, live, k_parts, false, gpu));
      if (k_parts > 1) consider_ours(plan::tiled(bits, m, n, k, fine, offset, live, k_parts, true, gpu));
    }
  }
  if (may_round && bits == 4 && m > kDecodeTokens && k > 0 && plan::has_faster_cublas(gpu)) {
    if (const GemmPlan p = plan::dense(m, n, k, gpu); p.blocks > 0) consider(p);
  }
  return best;
}

// What the decode kernel works with, so that no thread divides: numbers of 32 bits. A weight has less than 2^32 blocks
// of 512 bytes.
struct DecodeWork {
  uint32_t blocks;                 // of 64 columns in K
  uint32_t chunks;                 // of 8 columns
  uint32_t parts_log, slices_log;  // k_parts is 1 << parts_log, the slices of a block are 1 << slices_log
  uint32_t strips, longer;         // of a range; the first `longer` ranges have one more
  int stages;
  bool keeps_x;
  uint32_t ring_bytes;              // of a warp
  uint32_t x_of_stage, x_of_block;  // bytes between two stages of x: of a ring, or of the blocks of a slice
};

// What a warp multiplies: a share of the strips of its block's range, over the blocks of one slice of K.
struct DecodeShare {
  uint32_t slice;
  uint32_t first_strip, strips;
  uint32_t first_block, blocks;
};

constexpr DecodeWork decode_work(const GemmPlan& plan, int64_t n, int64_t k) {
  const auto narrow = [](int64_t value) { return static_cast<uint32_t>(value); };
  const int64_t strips = int4::strips(n), x_bytes = plan.tokens * kTokenStageBytes;
  const int64_t rings = plan.shared_bytes - 4 * plan.tokens * sum_stride(static_cast<int>(plan.strips));
  uint32_t parts_log = 0;
  while (1 << parts_log < plan.k_parts) ++parts_log;
  return {narrow(int4::blocks(k)),
          narrow(k / 8),
          parts_log,
          3 - parts_log,
          narrow(strips / plan.ranges),
          narrow(strips % plan.ranges),
          plan.stages,
          plan.keeps_x,
          narrow(rings / kGemmWarps),
          plan.keeps_x ? 0 : narrow(x_bytes),
          plan.keeps_x ? narrow(x_bytes) : 0};
}

QOPS_ALWAYS_INLINE constexpr DecodeShare decode_share(const DecodeWork& work, uint32_t block, uint32_t warp) {
  const uint32_t range = block >> work.parts_log, part = block - (range << work.parts_log);
  const uint32_t turn = warp >> work.slices_log;
  const uint32_t begin = range * work.strips + (range < work.longer ? range : work.longer);
  const uint32_t count = work.strips + (range < work.longer ? 1 : 0), first = count * turn >> work.parts_log;
  DecodeShare share{};
  share.slice = (part << work.slices_log) + warp - (turn << work.slices_log);
  share.first_strip = begin + first;
  share.strips = (count * (turn + 1) >> work.parts_log) - first;
  // As blocks_of_slice().
  share.first_block = work.blocks * share.slice / kSlices;
  share.blocks = work.blocks * (share.slice + 1) / kSlices - share.first_block;
  return share;
}

// Plans that were asked for lately. To search for one takes 2 us; a model asks for few different ones, each twice a
// call.
template <GemmPlan (*kSearch)(const GemmShape&)>
class PlanCacheOf {
 public:
  const GemmPlan& operator()(const GemmShape& shape) {
    Found* const set = sets_[set_of(shape)];
    for (int way = 0; way < kWays; ++way) {
      if (set[way].shape == shape) return set[way].plan;
    }
    ++searches_;
    for (int way = kWays - 1; way > 0; --way) set[way] = set[way - 1];
    set[0] = {shape, kSearch(shape)};
    return set[0].plan;
  }

  int64_t searches() const { return searches_; }

 private:
  static constexpr int kSetBits = 5, kWays = 4;
  struct Found {
    GemmShape shape;  // none has M = 0
    GemmPlan plan;
  };

  // Sizes are multiples of powers of two, so only a product's upper bits depend on all of theirs.
  static constexpr uint64_t set_of(const GemmShape& shape) {
    uint64_t hash = 0;
    const int64_t sizes[] = {shape.bits, shape.m, shape.n, shape.k, shape.group_size, shape.may_round};
    for (const int64_t size : sizes) {
      hash = (hash ^ static_cast<uint64_t>(size)) * 0x9e3779b97f4a7c15;
      hash ^= hash >> 32;
    }
    return hash * 0x9e3779b97f4a7c15 >> (64 - kSetBits);
  }

  Found sets_[1 << kSetBits][kWays]{};
  int64_t searches_ = 0;
};
using PlanCache = PlanCacheOf<&plan_weight_only_gemm>;

}  // namespace qops::cuda
