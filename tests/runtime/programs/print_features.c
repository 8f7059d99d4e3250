/* print_features.c: what kedge_cpu_features says here. */
#include <stdio.h>

#include "kedge.h"

int main(void) { return puts(kedge_cpu_features()) < 0; }
