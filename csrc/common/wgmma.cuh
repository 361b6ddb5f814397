// The matrix products of a warpgroup as PTX: 64 rows by N columns by 16, float32 sums. Only nvcc reads this file.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// The operands "+f"(d[i]) of 8 and more registers, and their names in the text.
#define WAM_OUT_8(d, i)                                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define WAM_OUT_32(d, i) WAM_OUT_8(d, i), WAM_OUT_8(d, i + 8), WAM_OUT_8(d, i + 16), WAM_OUT_8(d, i + 24)
#define WAM_OUT_64(d, i) WAM_OUT_32(d, i), WAM_OUT_32(d, i + 32)
#define WAM_NAMES_32                                                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, "                                                                                                          \
  "%25, %26, %27, %28, %29, %30, %31"
#define WAM_NAMES_64                                                                                                 \
  WAM_NAMES_32                                                                                                       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

namespace wam::sm90 {

// sums (+)= a b. `registers`: a in registers, b by descriptor, transposed where its rows (the columns of the product)
// are contiguous. `shared`: a and b by descriptor.
template <class T, int N>
struct Wgmma;

// Arguments after the name of the type: N, its half as spelt in the macros above, and the numbers of the operands after
// the sums.
#define WAM_WGMMA(T, TYPE, N, HALF, P0, P1, P2, P3, P4, P5, P6)                                                        \
  template <>                                                                                                          \
  struct Wgmma<T, N> {                                                                                                 \
    template <bool kTransposed>                                                                                        \
    static __device__ __forceinline__ void registers(float (&sums)[N / 2], const uint32_t (&a)[4], uint64_t b,         \
                                                     bool accumulate) {                                                \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #P5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N           \
                   "k16.f32." TYPE "." TYPE " {" WAM_NAMES_##HALF "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 \
                                                                  ", add, 1, 1, %" #P6 ";\n}\n"                        \
                   : WAM_OUT_##HALF(sums, 0)                                                                           \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),            \
                     "n"(static_cast<int>(kTransposed)));                                                              \
    }                                                                                                                  \
    static __device__ __forceinline__ void shared(float (&sums)[N / 2], uint64_t a, uint64_t b, bool accumulate) {     \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #P2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N           \
                   "k16.f32." TYPE "." TYPE " {" WAM_NAMES_##HALF "}, %" #P0 ", %" #P1 ", add, 1, 1, 0, 0;\n}\n"       \
                   : WAM_OUT_##HALF(sums, 0)                                                                           \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                               \
    }                                                                                                                  \
  };

WAM_WGMMA(__nv_bfloat16, "bf16", 64, 32, 32, 33, 34, 35, 36, 37, 38)
WAM_WGMMA(__nv_bfloat16, "bf16", 128, 64, 64, 65, 66, 67, 68, 69, 70)
WAM_WGMMA(__half, "f16", 64, 32, 32, 33, 34, 35, 36, 37, 38)
WAM_WGMMA(__half, "f16", 128, 64, 64, 65, 66, 67, 68, 69, 70)

#undef WAM_WGMMA
#undef WAM_OUT_8
#undef WAM_OUT_32
#undef WAM_OUT_64
#undef WAM_NAMES_32
#undef WAM_NAMES_64

}  // namespace wam::sm90
