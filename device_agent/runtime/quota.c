/* quota.c: how much of the CPUs the control groups of this process let it use (cgroup v2, cpu.max). */
#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "internal.h"

enum { PATH_ROOM = 4096 };

/* What one group allows, in CPUs, rounded up; INT32_MAX where it sets no limit. */
static int32_t of_group(const char *folder) {
  char path[2 * PATH_ROOM + 16];
  long long quota, period;
  if (snprintf(path, sizeof path, "%s/cpu.max", folder) >= (int)sizeof path) return INT32_MAX;
  FILE *file = fopen(path, "re");
  if (file == NULL) return INT32_MAX;
  int found = fscanf(file, "%lld %lld", &quota, &period); /* "max" in place of the first is no number */
  fclose(file);
  if (found != 2 || quota <= 0 || period <= 0 || quota / period >= INT32_MAX) return INT32_MAX;
  return (int32_t)((quota + period - 1) / period);
}

/* Where this process is in the hierarchy of version 2, "/..."; false where there is none. */
static bool own_group(const char *root, char *into, size_t room) {
  char path[PATH_ROOM], line[PATH_ROOM];
  if (snprintf(path, sizeof path, "%s/proc/self/cgroup", root) >= (int)sizeof path) return false;
  FILE *file = fopen(path, "re");
  bool found = false;
  while (file != NULL && !found && fgets(line, sizeof line, file) != NULL) {
    line[strcspn(line, "\n")] = '\0';
    found = strncmp(line, "0::/", 4) == 0;
  }
  if (file != NULL) fclose(file);
  return found && snprintf(into, room, "%s", line + 3) < (int)room;
}

int32_t kedge_cpu_quota(const char *root) {
  char group[PATH_ROOM], folder[2 * PATH_ROOM];
  if (!own_group(root, group, sizeof group)) return INT32_MAX;
  int32_t least = INT32_MAX;
  for (;;) { /* every group above has a limit of its own */
    if (snprintf(folder, sizeof folder, "%s/sys/fs/cgroup%s", root, group) >= (int)sizeof folder) return least;
    int32_t allowed = of_group(folder);
    least = allowed < least ? allowed : least;
    char *end = strrchr(group, '/');
    if (end == NULL) return least;
    *end = '\0';
  }
}
