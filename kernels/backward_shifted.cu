// The kernels of backward.cu for rows that do not start on 16 bytes, in tensors that do.
#define LN_SHIFTED
#include "backward.cu"
