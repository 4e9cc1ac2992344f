// The kernels of forward.cu for tensors that do not start on 16 bytes, an element at a time: a module of their own, compiled where it is used.
#define LN_SINGLE
#include "forward.cu"
