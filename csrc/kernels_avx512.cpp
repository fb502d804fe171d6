#define FASTDIFF_ISA avx512
#define FASTDIFF_LANES 16
#include "kernels.inc"
