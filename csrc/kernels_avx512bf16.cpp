#define FASTDIFF_ISA avx512bf16
#define FASTDIFF_LANES 16
#include "kernels.inc"
