// The kernels of backward.cu that take the gradient of the sum with a residual: a module of their own, compiled where it is used.
#define LN_ADD
#include "backward.cu"
