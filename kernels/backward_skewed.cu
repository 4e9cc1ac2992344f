// The kernels of backward.cu for tensors that do not start on 16 bytes.
#define LN_SHIFTED
#define LN_SKEWED
#include "backward.cu"
