/* As much of libcuda as Triton's launch path asks for: one device like an H100 that runs nothing.

   It takes kernels and launches and keeps of each launch what a driver would hand to the device:
   the grid, the threads, and the parameters, as many and as large as the kernel's own table in its
   cubin says. Pointers count as device memory between DEVICE_START and DEVICE_END. */

#include "cuda.h"
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEVICE_START (1ull << 40)
#define DEVICE_END (1ull << 44)
#define MOST_PARAMETERS 512

struct kernel {
  char name[96];
  uint32_t count, size[MOST_PARAMETERS];
};

struct launch {
  char name[96];
  uint32_t grid[3], block[3], shared, attributes;
  uint64_t stream;
  uint32_t count, size[MOST_PARAMETERS];
  uint8_t value[MOST_PARAMETERS][8];
} last;

uint64_t launches; /* so far; `last` is the latest */

/* ---------------------------------------------------------------- the cubin */

/* The section .nv.info.KERNEL is a row of entries: format, attribute, two bytes of size or value,
   and, in the format SIZED, so many bytes. One of twelve bytes describes each parameter. */
enum { SIZED = 4, PARAMETER = 0x17, PARAMETER_BYTES = 12 };

static CUresult read_parameters(struct kernel *kernel, const uint8_t *at, const uint8_t *end) {
  while (at + 4 <= end) {
    uint8_t format = at[0], attribute = at[1];
    uint16_t size, ordinal;
    uint32_t word;
    memcpy(&size, at + 2, 2);
    at += 4;
    if (format != SIZED)
      continue;
    if (attribute == PARAMETER) {
      memcpy(&ordinal, at + 4, 2);
      memcpy(&word, at + 8, 4);
      if (size != PARAMETER_BYTES || ordinal >= MOST_PARAMETERS || word >> 18 > 8)
        return CUDA_ERROR_INVALID_IMAGE;
      kernel->size[ordinal] = word >> 18;
      kernel->count++;
    }
    at += size;
  }
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)image;
  return memcmp(image, ELFMAG, SELFMAG) ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  const uint8_t *image = (const uint8_t *)module;
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + header->e_shoff);
  const char *names = (const char *)image + sections[header->e_shstrndx].sh_offset;
  struct kernel *kernel = calloc(1, sizeof *kernel);
  char wanted[128];
  snprintf(kernel->name, sizeof kernel->name, "%s", name);
  snprintf(wanted, sizeof wanted, ".nv.info.%s", name);
  *function = (CUfunction)kernel;
  for (int i = 0; i < header->e_shnum; i++)
    if (!strcmp(names + sections[i].sh_name, wanted)) {
      const uint8_t *at = image + sections[i].sh_offset;
      return read_parameters(kernel, at, at + sections[i].sh_size);
    }
  return CUDA_ERROR_NOT_FOUND;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

/* ---------------------------------------------------------------- launches */

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters,
                          void **extra) {
  const struct kernel *kernel = (const struct kernel *)function;
  memset(&last, 0, sizeof last);
  memcpy(last.name, kernel->name, sizeof last.name);
  memcpy(last.grid, &config->gridDimX, sizeof last.grid);
  memcpy(last.block, &config->blockDimX, sizeof last.block);
  last.shared = config->sharedMemBytes;
  last.attributes = config->numAttrs;
  last.stream = (uint64_t)config->hStream;
  last.count = kernel->count;
  memcpy(last.size, kernel->size, sizeof last.size);
  for (uint32_t i = 0; i < kernel->count; i++)
    memcpy(last.value[i], parameters[i], kernel->size[i]);
  launches++;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER || pointer < DEVICE_START ||
      pointer >= DEVICE_END)
    return CUDA_ERROR_INVALID_VALUE;
  memcpy(data, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

/* ---------------------------------------------------------------- the device and its context */

CUresult cuInit(unsigned int flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
  *count = 1;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return ordinal ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 * 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 * 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 0; /* clock rates and the like, which nobody here asks for twice */
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)&last;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) { return cuDevicePrimaryCtxRetain(context, 0); }

CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }

CUresult cuCtxGetDevice(CUdevice *device) { return cuDeviceGet(device, 0); }

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "an error of the fake driver's";
  return CUDA_SUCCESS;
}
