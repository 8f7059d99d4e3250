/* Prints what kedge_cpu_quota finds below each folder that is named. */
#include <stdio.h>

#include "internal.h"

int main(int argc, char **argv) {
  for (int i = 1; i < argc; i++) printf("%d\n", kedge_cpu_quota(argv[i]));
  return 0;
}
