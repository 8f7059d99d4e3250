"""Linking and building the runtime: what is made, where it is kept, and what goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kedge.compiler import toolchain
from kedge.compiler.codegen.machine import emit_object
from kedge.compiler.errors import ToolchainError
from kedge.compiler.target import parse
from kedge.compiler.toolchain import build_runtime, c_libraries, cache_dir, compile_c, link_shared, zig_cpu

NATIVE = parse("x86-64")


def module(body: str) -> bytes:
    return emit_object(f'target triple = "x86_64-unknown-linux-gnu"\n{body}', NATIVE)


def test_objects_that_need_something_from_outside_are_refused() -> None:
    body = "  %y = call double @cbrt(double %x)\n  ret double %y\n"
    needy = module("declare double @cbrt(double)\ndefine double @f(double %x) {\n" + body + "}")
    with pytest.raises(ToolchainError, match="cbrt"):
        link_shared([needy], NATIVE)


def test_linking_is_reproducible() -> None:
    one = module("define i32 @f() {\n  ret i32 1\n}")
    assert link_shared([one], NATIVE) == link_shared([one], NATIVE)


def test_a_missing_linker_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_zig", lambda: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ToolchainError, match="no linker") as caught:
        link_shared([], NATIVE)
    assert "pip install ziglang" in str(caught.value)


def test_a_missing_compiler_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEDGE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(toolchain, "_zig", lambda: None)
    with pytest.raises(ToolchainError, match="pip install ziglang"):
        build_runtime(NATIVE)


def test_external_code_without_a_compiler_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEDGE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(toolchain, "_zig", lambda: None)
    for needs in (lambda: compile_c(tmp_path / "f.c", NATIVE, ()), lambda: c_libraries(NATIVE)):
        with pytest.raises(ToolchainError, match="external code needs ziglang") as caught:
            needs()
        assert "pip install ziglang" in str(caught.value)


def test_a_c_library_in_an_unwritable_cache_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("KEDGE_CACHE_DIR", str(blocked))
    with pytest.raises(ToolchainError, match="KEDGE_CACHE_DIR"):
        c_libraries(NATIVE)


def test_the_c_library_has_the_runtime_s_helpers() -> None:
    """zig would make others, in seconds, for what is not stripped: they come with debugging information."""
    (helpers,) = [path for path in c_libraries(NATIVE) if path.name == "libcompiler_rt.a"]
    assert b".text" in helpers.read_bytes() and b".debug_info" not in helpers.read_bytes()


def test_the_cpu_of_external_code_is_that_of_the_target() -> None:
    assert zig_cpu(parse("x86-64")) == "x86_64"
    assert zig_cpu(parse("x86-64-v3")).startswith("x86_64+avx+avx2+")
    assert "+sse4_1" in zig_cpu(parse("x86-64-v3"))
    # Neon is taken from the baseline of 32-bit ARM, and given back by the boards that have it.
    assert zig_cpu(parse("beaglebone/black")).startswith("generic+v7a+vfp3d16") and "-neon" not in zig_cpu(
        parse("beaglebone/black")
    )


def test_what_a_c_file_includes_is_known(tmp_path: Path) -> None:
    (tmp_path / "with space.h").write_text("#define ONE 1\n")
    source = tmp_path / "f.c"
    source.write_text('#include <stdio.h>\n#include "with space.h"\nint f(void) { return ONE; }\n')
    made = compile_c(source, NATIVE, ())
    assert made.includes == (tmp_path / "with space.h",) and made.warnings == ""
    assert made.code == compile_c(source, NATIVE, ()).code


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEDGE_CACHE_DIR", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("KEDGE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "kedge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "kedge"


def test_what_zig_keeps_moves_with_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """But for a folder that the user gives it, as the tests do."""
    monkeypatch.setenv("KEDGE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", "elsewhere")
    assert toolchain._zig_environment(tmp_path)["ZIG_GLOBAL_CACHE_DIR"] == "elsewhere"
    monkeypatch.delenv("ZIG_GLOBAL_CACHE_DIR")
    assert toolchain._zig_environment(tmp_path)["ZIG_GLOBAL_CACHE_DIR"] == str(tmp_path / "zig")


def test_an_unwritable_cache_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("KEDGE_CACHE_DIR", str(blocked))
    with pytest.raises(ToolchainError, match="KEDGE_CACHE_DIR"):
        build_runtime(NATIVE)


def test_a_full_disk_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full takes nothing: writing there fails as on a disk without room."""
    real = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        return real(Path("/dev/full"), data) if path.suffix == ".o" else real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ToolchainError, match="No space left"):
        link_shared([b"x" * 100], NATIVE)


def test_the_runtime_is_built_once_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    files = build_runtime(parse("native"), progress=said.append)
    assert all(path.is_file() and os.access(path, os.R_OK) for path in (files.lib, files.static))
    assert os.access(files.runner, os.X_OK)
    before = files.lib.stat().st_mtime_ns
    said.clear()
    assert build_runtime(parse("x86-64-v3"), progress=said.append) == files  # one build per architecture
    assert not said and files.lib.stat().st_mtime_ns == before


def test_another_process_that_was_faster_is_no_error(tmp_path: Path) -> None:
    made, folder = tmp_path / "made", tmp_path / "folder"
    for path in (made, folder):
        path.mkdir()
        (path / "lib").write_text(path.name)
    toolchain._publish(made, folder)
    assert (folder / "lib").read_text() == "made"


def test_importing_the_toolchain_needs_no_llvm() -> None:
    code = "import sys, kedge.compiler.toolchain; sys.exit('llvmlite' in sys.modules or 'onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
