// The Python module wam_kernels._C: one function per launch, taking device addresses and a stream as integers.
//
// Every op binds its own functions, in its folder; they are compiled here together, because pybind11's headers take
// longer than all of them.
#include "adaln/bindings.h"
#include "block_attention/bindings.h"
#include "cached_attention/bindings.h"
#include "qk_norm_rope/bindings.h"

#ifndef WAM_CUDA_ARCHITECTURES
#define WAM_CUDA_ARCHITECTURES ""  // the host emulation's module
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of wam_kernels. Importing it touches no driver; a call does.";
  // "80 90a": those of all kernels but Hopper's own, which are compiled for sm_90a alone
  m.attr("architectures") = WAM_CUDA_ARCHITECTURES;
  wam::adaln_bindings::register_functions(m);
  wam::block_attention_bindings::register_functions(m);
  wam::cached_attention_bindings::register_functions(m);
  wam::qk_norm_rope_bindings::register_functions(m);
}
