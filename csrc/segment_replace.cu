// Segment replacement on CUDA, both streams in one launch: a thread block per tile, or, in place, as
// many blocks as the device holds at once, so that they can wait for each other. They wait only where
// a donor is itself overwritten, which the segments' values on the device alone can tell; as samples
// may swap, no order of copying would do there, and such values go to scratch memory first.
#include "segment_replace_tiles.h"

#include <cooperative_groups.h>

#include <cstdio>
#include <stdexcept>
#include <string>

namespace syncdpo {
namespace {

constexpr int kThreads = 256;
// Room for registers without spills; 96 KiB of loads in flight, 64 in place.
constexpr int kBlocksPerSm = 3, kInPlaceBlocksPerSm = 2;

enum class Problem { time, donor, past_end };

// As indexing does in PyTorch: print what is wrong, and end the kernel with an error.
__device__ __noinline__ void fail(Problem problem, int64_t sample, int64_t row, int64_t donor,
                                  const Stream& stream) {
  const long long b = sample, s = row;
  if (problem == Problem::time)
    printf("replace_segments: segments[%lld, %lld]: expected finite times >= 0\n", b, s);
  else if (problem == Problem::donor)
    printf("replace_segments: segments.donor[%lld, %lld]: expected 0 <= donor < %lld, got %lld\n",
           b, s, static_cast<long long>(stream.samples), static_cast<long long>(donor));
  else
    printf("replace_segments: segments[%lld, %lld] reaches past the end of %lld frames\n", b, s,
           static_cast<long long>(stream.frames));
  __trap();
}

__device__ void check_segment(const Stream& stream, const Segments& segments, bool clip,
                              int64_t sample, int64_t row) {
  const int64_t index = sample * segments.count + row;
  const int64_t donor = segments.donor[index];
  const double start = seconds_at(segments.start, segments.is_double, index);
  const double length = seconds_at(segments.length, segments.is_double, index);
  const double donor_start = seconds_at(segments.donor_start, segments.is_double, index);
  const double low = fmin(start, fmin(length, donor_start)), sum = start + length + donor_start;
  if (!(low >= 0 && sum < INFINITY)) fail(Problem::time, sample, row, donor, stream);
  if (donor < 0 || donor >= stream.samples) fail(Problem::donor, sample, row, donor, stream);
  const int64_t end = frame_at(fmax(start, donor_start) + length, stream.rate);
  if (!clip && end > stream.frames) fail(Problem::past_end, sample, row, donor, stream);
}

// By each block, before it uses any of them.
__device__ void check_segments(const Stream& stream, const Segments& segments, bool clip) {
  for (int64_t i = threadIdx.x; i < stream.samples * segments.count; i += kThreads)
    check_segment(stream, segments, clip, i / segments.count, i % segments.count);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    replace_segments_kernel(const __grid_constant__ Launch launch, bool clip) {
  check_segments(launch.stream[blockIdx.x >= launch.tiles[0]], launch.segments, clip);
  __syncthreads();
  replace_tile<kThreads>(launch, blockIdx.x, threadIdx.x, Pass::out_of_place);
}

__global__ void __launch_bounds__(kThreads, kInPlaceBlocksPerSm)
    replace_in_place_kernel(const __grid_constant__ Launch launch, bool clip) {
  for (const Stream& stream : launch.stream) check_segments(stream, launch.segments, clip);
  __syncthreads();
  bool staged = false;
  for (const Stream& stream : launch.stream)
    staged |= needs_staging(stream, launch.segments, threadIdx.x, kThreads);
  Pass pass = __syncthreads_or(staged) ? Pass::stage : Pass::in_place;
  while (true) {
    replace_tiles<kThreads>(launch, blockIdx.x, gridDim.x, threadIdx.x, pass);
    if (pass == Pass::in_place) return;
    cooperative_groups::this_grid().sync();
    pass = Pass::in_place;
  }
}

void check_cuda(cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("replace_segments on CUDA: ") +
                             cudaGetErrorString(status));
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_));
    if (device != previous_) check_cuda(cudaSetDevice(device));
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// How many blocks the current device holds at once.
int64_t resident_blocks(int device) {
  int processors = 0, blocks = 0;
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, replace_in_place_kernel,
                                                           kThreads, 0));
  return static_cast<int64_t>(processors) * blocks;
}

}  // namespace

void replace_segments_cuda(const std::vector<Stream>& streams, const Segments& segments, bool clip,
                           int device, uintptr_t cuda_stream) {
  Launch launch = make_launch<kThreads>(streams, segments);
  const int64_t tiles = launch.tiles[0] + launch.tiles[1];
  if (tiles == 0) return;
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(cuda_stream);
  if (launch.stream[0].in_place || launch.stream[1].in_place) {
    const auto grid = static_cast<unsigned>(smaller(tiles, resident_blocks(device)));
    void* arguments[] = {&launch, &clip};
    check_cuda(cudaLaunchCooperativeKernel(replace_in_place_kernel, grid, kThreads, arguments, 0,
                                           stream));
  } else {
    replace_segments_kernel<<<static_cast<unsigned>(tiles), kThreads, 0, stream>>>(launch, clip);
    check_cuda(cudaGetLastError());
  }
}

}  // namespace syncdpo
