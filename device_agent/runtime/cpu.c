/* cpu.c: what this machine's CPU can do, in LLVM's names. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

enum { MAX_FEATURES = 128 };

typedef struct {
  const char *names[MAX_FEATURES];
  int count;
} feature_list;

static void add(feature_list *list, const char *name) {
  if (list->count < MAX_FEATURES) list->names[list->count++] = name;
}

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>

/* Registers that need the operating system to save them. */
enum { OS_NONE, OS_AVX, OS_AVX512, OS_AMX };
enum { EAX, EBX, ECX, EDX };

typedef struct {
  const char *name;
  uint32_t leaf, subleaf;
  uint8_t reg, bit, os;
} x86_feature;

/* Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E. */
static const x86_feature x86_features[] = {
    {"cx8", 1, 0, EDX, 8, OS_NONE},
    {"cmov", 1, 0, EDX, 15, OS_NONE},
    {"mmx", 1, 0, EDX, 23, OS_NONE},
    {"fxsr", 1, 0, EDX, 24, OS_NONE},
    {"sse", 1, 0, EDX, 25, OS_NONE},
    {"sse2", 1, 0, EDX, 26, OS_NONE},
    {"sse3", 1, 0, ECX, 0, OS_NONE},
    {"pclmul", 1, 0, ECX, 1, OS_NONE},
    {"ssse3", 1, 0, ECX, 9, OS_NONE},
    {"fma", 1, 0, ECX, 12, OS_AVX},
    {"cx16", 1, 0, ECX, 13, OS_NONE},
    {"sse4.1", 1, 0, ECX, 19, OS_NONE},
    {"sse4.2", 1, 0, ECX, 20, OS_NONE},
    {"crc32", 1, 0, ECX, 20, OS_NONE},
    {"movbe", 1, 0, ECX, 22, OS_NONE},
    {"popcnt", 1, 0, ECX, 23, OS_NONE},
    {"aes", 1, 0, ECX, 25, OS_NONE},
    {"xsave", 1, 0, ECX, 26, OS_AVX},
    {"avx", 1, 0, ECX, 28, OS_AVX},
    {"f16c", 1, 0, ECX, 29, OS_AVX},
    {"rdrnd", 1, 0, ECX, 30, OS_NONE},
    {"fsgsbase", 7, 0, EBX, 0, OS_NONE},
    {"bmi", 7, 0, EBX, 3, OS_NONE},
    {"avx2", 7, 0, EBX, 5, OS_AVX},
    {"bmi2", 7, 0, EBX, 8, OS_NONE},
    {"invpcid", 7, 0, EBX, 10, OS_NONE},
    {"rtm", 7, 0, EBX, 11, OS_NONE},
    {"avx512f", 7, 0, EBX, 16, OS_AVX512},
    {"avx512dq", 7, 0, EBX, 17, OS_AVX512},
    {"rdseed", 7, 0, EBX, 18, OS_NONE},
    {"adx", 7, 0, EBX, 19, OS_NONE},
    {"avx512ifma", 7, 0, EBX, 21, OS_AVX512},
    {"clflushopt", 7, 0, EBX, 23, OS_NONE},
    {"clwb", 7, 0, EBX, 24, OS_NONE},
    {"avx512cd", 7, 0, EBX, 28, OS_AVX512},
    {"sha", 7, 0, EBX, 29, OS_NONE},
    {"avx512bw", 7, 0, EBX, 30, OS_AVX512},
    {"avx512vl", 7, 0, EBX, 31, OS_AVX512},
    {"avx512vbmi", 7, 0, ECX, 1, OS_AVX512},
    {"pku", 7, 0, ECX, 4, OS_NONE},
    {"waitpkg", 7, 0, ECX, 5, OS_NONE},
    {"avx512vbmi2", 7, 0, ECX, 6, OS_AVX512},
    {"shstk", 7, 0, ECX, 7, OS_NONE},
    {"gfni", 7, 0, ECX, 8, OS_NONE},
    {"vaes", 7, 0, ECX, 9, OS_AVX},
    {"vpclmulqdq", 7, 0, ECX, 10, OS_AVX},
    {"avx512vnni", 7, 0, ECX, 11, OS_AVX512},
    {"avx512bitalg", 7, 0, ECX, 12, OS_AVX512},
    {"avx512vpopcntdq", 7, 0, ECX, 14, OS_AVX512},
    {"rdpid", 7, 0, ECX, 22, OS_NONE},
    {"cldemote", 7, 0, ECX, 25, OS_NONE},
    {"movdiri", 7, 0, ECX, 27, OS_NONE},
    {"movdir64b", 7, 0, ECX, 28, OS_NONE},
    {"avx512vp2intersect", 7, 0, EDX, 8, OS_AVX512},
    {"serialize", 7, 0, EDX, 14, OS_NONE},
    {"tsxldtrk", 7, 0, EDX, 16, OS_NONE},
    {"amx-bf16", 7, 0, EDX, 22, OS_AMX},
    {"avx512fp16", 7, 0, EDX, 23, OS_AVX512},
    {"amx-tile", 7, 0, EDX, 24, OS_AMX},
    {"amx-int8", 7, 0, EDX, 25, OS_AMX},
    {"avxvnni", 7, 1, EAX, 4, OS_AVX},
    {"avx512bf16", 7, 1, EAX, 5, OS_AVX512},
    {"amx-fp16", 7, 1, EAX, 21, OS_AMX},
    {"avxifma", 7, 1, EAX, 23, OS_AVX},
    {"avxvnniint8", 7, 1, EDX, 4, OS_AVX},
    {"avxneconvert", 7, 1, EDX, 5, OS_AVX},
    {"avxvnniint16", 7, 1, EDX, 10, OS_AVX},
    {"xsaveopt", 0xd, 1, EAX, 0, OS_AVX},
    {"xsavec", 0xd, 1, EAX, 1, OS_AVX},
    {"xsaves", 0xd, 1, EAX, 3, OS_AVX},
    {"sahf", 0x80000001u, 0, ECX, 0, OS_NONE},
    {"lzcnt", 0x80000001u, 0, ECX, 5, OS_NONE},
    {"sse4a", 0x80000001u, 0, ECX, 6, OS_NONE},
    {"prfchw", 0x80000001u, 0, ECX, 8, OS_NONE},
    {"xop", 0x80000001u, 0, ECX, 11, OS_AVX},
    {"fma4", 0x80000001u, 0, ECX, 16, OS_AVX},
    {"tbm", 0x80000001u, 0, ECX, 21, OS_NONE},
    {"mwaitx", 0x80000001u, 0, ECX, 29, OS_NONE},
    {"64bit", 0x80000001u, 0, EDX, 29, OS_NONE},
    {"clzero", 0x80000008u, 0, EBX, 0, OS_NONE},
    {"wbnoinvd", 0x80000008u, 0, EBX, 9, OS_NONE},
};

static uint64_t saved_by_os(void) {
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & (1u << 27))) return 0; /* no OSXSAVE: no xgetbv either */
  __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return ((uint64_t)edx << 32) | eax;
}

/* The registers of a leaf; false where this CPU has none. A virtual machine traps each CPUID, which takes it
 * microseconds: features of one leaf stand together in the table, and the last answer is kept for the next of them. */
static bool ask(uint32_t leaf, uint32_t subleaf, const uint32_t **answer) {
  static struct {
    uint32_t leaf, subleaf, regs[4];
    bool asked, found;
  } last;
  if (!last.asked || last.leaf != leaf || last.subleaf != subleaf) {
    uint32_t highest = 0, ignored, *regs = last.regs;
    last.asked = true, last.leaf = leaf, last.subleaf = subleaf;
    last.found = __get_cpuid_count(leaf, subleaf, &regs[EAX], &regs[EBX], &regs[ECX], &regs[EDX]);
    if (leaf == 7 && subleaf > 0 && last.found) {
      __cpuid_count(7, 0, highest, ignored, ignored, ignored);
      last.found = highest >= subleaf;
    }
  }
  *answer = last.regs;
  return last.found;
}

static void detect(feature_list *list) {
  static const uint64_t masks[] = {[OS_NONE] = 0, [OS_AVX] = 0x6, [OS_AVX512] = 0xe6, [OS_AMX] = 0x60000};
  uint64_t saved = saved_by_os();
  for (size_t i = 0; i < sizeof x86_features / sizeof *x86_features; i++) {
    const x86_feature *feature = &x86_features[i];
    const uint32_t *regs;
    if (!ask(feature->leaf, feature->subleaf, &regs)) continue;
    uint64_t mask = masks[feature->os];
    if ((regs[feature->reg] >> feature->bit & 1) && (saved & mask) == mask) add(list, feature->name);
  }
}

#elif defined(__aarch64__) || defined(__arm__) || defined(__riscv)
#include <sys/auxv.h>
#ifndef AT_HWCAP2
#define AT_HWCAP2 26
#endif

typedef struct {
  const char *name;
  uint64_t hwcap, hwcap2; /* all of these bits */
} hwcap_feature;
#define BIT(n) (1ull << (n))

#if defined(__aarch64__) /* Linux: arch/arm64/include/uapi/asm/hwcap.h */
static const hwcap_feature hwcap_features[] = {
    {"fp-armv8", BIT(0), 0},   {"neon", BIT(1), 0},          {"aes", BIT(3) | BIT(4), 0},
    {"sha2", BIT(5) | BIT(6), 0}, {"crc", BIT(7), 0},        {"lse", BIT(8), 0},
    {"fullfp16", BIT(9) | BIT(10), 0}, {"rdm", BIT(12), 0},  {"jsconv", BIT(13), 0},
    {"complxnum", BIT(14), 0}, {"rcpc", BIT(15), 0},         {"ccpp", BIT(16), 0},
    {"sha3", BIT(17) | BIT(21), 0}, {"sm4", BIT(18) | BIT(19), 0}, {"dotprod", BIT(20), 0},
    {"sve", BIT(22), 0},       {"fp16fml", BIT(23), 0},      {"dit", BIT(24), 0},
    {"rcpc-immo", BIT(26), 0}, {"flagm", BIT(27), 0},        {"ssbs", BIT(28), 0},
    {"sb", BIT(29), 0},        {"pauth", BIT(30) | BIT(31), 0}, {"sve2", 0, BIT(1)},
    {"altnzcv", 0, BIT(7)},    {"fptoint", 0, BIT(8)},       {"f32mm", 0, BIT(10)},
    {"f64mm", 0, BIT(11)},     {"i8mm", 0, BIT(13)},         {"bf16", 0, BIT(14)},
    {"rand", 0, BIT(16)},      {"bti", 0, BIT(17)},          {"sme", 0, BIT(23)},
};
#elif defined(__arm__) /* Linux: arch/arm/include/uapi/asm/hwcap.h */
static const hwcap_feature hwcap_features[] = {
    {"vfp2", BIT(6), 0},       {"neon", BIT(12), 0},     {"vfp3", BIT(13) | BIT(19), 0},
    {"vfp3d16", BIT(13), 0},   {"vfp4", BIT(16) | BIT(19), 0}, {"vfp4d16", BIT(16), 0},
    {"fp16", BIT(16), 0},      {"hwdiv-arm", BIT(17), 0}, {"hwdiv", BIT(18), 0},
    {"d32", BIT(19), 0},       {"fullfp16", BIT(22) | BIT(23), 0}, {"dotprod", BIT(24), 0},
    {"fp16fml", BIT(25), 0},   {"bf16", BIT(26), 0},     {"i8mm", BIT(27), 0},
    {"aes", 0, BIT(0) | BIT(1)}, {"sha2", 0, BIT(2) | BIT(3)}, {"crc", 0, BIT(4)},
};
#else /* RISC-V: one bit per letter of the base extensions; the others have no bit here */
static const hwcap_feature hwcap_features[] = {
    {"a", BIT('a' - 'a'), 0}, {"c", BIT('c' - 'a'), 0}, {"d", BIT('d' - 'a'), 0},
    {"f", BIT('f' - 'a'), 0}, {"m", BIT('m' - 'a'), 0}, {"v", BIT('v' - 'a'), 0},
};
#endif

static void detect(feature_list *list) {
  uint64_t hwcap = getauxval(AT_HWCAP), hwcap2 = getauxval(AT_HWCAP2);
  for (size_t i = 0; i < sizeof hwcap_features / sizeof *hwcap_features; i++) {
    const hwcap_feature *feature = &hwcap_features[i];
    if ((hwcap & feature->hwcap) == feature->hwcap && (hwcap2 & feature->hwcap2) == feature->hwcap2) {
      add(list, feature->name);
    }
  }
}

#else
static void detect(feature_list *list) { (void)list; }
#endif

static char features[2048];
static pthread_once_t features_once = PTHREAD_ONCE_INIT;

static int by_name(const void *a, const void *b) { return strcmp(*(const char *const *)a, *(const char *const *)b); }

static void fill_features(void) {
  feature_list list = {.count = 0};
  detect(&list);
  qsort(list.names, (size_t)list.count, sizeof *list.names, by_name);
  size_t used = 0;
  for (int i = 0; i < list.count; i++) {
    size_t length = strlen(list.names[i]);
    if (used + length + 2 > sizeof features) break;
    if (i > 0) features[used++] = ',';
    memcpy(features + used, list.names[i], length);
    used += length;
  }
  features[used] = '\0';
}

const char *kedge_cpu_features(void) {
  pthread_once(&features_once, fill_features);
  return features;
}

bool kedge_has_features(const char *required, const char *available, kedge_text *missing) {
  bool all = true;
  for (const char *name = required; *name != '\0';) {
    size_t length = strcspn(name, ",");
    bool found = length == 0;
    for (const char *other = available; !found && *other != '\0';) {
      size_t size = strcspn(other, ",");
      found = size == length && memcmp(name, other, length) == 0;
      other += size + (other[size] == ',');
    }
    if (!found) kedge_text_add(missing, "%s%.*s", all ? "" : ", ", (int)length, name);
    all = all && found;
    name += length + (name[length] == ',');
  }
  return all;
}
