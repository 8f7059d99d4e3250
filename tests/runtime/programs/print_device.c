/* print_device.c: the features of the first OpenCL device. */
#include <stdio.h>

#include "kedge.h"

int main(void) {
  kedge_device_properties properties = {.struct_size = sizeof properties};
  if (kedge_device_info(kDLOpenCL, 0, &properties) != KEDGE_OK) return fprintf(stderr, "%s\n", kedge_last_error()), 1;
  return puts(properties.features) < 0;
}
