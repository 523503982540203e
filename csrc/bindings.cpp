// The Python module. It takes addresses, sizes and the stream handle as integers and knows nothing
// of torch, so that one build serves every version of it. Arguments are checked by
// syncdpo/ops/segment_replace.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "segment_replace.h"

namespace py = pybind11;

namespace {

// (in, out, scratch, dtype, size, in_stride, out_stride, dim, rate)
using StreamArgs = std::tuple<uintptr_t, uintptr_t, uintptr_t, int, std::vector<int64_t>,
                              std::vector<int64_t>, std::vector<int64_t>, int64_t, double>;
// (start, length, donor, donor_start, rows per sample, times are double)
using SegmentsArgs = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, bool>;

std::vector<syncdpo::Stream> streams_of(const std::vector<StreamArgs>& args, double crossfade) {
  std::vector<syncdpo::Stream> streams;
  for (const auto& [in, out, scratch, dtype, size, in_stride, out_stride, dim, rate] : args) {
    streams.push_back(syncdpo::make_stream({in, out, static_cast<syncdpo::DType>(dtype), size,
                                            in_stride, out_stride, dim, rate},
                                           crossfade));
    streams.back().scratch = reinterpret_cast<char*>(scratch);
  }
  return streams;
}

syncdpo::Segments segments_of(const SegmentsArgs& args) {
  const auto& [start, length, donor, donor_start, count, is_double] = args;
  return {reinterpret_cast<const void*>(start), reinterpret_cast<const void*>(length),
          reinterpret_cast<const int64_t*>(donor), reinterpret_cast<const void*>(donor_start),
          count, is_double};
}

void replace_segments_cpu(const std::vector<StreamArgs>& streams, const SegmentsArgs& segments,
                          double crossfade, int threads) {
  const py::gil_scoped_release release;
  syncdpo::replace_segments_cpu(streams_of(streams, crossfade), segments_of(segments), threads);
}

#ifdef SYNCDPO_CUDA_VERSION
void replace_segments_cuda(const std::vector<StreamArgs>& streams, const SegmentsArgs& segments,
                           double crossfade, bool clip, int device, uintptr_t cuda_stream) {
  syncdpo::replace_segments_cuda(streams_of(streams, crossfade), segments_of(segments), clip,
                                 device, cuda_stream);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "syncdpo's native ops, on addresses and sizes.";
  module.def("replace_segments_cpu", &replace_segments_cpu);
#ifdef SYNCDPO_CUDA_VERSION
  module.def("replace_segments_cuda", &replace_segments_cuda);
  module.attr("cuda_version") = SYNCDPO_CUDA_VERSION;
  module.attr("cuda_architectures") = py::str(SYNCDPO_CUDA_ARCHITECTURES).attr("split")();
#else
  module.attr("cuda_version") = py::none();
  module.attr("cuda_architectures") = py::list();
#endif
}
