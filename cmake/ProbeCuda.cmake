# Finding an nvcc that works, without failing where there is none.

# Sets `nvcc` and `version` to the first nvcc found and its CUDA version if it compiles and links a
# program, else `nvcc` to "" and `reason` to what is wrong. `enable_language(CUDA)` would stop the
# build instead, and CMake's own `check_language` is unreliable on 3.25.
function(syncdpo_probe_cuda nvcc version reason)
  set(${nvcc} "" PARENT_SCOPE)
  if(CMAKE_CUDA_COMPILER)
    set(found "${CMAKE_CUDA_COMPILER}")
  elseif(DEFINED ENV{CUDACXX})
    set(found "$ENV{CUDACXX}")
  else()
    find_program(SYNCDPO_NVCC nvcc
      HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
    set(found "${SYNCDPO_NVCC}")
  endif()
  if(NOT found)
    set(${reason} "no nvcc was found" PARENT_SCOPE)
    return()
  endif()

  execute_process(COMMAND "${found}" --version
    OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE status)
  if(NOT output MATCHES "release ([0-9]+\\.[0-9]+)")
    set(${reason} "${found} --version failed (${status})" PARENT_SCOPE)
    return()
  endif()
  set(release "${CMAKE_MATCH_1}")
  if(release VERSION_LESS 12.0)
    set(${reason} "${found} is CUDA ${release}; 12.0 or newer is needed" PARENT_SCOPE)
    return()
  endif()

  set(probe "${CMAKE_CURRENT_BINARY_DIR}/probe_cuda")
  file(WRITE "${probe}.cu" "__global__ void probe() {}\nint main() { probe<<<1, 1>>>(); }\n")
  set(host_compiler "")
  if(CMAKE_CUDA_HOST_COMPILER)
    set(host_compiler "-ccbin=${CMAKE_CUDA_HOST_COMPILER}")
  elseif(DEFINED ENV{CUDAHOSTCXX})
    set(host_compiler "-ccbin=$ENV{CUDAHOSTCXX}")
  endif()
  execute_process(COMMAND "${found}" ${host_compiler} -arch=sm_80 -o "${probe}" "${probe}.cu"
    OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    string(STRIP "${output}" output)
    set(${reason} "${found} cannot build a program: ${output}" PARENT_SCOPE)
    return()
  endif()
  set(${nvcc} "${found}" PARENT_SCOPE)
  set(${version} "${release}" PARENT_SCOPE)
endfunction()

# Machine code for A100, H100 and, where the compiler knows it, B200; PTX of the lowest, from which
# the driver builds for every chip in between and to come.
function(syncdpo_cuda_architectures version architectures)
  set(list 80 90-real)
  if(version VERSION_GREATER_EQUAL 12.8)
    list(APPEND list 100-real)
  endif()
  set(${architectures} ${list} PARENT_SCOPE)
endfunction()
