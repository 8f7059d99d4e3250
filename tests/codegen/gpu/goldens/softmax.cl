#ifndef HAVE_kedge_max_float
#define HAVE_kedge_max_float
float kedge_max_float(float a, float b) { return isnan(a) ? a : a > b ? a : b; }
#endif

__kernel __attribute__((reqd_work_group_size(256, 1, 1)))
void k(__global uchar *x_base, ulong x_offset,
    __global uchar *e_base, ulong e_offset,
    __global uchar *y_base, ulong y_offset) {
  __global const float *restrict x = (__global const float *)(x_base + x_offset);
  __global float *restrict e = (__global float *)(e_base + e_offset);
  __global float *restrict y = (__global float *)(y_base + y_offset);
  const int blockIdx_x = (int)get_group_id(0);
  const int threadIdx_x = (int)get_local_id(0);
  __local float most_tree[256];
  __local float most[1];
  __local float total_tree[256];
  __local float total[1];
  float most_part[1];
  float total_part[1];
  most_part[0] = -INFINITY;
  for (int r_0 = 0; r_0 < 4; ++r_0) {
    if (r_0 * 256 + threadIdx_x < 1000) {
      most_part[0] = kedge_max_float(most_part[0], x[blockIdx_x * 1000 + r_0 * 256 + threadIdx_x]);
    }
  }
  most_tree[threadIdx_x] = most_part[0];
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 128) {
    most_tree[threadIdx_x] = kedge_max_float(most_tree[threadIdx_x], most_tree[threadIdx_x + 128]);
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 64) {
    most_tree[threadIdx_x] = kedge_max_float(most_tree[threadIdx_x], most_tree[threadIdx_x + 64]);
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 32) {
    most_tree[threadIdx_x] = kedge_max_float(most_tree[threadIdx_x], most_tree[threadIdx_x + 32]);
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 16) {
    most_tree[threadIdx_x] = kedge_max_float(most_tree[threadIdx_x], most_tree[threadIdx_x + 16]);
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 8) {
    most_tree[threadIdx_x] = kedge_max_float(most_tree[threadIdx_x], most_tree[threadIdx_x + 8]);
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 4) {
    most_tree[threadIdx_x] = kedge_max_float(most_tree[threadIdx_x], most_tree[threadIdx_x + 4]);
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 2) {
    most_tree[threadIdx_x] = kedge_max_float(most_tree[threadIdx_x], most_tree[threadIdx_x + 2]);
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x == 0) {
    most_tree[0] = kedge_max_float(most_tree[0], most_tree[1]);
    most[0] = -INFINITY;
    most[0] = kedge_max_float(most[0], most_tree[0]);
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  for (int j_0 = 0; j_0 < 4; ++j_0) {
    if (j_0 * 256 + threadIdx_x < 1000) {
      e[blockIdx_x * 1000 + j_0 * 256 + threadIdx_x] = exp(x[blockIdx_x * 1000 + j_0 * 256 + threadIdx_x] - most[0]);
    }
  }
  total_part[0] = 0.0f;
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  for (int s_0 = 0; s_0 < 4; ++s_0) {
    if (s_0 * 256 + threadIdx_x < 1000) {
      total_part[0] = total_part[0] + e[blockIdx_x * 1000 + s_0 * 256 + threadIdx_x];
    }
  }
  total_tree[threadIdx_x] = total_part[0];
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 128) {
    total_tree[threadIdx_x] = total_tree[threadIdx_x] + total_tree[threadIdx_x + 128];
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 64) {
    total_tree[threadIdx_x] = total_tree[threadIdx_x] + total_tree[threadIdx_x + 64];
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 32) {
    total_tree[threadIdx_x] = total_tree[threadIdx_x] + total_tree[threadIdx_x + 32];
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 16) {
    total_tree[threadIdx_x] = total_tree[threadIdx_x] + total_tree[threadIdx_x + 16];
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 8) {
    total_tree[threadIdx_x] = total_tree[threadIdx_x] + total_tree[threadIdx_x + 8];
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 4) {
    total_tree[threadIdx_x] = total_tree[threadIdx_x] + total_tree[threadIdx_x + 4];
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x < 2) {
    total_tree[threadIdx_x] = total_tree[threadIdx_x] + total_tree[threadIdx_x + 2];
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  if (threadIdx_x == 0) {
    total_tree[0] = total_tree[0] + total_tree[1];
    total[0] = 0.0f;
    total[0] = total[0] + total_tree[0];
  }
  barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
  for (int j_0_1 = 0; j_0_1 < 4; ++j_0_1) {
    if (j_0_1 * 256 + threadIdx_x < 1000) {
      y[blockIdx_x * 1000 + j_0_1 * 256 + threadIdx_x] = e[blockIdx_x * 1000 + j_0_1 * 256 + threadIdx_x] / total[0];
    }
  }
}
