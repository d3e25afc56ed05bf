// The Python module deco_fast._C.
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include "flow_matching_loss_op.h"
#include "instruction_set.h"
#include "packed_linear_op.h"
#include "pixel_decoder_op.h"

namespace py = pybind11;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "The C++ side of deco_fast: what this CPU can do, and the kernels for it.";
  module.attr("sources") = DECO_SOURCES;  // see kernels/sources.py
  module.def(
      "instruction_set", [] { return deco::name(deco::selected_instruction_set()); },
      "The instruction set that the CPU kernels use: 'baseline', 'avx2', 'avx512', 'avx512_bf16' "
      "or 'amx'. Raises ValueError if the environment variable DECO_ISA names an unknown "
      "one or one that this CPU lacks.");
  module.def("flow_matching_loss_forward", &deco::flow_matching_loss_forward,
             py::call_guard<py::gil_scoped_release>(), "See flow_matching_loss_op.h.");
  module.def("has_block_products", &deco::has_block_products, "See packed_linear_op.h.");
  module.def("pack_weight", &deco::pack_weight, py::call_guard<py::gil_scoped_release>(),
             "See packed_linear_op.h.");
  module.def("packed_linear", &deco::packed_linear, py::call_guard<py::gil_scoped_release>(),
             "See packed_linear_op.h.");
  module.def("pixel_decoder_forward", &deco::pixel_decoder_forward,
             py::call_guard<py::gil_scoped_release>(), "See pixel_decoder_op.h.");
  module.def("pixel_decoder_backward", &deco::pixel_decoder_backward,
             py::call_guard<py::gil_scoped_release>(), "See pixel_decoder_op.h.");
}
