// Segment replacement on CUDA: one thread block per tile, both streams in one launch.
#include "segment_replace.h"

#include <cstdio>
#include <stdexcept>
#include <string>

namespace syncdpo {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 3;  // room for registers without spills; 96 KiB of loads in flight
constexpr int64_t kTileChunks = kThreads * kChunksPerThread;

struct Launch {
  Stream stream[2];
  int64_t tiles[2];
  Segments segments;
  bool clip;
};

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

__device__ void check_segment(const Launch& launch, const Stream& stream, int64_t sample,
                              int64_t row) {
  const Segments& segments = launch.segments;
  const int64_t index = sample * segments.count + row;
  const int64_t donor = segments.donor[index];
  const double start = seconds_at(segments.start, segments.is_double, index);
  const double length = seconds_at(segments.length, segments.is_double, index);
  const double donor_start = seconds_at(segments.donor_start, segments.is_double, index);
  const double low = fmin(start, fmin(length, donor_start)), sum = start + length + donor_start;
  if (!(low >= 0 && sum < INFINITY)) fail(Problem::time, sample, row, donor, stream);
  if (donor < 0 || donor >= stream.samples) fail(Problem::donor, sample, row, donor, stream);
  const int64_t end = frame_at(fmax(start, donor_start) + length, stream.rate);
  if (!launch.clip && end > stream.frames) fail(Problem::past_end, sample, row, donor, stream);
}

// Before use, every segment of the samples that this block's tile touches.
__device__ void check_segments(const Launch& launch, const Stream& stream, int64_t tile) {
  const int64_t chunks = stream.runs_per_sample * stream.chunks_per_run;
  const int64_t first = tile * kTileChunks / chunks;
  const int64_t last = smaller((tile + 1) * kTileChunks - 1, stream.samples * chunks - 1) / chunks;
  const int64_t count = launch.segments.count;
  for (int64_t i = threadIdx.x; i < (last - first + 1) * count; i += kThreads)
    check_segment(launch, stream, first + i / count, i % count);
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    replace_segments_kernel(const __grid_constant__ Launch launch, Phase phase) {
  const int which = blockIdx.x >= launch.tiles[0];
  const Stream& stream = launch.stream[which];
  const int64_t tile = blockIdx.x - (which ? launch.tiles[0] : 0);
  if (phase == Phase::stage && !stream.in_place) return;
  check_segments(launch, stream, tile);
  replace_tile<kThreads>(stream, launch.segments, tile, threadIdx.x, phase);
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

}  // namespace

void replace_segments_cuda(const std::vector<Stream>& streams, const Segments& segments, bool clip,
                           int device, uintptr_t cuda_stream) {
  Launch launch{};
  launch.segments = segments;
  launch.clip = clip;
  bool in_place = false;
  for (size_t i = 0; i < streams.size(); ++i) {
    const Stream& stream = streams[i];
    launch.stream[i] = stream;
    launch.tiles[i] = (stream.samples * stream.runs_per_sample * stream.chunks_per_run +
                       kTileChunks - 1) / kTileChunks;
    in_place |= stream.in_place;
  }
  const int64_t blocks = launch.tiles[0] + launch.tiles[1];
  if (blocks == 0) return;
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(cuda_stream);
  const auto grid = static_cast<unsigned>(blocks);
  if (in_place) replace_segments_kernel<<<grid, kThreads, 0, stream>>>(launch, Phase::stage);
  replace_segments_kernel<<<grid, kThreads, 0, stream>>>(launch, Phase::write);
  check_cuda(cudaGetLastError());
}

}  // namespace syncdpo
