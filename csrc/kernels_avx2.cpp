#define FASTDIFF_ISA avx2
#define FASTDIFF_LANES 8
#include "kernels.inc"
