// Reads lines "major minor registers shared_bytes threads" of kernels, and prints how many of their blocks one
// multiprocessor holds, by NVIDIA's own calculation.
#include <cstdio>

#include <cuda_occupancy.h>

// CUDA C++ Programming Guide, technical specifications per compute capability.
static cudaOccDeviceProp device(int major, int minor) {
  const bool has_large_sm = minor == 0 && major != 12;  // those of data centres: 8.0, 9.0, 10.0
  cudaOccDeviceProp p;
  p.computeMajor = major;
  p.computeMinor = minor;
  p.maxThreadsPerBlock = 1024;
  p.maxThreadsPerMultiprocessor = has_large_sm ? 2048 : 1536;
  p.regsPerBlock = 65536;
  p.regsPerMultiprocessor = 65536;
  p.warpSize = 32;
  p.sharedMemPerBlock = 48 << 10;
  p.sharedMemPerMultiprocessor = (major >= 9 && has_large_sm ? 228 : major == 8 && has_large_sm ? 164 : 100) << 10;
  p.reservedSharedMemPerBlock = 1 << 10;
  p.sharedMemPerBlockOptin = p.sharedMemPerMultiprocessor - p.reservedSharedMemPerBlock;
  p.numSms = 1;
  return p;
}

int main() {
  int major, minor, registers, shared, threads;
  while (std::scanf("%d %d %d %d %d", &major, &minor, &registers, &shared, &threads) == 5) {
    const cudaOccDeviceProp properties = device(major, minor);
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = threads;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = static_cast<size_t>(shared);
    cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &properties, &kernel, &state, threads, 0) !=
        CUDA_OCC_SUCCESS) {
      return 1;
    }
    std::printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
}
