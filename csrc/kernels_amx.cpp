#define FASTDIFF_ISA amx
#define FASTDIFF_LANES 16
#define FASTDIFF_AMX 1
#include "kernels.inc"
