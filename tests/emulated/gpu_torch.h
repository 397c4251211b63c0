// What gpu_torch.cpp makes of torch for this module.
#pragma once

namespace emulated {

// Tensors are on the GPU of this number (emu::current_gpu()); below 0, on whichever is current.
void place_tensors(int gpu);

// But for tensors whose elements begin here, which are on the next GPU; null: for none.
void place_elsewhere(const void* memory);

}  // namespace emulated
