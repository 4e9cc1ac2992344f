// The kernels of forward.cu that add a residual first: a module of their own, compiled where it is used.
#define LN_ADD
#include "forward.cu"
