__kernel __attribute__((reqd_work_group_size(256, 1, 1)))
void k(__global uchar *x_base, ulong x_offset,
    __global uchar *y_base, ulong y_offset) {
  __global const float *restrict x = (__global const float *)(x_base + x_offset);
  __global float *restrict y = (__global float *)(y_base + y_offset);
  const int blockIdx_x = (int)get_group_id(0);
  const int threadIdx_x = (int)get_local_id(0);
  __local float y_tree[256];
  float y_part[1];
  y_part[0] = 0.0f;
  for (int k_0 = 0; k_0 < 4; ++k_0) {
    if (k_0 * 256 + threadIdx_x < 1000) {
      y_part[0] = y_part[0] + x[blockIdx_x * 1000 + k_0 * 256 + threadIdx_x];
    }
  }
  y_tree[threadIdx_x] = y_part[0];
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 128) {
    y_tree[threadIdx_x] = y_tree[threadIdx_x] + y_tree[threadIdx_x + 128];
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 64) {
    y_tree[threadIdx_x] = y_tree[threadIdx_x] + y_tree[threadIdx_x + 64];
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 32) {
    y_tree[threadIdx_x] = y_tree[threadIdx_x] + y_tree[threadIdx_x + 32];
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 16) {
    y_tree[threadIdx_x] = y_tree[threadIdx_x] + y_tree[threadIdx_x + 16];
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 8) {
    y_tree[threadIdx_x] = y_tree[threadIdx_x] + y_tree[threadIdx_x + 8];
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 4) {
    y_tree[threadIdx_x] = y_tree[threadIdx_x] + y_tree[threadIdx_x + 4];
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 2) {
    y_tree[threadIdx_x] = y_tree[threadIdx_x] + y_tree[threadIdx_x + 2];
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x == 0) {
    y_tree[0] = y_tree[0] + y_tree[1];
    y[blockIdx_x] = 0.0f;
    y[blockIdx_x] = y[blockIdx_x] + y_tree[0];
  }
}
