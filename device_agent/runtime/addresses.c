/* addresses.c: addresses for memory that has none.
 *
 * Each object gets a range of this process's address space where nothing is mapped: arithmetic works, no two overlap,
 * and a host that reads one faults. A table sorted by address leads back to the object.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "device.h"

void kedge_addresses_init(kedge_addresses *table) {
  *table = (kedge_addresses){.n_ranges = 0};
  pthread_mutex_init(&table->lock, NULL);
}

void kedge_addresses_destroy(kedge_addresses *table) {
  pthread_mutex_destroy(&table->lock);
  free(table->ranges);
}

/* How many ranges begin at or before an address. */
static size_t begun_by(const kedge_addresses *table, uintptr_t address) {
  size_t low = 0, high = table->n_ranges;
  while (low < high) {
    size_t middle = low + (high - low) / 2;
    if (table->ranges[middle].start <= address) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

/* False when there is no memory for another range. */
static bool insert(kedge_addresses *table, kedge_range made) {
  if (table->n_ranges == table->room) {
    size_t room = table->room * 2 + 16;
    kedge_range *grown = realloc(table->ranges, room * sizeof *grown);
    if (grown == NULL) return false;
    table->ranges = grown;
    table->room = room;
  }
  size_t at = begun_by(table, made.start);
  memmove(&table->ranges[at + 1], &table->ranges[at], (table->n_ranges - at) * sizeof made);
  table->ranges[at] = made;
  table->n_ranges++;
  return true;
}

void *kedge_new_address(kedge_addresses *table, size_t bytes, void *object) {
  /* More than `bytes`, so that the address behind the last byte is in no other range. */
  size_t page = (size_t)sysconf(_SC_PAGESIZE), reserved = (bytes / page + 1) * page;
  void *address = mmap(NULL, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) return NULL;
  pthread_mutex_lock(&table->lock);
  bool fits = insert(table, (kedge_range){(uintptr_t)address, reserved, bytes, object});
  pthread_mutex_unlock(&table->lock);
  if (fits) return address;
  munmap(address, reserved);
  return NULL;
}

bool kedge_find_address(kedge_addresses *table, const void *address, uint64_t bytes, void **object, uint64_t *offset) {
  pthread_mutex_lock(&table->lock);
  size_t begun = begun_by(table, (uintptr_t)address);
  bool found = false;
  if (begun > 0) {
    const kedge_range *range = &table->ranges[begun - 1];
    *offset = (uintptr_t)address - range->start;
    *object = range->object;
    found = *offset <= range->bytes && bytes <= range->bytes - *offset;
  }
  pthread_mutex_unlock(&table->lock);
  return found;
}

void *kedge_free_address(kedge_addresses *table, void *address) {
  void *object = NULL;
  pthread_mutex_lock(&table->lock);
  size_t begun = begun_by(table, (uintptr_t)address);
  if (begun > 0 && table->ranges[begun - 1].start == (uintptr_t)address) {
    kedge_range *range = &table->ranges[begun - 1];
    object = range->object;
    munmap(address, range->reserved);
    table->n_ranges--;
    memmove(range, range + 1, (table->n_ranges - (begun - 1)) * sizeof *range);
  }
  pthread_mutex_unlock(&table->lock);
  return object;
}

void *kedge_any_address(kedge_addresses *table) {
  pthread_mutex_lock(&table->lock);
  void *address = table->n_ranges == 0 ? NULL : (void *)table->ranges[table->n_ranges - 1].start;
  pthread_mutex_unlock(&table->lock);
  return address;
}
