#define FASTDIFF_ISA neon
#define FASTDIFF_LANES 4
#include "kernels.inc"
