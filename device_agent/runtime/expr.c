/* expr.c: postfix size expressions over int64, with every overflow noticed. */
#include "internal.h"

enum { MAX_OPS = 4096, MAX_DEPTH = 32 };

const char *kedge_expr_check(const kedge_expr *expr, int32_t n_symbols) {
  if (expr->n_ops < 1 || expr->n_ops > MAX_OPS || expr->ops == NULL) return "has no operations, or too many";
  int depth = 0;
  for (int64_t i = 0; i < expr->n_ops; i++) {
    const kedge_expr_op *op = &expr->ops[i];
    if (op->opcode < KEDGE_EXPR_CONST || op->opcode > KEDGE_EXPR_MAX) return "has an unknown operation";
    if (op->opcode == KEDGE_EXPR_SYMBOL && (op->value < 0 || op->value >= n_symbols)) return "names an unknown symbol";
    if (op->opcode <= KEDGE_EXPR_SYMBOL) {
      if (++depth > MAX_DEPTH) return "is too deep";
    } else if (--depth < 1) {
      return "lacks an operand";
    }
  }
  return depth == 1 ? NULL : "leaves more than one value";
}

static bool floor_divide(int64_t a, int64_t b, int64_t *quotient, int64_t *rest) {
  if (b == 0 || (a == INT64_MIN && b == -1)) return false;
  *quotient = a / b;
  *rest = a % b;
  if (*rest != 0 && (*rest < 0) != (b < 0)) {
    *quotient -= 1;
    *rest += b;
  }
  return true;
}

static bool apply(int64_t opcode, int64_t a, int64_t b, int64_t *result) {
  int64_t other;
  switch (opcode) {
    case KEDGE_EXPR_ADD: return !__builtin_add_overflow(a, b, result);
    case KEDGE_EXPR_SUB: return !__builtin_sub_overflow(a, b, result);
    case KEDGE_EXPR_MUL: return !__builtin_mul_overflow(a, b, result);
    case KEDGE_EXPR_FLOORDIV: return floor_divide(a, b, result, &other);
    case KEDGE_EXPR_FLOORMOD:
      if (b == -1) return *result = 0, true; /* INT64_MIN too, where only the quotient overflows */
      return floor_divide(a, b, &other, result);
    case KEDGE_EXPR_MIN: return *result = a < b ? a : b, true;
    case KEDGE_EXPR_MAX: return *result = a > b ? a : b, true;
    default: return false;
  }
}

bool kedge_expr_eval(const kedge_expr *expr, const int64_t *symbols, int64_t *value) {
  int64_t stack[MAX_DEPTH];
  int top = 0;
  for (int64_t i = 0; i < expr->n_ops; i++) {
    const kedge_expr_op *op = &expr->ops[i];
    if (op->opcode == KEDGE_EXPR_CONST) {
      stack[top++] = op->value;
    } else if (op->opcode == KEDGE_EXPR_SYMBOL) {
      stack[top++] = symbols[op->value];
    } else {
      top--;
      if (!apply(op->opcode, stack[top - 1], stack[top], &stack[top - 1])) return false;
    }
  }
  *value = stack[0];
  return true;
}

bool kedge_expr_uses(const kedge_expr *expr, int64_t symbol) {
  for (int64_t i = 0; i < expr->n_ops; i++) {
    if (expr->ops[i].opcode == KEDGE_EXPR_SYMBOL && expr->ops[i].value == symbol) return true;
  }
  return false;
}

/* Where the operand that ends before `end` begins. */
static int64_t operand_start(const kedge_expr *expr, int64_t end) {
  int64_t wanted = 1, at = end;
  while (wanted > 0) {
    at--;
    wanted += expr->ops[at].opcode <= KEDGE_EXPR_SYMBOL ? -1 : 1;
  }
  return at;
}

static void print_operand(const kedge_expr *expr, int64_t end, bool nested, const kedge_symbol *symbols,
                          kedge_text *text) {
  static const char *const signs[] = {"", "", " + ", " - ", "*", "//", "%", ", ", ", "};
  const kedge_expr_op *op = &expr->ops[end - 1];
  if (op->opcode == KEDGE_EXPR_CONST) {
    kedge_text_add(text, "%lld", (long long)op->value);
  } else if (op->opcode == KEDGE_EXPR_SYMBOL) {
    kedge_text_add(text, "%s", symbols[op->value].name);
  } else {
    bool call = op->opcode >= KEDGE_EXPR_MIN;
    kedge_text_add(text, "%s", op->opcode == KEDGE_EXPR_MIN ? "min(" : call ? "max(" : nested ? "(" : "");
    print_operand(expr, operand_start(expr, end - 1), !call, symbols, text);
    kedge_text_add(text, "%s", signs[op->opcode]);
    print_operand(expr, end - 1, !call, symbols, text);
    kedge_text_add(text, "%s", call || nested ? ")" : "");
  }
}

void kedge_expr_print(const kedge_expr *expr, const kedge_symbol *symbols, kedge_text *text) {
  print_operand(expr, expr->n_ops, false, symbols, text);
}
