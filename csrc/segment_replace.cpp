// Segment replacement on the CPU, and the layout of a stream for either device.
#include "segment_replace.h"

#include <algorithm>
#include <atomic>
#include <future>
#include <memory>
#include <stdexcept>

namespace syncdpo {
namespace {

struct Axis {
  int64_t size, in, out;  // strides in bytes
  bool is_time;
};

// What a thread takes at a time. It pays for one to be started, and is so little that all end
// together where only some parts hold anything to replace.
constexpr int64_t kBytesPerPart = 1 << 20;

template <int64_t size>
void copy_strided(char* to, const char* from, int64_t count, int64_t to_step, int64_t from_step) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * to_step, from + i * from_step, size);
}

// Short runs, where time is another axis: at most `count` of them along the innermost axis lie in
// one frame and share its piece. Returns how many were copied; none where they must be blended.
int64_t copy_runs(const Stream& stream, const Segments& segments, int64_t index, int64_t count,
                  Pass pass) {
  const int axis = stream.outer_dims - 1;
  if (stream.time_dim < 0 || stream.time_dim == axis || pass != Pass::out_of_place) return 0;
  const Run run = find_run(stream, index);
  const Piece piece = find_piece(stream, segments, run.sample, run.t);
  if (piece.kind == Kind::blend) return 0;
  count = std::min(count, stream.size[axis] - index % stream.size[axis]);
  const char* from = donor_run(stream, run, piece.donor, piece.shift);
  const int64_t to_step = stream.out_stride[axis], from_step = stream.in_stride[axis];
  switch (stream.run) {
    case 1: copy_strided<1>(run.out, from, count, to_step, from_step); break;
    case 2: copy_strided<2>(run.out, from, count, to_step, from_step); break;
    case 3: copy_strided<3>(run.out, from, count, to_step, from_step); break;
    case 4: copy_strided<4>(run.out, from, count, to_step, from_step); break;
    default:
      for (int64_t i = 0; i < count; ++i)
        std::memcpy(run.out + i * to_step, from + i * from_step, stream.run);
  }
  return count;
}

void replace_bytes(const Stream& stream, const Segments& segments, int64_t begin, int64_t end,
                   Pass pass) {
  while (begin < end) {
    const int64_t index = begin / stream.run, offset = begin % stream.run;
    if (offset == 0 && end - begin >= stream.run) {
      const int64_t copied = copy_runs(stream, segments, index, (end - begin) / stream.run,
                                       pass);
      begin += copied * stream.run;
      if (copied > 0) continue;
    }
    const int64_t bytes = std::min(end - begin, stream.run - offset);
    replace_range(stream, segments, find_run(stream, index), offset, offset + bytes, pass,
                  [](char* to, const char* from, int64_t n) { std::memcpy(to, from, n); });
    begin += bytes;
  }
}

void replace_stream(const Stream& stream, const Segments& segments, int threads, Pass pass) {
  const int64_t total = stream.samples * stream.runs_per_sample * stream.run;
  const int64_t workers = std::clamp<int64_t>(total / kBytesPerPart, 1, std::max(threads, 1));
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t begin; (begin = kBytesPerPart * next.fetch_add(1)) < total;)
      replace_bytes(stream, segments, begin, std::min(begin + kBytesPerPart, total), pass);
  };
  std::vector<std::future<void>> others;
  for (int64_t i = 1; i < workers; ++i) others.push_back(std::async(std::launch::async, work));
  work();
  for (auto& other : others) other.get();
}

}  // namespace

Stream make_stream(const Tensor& tensor, double crossfade) {
  const int64_t item = item_size(tensor.dtype);
  Stream stream{};
  stream.in = reinterpret_cast<const char*>(tensor.in);
  stream.out = reinterpret_cast<char*>(tensor.out);
  stream.dtype = tensor.dtype;
  stream.in_place = tensor.in == tensor.out;
  stream.rate = tensor.rate;
  stream.fade = frame_at(crossfade, tensor.rate);
  stream.frames = tensor.size[tensor.dim];
  stream.in_frame = tensor.in_stride[tensor.dim] * item;
  stream.in_sample = tensor.in_stride[0] * item;
  stream.out_sample = tensor.out_stride[0] * item;
  stream.samples = tensor.size[0];
  stream.runs_per_sample = 1;
  stream.run = stream.frame = item;
  stream.time_dim = -1;

  std::vector<Axis> axes;
  for (size_t dim = 1; dim < tensor.size.size(); ++dim) {
    if (tensor.size[dim] == 0) stream.samples = 0;
    if (tensor.size[dim] > 1)
      axes.push_back({tensor.size[dim], tensor.in_stride[dim] * item,
                      tensor.out_stride[dim] * item, static_cast<int64_t>(dim) == tensor.dim});
  }
  // Innermost first, in the order of memory rather than of the axes' names.
  std::stable_sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) {
    return a.out != b.out ? a.out < b.out : a.in < b.in;
  });

  size_t used = 0;
  bool time_in_run = stream.frames <= 1;
  for (; used < axes.size(); ++used) {
    const Axis& axis = axes[used];
    if (axis.in != stream.run || axis.out != stream.run) break;
    if (axis.is_time) {
      time_in_run = true;
      stream.frame = stream.run;
    }
    stream.run *= axis.size;
    if (!time_in_run || stream.frames <= 1) stream.frame = stream.run;
  }

  std::vector<Axis> outer;  // innermost first, neighbours merged where both layouts allow it
  for (; used < axes.size(); ++used) {
    const Axis& axis = axes[used];
    if (!outer.empty() && !axis.is_time && !outer.back().is_time &&
        axis.in == outer.back().in * outer.back().size &&
        axis.out == outer.back().out * outer.back().size)
      outer.back().size *= axis.size;
    else
      outer.push_back(axis);
  }
  if (outer.size() > kMaxDims)
    throw std::invalid_argument("expected at most 8 axes that are strided independently, got " +
                                std::to_string(outer.size()));
  stream.outer_dims = static_cast<int32_t>(outer.size());
  for (size_t i = 0; i < outer.size(); ++i) {
    const size_t dim = outer.size() - 1 - i;
    stream.size[dim] = outer[i].size;
    stream.in_stride[dim] = outer[i].in;
    stream.out_stride[dim] = outer[i].out;
    stream.runs_per_sample *= outer[i].size;
    if (outer[i].is_time) stream.time_dim = static_cast<int32_t>(dim);
  }

  // Runs begin anywhere on the finest grid that all addresses share.
  uint64_t address = tensor.out | static_cast<uint64_t>(stream.out_sample) | 16;
  for (int dim = 0; dim < stream.outer_dims; ++dim)
    address |= static_cast<uint64_t>(stream.out_stride[dim]);
  const int64_t grid = static_cast<int64_t>(address & (~address + 1));
  stream.chunks_per_run = (stream.run + (16 - grid) + 15) / 16;
  return stream;
}

void replace_segments_cpu(std::vector<Stream> streams, const Segments& segments, int threads) {
  for (Stream& stream : streams) {
    if (stream.samples == 0) continue;
    std::unique_ptr<char[]> scratch;
    if (needs_staging(stream, segments, 0, 1)) {
      scratch.reset(new char[stream.samples * stream.runs_per_sample * stream.run]);
      stream.scratch = scratch.get();
      replace_stream(stream, segments, threads, Pass::stage);
    }
    replace_stream(stream, segments, threads,
                   stream.in_place ? Pass::in_place : Pass::out_of_place);
  }
}

}  // namespace syncdpo
