// Runs cases of segment replacement on the host, by the CPU kernel and by the body of the CUDA
// kernel, so that sanitizers see both. tests/ops/test_segment_replace_kernels.py writes the cases, builds this
// with csrc/segment_replace.cpp, and compares what comes back with the reference.
//
//   segment_replace_host CASES RESULTS

#include <algorithm>
#include <fstream>
#include <memory>
#include <numeric>
#include <random>

#include "segment_replace_tiles.h"

namespace {

using syncdpo::Pass;
using Bytes = std::vector<char>;

constexpr int kThreads = 8;  // few, so that small cases have tiles of every kind
constexpr int64_t kResident = 3;
constexpr int kWorkers = 2;
constexpr char kUnwritten = 0x55;

template <class T>
T get(std::istream& file) {
  T value;
  file.read(reinterpret_cast<char*>(&value), sizeof value);
  return value;
}

template <class T>
std::vector<T> get(std::istream& file, int64_t count) {
  std::vector<T> values(count);
  file.read(reinterpret_cast<char*>(values.data()), count * sizeof(T));
  return values;
}

// Every thread of every block, in an order of its own: no result may depend on it.
void run_pass(const syncdpo::Launch& launch, int64_t blocks, Pass pass) {
  std::vector<int64_t> threads(blocks * kThreads);
  std::iota(threads.begin(), threads.end(), 0);
  std::shuffle(threads.begin(), threads.end(), std::mt19937(static_cast<unsigned>(blocks)));
  for (const int64_t i : threads)
    syncdpo::replace_tiles<kThreads>(launch, i / kThreads, blocks, static_cast<int>(i % kThreads),
                                     pass);
}

// As the kernel does where a stream is replaced in place: a few blocks, which wait if they must.
void launch_blocks(const std::vector<syncdpo::Stream>& streams,
                   const syncdpo::Segments& segments) {
  const syncdpo::Launch launch = syncdpo::make_launch<kThreads>(streams, segments);
  const int64_t blocks = std::min(launch.tiles[0] + launch.tiles[1], kResident);
  bool staged = false;
  for (const syncdpo::Stream& stream : streams)
    for (int thread = 0; thread < kThreads; ++thread)
      staged |= syncdpo::needs_staging(stream, segments, thread, kThreads);
  if (staged) run_pass(launch, blocks, Pass::stage);
  run_pass(launch, blocks, Pass::in_place);
}

struct Case {
  syncdpo::Tensor tensor;
  int64_t in_offset, out_offset;
  Bytes in, out;

  explicit Case(std::istream& file) {
    tensor.dtype = static_cast<syncdpo::DType>(get<int64_t>(file));
    tensor.dim = get<int64_t>(file);
    const auto axes = get<int64_t>(file);
    tensor.size = get<int64_t>(file, axes);
    tensor.in_stride = get<int64_t>(file, axes);
    tensor.out_stride = get<int64_t>(file, axes);
    tensor.rate = get<double>(file);
    in_offset = get<int64_t>(file);
    out_offset = get<int64_t>(file);
    const auto in_bytes = get<int64_t>(file), out_bytes = get<int64_t>(file);
    in = get<char>(file, in_bytes);
    out = Bytes(out_bytes, kUnwritten);
  }

  syncdpo::Stream stream(Bytes& from, Bytes& to, double crossfade) const {
    syncdpo::Tensor here = tensor;
    const bool in_place = &from == &to;
    here.in = reinterpret_cast<uintptr_t>(from.data() + in_offset);
    here.out = in_place ? here.in : reinterpret_cast<uintptr_t>(to.data() + out_offset);
    if (in_place) here.out_stride = here.in_stride;
    return syncdpo::make_stream(here, crossfade);
  }

  // Out of place and in place, by the CPU kernel.
  std::vector<Bytes> on_cpu(const syncdpo::Segments& segments, double crossfade) const {
    Bytes from = in, to = out;
    syncdpo::replace_segments_cpu({stream(from, to, crossfade)}, segments, kWorkers);
    syncdpo::replace_segments_cpu({stream(from, from, crossfade)}, segments, kWorkers);
    return {to, from};
  }

  // The same in one launch of the CUDA kernel's body.
  std::vector<Bytes> by_blocks(const syncdpo::Segments& segments, double crossfade) const {
    Bytes from = in, to = out, place = in;
    syncdpo::Stream staged = stream(place, place, crossfade);
    const int64_t bytes = staged.samples * staged.runs_per_sample * staged.run;
    const std::unique_ptr<char[]> scratch(new char[bytes]);
    staged.scratch = scratch.get();
    launch_blocks({stream(from, to, crossfade), staged}, segments);
    return {to, place};
  }
};

}  // namespace

int main(int, char** argv) {
  std::ifstream cases(argv[1], std::ios::binary);
  std::ofstream results(argv[2], std::ios::binary);
  for (auto left = get<int64_t>(cases); left > 0; --left) {
    const auto samples = get<int64_t>(cases), rows = get<int64_t>(cases);
    const bool is_double = get<int64_t>(cases) != 0;
    const auto crossfade = get<double>(cases);
    const int64_t bytes = samples * rows * (is_double ? 8 : 4);
    const auto start = get<char>(cases, bytes), length = get<char>(cases, bytes);
    const auto donor = get<int64_t>(cases, samples * rows);
    const auto donor_start = get<char>(cases, bytes);
    const syncdpo::Segments segments{start.data(), length.data(), donor.data(),
                                     donor_start.data(), rows, is_double};
    const Case stream(cases);
    for (const auto& results_of : {stream.on_cpu(segments, crossfade),
                                   stream.by_blocks(segments, crossfade)})
      for (const Bytes& result : results_of)
        results.write(result.data(), static_cast<std::streamsize>(result.size()));
  }
  return 0;
}
