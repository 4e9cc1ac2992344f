// The kernels of backward_ring.cu for rows that do not start on 16 bytes, in tensors that do: a module of their own, compiled where it is used.
#define LN_SHIFTED
#include "backward_ring.cu"
