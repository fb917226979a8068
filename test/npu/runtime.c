/* What the lowered kernels call. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  int64_t rank;
  void *descriptor; /* allocated, aligned, offset, sizes[rank], strides[rank] */
} Memref;

/* One strided block of memory to another. */
void memrefCopy(int64_t size, const Memref *from, const Memref *to) {
  int64_t rank = from->rank, *f = from->descriptor, *t = to->descriptor;
  const int64_t *sizes = f + 3, *from_strides = f + 3 + rank, *to_strides = t + 3 + rank;
  const char *source = (const char *)f[1] + f[2] * size;
  char *target = (char *)t[1] + t[2] * size;
  for (int64_t d = 0; d < rank; d++)
    if (sizes[d] <= 0) return;
  int64_t *at = calloc(rank + 1, sizeof *at);
  for (;;) {
    const char *s = source;
    char *d = target;
    for (int64_t k = 0; k < rank; k++) {
      s += at[k] * from_strides[k] * size;
      d += at[k] * to_strides[k] * size;
    }
    memcpy(d, s, size);
    int64_t k = rank - 1;
    while (k >= 0 && ++at[k] == sizes[k]) at[k--] = 0;
    if (k < 0) break;
  }
  free(at);
}

/* fp32 as bf16, to nearest and to even, in the low half of the result's register: what llc calls where a processor has
   no bf16, and gcc 12 has no type for it. */
float __truncsfbf2(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  if ((bits & 0x7fffffff) > 0x7f800000) nearest = bits >> 16 | 0x40; /* a NaN stays one */
  memcpy(&x, &nearest, sizeof x);
  return x;
}
