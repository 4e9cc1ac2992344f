// The kernels of forward_ring.cu for tensors that do not start on 16 bytes.
#define LN_SHIFTED
#define LN_SKEWED
#include "forward_ring.cu"
