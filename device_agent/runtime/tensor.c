/* tensor.c: what can be said about a DLTensor by itself. */
#include "internal.h"

void kedge_dtype_print(DLDataType dtype, kedge_text *text) {
  const char *kind = dtype.code == kDLInt      ? "int"
                     : dtype.code == kDLUInt   ? "uint"
                     : dtype.code == kDLFloat  ? "float"
                     : dtype.code == kDLBfloat ? "bfloat"
                                               : NULL;
  if (dtype.code == kDLBool && dtype.bits == 8) {
    kedge_text_add(text, "bool");
  } else if (kind != NULL) {
    kedge_text_add(text, "%s%d", kind, dtype.bits);
  } else {
    kedge_text_add(text, "dtype(code %d, %d bits)", dtype.code, dtype.bits);
  }
  if (dtype.lanes != 1) kedge_text_add(text, "x%d", dtype.lanes);
}

bool kedge_tensor_bytes(const DLTensor *tensor, uint64_t *bytes) {
  uint64_t total = ((uint64_t)tensor->dtype.bits * tensor->dtype.lanes + 7) / 8;
  for (int32_t i = 0; i < tensor->ndim; i++) { /* a zero first: it makes any other dim harmless */
    if (tensor->shape[i] < 0) return false;
    if (tensor->shape[i] == 0) total = 0;
  }
  for (int32_t i = 0; i < tensor->ndim; i++) {
    if (__builtin_mul_overflow(total, (uint64_t)tensor->shape[i], &total)) return false;
  }
  *bytes = total;
  return total <= (uint64_t)PTRDIFF_MAX;
}

bool kedge_tensor_is_dense(const DLTensor *tensor) {
  if (tensor->strides == NULL) return true;
  int64_t expected = 1;
  for (int32_t i = 0; i < tensor->ndim; i++) {
    if (tensor->shape[i] == 0) return true;
  }
  for (int32_t i = tensor->ndim - 1; i >= 0; i--) {
    if (tensor->shape[i] != 1 && tensor->strides[i] != expected) return false; /* the stride of a 1 says nothing */
    if (__builtin_mul_overflow(expected, tensor->shape[i], &expected)) return false;
  }
  return true;
}
