// What gpu_torch.cpp makes of torch for this module.
#pragma once

namespace emulated {

// Tensors are on the GPU of this number (emu::current_gpu()); below 0, on whichever is current.
void place_tensors(int gpu);

}  // namespace emulated
