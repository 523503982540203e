#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, module) {
  module.doc() = "syncdpo's native ops; they take addresses and sizes, and know nothing of torch.";
#ifdef SYNCDPO_CUDA_VERSION
  module.attr("cuda_version") = SYNCDPO_CUDA_VERSION;
  module.attr("cuda_architectures") = SYNCDPO_CUDA_ARCHITECTURES;
#else
  module.attr("cuda_version") = pybind11::none();
  module.attr("cuda_architectures") = "";
#endif
}
