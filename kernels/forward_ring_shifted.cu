// The kernels of forward_ring.cu for rows that do not start on 16 bytes, in tensors that do.
#define LN_SHIFTED
#include "forward_ring.cu"
