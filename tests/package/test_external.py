"""External C code in artifacts: what it is handed, what it may use, and how it fails."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kedge
from kedge import patterns as p
from kedge.artifact import external_functions
from kedge.compiler.cache import KernelCache
from kedge.compiler.elf import complaint
from kedge.compiler.errors import CompileError, CompileWarning, ToolchainError
from kedge.compiler.external_code import external_objects
from kedge.compiler.frontend import nn
from kedge.compiler.graph import interp
from kedge.compiler.graph.builder import Builder
from kedge.compiler.graph.ir import TensorType
from kedge.compiler.lower.interp import run_program
from kedge.compiler.lower.lower import lower
from kedge.compiler.target import parse
from kedge.compiler.tir.expr import Var
from kedge.device_agent import runtime
from kedge.rpc import abi
from kedge.rpc.artifact import Manifest
from kedge.rpc.errors import JobError
from support import emulated, native

HEAD = '#include "kedge_external.h"\n'
#: relu(x · w + b) in plain C, each row by itself on whatever thread is free.
DENSE = r"""
#include "kedge_external.h"

static int32_t rows(void *closure, int64_t begin, int64_t end) {
  const kedge_external_call *call = closure;
  const float *x = kedge_data(&call->inputs[0]), *w = kedge_data(&call->inputs[1]);
  const float *b = call->inputs[2].data == NULL ? NULL : kedge_data(&call->inputs[2]);
  float *y = kedge_data(&call->outputs[0]);
  int64_t inner = call->inputs[0].shape[1], columns = call->outputs[0].shape[1];
  for (int64_t i = begin; i < end; i++) {
    for (int64_t j = 0; j < columns; j++) {
      float sum = b == NULL ? 0 : b[j];
      for (int64_t k = 0; k < inner; k++) sum += x[i * inner + k] * w[k * columns + j];
      y[i * columns + j] = sum > 0 ? sum : 0;
    }
  }
  return 0;
}

int32_t dense_relu(const kedge_external_call *call) {
  return kedge_external_parallel_for(call, rows, (void *)call, call->outputs[0].shape[0]);
}
"""


class Net(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 5)
        self.relu = nn.ReLU()

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        return nn.op.softmax(self.fc2(self.relu(self.fc1(x))), dim=-1)


@pytest.fixture(scope="module")
def net() -> kedge.Module:
    module, params = Net().export(spec={"forward": {"x": nn.spec.Tensor(("N", 12), "float32")}})
    rng = np.random.default_rng(0)
    return module.bind({name: rng.standard_normal(t.shape).astype(t.dtype) for name, t in params.items()})


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of compiled C files of the test's own."""
    from kedge.compiler import external_code

    monkeypatch.setattr(external_code, "cache_dir", lambda: tmp_path / "cache")
    yield tmp_path / "cache" / "external"


def dense(source: Any = DENSE, **options: Any) -> kedge.External:
    x, w, b = p.wildcard("x"), p.constant("w"), p.wildcard("b")
    product = p.op("matmul", x, w).optional(lambda y: p.op("add", y, b))
    return kedge.External("dense_relu", p.op("relu", product), source=source, **options)


def relu(body: str, **options: Any) -> kedge.External:
    """An external of relu alone whose C function has this body."""
    text = f"{HEAD}int32_t my_relu(const kedge_external_call *call) {{\n{body}\n}}\n"
    options.setdefault("source", text)
    return kedge.External("my_relu", p.op("relu", p.wildcard("x")), **options)


def x_of(batch: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(batch).standard_normal((batch, 12)).astype("float32")}


def check(module: kedge.Module, *externals: kedge.External, batches: tuple[int, ...] = (1, 3, 64)) -> kedge.Artifact:
    artifact = kedge.compile(module, "native", externals=externals)
    with artifact.open(threads=2) as m:
        for batch in batches:
            expected = interp.run(module, x_of(batch), "forward")["output"]
            got = m.run(x_of(batch), function="forward")["output"]
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    return artifact


# What it is handed ----------------------------------------------------------------------------------------------


def test_a_layer_in_c_at_any_batch_size(net: kedge.Module) -> None:
    artifact = check(net, dense())
    (report,) = artifact.manifest.info["variants"]
    (row,) = [row for row in report["kernels"] if row["rule"] == "external dense_relu"]
    assert row["name"] == "dense_relu" and len(row["sha256"]) == 64


def test_what_is_lowered_means_the_same(net: kedge.Module) -> None:
    pipeline = kedge.pipeline().partition([dense()])
    program = lower(pipeline.run(net), parse("native"), pipeline.externals)
    (call,) = program.externals.values()
    assert call.order == (0, 1, 2)
    expected = interp.run(net, x_of(4), "forward")["output"]
    np.testing.assert_allclose(run_program(program, x_of(4), "forward")["output"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", ["raspberry-pi/4b", "beaglebone/black", "llvm -mtriple=riscv64-linux-gnu"])
def test_a_layer_in_c_on_other_architectures(net: kedge.Module, text: str, tmp_path: Path) -> None:
    target = emulated.emulated(text)
    pipeline = kedge.pipeline().partition([dense()])
    program = lower(pipeline.run(net), target, pipeline.externals)
    inputs = [x_of(3)["x"]]
    (got,) = emulated.run_program(program, target, inputs, tmp_path, KernelCache(tmp_path / "kernels"))
    np.testing.assert_allclose(got, interp.run(net, x_of(3), "forward")["output"], rtol=1e-4, atol=1e-6)


def test_the_call_says_everything(net: kedge.Module) -> None:
    """The function checks what it gets, and says the line where it differs."""
    source = r"""
#include <string.h>
#include "kedge_external.h"
#define CHECK(condition) if (!(condition)) return __LINE__
int32_t dense_relu(const kedge_external_call *call) {
  const DLTensor *x = &call->inputs[0], *w = &call->inputs[1], *b = &call->inputs[2], *y = &call->outputs[0];
  CHECK(call->struct_size == sizeof *call && call->n_inputs == 3 && call->n_outputs == 1);
  CHECK(strcmp(call->name, "dense_relu") == 0); /* nn names no operators */
  CHECK(x->ndim == 2 && x->shape[0] == y->shape[0] && x->shape[1] == 12 && x->strides == NULL && x->byte_offset == 0);
  CHECK(w->ndim == 2 && w->shape[0] == 12 && w->shape[1] == 16 && b->ndim == 1 && b->shape[0] == 16);
  CHECK(y->ndim == 2 && y->shape[1] == 16 && kedge_size(y) == 16 * y->shape[0]);
  for (int i = 0; i < 3; i++) {
    const DLTensor *t = &call->inputs[i];
    CHECK(t->dtype.code == kDLFloat && t->dtype.bits == 32 && t->dtype.lanes == 1 && t->device.device_type == kDLCPU);
  }
  CHECK((uintptr_t)w->data % KEDGE_ALIGNMENT == 0 && (uintptr_t)call->workspace % KEDGE_ALIGNMENT == 0);
  CHECK(call->workspace_size == (uint64_t)(x->shape[0] * 96 + 32));
  memset(call->workspace, 0xff, call->workspace_size);
  CHECK(call->n_attributes == 3 && kedge_external_int(call, "count", 0) == -3);
  CHECK(kedge_external_float(call, "alpha", 0) == 0.25 && kedge_external_int(call, "missing", 7) == 7);
  const kedge_external_attribute *taps = kedge_external_find(call, "taps");
  CHECK(taps->count == 2 && taps->ints == NULL && taps->floats[1] == 2.5);
  CHECK(!kedge_external_cancelled(call) && kedge_external_find(call, "tap") == NULL);
  float *out = kedge_data(y);
  for (int64_t i = 0; i < y->shape[0]; i++) {
    for (int64_t j = 0; j < 16; j++) {
      float sum = ((const float *)kedge_data(b))[j];
      for (int64_t k = 0; k < 12; k++) sum += ((float *)x->data)[i * 12 + k] * ((float *)w->data)[k * 16 + j];
      out[i * 16 + j] = sum > 0 ? sum : 0;
    }
  }
  return KEDGE_OK;
}
"""
    options = {
        "attributes": lambda match: {"count": -3, "alpha": 0.25, "taps": [1, 2.5]},
        "workspace": lambda match: match["x"].type.shape[0] * 96 + 32,
    }
    check(net, dense(source, **options))


def test_a_leaf_that_is_not_there_has_no_data() -> None:
    x, w = nn.spec.Tensor(("N", 12), "float32"), nn.spec.Tensor((12, 4), "float32")

    class Product(nn.Module):  # type: ignore[misc]
        def forward(self, x: nn.Tensor, w: nn.Tensor) -> nn.Tensor:
            return nn.op.relu(nn.op.matmul(x, w))

    module, _ = Product().export(spec={"forward": {"x": x, "w": w}})
    a, b, c = p.wildcard("x"), p.wildcard("w"), p.wildcard("b")
    whole = p.op("relu", p.op("matmul", a, b).optional(lambda y: p.op("add", y, c)))
    data = {**x_of(2), "w": np.random.default_rng(0).standard_normal((12, 4)).astype("float32")}
    with kedge.compile(module, externals=[kedge.External("dense_relu", whole, source=DENSE)]).open() as m:
        np.testing.assert_allclose(m.run(data)["output"], np.maximum(data["x"] @ data["w"], 0), rtol=1e-4, atol=1e-6)


def test_a_saved_partition_needs_its_code_again(net: kedge.Module, tmp_path: Path) -> None:
    kedge.pipeline().partition([dense()]).run(net).save(tmp_path / "net.kmod")
    saved = kedge.load(tmp_path / "net.kmod")
    with pytest.raises(CompileError, match="external function dense_relu, but there is no code for it"):
        kedge.compile(saved)
    other = kedge.External("dense_relu", p.op("relu", p.wildcard("y")), source=DENSE)
    with (
        pytest.warns(CompileWarning),
        pytest.raises(CompileError, match="has the inputs y; the graph gives it x, w, b"),
    ):
        kedge.compile(saved, externals=[other])
    with pytest.warns(CompileWarning, match="matches nothing"), kedge.compile(saved, externals=[dense()]).open() as m:
        np.testing.assert_allclose(
            m.run(x_of(2))["output"], interp.run(net, x_of(2), "forward")["output"], rtol=1e-4, atol=1e-6
        )


def test_a_gpu_has_no_use_for_it(net: kedge.Module) -> None:
    with pytest.raises(CompileError, match="external dense_relu is code for a CPU"):
        kedge.compile(net, "opencl", externals=[dense()])


# What it may use ------------------------------------------------------------------------------------------------


def test_the_mathematics_of_c_is_there(net: kedge.Module) -> None:
    body = """
  const float *x = kedge_data(&call->inputs[0]);
  float *y = kedge_data(&call->outputs[0]);
  for (int64_t i = 0; i < kedge_size(&call->inputs[0]); i++) y[i] = fmaxf(x[i], 0);
  return 0;"""
    source = f"#include <math.h>\n{HEAD}int32_t my_relu(const kedge_external_call *call) {{{body}\n}}\n"
    check(net, relu("", source=source, cflags=["-fno-builtin"]))


def test_what_nothing_defines_is_named(net: kedge.Module) -> None:
    external = relu("extern int cblas_sgemm(void);\nreturn cblas_sgemm();")
    with pytest.raises(CompileError, match=r"my_relu.*needs cblas_sgemm, which neither it nor the C library") as caught:
        kedge.compile(net, externals=[external])
    assert "library=" in str(caught.value)
    loader = f"#include <dlfcn.h>\n{HEAD}int32_t my_relu(const kedge_external_call *call) {{\n"
    loader += 'return call != NULL && dlopen("libvendor.so", RTLD_NOW) != NULL;\n}\n'
    with pytest.raises(CompileError, match="needs dlopen"):
        kedge.compile(net, externals=[relu("", source=loader)])


def test_a_function_that_is_not_there_is_named(net: kedge.Module) -> None:
    with pytest.raises(CompileError, match="external my_relu defines no function of that name"):
        kedge.compile(net, externals=[relu("", source=HEAD + "int32_t other(void) { return 0; }\n")])


def test_only_the_descriptor_is_exported(net: kedge.Module, tmp_path: Path) -> None:
    source = DENSE.replace("int32_t dense_relu(", '__attribute__((visibility("default"))) int32_t dense_relu(')
    path = tmp_path / "lib.so"
    path.write_bytes(kedge.compile(net, externals=[dense(source)]).member("lib.so"))
    lib = ctypes.CDLL(str(path))
    assert ctypes.c_uint32.in_dll(lib, "kedge_module").value == abi.MODULE_MAGIC
    with pytest.raises(AttributeError):
        getattr(lib, "dense_relu")  # noqa: B009 - a symbol


def test_the_helpers_of_the_compiler_cost_little(net: kedge.Module) -> None:
    """32-bit ARM divides 64-bit numbers in a library, which brings far more debugging information than code."""
    divide = relu("return kedge_size(&call->inputs[0]) / call->inputs[0].shape[0] == 16 ? 1 : 2;")
    own = len(kedge.compile(net, "beaglebone/black").member("lib.so"))
    assert len(kedge.compile(net, "beaglebone/black", externals=[divide]).member("lib.so")) < own + 16_000


def test_an_error_of_the_compiler_is_shown_with_its_line(net: kedge.Module, tmp_path: Path) -> None:
    for source in (HEAD + "int32_t dense_relu(void) { return 0\n}\n", tmp_path / "broken.c"):
        if isinstance(source, Path):
            source.write_text(HEAD + "int32_t dense_relu(void) { return 0\n}\n")
        with pytest.raises(ToolchainError, match="dense_relu does not compile for aarch64") as caught:
            kedge.compile(net, "raspberry-pi/4b", externals=[dense(source)])
        name = "broken.c" if isinstance(source, Path) else "dense_relu.c"
        assert f"{name}:2:36: error: expected ';' after return statement" in caught.value.message


def test_warnings_are_shown_each_time(net: kedge.Module, cached: Path) -> None:
    source = DENSE.replace("return kedge_external_par", "int unused;\n  return kedge_external_par")
    said: list[str] = []
    for _ in range(2):
        with pytest.warns(CompileWarning, match=r"dense_relu\.c:\d+:7: warning: unused variable 'unused'"):
            kedge.compile(net, externals=[dense(source)], progress=said.append)
    assert said.count("compiling dense_relu.c for x86_64") == 1, "what is compiled is said, what is kept is not"
    assert len([path for path in cached.rglob("*") if path.is_file()]) == 1


def test_code_is_kept_by_its_content(cached: Path, tmp_path: Path) -> None:
    def count() -> int:
        return len([path for path in cached.rglob("*") if path.is_file()])

    target = parse("x86-64")
    header = tmp_path / "own header.h"
    header.write_text("#define ANSWER 1\n")
    source = tmp_path / "f.c"
    source.write_text(HEAD + '#include "own header.h"\nint32_t dense_relu(void) { return ANSWER; }\n')
    first = external_objects(dense(source), target)
    assert external_objects(dense(source), target) == first and count() == 1
    header.write_text("#define ANSWER 2\n")
    second = external_objects(dense(source), target)
    assert second.digest != first.digest and count() == 1
    assert external_objects(dense(source, cflags=["-DX"]), target).digest == second.digest and count() == 2
    assert external_objects(dense(source), parse("x86-64-v3")) and count() == 3
    (kept,) = [path for path in cached.rglob("*") if path.is_file()][:1]
    kept.write_bytes(kept.read_bytes()[:-1])
    assert external_objects(dense(source), target) == second
    assert count() == 3


def test_the_source_makes_the_artifact(net: kedge.Module) -> None:
    one, again = (kedge.compile(net, "x86-64-v3", externals=[dense()]) for _ in range(2))
    other = kedge.compile(net, "x86-64-v3", externals=[dense(DENSE.replace("sum > 0", "sum > 1"))])
    assert one.digest == again.digest != other.digest != kedge.compile(net, "x86-64-v3").digest


def test_what_is_no_source(net: kedge.Module, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"cannot read .*missing\.c: No such file"):
        kedge.compile(net, externals=[dense(tmp_path / "missing.c")])
    (tmp_path / "f.cpp").write_text("")
    with pytest.raises(CompileError, match=r"f\.cpp is no C file"):
        kedge.compile(net, externals=[dense(tmp_path / "f.cpp")])
    x = kedge.te.placeholder((4,), "float32", "x")
    func = kedge.te.create_prim_func([x, kedge.te.compute((4,), lambda i: x[i] + 1.0, name="y")], "main")
    with pytest.raises(TypeError, match="externals="):
        kedge.compile(func, externals=[dense()])


@pytest.mark.parametrize(
    ("info", "names"),
    [
        ({}, ()),
        ({"variants": 3}, ()),
        ({"variants": [3, {"kernels": [{"rule": "external f"}, {"rule": "tile"}, {"rule": "external f"}, 1]}]}, ("f",)),
    ],
)
def test_a_report_names_the_functions_whatever_is_in_it(info: dict[str, Any], names: tuple[str, ...]) -> None:
    manifest = Manifest("m", 1, "", (), (), (), info)
    assert external_functions(manifest) == names


def test_one_source_for_two_externals(net: kedge.Module, tmp_path: Path) -> None:
    body = """
int32_t NAME(const kedge_external_call *call) {
  const float *x = kedge_data(&call->inputs[0]);
  float *y = kedge_data(&call->outputs[0]);
  for (int64_t i = 0; i < kedge_size(&call->inputs[0]); i++) y[i] = VALUE;
  return 0;
}
"""
    pair = body.replace("NAME", "first").replace("VALUE", "fmaxf(x[i], 0)")
    text = f"#include <math.h>\n{HEAD}{pair}{body.replace('NAME', 'second').replace('VALUE', 'expf(x[i])')}"
    (tmp_path / "both.c").write_text(text)
    b = Builder("main")
    x = b.input("x", TensorType((Var("n", lower=1), 12), "float32"))
    model = kedge.Module({"main": b.finish({"y": b.call("exp", b.call("relu", x))})})
    for source in (text, tmp_path / "both.c"):
        patterns = {"first": p.op("relu", p.wildcard("x")), "second": p.op("exp", p.wildcard("x"))}
        externals = [kedge.External(name, pattern, source=source) for name, pattern in patterns.items()]
        with kedge.compile(model, externals=externals).open() as m:
            np.testing.assert_allclose(m.run(x_of(3))["y"], np.exp(np.maximum(x_of(3)["x"], 0)), rtol=1e-5)


def test_what_two_sources_define_is_named(net: kedge.Module) -> None:
    helper = "float helper(float x) { return x; }\n"
    other = kedge.External("sums", p.op("softmax", p.wildcard("x")), source=f"{helper}int sums(void) {{ return 1; }}\n")
    with pytest.raises(
        CompileError, match=r"external code \(dense_relu, sums\) defines helper more than once"
    ) as caught:
        kedge.compile(net, externals=[dense(DENSE + helper), other])
    assert "make static" in str(caught.value) and "dense_relu-1.o" in caught.value.message


def test_a_name_that_loaders_call_is_a_name_as_others(net: kedge.Module) -> None:
    external = kedge.External("_init", dense().pattern, source=DENSE.replace("dense_relu", "_init"))
    lib = kedge.compile(net, externals=[external]).member("lib.so")
    assert struct.pack("<Q", 12) not in [tag[:8] for tag in _dynamic(lib)]  # DT_INIT


def _dynamic(lib: bytes) -> list[bytes]:
    """The entries of the dynamic section of a 64-bit ELF file."""
    (start,), (size, count) = struct.unpack_from("<Q", lib, 32), struct.unpack_from("<HH", lib, 54)
    for at in range(start, start + size * count, size):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", lib, at)
        if kind == 2:  # PT_DYNAMIC
            return [lib[place : place + 16] for place in range(offset, offset + length, 16)]
    raise AssertionError("there is no dynamic section")


def test_ordinary_c_compiles(net: kedge.Module) -> None:
    source = f"#include <math.h>\n{HEAD}int32_t my_relu(const kedge_external_call *call) {{\n"
    source += "typeof(M_PI) pi = M_PI;\nreturn call->n_inputs < 0 ? (int32_t)pi : 1;\n}\n"
    assert external_objects(relu("", source=source), parse("native"))


def test_each_folder_has_its_own_headers(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One source in two folders, each with another header: beside it, and where a relative flag says."""
    digests = []
    for number, name in enumerate(("one", "two $x #y")):
        folder = tmp_path / name
        (folder / "include").mkdir(parents=True)
        monkeypatch.chdir(folder)
        Path("f.c").write_text(f'{HEAD}#include "own.h"\nint32_t dense_relu(void) {{ return OWN; }}\n')
        Path("own.h").write_text(f"#define OWN {number}\n")
        Path("include/far.h").write_text(f"#define FAR {number + 5}\n")
        far = f'{HEAD}#include "far.h"\nint32_t dense_relu(void) {{ return FAR; }}\n'
        made = [external_objects(each, parse("x86-64")) for each in (dense("f.c"), dense(far, cflags=["-Iinclude"]))]
        digests += [each.digest for each in made]
    Path("own.h").write_text("#define OWN 9\n")
    digests.append(external_objects(dense("f.c"), parse("x86-64")).digest)
    assert len(set(digests)) == 5


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KEDGE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ToolchainError, match="cannot write the cache") as caught:
        external_objects(dense(), parse("x86-64"))
    assert caught.value.hint is not None and "KEDGE_CACHE_DIR" in caught.value.hint


@pytest.mark.parametrize(
    "options", [{"cflags": "-ffast-math"}, {"library": ["libfoo.a"]}, {"library": {"x86_64": 3}}, {"source": 3}]
)
def test_arguments_of_another_type(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=rf"external my_relu: {next(iter(options))}= takes"):
        relu("return 0;", **options)


# Libraries ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The layer as a static library for two architectures, as its vendor would build it."""
    folder, made = tmp_path_factory.mktemp("libraries"), {}
    (folder / "dense.c").write_text(DENSE)
    for arch in ("x86_64", "aarch64"):
        command = [native.ZIG, "cc", "-target", f"{arch}-linux-gnu", "-O1", "-fPIC", "-fno-sanitize=all"]
        command += ["-I", str(runtime.SOURCE_DIR), "-c", str(folder / "dense.c"), "-o", str(folder / f"{arch}.o")]
        subprocess.run(command, check=True)
        made[arch] = folder / f"libdense-{arch}.a"
        subprocess.run([native.ZIG, "ar", "rcs", str(made[arch]), str(folder / f"{arch}.o")], check=True)
    return made


def test_a_library_for_each_architecture(net: kedge.Module, libraries: dict[str, Path]) -> None:
    external = dense(None, library=libraries)
    check(net, external)
    artifact = kedge.compile(net, ["native", "raspberry-pi/4b"], externals=[external])
    assert [variant.arch for variant in artifact.manifest.variants] == ["x86_64", "aarch64"]
    with pytest.raises(CompileError, match="no library for armv7l") as caught:
        kedge.compile(net, "beaglebone/black", externals=[external])
    assert "x86_64, aarch64" in str(caught.value)


def test_a_library_for_another_machine_is_refused(net: kedge.Module, libraries: dict[str, Path]) -> None:
    for path in (libraries["aarch64"], libraries["aarch64"].with_name("aarch64.o")):
        with pytest.raises(CompileError, match=rf"{path.name} is for aarch64.*, not for x86_64"):
            kedge.compile(net, externals=[dense(None, library=path)])


def test_a_source_may_use_a_library(net: kedge.Module, libraries: dict[str, Path]) -> None:
    body = (
        "extern int32_t dense_relu(const kedge_external_call *);\nint32_t wrapped(const kedge_external_call *call) {\n"
    )
    pattern = dense().pattern
    source = HEAD + body + "return dense_relu(call);\n}\n"
    check(net, kedge.External("wrapped", pattern, source=source, library=libraries["x86_64"]))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "neither an ELF object file nor a static library"),
        (b"!<thin>\n", "thin archive"),
        (b"BC\xc0\xde" + bytes(60), "holds LLVM bitcode and no machine code; compile it without -flto"),
        (b"!<arch>\n" + b"f.o/".ljust(48) + b"4".ljust(10) + b"`\nBC\xc0\xde", r"holds LLVM bitcode (f.o)"),
        (b"!<arch>\n", "holds no ELF object file"),
        (b"!<arch>\n" + b"x" * 70, "holds no ELF object file"),
        (b"\x7fELF\x02\x01" + bytes(10) + struct.pack("<HH", 3, 62) + bytes(40), "is a shared object"),
        (b"\x7fELF\x02\x01" + bytes(10) + struct.pack("<HH", 2, 62) + bytes(40), "is a finished program"),
        (b"\x7fELF\x01\x01" + bytes(10) + struct.pack("<HH", 1, 62) + bytes(40), "ELF machine 62 with 32 bits"),
        (b"\x7fELF\x02\x02" + bytes(10) + struct.pack(">HH", 1, 22) + bytes(40), "ELF machine 22 with 64 bits"),
    ],
)
def test_what_is_no_library(data: bytes, reason: str) -> None:
    said = complaint(data, parse("x86-64").arch)
    assert said is not None and reason in said


# How it fails ---------------------------------------------------------------------------------------------------


def failing(external: kedge.External, match: str, outcome: str) -> None:
    """A model of one relu, named `act`, fails in an isolated runner as it should."""
    b = Builder("main")
    x = b.input("x", TensorType((Var("n", lower=1), 12), "float32"))
    model = kedge.Module({"main": b.finish({"y": b.call("relu", x, origin=("act",))})})
    with kedge.local(threads=2) as device:
        module = device.load(kedge.compile(model, externals=[external]))
        with pytest.raises(JobError, match=match) as caught:
            module.run(x_of(4))
    assert caught.value.outcome == outcome


def test_a_status_is_reported_with_function_and_operator() -> None:
    failing(relu("return 42;"), r"external function my_relu \(act\) returned 42", "crash")


def test_a_reason_is_reported() -> None:
    body = 'return kedge_external_fail(call, "the accelerator is asleep");'
    failing(relu(body), r"external function my_relu \(act\) failed: the accelerator is asleep", "crash")


def test_memory_is_a_reason_of_its_own() -> None:
    failing(relu("return KEDGE_E_MEMORY;"), r"my_relu \(act\) failed: out of memory", "out_of_memory")


def test_a_failure_in_a_parallel_loop() -> None:
    body = "static int32_t f(void *c, int64_t b, int64_t e) { (void)c, (void)b, (void)e; return 5; }\n"
    source = f"{HEAD}{body}int32_t my_relu(const kedge_external_call *call) {{\n"
    source += "return kedge_external_parallel_for(call, f, NULL, 100);\n}\n"
    failing(relu("", source=source), r"my_relu \(act\) failed: a parallel loop failed with 5", "crash")


def test_a_crash_ends_only_the_runner() -> None:
    failing(relu("*(volatile int *)16 = 1;\nreturn 0;"), "SIGSEGV|signal 11", "crash")


def test_a_call_can_be_broken_off() -> None:
    wait = relu("while (!kedge_external_cancelled(call)) {}\nreturn KEDGE_E_CANCELLED;")
    b = Builder("main")
    x = b.input("x", TensorType((4, 12), "float32"))
    artifact = kedge.compile(kedge.Module({"main": b.finish({"y": b.call("relu", x)})}), externals=[wait])
    with kedge.local(threads=1) as device, pytest.raises(JobError) as caught:
        device.load(artifact).run(x_of(4), timeout_s=0.2)
    assert caught.value.outcome == "timeout"
