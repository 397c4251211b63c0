// Greedy generation by a model that qops.integrations.serving.export_decoder has exported, without Python:
//
//     generate LIBRARY PACKAGE NEW_TOKENS ID...
//
// LIBRARY is one of qops.integrations.serving.libraries(), PACKAGE what aoti_compile_and_package has written.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <vector>

int main(int argc, char** argv) try {
  if (argc < 5) {
    std::cerr << "usage: generate LIBRARY PACKAGE NEW_TOKENS ID...\n";
    return 2;
  }
  // Registers the operators. They stay as long as the process.
  if (dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::cerr << dlerror() << '\n';
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  std::vector<int64_t> ids;
  for (int i = 4; i < argc; ++i) ids.push_back(std::atoll(argv[i]));
  const int64_t new_tokens = std::atoll(argv[3]);
  int64_t position = 0;
  for (int64_t i = 0; i < new_tokens; ++i) {
    const auto count = static_cast<int64_t>(ids.size());
    const at::Tensor logits = model.run({at::tensor(ids).unsqueeze(0), at::arange(position, position + count)})[0];
    position += count;
    ids = {logits[0][-1].argmax().item<int64_t>()};
    std::cout << ids[0] << (i + 1 < new_tokens ? ' ' : '\n');
  }
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
