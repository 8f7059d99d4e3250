"""Where barriers are put, what they are refused for, and that a missing or misplaced one would be noticed."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from kedge.compiler.codegen.gpu import barriers
from kedge.compiler.codegen.gpu.barriers import _Placer
from kedge.compiler.codegen.gpu.opencl import opencl_source
from kedge.compiler.errors import CodegenError
from kedge.compiler.tir.parser import parse_func
from support.gpu_threads import Hang, Race, launches, run_threads

X = np.arange(8, dtype=np.float32)


def kernel(body: str, *, allocs: str = "alloc s: float32[8] in shared", x: int = 8, y: int = 8) -> str:
    """The statements of the only kernel of a function from x to y, without declarations."""
    text = opencl_source(launches(parse_func(function(body, allocs=allocs, x=x, y=y))))
    lines = text.split("\n")
    return "\n".join(line for line in lines[lines.index(next(s for s in lines if s.startswith("void"))) + 1 :])


def function(body: str, *, allocs: str = "alloc s: float32[8] in shared", x: int = 8, y: int = 8) -> str:
    indented = "\n".join(f"  {line}" for line in [*allocs.split("\n"), *body.strip("\n").split("\n")] if line.strip())
    return f"func f(x: float32[{x}]) -> (y: float32[{y}]):\n{indented}"


def steps(text: str) -> list[str]:
    """What happens, in order: barriers, loops and their ends, conditions, and which buffer is stored to."""
    found = []
    for line in (line.strip() for line in text.split("\n")):
        if line.startswith("barrier"):
            found.append("barrier")
        elif line.startswith(("for", "if")):
            found.append(line.split(" ")[0] + (" " + line.split(" ")[2] if line.startswith("for") else ""))
        elif line == "}":
            found.append("}")
        elif "] = " in line:
            found.append(line.split("[")[0])
    return found[:-1]


def store(name: str, target: str, value: str, *, at: str = "t", reads: str = "") -> str:
    """A block of eight iterations that stores one element."""
    lines = [f"block {name}:", f"  v = spatial(8, {at})", f"  writes {target}", f"  {target} = {value}"]
    return "\n".join([*lines[:2], *([f"  reads {reads}"] if reads else []), *lines[2:]])


def nest(head: str, *bodies: str) -> str:
    inner = "\n".join(f"  {line}" for body in bodies for line in body.strip("\n").split("\n"))
    return f"{head}\n{inner}"


FILL = nest("for t in thread(8, 'threadIdx.x'):", store("fill", "s[v]", "x[v]", reads="x[v]"))
TURN = nest("for u in thread(8, 'threadIdx.x'):", store("turn", "y[v]", "s[7 - v]", at="u", reads="s[7 - v]"))


def grouped(*bodies: str) -> str:
    return nest("for b in thread(1, 'blockIdx.x'):", *bodies)


def test_a_barrier_stands_between_what_is_written_and_what_others_read() -> None:
    assert steps(kernel(grouped(FILL, TURN))) == ["s", "barrier", "y"]


def test_none_stands_where_each_thread_reads_its_own() -> None:
    own = nest(
        "for t in thread(8, 'threadIdx.x'):",
        store("fill", "s[v]", "x[v]", reads="x[v]"),
        store("same", "y[v]", "s[v]", reads="s[v]"),
    )
    assert steps(kernel(grouped(own))) == ["s", "y"]


def test_a_loop_waits_for_its_iteration_before() -> None:
    """The next filling waits for the readers of this one."""
    loop = nest("for k in range(3):", FILL, TURN)
    assert steps(kernel(grouped(loop))) == ["for k", "barrier", "s", "barrier", "y", "}"]


def test_a_loop_of_one_iteration_waits_for_none() -> None:
    assert steps(kernel(grouped(nest("for k in range(1):", FILL, TURN)))).count("barrier") == 1


def test_what_comes_before_a_loop_is_waited_for_once() -> None:
    read = nest("for k in range(4):", TURN)
    assert steps(kernel(grouped(FILL, read))) == ["s", "barrier", "for k", "y", "}"]


def test_nested_loops_wait_only_where_it_is_needed() -> None:
    loop = nest("for k in range(3):", nest("for l in range(2):", nest("for m in range(2):", FILL, TURN)))
    assert steps(kernel(grouped(loop))).count("barrier") == 2


SLIDING = """
for k in range(4):
  for t in thread(4, 'threadIdx.x'):
    block slide:
      v = spatial(8, t + k)
      vk = spatial(4, k)
      reads s[v], x[vk]
      writes s[v]
      s[v] = s[v] + x[vk]
"""


def test_threads_that_move_on_wait_for_those_that_were_there() -> None:
    """Iterations of the bound loop keep apart, but the next iteration of the loop around hands their elements on."""
    clear = nest("for t in thread(8, 'threadIdx.x'):", store("clear", "s[v]", "0.0"))
    body = grouped(clear, SLIDING, TURN.replace("turn", "out"))
    found = steps(kernel(body))
    assert found == ["s", "for k", "barrier", "if", "s", "}", "}", "barrier", "y"]
    run_threads(parse_func(function(body)), [X], {}, random.Random(0))


STAYING = SLIDING.replace("spatial(8, t + k)", "spatial(8, t)")


def test_threads_that_stay_with_their_elements_do_not_wait() -> None:
    clear = nest("for t in thread(8, 'threadIdx.x'):", store("clear", "s[v]", "0.0"))
    body = grouped(clear, STAYING, TURN.replace("turn", "out"))
    assert steps(kernel(body)) == ["s", "barrier", "if", "for k", "s", "}", "}", "barrier", "y"]


def test_the_first_thread_does_what_stands_outside() -> None:
    body = grouped(store("one", "s[v]", "x[v]", at="0", reads="x[v]"), TURN)
    text = kernel(body)
    assert steps(text) == ["if", "s", "}", "barrier", "y"]
    assert "if (threadIdx_x == 0)" in text


def test_conditions_of_neighbours_are_put_together_and_none_is_around_a_barrier() -> None:
    less = FILL.replace("8, 'threadIdx.x'", "5, 'threadIdx.x'")
    again = less.replace("block fill", "block again").replace("s[v]", "p[v]").replace("for t", "for w")
    again = again.replace("spatial(8, t)", "spatial(8, w)")
    body = grouped(less, again, TURN)
    assert steps(kernel(body, allocs="alloc s: float32[8] in shared\nalloc p: float32[8] in shared")) == [
        "if", "s", "p", "}", "barrier", "y",
    ]  # fmt: skip


# Refusals ---------------------------------------------------------------------------------------------------------


def refusal(body: str, **options: Any) -> str:
    with pytest.raises(CodegenError) as caught:
        launches(parse_func(function(body, **options)))
    return str(caught.value)


def test_groups_do_not_wait_for_one_another() -> None:
    first = FILL.replace("s[v]", "g[v]").replace("threadIdx.x", "blockIdx.x")
    second = TURN.replace("s[7 - v]", "g[7 - v]").replace("threadIdx.x", "blockIdx.x")
    body = nest("for b in thread(1, 'blockIdx.y'):", first, second)
    assert "'g' passes from one group of blockIdx.x to another within a kernel" in refusal(
        body, allocs="alloc g: float32[8]"
    )


def test_a_barrier_of_a_group_does_not_help_other_groups() -> None:
    first = FILL.replace("s[v]", "g[v]").replace("threadIdx.x", "blockIdx.x")
    second = TURN.replace("s[7 - v]", "g[7 - v]").replace("threadIdx.x", "blockIdx.x")
    between = nest("for w in thread(8, 'threadIdx.x'):", store("shared", "s[v]", "x[v]", at="w", reads="x[v]")) + nest(
        "\nfor z in thread(8, 'threadIdx.x'):", store("back", "q[v]", "s[7 - v]", at="z", reads="s[7 - v]")
    )
    body = nest("for b in thread(1, 'blockIdx.y'):", first, between, second)
    text = refusal(body, allocs="alloc g: float32[8]\nalloc s: float32[8] in shared\nalloc q: float32[8] in shared")
    assert "'g' passes from one group of blockIdx.x to another" in text


def test_groups_that_move_on_would_meet() -> None:
    body = nest("for b in thread(1, 'blockIdx.y'):", SLIDING.replace("threadIdx", "blockIdx").replace("s[v]", "y[v]"))
    assert "'y' passes from one group of blockIdx.x to another" in refusal(body, allocs="alloc s: float32[1]")


def test_threads_that_go_differently_often_cannot_wait() -> None:
    fill = nest("for c in thread(8, 'threadIdx.y'):", store("fill", "s[v]", "x[v]", at="c", reads="x[v]"))
    turn = nest("for u in thread(8, 'threadIdx.y'):", store("turn", "y[v]", "s[7 - v]", at="u", reads="s[7 - v]"))
    body = nest("for t in thread(4, 'threadIdx.x'):", nest("for k in range(t):", fill, turn))
    assert "threads would have to wait for one another over 's' inside loop 'k'" in refusal(body)


def test_shared_memory_does_not_last_from_kernel_to_kernel() -> None:
    text = refusal(f"{FILL.strip()}\n{TURN.strip()}")
    assert "buffer 's' in shared scope does not last from one kernel to the next" in text
    assert "put all that uses it under one loop bound to blockIdx" in text
    assert "or, for the block that writes it, sch.set_scope" in text


def test_shared_memory_does_not_last_from_launch_to_launch() -> None:
    """A loop of the host starts the kernel again in each iteration."""
    body = nest("for k in range(4):", SLIDING.replace("for k in range(4):", "for j in thread(1, 'blockIdx.x'):"), TURN)
    assert "does not last" in refusal(body.replace("spatial(4, k)", "spatial(4, 0)").replace("t + k", "t"))


def test_an_inner_loop_on_the_same_axis_is_the_same_in_all_iterations_of_the_outer() -> None:
    inner = nest("for c in thread(8, 'threadIdx.x'):", store("fill", "s[v]", "x[v]", at="(c + t) % 8", reads="x[v]"))
    body = grouped(nest("for t in thread(8, 'threadIdx.x'):", inner), TURN)
    text = refusal(body)
    assert "loop 'c', bound to threadIdx.x, is inside loop 't', bound to it, too" in text
    assert "is not the same in all iterations" in text


# The detector -----------------------------------------------------------------------------------------------------


def test_a_missing_barrier_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    func = parse_func(function(grouped(FILL, TURN)))
    (got,) = run_threads(func, [X], {}, random.Random(1))
    np.testing.assert_array_equal(got, X[::-1])
    monkeypatch.setattr(_Placer, "must_wait", lambda *_: False)
    with pytest.raises(Race, match="threads of k in s"):
        run_threads(func, [X], {}, random.Random(1))


def test_a_missing_barrier_at_the_end_of_an_iteration_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    func = parse_func(function(grouped(nest("for k in range(3):", FILL, TURN))))
    run_threads(func, [X], {}, random.Random(1))
    monkeypatch.setattr(_Placer, "must_wait", lambda self, old, new: bool(old) and all(not t.is_write for t in new))
    with pytest.raises(Race):
        run_threads(func, [X], {}, random.Random(1))


def test_a_barrier_under_a_condition_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    less = FILL.replace("8, 'threadIdx.x'", "5, 'threadIdx.x'")
    func = parse_func(function(grouped(less, TURN)))

    def gather(stmt: Any) -> Any:
        guards, body = barriers._lift(stmt)
        first = next(each for each in barriers.walk(stmt) if isinstance(each, barriers.Unit))
        return barriers._guarded((*guards, *first.guards), body)

    monkeypatch.setattr(barriers, "_gather", gather)
    with pytest.raises(Hang, match="threads of k wait at"):
        run_threads(func, [X], {}, random.Random(1))


def test_groups_that_meet_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Placer, "check_groups", lambda self: None)
    first = FILL.replace("s[v]", "g[v]").replace("threadIdx.x", "blockIdx.x")
    second = TURN.replace("s[7 - v]", "g[7 - v]").replace("threadIdx.x", "blockIdx.x")
    body = nest("for b in thread(1, 'blockIdx.y'):", first, second)
    with pytest.raises(Race, match="groups of k in g"):
        run_threads(parse_func(function(body, allocs="alloc g: float32[8]")), [X], {}, random.Random(1))
