// Frame-audio segment replacement: the parameters, and the arithmetic that host and device share.
//
// A stream is [B, ..., T, ...] in any layout. The kernels see samples made of runs: the longest
// stretches of bytes that are contiguous in input and output alike. A run holds whole frames where
// time is among its axes, else a part of one frame. Pieces of neighbouring frames within a run are
// kept, copied from a donor, or blended; only blending looks at single elements.
#pragma once

#include <vector>

#include "elements.h"

namespace syncdpo {

constexpr int kMaxDims = 8;

struct Stream {
  const char* in;
  char* out;
  char* scratch;  // in place: one byte per byte of the stream, for values read before overwritten
  DType dtype;
  bool in_place;
  double rate;     // frames per second
  int64_t fade;    // frames of crossfade at either seam
  int64_t frames;  // T
  int64_t in_frame;                 // bytes from one frame to the next
  int64_t in_sample, out_sample;    // bytes from one sample to the next
  int64_t samples, runs_per_sample;
  int64_t run;                      // bytes of a run
  int64_t frame;                    // bytes of a frame within a run
  int64_t chunks_per_run;           // 16-byte chunks, aligned in the output, that a run can touch
  int32_t outer_dims;               // the axes that are not part of a run, outermost first
  int32_t time_dim;                 // which of them is time; -1: time is part of the run
  int64_t size[kMaxDims], in_stride[kMaxDims], out_stride[kMaxDims];
};

// Seconds, [B, count], either all float or all double.
struct Segments {
  const void* start;
  const void* length;
  const int64_t* donor;
  const void* donor_start;
  int64_t count;
  bool is_double;
};

// In place, values whose source is itself overwritten are staged first, by all threads, and written
// afterwards with the others.
enum class Pass { out_of_place, stage, in_place };

// ---- From seconds to frames -------------------------------------------------------------------

// i(t) = floor(t * rate + 0.5), in float64 and rounded twice, as PyTorch does.
SYNCDPO_FN int64_t frame_at(double seconds, double rate) {
#ifdef __CUDA_ARCH__
  return static_cast<int64_t>(floor(__dadd_rn(__dmul_rn(seconds, rate), 0.5)));
#else
  return static_cast<int64_t>(std::floor(seconds * rate + 0.5));
#endif
}

SYNCDPO_FN double seconds_at(const void* times, bool is_double, int64_t index) {
  return is_double ? static_cast<const double*>(times)[index]
                   : static_cast<double>(static_cast<const float*>(times)[index]);
}

// Frames [first, end) are overwritten by those of sample `donor` from `donor_first` on.
struct Segment {
  int64_t first, end, donor, donor_first;
};

SYNCDPO_FN Segment resolve(const Stream& stream, const Segments& segments, int64_t sample,
                           int64_t row) {
  const int64_t index = sample * segments.count + row;
  const double start = seconds_at(segments.start, segments.is_double, index);
  const double length = seconds_at(segments.length, segments.is_double, index);
  const double donor_start = seconds_at(segments.donor_start, segments.is_double, index);
  Segment segment;
  segment.donor = segments.donor[index];
  segment.first = frame_at(start, stream.rate);
  segment.end = smaller(frame_at(start + length, stream.rate), stream.frames);
  segment.donor_first = frame_at(donor_start, stream.rate);
  int64_t count = larger<int64_t>(segment.end - segment.first, 0);
  if (frame_at(donor_start + length, stream.rate) <= stream.frames)
    // The donor's seconds fit: where rounding makes one frame too many of them, begin one earlier.
    segment.donor_first = smaller(segment.donor_first, stream.frames - count);
  else
    count = larger<int64_t>(smaller(count, stream.frames - segment.donor_first), 0);
  segment.end = segment.first + count;
  return segment;
}

SYNCDPO_CALLED float raised_cosine(int64_t edge, int64_t fade) {
  const double phase = (static_cast<double>(edge) + 0.5) / static_cast<double>(fade);
#ifdef __CUDA_ARCH__
  return static_cast<float>(0.5 - 0.5 * cospi(phase));
#else
  return static_cast<float>(0.5 - 0.5 * std::cos(3.14159265358979323846 * phase));
#endif
}

// The donor's share of frame t: rising over the first `fade` frames of a segment, falling over the
// last, 1 between them.
SYNCDPO_FN float weight_at(const Segment& segment, int64_t t, int64_t fade) {
  const int64_t edge = smaller(t - segment.first, segment.end - 1 - t);
  return edge >= fade ? 1.0f : raised_cosine(edge, fade);
}

// ---- Pieces -----------------------------------------------------------------------------------

enum class Kind { keep, copy, blend };

// What happens to frames from the one asked for up to, not including, `until`.
struct Piece {
  Kind kind;
  int64_t donor, shift;  // copy: from sample `donor`, `shift` frames on
  int64_t until;
};

SYNCDPO_FN Piece find_piece(const Stream& stream, const Segments& segments, int64_t sample,
                            int64_t t) {
  Piece piece{Kind::keep, sample, 0, stream.frames};
  SYNCDPO_ROLLED
  for (int64_t row = 0; row < segments.count; ++row) {
    const Segment segment = resolve(stream, segments, sample, row);
    if (t >= segment.end) continue;
    if (t < segment.first) {
      if (segment.first < segment.end) piece.until = smaller(piece.until, segment.first);
    } else if (smaller(t - segment.first, segment.end - 1 - t) < stream.fade) {
      piece.kind = Kind::blend;
      piece.until = t + 1;
    } else {
      piece = {Kind::copy, segment.donor, segment.donor_first - segment.first,
               segment.end - stream.fade};
    }
  }
  return piece;
}

// In place: is any source of frames [begin, end) of `sample` among the frames to be overwritten?
SYNCDPO_FN bool reads_overwritten(const Stream& stream, const Segments& segments, int64_t sample,
                                  int64_t begin, int64_t end) {
  SYNCDPO_ROLLED
  for (int64_t row = 0; row < segments.count; ++row) {
    const Segment segment = resolve(stream, segments, sample, row);
    const int64_t shift = segment.donor_first - segment.first;
    const int64_t from = larger(begin, segment.first) + shift;
    const int64_t to = smaller(end, segment.end) + shift;
    if (from >= to) continue;
    SYNCDPO_ROLLED
    for (int64_t other = 0; other < segments.count; ++other) {
      const Segment target = resolve(stream, segments, segment.donor, other);
      if (larger(from, target.first) < smaller(to, target.end)) return true;
    }
  }
  return false;
}

// Whether anything is to be staged for samples `first`, `first + step`, ...
SYNCDPO_FN bool needs_staging(const Stream& stream, const Segments& segments, int64_t first,
                              int64_t step) {
  bool needed = false;
  for (int64_t sample = first; stream.in_place && sample < stream.samples; sample += step)
    needed = needed || reads_overwritten(stream, segments, sample, 0, stream.frames);
  return needed;
}

// ---- Runs -------------------------------------------------------------------------------------

struct Run {
  const char* in;
  char* out;
  char* scratch;
  int64_t sample;
  int64_t t;  // the frame, where time is not part of the run
};

SYNCDPO_FN Run find_run(const Stream& stream, int64_t index) {
  Run run{stream.in, stream.out, stream.scratch, index / stream.runs_per_sample, 0};
  run.in += run.sample * stream.in_sample;
  run.out += run.sample * stream.out_sample;
  if (run.scratch != nullptr) run.scratch += index * stream.run;
  int64_t rest = index % stream.runs_per_sample;
  SYNCDPO_ROLLED
  for (int dim = stream.outer_dims - 1; dim >= 0; --dim) {
    const int64_t i = rest % stream.size[dim];
    rest /= stream.size[dim];
    run.in += i * stream.in_stride[dim];
    run.out += i * stream.out_stride[dim];
    if (dim == stream.time_dim) run.t = i;
  }
  return run;
}

SYNCDPO_FN const char* donor_run(const Stream& stream, const Run& run, int64_t donor,
                                 int64_t shift) {
  return run.in + (donor - run.sample) * stream.in_sample + shift * stream.in_frame;
}

// Rows one after the other: each blends into what those before it left, from donors as they were.
template <DType dtype>
SYNCDPO_FN void blend_frame(const Stream& stream, const Segments& segments, const Run& run,
                            int64_t t, int64_t begin, int64_t end, char* to) {
  using E = Element<dtype>;
  using T = typename E::type;
  const char* base = run.in;  // what the rows up to `from` leave: this frame, or one donor's
  const char* donor = nullptr;
  float weight = 0;
  int64_t from = 0, blends = 0;
  SYNCDPO_ROLLED
  for (int64_t row = 0; row < segments.count; ++row) {
    const Segment segment = resolve(stream, segments, run.sample, row);
    if (t < segment.first || t >= segment.end) continue;
    donor = donor_run(stream, run, segment.donor, segment.donor_first - segment.first);
    weight = weight_at(segment, t, stream.fade);
    if (smaller(t - segment.first, segment.end - 1 - t) >= stream.fade) {
      base = donor;
      from = row + 1;
      blends = 0;
    } else {
      ++blends;
    }
  }
  if (blends == 1) {
    SYNCDPO_ROLLED
    for (int64_t p = begin; p < end; p += sizeof(T)) {
      const float value = blend(E::load(read<T>(base + p)), E::load(read<T>(donor + p)), weight);
      write<T>(to + p, E::store(value));
    }
    return;
  }
  SYNCDPO_ROLLED
  for (int64_t p = begin; p < end; p += sizeof(T)) {
    float value = E::load(read<T>(base + p));
    SYNCDPO_ROLLED
    for (int64_t row = from; row < segments.count; ++row) {
      const Segment segment = resolve(stream, segments, run.sample, row);
      if (t < segment.first || t >= segment.end) continue;
      donor = donor_run(stream, run, segment.donor, segment.donor_first - segment.first);
      value = blend(value, E::load(read<T>(donor + p)), weight_at(segment, t, stream.fade));
    }
    write<T>(to + p, E::store(value));
  }
}

SYNCDPO_FN void blend_frame(const Stream& stream, const Segments& segments, const Run& run,
                            int64_t t, int64_t begin, int64_t end, char* to) {
  switch (stream.dtype) {
    case DType::uint8:
      return blend_frame<DType::uint8>(stream, segments, run, t, begin, end, to);
    case DType::int16:
      return blend_frame<DType::int16>(stream, segments, run, t, begin, end, to);
    case DType::float16:
      return blend_frame<DType::float16>(stream, segments, run, t, begin, end, to);
    case DType::bfloat16:
      return blend_frame<DType::bfloat16>(stream, segments, run, t, begin, end, to);
    case DType::float32:
      return blend_frame<DType::float32>(stream, segments, run, t, begin, end, to);
  }
}

// Bytes [begin, end) of a run, piece by piece; `copy(to, from, bytes)` moves whole elements.
template <class Copy>
SYNCDPO_FN void replace_range(const Stream& stream, const Segments& segments, const Run& run,
                              int64_t begin, int64_t end, Pass pass, Copy copy) {
  int64_t next = end;
  SYNCDPO_ROLLED
  for (int64_t p = begin; p < end; p = next) {
    const bool time_in_run = stream.time_dim < 0;
    const int64_t row = p / stream.frame;
    const int64_t t = time_in_run ? row % stream.frames : run.t;
    const Piece piece = find_piece(stream, segments, run.sample, t);
    next = time_in_run ? smaller(end, (row - t + piece.until) * stream.frame) : end;

    if (piece.kind == Kind::keep) {
      if (pass == Pass::out_of_place) copy(run.out + p, run.in + p, next - p);
      continue;
    }
    const int64_t frames = (next - 1) / stream.frame - row + 1;
    const bool staged = pass != Pass::out_of_place &&
                        reads_overwritten(stream, segments, run.sample, t, t + frames);
    if (pass == Pass::stage && !staged) continue;
    if (pass == Pass::in_place && staged) {
      copy(run.out + p, run.scratch + p, next - p);
      continue;
    }
    char* to = staged ? run.scratch : run.out;
    if (piece.kind == Kind::copy)
      copy(to + p, donor_run(stream, run, piece.donor, piece.shift) + p, next - p);
    else
      blend_frame(stream, segments, run, t, p, next, to);
  }
}

// ---- Entry points -----------------------------------------------------------------------------

// A stream as Python has it: sizes and strides in elements, axis 0 the batch, `dim` time.
struct Tensor {
  uintptr_t in, out;
  DType dtype;
  std::vector<int64_t> size, in_stride, out_stride;
  int64_t dim;
  double rate;
};

Stream make_stream(const Tensor& tensor, double crossfade);

void replace_segments_cpu(std::vector<Stream> streams, const Segments& segments, int threads);

// At most two streams, in one launch. Times and donors are checked on the device.
void replace_segments_cuda(const std::vector<Stream>& streams, const Segments& segments, bool clip,
                           int device, uintptr_t cuda_stream);

}  // namespace syncdpo
