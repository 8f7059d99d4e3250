__kernel __attribute__((reqd_work_group_size(16, 16, 1)))
void k(__global uchar *b_base, ulong b_offset,
    __global uchar *a_base, ulong a_offset,
    __global uchar *c_base, ulong c_offset) {
  __global const float *restrict b = (__global const float *)(b_base + b_offset);
  __global const float *restrict a = (__global const float *)(a_base + a_offset);
  __global float *restrict c = (__global float *)(c_base + c_offset);
  const int blockIdx_y = (int)get_group_id(1);
  const int blockIdx_x = (int)get_group_id(0);
  const int threadIdx_y = (int)get_local_id(1);
  const int threadIdx_x = (int)get_local_id(0);
  __local float b_shared[1024];
  __local float a_shared[1024];
  float c_local[544];
  for (int i_2 = 0; i_2 < 8; ++i_2) {
    for (int j_1 = 0; j_1 < 2; ++j_1) {
      for (int j_3 = 0; j_3 < 4; ++j_3) {
        c_local[i_2 * 68 + j_1 * 64 + j_3] = 0.0f;
      }
    }
  }
  for (int k_0 = 0; k_0 < 32; ++k_0) {
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    #pragma unroll
    for (int c0_c1_0 = 0; c0_c1_0 < 4; ++c0_c1_0) {
      b_shared[c0_c1_0 * 256 + threadIdx_y * 16 + threadIdx_x] = b[c0_c1_0 * 512 + threadIdx_y * 32 + k_0 * 2048 + threadIdx_x + blockIdx_x * 128 - threadIdx_y % 8 * 16];
    }
    #pragma unroll
    for (int c0_c1_0_1 = 0; c0_c1_0_1 < 4; ++c0_c1_0_1) {
      a_shared[threadIdx_x % 8 * 128 + threadIdx_x / 8 + c0_c1_0_1 * 32 + threadIdx_y * 2] = a[threadIdx_x * 32 + c0_c1_0_1 * 8192 + threadIdx_y * 512 + blockIdx_y * 32768 + k_0 * 8 - threadIdx_x % 8 * 31];
    }
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    #pragma unroll
    for (int k_1 = 0; k_1 < 8; ++k_1) {
      #pragma unroll
      for (int i_2_1 = 0; i_2_1 < 8; ++i_2_1) {
        #pragma unroll
        for (int j_1_1 = 0; j_1_1 < 2; ++j_1_1) {
          #pragma unroll
          for (int j_3_1 = 0; j_3_1 < 4; ++j_3_1) {
            c_local[i_2_1 * 68 + j_1_1 * 64 + j_3_1] = fma(a_shared[k_1 * 128 + i_2_1 + threadIdx_y * 8], b_shared[k_1 * 128 + j_1_1 * 64 + j_3_1 + threadIdx_x * 4], c_local[i_2_1 * 68 + j_1_1 * 64 + j_3_1]);
          }
        }
      }
    }
  }
  #pragma unroll
  for (int i_2_2 = 0; i_2_2 < 8; ++i_2_2) {
    #pragma unroll
    for (int j_1_2 = 0; j_1_2 < 2; ++j_1_2) {
      #pragma unroll
      for (int j_3_2 = 0; j_3_2 < 4; ++j_3_2) {
        c[blockIdx_y * 32768 + threadIdx_y * 2048 + i_2_2 * 256 + blockIdx_x * 128 + threadIdx_x * 4 + j_1_2 * 64 + j_3_2] = c_local[i_2_2 * 68 + j_1_2 * 64 + j_3_2];
      }
    }
  }
}
