// Runs cases of segment replacement on the host, by the CPU kernel and by the body of the CUDA
// kernel, so that sanitizers see both. tests/test_segment_replace.py writes the cases, builds this
// with csrc/segment_replace.cpp, and compares what comes back with the reference.
//
//   segment_replace_host CASES RESULTS

#include <algorithm>
#include <fstream>
#include <memory>
#include <numeric>
#include <random>

#include "segment_replace.h"

namespace {

using syncdpo::Phase;
using Bytes = std::vector<char>;

constexpr int kThreads = 8;  // few, so that small cases have tiles of every kind
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

// Every thread of every tile, in an order of its own: no result may depend on it.
void run_tiles(const syncdpo::Stream& stream, const syncdpo::Segments& segments, Phase phase) {
  const int64_t per_tile = kThreads * syncdpo::kChunksPerThread;
  const int64_t chunks = stream.samples * stream.runs_per_sample * stream.chunks_per_run;
  std::vector<int64_t> threads((chunks + per_tile - 1) / per_tile * kThreads);
  std::iota(threads.begin(), threads.end(), 0);
  std::shuffle(threads.begin(), threads.end(), std::mt19937(static_cast<unsigned>(chunks)));
  for (const int64_t i : threads)
    syncdpo::replace_tile<kThreads>(stream, segments, i / kThreads,
                                    static_cast<int>(i % kThreads), phase);
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

  Bytes run(const syncdpo::Segments& segments, double crossfade, bool in_place, bool tiles) const {
    Bytes from = in, to = out;
    syncdpo::Tensor here = tensor;
    here.in = reinterpret_cast<uintptr_t>(from.data() + in_offset);
    here.out = in_place ? here.in : reinterpret_cast<uintptr_t>(to.data() + out_offset);
    if (in_place) here.out_stride = here.in_stride;
    syncdpo::Stream stream = syncdpo::make_stream(here, crossfade);
    if (!tiles) {
      syncdpo::replace_segments_cpu({stream}, segments, kWorkers);
    } else {
      const int64_t bytes = stream.samples * stream.runs_per_sample * stream.run;
      const std::unique_ptr<char[]> scratch(new char[bytes]);
      stream.scratch = scratch.get();
      if (in_place) run_tiles(stream, segments, Phase::stage);
      run_tiles(stream, segments, Phase::write);
    }
    return in_place ? from : to;
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
    for (const bool in_place : {false, true})
      for (const bool tiles : {false, true}) {
        const Bytes result = stream.run(segments, crossfade, in_place, tiles);
        results.write(result.data(), static_cast<std::streamsize>(result.size()));
      }
  }
  return 0;
}
