__kernel __attribute__((reqd_work_group_size(16, 16, 1)))
void k(__global uchar *a_base, ulong a_offset,
    __global uchar *b_base, ulong b_offset,
    __global uchar *c_base, ulong c_offset) {
  __global const float *restrict a = (__global const float *)(a_base + a_offset);
  __global const float *restrict b = (__global const float *)(b_base + b_offset);
  __global float *restrict c = (__global float *)(c_base + c_offset);
  const int blockIdx_y = (int)get_group_id(1);
  const int blockIdx_x = (int)get_group_id(0);
  const int threadIdx_y = (int)get_local_id(1);
  const int threadIdx_x = (int)get_local_id(0);
  float c_local[1];
  c_local[0] = 0.0f;
  for (int k = 0; k < 256; ++k) {
    c_local[0] = fma(a[blockIdx_y * 4096 + threadIdx_y * 256 + k], b[k * 256 + blockIdx_x * 16 + threadIdx_x], c_local[0]);
  }
  c[blockIdx_y * 4096 + threadIdx_y * 256 + blockIdx_x * 16 + threadIdx_x] = c_local[0];
}
