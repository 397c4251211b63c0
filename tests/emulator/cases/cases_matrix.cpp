#include "emulator/cases/harness.h"
#include "emulator/cases/kernels/dequantize.cuh"
#include "emulator/cases/kernels/flip.cuh"
#include "emulator/cases/kernels/gemm.cuh"
#include "emulator/cases/kernels/pipeline.cuh"

namespace cases {
namespace {

template <pipeline::Bug kBug>
void run_pipeline() {
  constexpr int kN = 5 * pipeline::kTile + 10;  // neither whole tiles nor whole vectors
  constexpr std::size_t kShared = pipeline::kStages * pipeline::kTile * sizeof(float);
  Random random(11);
  auto x = generate(kN, [&] { return random.integer(); });
  Vector<float> want = x;
  for (float& v : want) v *= 2;
  auto y = poisoned<float>(kN);
  launch(pipeline::pipeline<kBug>, 1, pipeline::kThreads, kShared, x.data(), y.data(), kN);
  require_equal(y, want);
}

template <class T>
T from_integer(float value) {
  if constexpr (std::is_same_v<T, __half>) return __float2half(value);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16(value);
  if constexpr (std::is_same_v<T, int8_t>) return static_cast<int8_t>(value);
}

template <class T, gemm::Bug kBug>
void run_gemm() {
  // Three stages' worth of K: the first one is filled again.
  constexpr int kM = 70, kN = 40, kK = 160 / sizeof(T);
  constexpr std::size_t kShared = gemm::kStages * gemm::kStageBytes;
  Random random(12);
  const auto x = generate(kM * kK, [&] { return random.integer(); });
  const auto w = generate(kN * kK, [&] { return random.integer(); });
  const auto convert = [](const Vector<float>& values) {
    Vector<T> converted;
    for (float v : values) converted.push_back(from_integer<T>(v));
    return converted;
  };
  const Vector<T> a = convert(x), b = convert(w);
  auto c = poisoned<gemm::Accumulator<T>>(kM * kN);
  launch(gemm::gemm<T, kBug>, dim3(2, 2), gemm::kThreads, kShared, a.data(), b.data(), c.data(), kM, kN, kK);
  Vector<gemm::Accumulator<T>> want(kM * kN);
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) {
      float sum = 0;
      for (int k = 0; k < kK; ++k) sum += x[m * kK + k] * w[n * kK + k];
      want[m * kN + n] = static_cast<gemm::Accumulator<T>>(sum);
    }
  }
  require_equal(c, want);
}

template <dequantize::Bug kBug>
void run_dequantize() {
  constexpr int kN = 70;
  Random random(13);
  const auto packed = generate(kN, [&] { return random.bits(); });
  auto y = poisoned<uint4>(kN);
  launch(dequantize::dequantize<kBug>, 2, 64, 0, packed.data(), reinterpret_cast<uint32_t*>(y.data()), kN);
  Vector<float> got, want;
  for (int i = 0; i < kN * 8; ++i) {
    got.push_back(__half2float(reinterpret_cast<const __half*>(y.data())[i]));
    want.push_back(static_cast<float>(packed[i / 8] >> (4 * (i % 8)) & 15) - 8);
  }
  require_equal(got, want);
}

template <flip::Bug kBug>
void run_flip() {
  constexpr int kBlocks = 2, kSide = flip::kSide, kElements = kSide * kSide;
  Random random(14);
  struct alignas(16) Matrix {
    uint16_t element[kElements];
  };
  Vector<Matrix> x(kBlocks), y(kBlocks);
  for (Matrix& matrix : x) {
    for (uint16_t& e : matrix.element) e = static_cast<uint16_t>(random.below(0xffff));
  }
  launch(flip::flip<kBug>, kBlocks, 32, 0, x[0].element, y[0].element);
  Vector<int> got, want;
  for (int b = 0; b < kBlocks; ++b) {
    for (int i = 0; i < kElements; ++i) {
      got.push_back(y[b].element[i]);
      want.push_back(x[b].element[i % kSide * kSide + i / kSide]);
    }
  }
  require_equal(got, want);
}

void run_flip_on_sm_80() {
  emu::options().arch = 80;
  run_flip<flip::Bug::kNone>();
}

constexpr Case kCases[] = {
    {Kind::kSound, "pipeline", run_pipeline<pipeline::Bug::kNone>},
    {Kind::kPlanted, "pipeline_waits_too_little", run_pipeline<pipeline::Bug::kWaitsTooLittle>},
    {Kind::kPlanted, "pipeline_missing_barrier", run_pipeline<pipeline::Bug::kMissingBarrier>},
    {Kind::kPlanted, "pipeline_refills_stage_being_read", run_pipeline<pipeline::Bug::kRefillsStageBeingRead>},
    {Kind::kPlanted, "pipeline_missing_commit", run_pipeline<pipeline::Bug::kMissingCommit>},
    {Kind::kPlanted, "pipeline_no_final_wait", run_pipeline<pipeline::Bug::kNoFinalWait>},
    {Kind::kPlanted, "pipeline_tail_read_whole", run_pipeline<pipeline::Bug::kTailReadWhole>},
    {Kind::kPlanted, "pipeline_tail_size_too_large", run_pipeline<pipeline::Bug::kTailSizeTooLarge>},
    {Kind::kPlanted, "pipeline_misaligned_source", run_pipeline<pipeline::Bug::kMisalignedSource>},
    {Kind::kPlanted, "pipeline_misaligned_destination", run_pipeline<pipeline::Bug::kMisalignedDestination>},
    {Kind::kPlanted, "pipeline_writes_source", run_pipeline<pipeline::Bug::kWritesSource>},
    {Kind::kPlanted, "pipeline_writes_destination", run_pipeline<pipeline::Bug::kWritesDestination>},
    {Kind::kSound, "gemm_f16", run_gemm<__half, gemm::Bug::kNone>},
    {Kind::kSound, "gemm_bf16", run_gemm<__nv_bfloat16, gemm::Bug::kNone>},
    {Kind::kSound, "gemm_s8", run_gemm<int8_t, gemm::Bug::kNone>},
    {Kind::kPlanted, "gemm_missing_barrier", run_gemm<__half, gemm::Bug::kMissingBarrier>},
    {Kind::kPlanted, "gemm_registers_swapped", run_gemm<int8_t, gemm::Bug::kRegistersSwapped>},
    {Kind::kPlanted, "gemm_unswizzled_read", run_gemm<__nv_bfloat16, gemm::Bug::kUnswizzledRead>},
    {Kind::kPlanted, "gemm_mma_in_branch", run_gemm<__half, gemm::Bug::kMmaInBranch>},
    {Kind::kPlanted, "gemm_place_of_mma_differs", run_gemm<__half, gemm::Bug::kPlaceOfMmaDiffers>},
    {Kind::kPlanted, "gemm_misaligned_matrix", run_gemm<__half, gemm::Bug::kMisalignedMatrix>},
    {Kind::kPlanted, "gemm_matrix_past_end", run_gemm<__half, gemm::Bug::kMatrixPastEnd>},
    {Kind::kPlanted, "gemm_row_past_end", run_gemm<int8_t, gemm::Bug::kRowPastEnd>},
    {Kind::kSound, "dequantize", run_dequantize<dequantize::Bug::kNone>},
    {Kind::kPlanted, "dequantize_wrong_mask", run_dequantize<dequantize::Bug::kWrongMask>},
    {Kind::kPlanted, "dequantize_wrong_table", run_dequantize<dequantize::Bug::kWrongTable>},
    {Kind::kPlanted, "dequantize_wrong_selector", run_dequantize<dequantize::Bug::kWrongSelector>},
    {Kind::kSound, "flip", run_flip<flip::Bug::kNone>},
    {Kind::kPlanted, "flip_missing_syncwarp", run_flip<flip::Bug::kMissingSyncwarp>},
    {Kind::kPlanted, "flip_missing_last_syncwarp", run_flip<flip::Bug::kMissingLastSyncwarp>},
    {Kind::kPlanted, "flip_not_transposed", run_flip<flip::Bug::kNotTransposed>},
    {Kind::kPlanted, "flip_on_sm_80", run_flip_on_sm_80},
};

}  // namespace

std::span<const Case> matrix_cases() { return kCases; }

}  // namespace cases
