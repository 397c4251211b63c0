# Which nvcc compiles the CUDA kernels, and for which GPUs; or why none are compiled. Makes no targets, so that
# `cmake -P` can include it, as the tests do.
#
# Takes   QOPS_TORCH_DIR, torch_version, QOPS_CUDA, QOPS_CUDA_ARCHS, CMAKE_CUDA_COMPILER where it is set.
# Gives   qops_nvcc, nvcc_version, qops_cuda_archs (for CMAKE_CUDA_ARCHITECTURES), and as half a sentence or nothing
#         qops_cuda_missing, why there are to be no CUDA kernels, and qops_left_out, what they are not compiled for.

if(NOT DEFINED QOPS_TOOLKITS)
  set(QOPS_TOOLKITS "/usr/local/cuda*")  # where NVIDIA's installers put toolkits
endif()
set(qops_nvcc "")
set(nvcc_version "")
set(qops_cuda_archs "")
set(qops_cuda_missing "")
set(qops_left_out "")

string(STRIP "${QOPS_CUDA}" asked)
string(TOUPPER "${asked}" QOPS_CUDA)
if(QOPS_CUDA MATCHES "^(1|YES|TRUE)$")
  set(QOPS_CUDA ON)
elseif(QOPS_CUDA MATCHES "^(0|NO|FALSE)$")
  set(QOPS_CUDA OFF)
elseif(QOPS_CUDA STREQUAL "")
  set(QOPS_CUDA AUTO)
elseif(NOT QOPS_CUDA MATCHES "^(ON|OFF|AUTO)$")
  message(FATAL_ERROR "QOPS_CUDA must be ON, OFF or AUTO, got ${asked}")
endif()

file(STRINGS "${QOPS_TORCH_DIR}/version.py" torch_cuda REGEX "^cuda")
string(REGEX MATCH "[0-9]+\\.[0-9]+" torch_cuda "${torch_cuda}")
string(REGEX MATCH "^[0-9]+" torch_cuda_major "${torch_cuda}")

# --- whether ---------------------------------------------------------------------------------------------------------
if(QOPS_CUDA STREQUAL "OFF")
  set(qops_cuda_missing "built with QOPS_CUDA=OFF")
elseif(QOPS_CUDA STREQUAL "AUTO" AND NOT EXISTS "${QOPS_TORCH_DIR}/lib/libtorch_cuda.so")
  set(qops_cuda_missing "built with torch ${torch_version}, which is one without CUDA")
endif()
if(qops_cuda_missing)
  return()
endif()

# --- by which nvcc ---------------------------------------------------------------------------------------------------
# One that is named as the compiler is taken or refused. CUDA_HOME names a folder, and often an old one: where its nvcc
# is of another major version than torch's CUDA, it is passed over like all others.
set(first "")
set(others "")
if(CMAKE_CUDA_COMPILER)
  set(first "${CMAKE_CUDA_COMPILER}")
elseif(NOT "$ENV{CUDACXX}" STREQUAL "")
  set(first "$ENV{CUDACXX}")
else()
  foreach(toolkit IN ITEMS "$ENV{CUDA_HOME}" "$ENV{CUDA_PATH}")
    if(toolkit AND EXISTS "${toolkit}/bin/nvcc")
      list(APPEND first "${toolkit}/bin/nvcc")
    endif()
  endforeach()
  string(REPLACE ":" ";" folders "$ENV{PATH}")
  list(TRANSFORM folders APPEND "/nvcc")
  foreach(path IN LISTS folders)
    if(EXISTS "${path}")
      list(APPEND others "${path}")
    endif()
  endforeach()
  list(TRANSFORM QOPS_TOOLKITS APPEND "/bin/nvcc" OUTPUT_VARIABLE patterns)
  file(GLOB toolkits ${patterns})
  # PyPI's compiler is spread over packages, any of which may be missing.
  get_filename_component(site "${QOPS_TORCH_DIR}" DIRECTORY)
  file(GLOB packages "${site}/nvidia/cu*")
  foreach(path IN LISTS packages)
    if(EXISTS "${path}/bin/nvcc" AND EXISTS "${path}/nvvm/bin/cicc" AND EXISTS "${path}/include/crt/host_config.h"
       AND EXISTS "${path}/include/nv/target" AND EXISTS "${path}/lib/libcudart_static.a")
      list(APPEND toolkits "${path}/bin/nvcc")
    endif()
  endforeach()
  list(APPEND others ${toolkits})
endif()

set(unfit "")
set(seen "")
foreach(path IN LISTS first others)
  file(REAL_PATH "${path}" real)
  if(real IN_LIST seen)
    continue()
  endif()
  list(APPEND seen "${real}")
  execute_process(COMMAND "${path}" --version OUTPUT_VARIABLE text ERROR_QUIET)
  if(NOT text MATCHES "release (([0-9]+)\\.[0-9]+)")
    list(APPEND unfit "${path} does not tell its version")
    continue()
  endif()
  set(version "${CMAKE_MATCH_1}")
  if(torch_cuda AND NOT CMAKE_MATCH_2 STREQUAL torch_cuda_major)
    list(APPEND unfit "${path} is ${version}")
    continue()
  endif()
  # Of those that nobody named the one of torch's own version, else the newest: an older one knows fewer GPUs.
  if(NOT qops_nvcc OR (NOT nvcc_version STREQUAL torch_cuda
                       AND (version STREQUAL torch_cuda OR version VERSION_GREATER nvcc_version)))
    set(qops_nvcc "${path}")
    set(nvcc_version "${version}")
  endif()
  if(path IN_LIST first)
    break()
  endif()
endforeach()
if(NOT qops_nvcc)
  list(JOIN unfit ", " unfit)
  if(unfit AND torch_cuda)
    set(qops_cuda_missing
        "built without an nvcc of CUDA ${torch_cuda_major}, the major version of torch's CUDA ${torch_cuda}: ${unfit}")
  elseif(unfit)
    set(qops_cuda_missing "built without an nvcc: ${unfit}")
  else()
    set(qops_cuda_missing "built without an nvcc: none at CUDACXX, CUDA_HOME, CUDA_PATH, PATH, ${QOPS_TOOLKITS}")
  endif()
  return()
endif()

# --- for which GPUs --------------------------------------------------------------------------------------------------
execute_process(COMMAND "${qops_nvcc}" --list-gpu-code OUTPUT_VARIABLE text ERROR_QUIET)
string(REGEX MATCHALL "sm_[0-9]+" known "${text}")
list(TRANSFORM known REPLACE "sm_" "")

# QOPS_CUDA_ARCHS, else torch's variable, else the GPUs of this machine, else all that qops is tuned for.
set(source "QOPS_CUDA_ARCHS")
set(archs "${QOPS_CUDA_ARCHS}")
string(STRIP "${archs}" archs)
if(NOT archs)
  set(source "TORCH_CUDA_ARCH_LIST")
  string(STRIP "$ENV{TORCH_CUDA_ARCH_LIST}" archs)
endif()
if(NOT archs)
  set(source "this machine's GPUs")
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE text ERROR_QUIET RESULT_VARIABLE failed)
  if(NOT failed)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" archs "${text}")
  endif()
endif()
if(NOT archs)
  # sm_80 serves 8.6 and 8.9 as well, sm_100 10.3, sm_120 12.1. PTX is for what lies between and after these, 11.0 first
  # of all, and serves only what is newer than itself: so it is that of 10.0 and not of 12.0. A toolkit that does not
  # know 10.0 gives PTX of 9.0.
  set(source "the default")
  set(archs 8.0 9.0a)
  if("100" IN_LIST known)
    list(APPEND archs 10.0+PTX 12.0)
  else()
    list(APPEND archs 9.0+PTX)
  endif()
endif()

# As torch.utils.cpp_extension spells them and what they stand for, longer names first.
set(names
  "Kepler[+]Tesla=3.7" "Kepler=3.5+PTX" "Maxwell[+]Tegra=5.3" "Maxwell=5.0 5.2+PTX" "Pascal=6.0 6.1+PTX"
  "Volta[+]Tegra=7.2" "Volta=7.0+PTX" "Turing=7.5+PTX" "Ampere[+]Tegra=8.7" "Ampere=8.0 8.6+PTX" "Ada=8.9+PTX"
  "Hopper=9.0+PTX" "Blackwell[+]Tegra=11.0" "Blackwell=10.0 10.3 12.0 12.1+PTX")
foreach(name IN LISTS names)
  string(REGEX MATCH "^(.+)=(.+)$" name "${name}")
  string(REGEX REPLACE "${CMAKE_MATCH_1}" "${CMAKE_MATCH_2}" archs "${archs}")
endforeach()
string(REGEX REPLACE "[ ,;\t\r\n\"']+" ";" archs "${archs}")  # quotes: docker's --env-file keeps them
list(REMOVE_DUPLICATES archs)
list(REMOVE_ITEM archs "")

set(left_out "")
foreach(arch IN LISTS archs)
  if(NOT arch MATCHES "^([0-9]+)\\.?([0-9])([af]?)([+]PTX)?$")
    list(APPEND left_out "${arch} (no architecture)")
    continue()
  endif()
  set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
  set(suffix "${CMAKE_MATCH_3}")
  set(ptx "${CMAKE_MATCH_4}")
  if(number LESS 80)
    list(APPEND left_out "${arch} (below 8.0)")
    continue()
  endif()
  if(source STREQUAL "this machine's GPUs" AND NOT number IN_LIST known)
    string(REGEX REPLACE ".$" "0" number "${number}")  # whose code runs on all minor versions
  endif()
  if(NOT number IN_LIST known OR (suffix AND number LESS 90)
     OR (suffix STREQUAL "f" AND (number LESS 100 OR nvcc_version VERSION_LESS 12.9)))
    list(APPEND left_out "${arch} (unknown to nvcc ${nvcc_version})")
    continue()
  endif()
  # wgmma and setmaxnreg exist under the name 9.0a alone, and every GPU of 9.0 is one of 9.0a.
  if(number EQUAL 90)
    set(suffix "a")
  endif()
  list(APPEND qops_cuda_archs ${number}${suffix}-real)
  if(ptx)
    list(APPEND qops_cuda_archs ${number}-virtual)  # with a suffix it would serve no newer GPU
  endif()
endforeach()
list(REMOVE_DUPLICATES qops_cuda_archs)
list(JOIN left_out ", " left_out)
if(NOT qops_cuda_archs)
  set(qops_cuda_missing "built with no architecture left of ${source}: ${left_out}")
elseif(left_out)
  set(qops_left_out "left out of ${source}: ${left_out}")
endif()
