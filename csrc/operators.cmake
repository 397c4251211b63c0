# The operators, and what every module that has them is made of: _C, _C_cuda and the one that tests/emulated builds.
#
# Sources are found by the operator's name: csrc/cpu/<op>.cpp, and in its place csrc/cpu/<op>_amx.cpp at the level amx;
# csrc/binding/<op>.cpp, where it does not share that of another operator; csrc/cuda/<op>*.cu.
set(QOPS_OPERATORS
  decode_attention
  decoder_block
  decoder_layers
  int4_dequantize
  int4_gemm
  int4_int8_gemm
  int8_embedding
  int8_gemm
  int8_weight_only_gemm
  qk_norm_rotary
  quantize_int8
  rms_norm
  rms_norm_int8
  rotary
  silu_mul
  silu_mul_int8
  weight_pack)

set(qops_cpu_sources "")
set(qops_amx_sources "")
set(qops_cuda_sources "")
set(qops_binding_sources "${CMAKE_CURRENT_LIST_DIR}/binding/checks.cpp" "${CMAKE_CURRENT_LIST_DIR}/binding/plan.cpp")
foreach(op IN LISTS QOPS_OPERATORS)
  file(GLOB cpu CONFIGURE_DEPENDS "${CMAKE_CURRENT_LIST_DIR}/cpu/${op}.cpp")
  file(GLOB amx CONFIGURE_DEPENDS "${CMAKE_CURRENT_LIST_DIR}/cpu/${op}_amx.cpp")
  file(GLOB binding CONFIGURE_DEPENDS "${CMAKE_CURRENT_LIST_DIR}/binding/${op}.cpp")
  file(GLOB cuda CONFIGURE_DEPENDS "${CMAKE_CURRENT_LIST_DIR}/cuda/${op}.cu" "${CMAKE_CURRENT_LIST_DIR}/cuda/${op}_*.cu")
  list(APPEND qops_cpu_sources ${cpu})
  list(APPEND qops_amx_sources ${amx})
  list(APPEND qops_binding_sources ${binding})
  list(APPEND qops_cuda_sources ${cuda})
endforeach()
list(REMOVE_DUPLICATES qops_cuda_sources)  # rms_norm_*.cu would be found twice

# The bindings as part of a module, which uses the LibTorch stable ABI only.
function(qops_add_bindings target)
  target_sources(${target} PRIVATE ${qops_binding_sources})
  target_include_directories(${target} PRIVATE "${CMAKE_CURRENT_FUNCTION_LIST_DIR}")
  target_include_directories(${target} SYSTEM PRIVATE
    ${QOPS_TORCH_DIR}/include ${QOPS_TORCH_DIR}/include/torch/csrc/api/include)
  target_compile_definitions(${target} PRIVATE TORCH_TARGET_VERSION=0x020b000000000000 TORCH_STABLE_ONLY)
  target_link_libraries(${target} PRIVATE ${QOPS_TORCH_DIR}/lib/libtorch_cpu.so)
endfunction()

# The text as a literal of C++, for a definition.
function(qops_literal result text)
  string(REGEX REPLACE "([\\\"])" "\\\\\\1" escaped "${text}")
  set(${result} "\"${escaped}\"" PARENT_SCOPE)
endfunction()
