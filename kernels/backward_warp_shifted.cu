// backward.cu for rows that do not start on 16 bytes.
#define LN_SHIFTED
#include "backward.cu"
