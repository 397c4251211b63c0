// Reads lines "bits m n k group_size kind may_round multiprocessors shared_bytes arch" and prints what
// csrc/cuda/weight_only_config.h plans for them, and how many times a cache of plans had to search so far; with "int8"
// what csrc/cuda/int4_int8_config.h does; with "banks" what the index functions of the first say about banks of shared
// memory instead.
#include <cstdio>
#include <cstring>
#include <set>
#include <vector>

#include "cuda/int4_int8_config.h"

using namespace qops;
using namespace qops::cuda;

namespace {

// How many times as long as it has to be an access of a warp takes: 32 banks of 4 bytes, a quarter of a warp at a time
// for 16 bytes a lane, half of one for 8. Lanes that read the same word share it.
double conflicts(const std::vector<int>& addresses, int bytes) {
  const int lanes = 128 / bytes < 32 ? 128 / bytes : 32;
  int taken = 0, phases = 0;
  for (std::size_t first = 0; first < addresses.size(); first += static_cast<std::size_t>(lanes)) {
    std::set<int> words[32];
    for (int lane = 0; lane < lanes; ++lane) {
      for (int at = 0; at < bytes; at += 4) {
        const int word = (addresses[first + static_cast<std::size_t>(lane)] + at) / 4;
        words[word % 32].insert(word);
      }
    }
    std::size_t most = 0;
    for (const auto& bank : words) most = bank.size() > most ? bank.size() : most;
    taken += static_cast<int>(most);
    ++phases;
  }
  return static_cast<double>(taken) / phases;
}

template <class F>
void report(const char* name, int bytes, const F& address) {
  std::vector<int> addresses;
  for (int lane = 0; lane < 32; ++lane) addresses.push_back(address(lane));
  std::printf("%s %g\n", name, conflicts(addresses, bytes));
}

void report_banks() {
  report("codes", 16, [](int lane) { return lane * int4::kLaneBytes; });
  for (int tile = 0; tile < 16; ++tile) {
    for (const int step : {0, 2}) {
      report("ldmatrix", 16, [&](int lane) { return x_address(4, tile, step, lane); });
    }
    for (int step = 0; step < int4::kSteps; ++step) {
      report("x_beside_int8", 8, [&](int lane) { return x_address(8, tile, step, lane); });
    }
  }
  for (const int bits : {4, 8}) {
    report("x_copies", 16, [&](int lane) { return x_place(bits, lane / 8, lane % 8); });
  }
  for (const int bytes : {2, 4}) {  // of a scale: pairs of rows, at the place of the upper one
    report("scales", 2 * bytes, [&](int lane) { return bytes * int4::scale_place(lane / 4); });
  }
  for (const int strips : {kStripsOfWarp[0], kStripsOfWarp[1], kTileStrips}) {
    for (int i = 0; i < 4; ++i) {
      report("sums", 4, [&](int lane) { return 4 * (sum_token(lane, i) * sum_stride(strips) + sum_row(lane, i)); });
    }
  }
  // Rows of x without their permutation: what the numbers above are measured against.
  report("rows_in_order", 16, [](int lane) { return lane % 8 * kTokenStageBytes + lane / 8 * 16; });
  for (const bool fine : {false, true}) {
    for (const int bits : {4, 8}) std::printf("stage %d\n", strip_stage_bytes(bits, fine) % 128);
  }
}

// Whether the warps of the decode kernel take each slice of each strip once, with the blocks of the canonical order.
bool shares_are_whole(const GemmPlan& plan, int64_t n, int64_t k) {
  const DecodeWork work = decode_work(plan, n, k);
  std::vector<int> taken(static_cast<std::size_t>(int4::strips(n) * kSlices));
  for (uint32_t block = 0; block < plan.blocks; ++block) {
    for (uint32_t warp = 0; warp < kGemmWarps; ++warp) {
      const DecodeShare share = decode_share(work, block, warp);
      const Range blocks = blocks_of_slice(int4::blocks(k), share.slice);
      if (share.first_block != blocks.begin || share.blocks != blocks.size()) return false;
      for (uint32_t strip = share.first_strip; strip < share.first_strip + share.strips; ++strip) {
        ++taken.at(static_cast<std::size_t>(strip * kSlices + share.slice));
      }
    }
  }
  for (const int times : taken) {
    if (times != 1) return false;
  }
  return true;
}

// Whether a plan's items take each tile and each block of K once, and its slices are those of the contract.
bool slices_are_whole(const GemmShape& shape) {
  const int4_int8::Slices slices(shape.k, shape.group_size, shape.kind);
  const int64_t blocks = int4::blocks(shape.k);
  int64_t unit = 64;  // least common multiple, by trial
  while (shape.k > 0 && unit % shape.group_size != 0) unit += 64;
  const int64_t units = ceil_div(shape.k, unit);
  for (int slice = 0; slice <= kSlices; ++slice) {
    const int64_t column = min_of(shape.k, units * slice / kSlices * unit);
    const int64_t expected = slices.is_one_group ? blocks * slice / kSlices : ceil_div(column, 64);
    if (slices.begin(slice) != expected) return false;
  }
  return true;
}

template <GemmPlan (*kPlan)(const GemmShape&), class Check>
int answer(const Check& check) {
  long long m, n, k, group_size, kind, may_round, multiprocessors, shared_bytes;
  int bits, arch;
  PlanCacheOf<kPlan> cache;
  while (std::scanf("%d %lld %lld %lld %lld %lld %lld %lld %lld %d", &bits, &m, &n, &k, &group_size, &kind, &may_round,
                    &multiprocessors, &shared_bytes, &arch) == 10) {
    const GemmShape shape{bits,
                          m,
                          n,
                          k,
                          group_size,
                          static_cast<WeightKind>(kind),
                          may_round != 0,
                          {multiprocessors, shared_bytes, arch}};
    const GemmPlan p = kPlan(shape);
    if (const GemmPlan& cached = cache(shape); !(cached == p)) {
      std::fprintf(stderr, "the cache has another plan for M = %lld, N = %lld, K = %lld\n", m, n, k);
      return 1;
    }
    if (!check(shape, p)) {
      std::fprintf(stderr, "warps do not share M = %lld, N = %lld, K = %lld\n", m, n, k);
      return 1;
    }
    const auto print = [](auto... values) { (std::printf("%lld ", static_cast<long long>(values)), ...); };
    print(p.kind, p.stages, p.shared_bytes, p.blocks, p.time, p.tokens, p.k_parts, p.ranges, p.strips, p.x_stages,
          p.keeps_x, p.rows, p.live, p.token_tiles, p.row_tiles, p.whole, p.scratch_bytes(m, n, k), cache.searches());
    std::printf("\n");
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "banks") == 0) {
    report_banks();
    return 0;
  }
  if (argc > 1)
    return answer<&int4_int8::plan_int4_int8_gemm>(
        [](const GemmShape& shape, const GemmPlan&) { return slices_are_whole(shape); });
  return answer<&plan_weight_only_gemm>([](const GemmShape& shape, const GemmPlan& p) {
    return p.kind != GemmPlan::Kind::kDecode || shares_are_whole(p, shape.n, shape.k);
  });
}
