"""Linking compiled kernels, building the native runtime, and compiling users' C. No system toolchain is needed.

The `ziglang` package carries a linker and a C compiler with headers and libraries for every target. The linker is
called directly (10 ms); the C compiler, whose start takes longer, for what is cached: the runtime and external code.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kedge.compiler.errors import ToolchainError
from kedge.compiler.target.arch import Arch
from kedge.compiler.target.model import Target
from kedge.compiler.target.parse import AnyTarget

Progress = Callable[[str], None]
_COMPILE_FLAGS = ("-std=c11", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-sanitize=all", "-Wall", "-Werror")
#: External code is other people's: their warnings are shown, and do not stop it.
_EXTERNAL_FLAGS = (
    "-std=gnu11", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-sanitize=all", "-fno-stack-protector", "-Wall",
)  # fmt: skip
_LIBRARIES = ("-lpthread", "-ldl", "-lm")
#: What external code may use: the C library, its mathematics, and the compiler's own helpers (division on 32-bit ARM).
_C_LIBRARIES = ("libm.so.6", "libc.so.6", "libc_nonshared.a", "libcompiler_rt.a")
#: zig makes its helpers (seconds of work) once for what is stripped and once more, with debugging information, for what
#: is not: the runtime and the C library are made with the same ones.
_STRIP = "-s"
#: External libraries may come with more debugging information than code.
#: A shared object runs a function called _init, or _fini, by itself; what external code calls so is none of that kind.
_EXTERNAL_LINK = ("--as-needed", "--strip-debug", "-init=", "-fini=")
_UNDEFINED = re.compile(r"undefined (?:hidden |protected )?symbol: (\S+)")
_DUPLICATE = re.compile(r"duplicate symbol: (\S+)")


@dataclass(frozen=True, slots=True)
class RuntimeFiles:
    """The native runtime for one architecture: shared library, runner program, and static library with its header."""

    lib: Path
    runner: Path
    static: Path


class UndefinedSymbolError(ToolchainError):
    """Linking found symbols that nothing defines; `symbols` are their names."""

    def __init__(self, message: str, symbols: tuple[str, ...]) -> None:
        super().__init__(message)
        self.symbols = symbols


class DuplicateSymbolError(ToolchainError):
    """Linking found symbols that several objects define; `symbols` are their names."""

    def __init__(self, message: str, symbols: tuple[str, ...]) -> None:
        super().__init__(message)
        self.symbols = symbols


# Linking --------------------------------------------------------------------------------------------------------


def link_shared(
    objects: Sequence[bytes],
    target: Target,
    externals: Sequence[tuple[str, bytes]] = (),
    libraries: Sequence[Path] = (),
) -> bytes:
    """A shared object of ELF object files and static libraries, which exports the module's descriptor.

    `externals` are files from outside, with the names that errors have for them. Nothing may need anything else but
    what `libraries` define (see `c_libraries`).

    Raises:
        UndefinedSymbolError: the objects use symbols that nothing defines.
        DuplicateSymbolError: two objects define one symbol.
        ToolchainError: there is no linker, it refuses an object, or the disk is full.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="kedge-link-") as folder:
            paths = []
            for name, data in (*((f"{number}.o", data) for number, data in enumerate(objects)), *externals):
                path = Path(folder, name)
                path.write_bytes(data)
                paths.append(str(path))
            exports = Path(folder, "exports.map")
            exports.write_text("{ global: kedge_module; local: *; };\n")
            # What external code exports stays inside; objects of kedge hide all but the descriptor anyway.
            external = [*_EXTERNAL_LINK, "--version-script", str(exports), *map(str, libraries)] if libraries else []
            out = Path(folder, "lib.so")
            command = [
                *_linker(), "-m", target.arch.lld_emulation, "-shared", "-soname", "lib.so", "--no-undefined",
                "--hash-style=gnu", "--build-id=none", "--gc-sections", "-O1", "-z", "noexecstack", "-z", "relro",
                "-z", "now", "-o", str(out), *paths, *external,
            ]  # fmt: skip
            _run(command, "linking", dict(os.environ), folder)
            return out.read_bytes()
    except OSError as error:
        raise ToolchainError(
            f"linking failed: {error.strerror} ({error.filename})", hint="free space in the temporary folder"
        ) from error


def _linker() -> list[str]:
    zig = _zig()
    if zig is not None:
        return [*zig, "ld.lld"]
    found = shutil.which("ld.lld")
    if found is not None:
        return [found]
    raise ToolchainError("there is no linker", hint="pip install ziglang, or put ld.lld on the PATH")


def linker_version() -> str:
    """What tells one linker from another; "none" where there is none."""
    if _zig() is not None:
        return f"zig {zig_version()}"
    found = shutil.which("ld.lld")
    if found is None:
        return "none"
    facts = Path(found).stat()
    return f"{found} {facts.st_size} {facts.st_mtime_ns}"


def _zig() -> list[str] | None:
    """The zig program of the ziglang package, or None."""
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        return None
    program = Path(spec.origin).with_name("zig.exe" if sys.platform == "win32" else "zig")
    return [str(program)] if program.exists() else [sys.executable, "-m", "ziglang"]


def _run(command: Sequence[str], what: str, environment: dict[str, str], folder: str = "") -> None:
    """Run a tool; what it complains about in `folder` goes by its name there."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        lines = (said.replace(f"{folder}{os.sep}", "") if folder else said).splitlines()
        full = any("No space left" in line for line in lines)
        hint = "free space on that disk" if full else None
        undefined = tuple(dict.fromkeys(_UNDEFINED.findall(done.stderr)))
        if undefined:
            raise UndefinedSymbolError(f"{what} failed: " + "\n".join(lines[:20]), undefined)
        duplicate = tuple(dict.fromkeys(_DUPLICATE.findall(done.stderr)))
        if duplicate:
            raise DuplicateSymbolError(f"{what} failed: " + "\n".join(lines[:20]), duplicate)
        raise ToolchainError(f"{what} failed: " + "\n".join(lines[:20] or [f"exit {done.returncode}"]), hint=hint)


# The runtime ----------------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Where compiled things are kept: KEDGE_CACHE_DIR, else ~/.cache/kedge (or under XDG_CACHE_HOME)."""
    given = os.environ.get("KEDGE_CACHE_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kedge"


def build_runtime(target: AnyTarget, *, progress: Progress | None = None) -> RuntimeFiles:
    """The runtime for the architecture of `target` or its host, built on first use (seconds) and cached by content.

    It is compiled for the baseline of the architecture, so one build serves every CPU of it. `progress` is called
    with a line before something takes long. Two processes may build at once; each file appears whole.

    Raises:
        ToolchainError: ziglang is missing, a source does not compile, or the cache cannot be written.
    """
    from kedge.device_agent import runtime

    arch = target.host.arch
    folder = cache_dir() / "runtime" / f"{arch.name}-{_runtime_key(arch)}"
    files = RuntimeFiles(folder / "libkedge_rt.so", folder / "kedge-runner", folder / "libkedge_rt.a")
    if all(path.exists() for path in (files.lib, files.runner, files.static)):
        return files
    zig = _zig()
    if zig is None:
        raise ToolchainError("building the runtime needs ziglang", hint="pip install ziglang")
    if progress is not None:
        progress(f"building the runtime for {arch.name} (once)")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{arch.name}-") as scratch:
            _build(zig, arch, runtime.SOURCE_DIR, runtime.LIBRARY_SOURCES, runtime.RUNNER_SOURCES, Path(scratch))
            _publish(Path(scratch, "out"), folder)
    except OSError as error:
        raise ToolchainError(
            f"cannot write the cache {folder.parent}: {error.strerror}",
            hint="set KEDGE_CACHE_DIR to a folder with room that you may write to",
        ) from error
    return files


def _runtime_key(arch: Arch) -> str:
    """Names the products by everything that goes into them."""
    from kedge.device_agent import runtime

    digest = hashlib.sha256()
    for name in (*runtime.LIBRARY_SOURCES, *runtime.RUNNER_SOURCES, *runtime.HEADERS):
        digest.update(name.encode() + b"\0" + (runtime.SOURCE_DIR / name).read_bytes())
    digest.update(repr((arch.zig_target, arch.zig_cpu, _COMPILE_FLAGS, _LIBRARIES, zig_version())).encode())
    return digest.hexdigest()[:16]


def zig_version() -> str:
    """The version of the C compiler, or "none"."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ziglang")
    except PackageNotFoundError:
        return "none"


def _build(
    zig: list[str], arch: Arch, sources: Path, library: Sequence[str], runner: Sequence[str], scratch: Path
) -> None:
    out, objects = scratch / "out", scratch / "obj"
    out.mkdir()
    objects.mkdir()
    environment = _zig_environment(scratch)
    cc = [*zig, "cc", "-target", arch.zig_target, f"-mcpu={arch.zig_cpu}", *_COMPILE_FLAGS]
    for name in (*library, *runner):
        _run([*cc, "-c", str(sources / name), "-o", str(objects / f"{name}.o")], f"compiling {name}", environment)
    lib = [str(objects / f"{name}.o") for name in library]
    program = [str(objects / f"{name}.o") for name in runner]
    _run([*cc, "-shared", _STRIP, *lib, *_LIBRARIES, "-o", str(out / "libkedge_rt.so")], "linking", environment)
    _run([*cc, _STRIP, *lib, *program, *_LIBRARIES, "-o", str(out / "kedge-runner")], "linking", environment)
    _run([*zig, "ar", "rcsD", str(out / "libkedge_rt.a"), *lib], "archiving", environment)


def _zig_environment(scratch: Path) -> dict[str, str]:
    """zig keeps the C library it has built for a target; beside ours, so that one setting moves both."""
    environment = dict(os.environ)
    environment.setdefault("ZIG_GLOBAL_CACHE_DIR", str(cache_dir() / "zig"))
    environment["ZIG_LOCAL_CACHE_DIR"] = str(scratch / "zig")
    return environment


def _publish(made: Path, folder: Path) -> None:
    """Move a finished folder into place; if another process was faster, its files are as good."""
    for path in made.iterdir():
        path.chmod(0o755)
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        for path in made.iterdir():
            path.replace(folder / path.name)


# External code --------------------------------------------------------------------------------------------------


def zig_cpu(target: Target) -> str:
    """The CPU for zig: exactly the features that the artifact will require."""
    base = target.arch.zig_cpu
    for feature in target.features:
        base = base.replace(f"-{feature}", "")
    return base + "".join("+" + feature.replace("-", "_").replace(".", "_") for feature in target.features)


def compiler_key(target: Target) -> str:
    """Changes with everything but the source that `compile_c` makes an object of."""
    from kedge.device_agent import runtime

    digest = hashlib.sha256(repr((target.arch.zig_target, zig_cpu(target), _EXTERNAL_FLAGS, zig_version())).encode())
    for name in ("kedge.h", "kedge_external.h"):
        digest.update((runtime.SOURCE_DIR / name).read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class CObject:
    """A compiled C file: its object file, what the compiler warned of, and the files it included, its own headers."""

    code: bytes
    warnings: str
    includes: tuple[Path, ...]


def compile_c(source: Path, target: Target, flags: Sequence[str]) -> CObject:
    """Compile a C file that may include `kedge_external.h`.

    Raises:
        ToolchainError: ziglang is missing, or the compiler refuses the file; carries the compiler's own words.
    """
    from kedge.device_agent import runtime

    zig = _zig()
    if zig is None:
        raise ToolchainError("compiling external code needs ziglang", hint="pip install ziglang")
    with tempfile.TemporaryDirectory(prefix="kedge-cc-") as folder:
        scratch = Path(folder)
        made, listed = scratch / "made.o", scratch / "made.d"
        command = [
            *zig, "cc", "-target", target.arch.zig_target, f"-mcpu={zig_cpu(target)}", *_EXTERNAL_FLAGS,
            f"-ffile-prefix-map={source.parent}{os.sep}=", "-I", str(runtime.SOURCE_DIR), *flags,
            "-MMD", "-MF", str(listed), "-c", str(source), "-o", str(made),
        ]  # fmt: skip
        environment = _zig_environment(scratch)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        said = done.stderr.strip()
        if done.returncode != 0:
            raise ToolchainError("\n".join((said or done.stdout).splitlines()[:40]))
        return CObject(made.read_bytes(), said, tuple(_dependencies(listed.read_text(), source)))


def _dependencies(rule: str, source: Path) -> list[Path]:
    """The files of a rule for make, but for the source itself."""
    names = re.split(r"(?<!\\)\s+", rule.partition(": ")[2].replace("\\\n", " ").strip())
    paths = [Path(re.sub(r"\\(.)", r"\1", name.replace("$$", "$"))) for name in names if name]
    return [path for path in dict.fromkeys(paths) if path != source]


def c_libraries(target: Target, *, progress: Progress | None = None) -> tuple[Path, ...]:
    """What external code may be linked with: stubs of libc and libm, and the compiler's helpers.

    Made on first use (seconds) and kept, as the runtime is.

    Raises:
        ToolchainError: ziglang is missing, or the cache cannot be written.
    """
    arch = target.arch
    made_of = (arch.zig_target, arch.zig_cpu, _C_LIBRARIES, _STRIP, zig_version())
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    folder = cache_dir() / "clib" / f"{arch.name}-{key}"
    files = tuple(folder / name for name in _C_LIBRARIES)
    if all(path.exists() for path in files):
        return files
    zig = _zig()
    if zig is None:
        raise ToolchainError("linking external code needs ziglang", hint="pip install ziglang")
    if progress is not None:
        progress(f"preparing the C library for {arch.name} (once)")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{arch.name}-") as scratch:
            out = Path(scratch, "out")
            out.mkdir()
            for path in _find_c_libraries(zig, arch, Path(scratch)):
                shutil.copyfile(path, out / path.name)
            _publish(out, folder)
    except OSError as error:
        raise ToolchainError(
            f"cannot write the cache {folder.parent}: {error.strerror}",
            hint="set KEDGE_CACHE_DIR to a folder with room that you may write to",
        ) from error
    return files


def _find_c_libraries(zig: list[str], arch: Arch, scratch: Path) -> list[Path]:
    """Where zig has them: it tells when it links something.

    Optimized, as the runtime is: zig makes its helpers anew for code that is not, in three times the time.
    """
    source = scratch / "probe.c"
    source.write_text("int kedge_probe(void) { return 0; }\n")
    command = [
        *zig, "cc", "-target", arch.zig_target, f"-mcpu={arch.zig_cpu}", "-O2", "-fno-sanitize=all", "-shared",
        "-fPIC", _STRIP, "--verbose", str(source), "-lm", "-o", str(scratch / "probe.so"),
    ]  # fmt: skip
    environment = _zig_environment(scratch)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("ld.lld ")]
    found = {Path(word).name: Path(word) for line in lines for word in shlex.split(line)}
    missing = [name for name in _C_LIBRARIES if name not in found]
    if done.returncode != 0 or missing:
        raise ToolchainError(
            f"zig does not link for {arch.name}: " + "\n".join((done.stderr or ", ".join(missing)).splitlines()[:20])
        )
    return [found[name] for name in _C_LIBRARIES]
