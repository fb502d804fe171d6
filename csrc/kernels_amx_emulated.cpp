#define FASTDIFF_ISA amx_emulated
#define FASTDIFF_NAME "amx-emulated"
#define FASTDIFF_LANES 16
#define FASTDIFF_AMX 2
#include "kernels.inc"
