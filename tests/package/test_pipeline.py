"""From a module to an artifact: pipelines, variants, the kernel cache, what a user can look at on the way."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from kedge.compiler import debug
from kedge.compiler.cache import KernelCache, draft_key, kernel_key
from kedge.compiler.errors import CodegenError, CompileError, ToolchainError
from kedge.compiler.frontend import nn
from kedge.compiler.graph.ir import Module
from kedge.compiler.lower.program import Draft
from kedge.compiler.pipeline import compile_module, compile_prim_func, pipeline
from kedge.compiler.target import parse
from kedge.compiler.tir.expr import Var
from kedge.compiler.tir.stmt import Block, PrimFunc
from kedge.compiler.tir.structural import canonical
from kedge.compiler.tir.visitor import map_stmt
from support import functions
from support.compiled import NativeError, opened


class Net(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 5)
        self.relu = nn.ReLU()

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        return self.fc2(self.relu(self.fc1(x)))


@pytest.fixture(scope="module")
def net() -> tuple[Module, dict[str, np.ndarray]]:  # type: ignore[type-arg]
    rng = np.random.default_rng(0)
    module, _ = Net().export(spec={"forward": {"x": nn.spec.Tensor(("N", 12), "float32")}})
    params = {
        "fc1.weight": rng.standard_normal((16, 12)), "fc1.bias": rng.standard_normal(16),
        "fc2.weight": rng.standard_normal((5, 16)), "fc2.bias": rng.standard_normal(5),
    }  # fmt: skip
    single = {name: data.astype(np.float32) for name, data in params.items()}
    return module.bind(single), single


def reference(params: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    hidden = np.maximum(x @ params["fc1.weight"].T + params["fc1.bias"], 0)
    result: np.ndarray = hidden @ params["fc2.weight"].T + params["fc2.bias"]  # type: ignore[type-arg]
    return result


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path / "kernels")


def test_a_module_runs_at_any_batch_size(net, cache: KernelCache) -> None:  # type: ignore[no-untyped-def]
    module, params = net
    artifact = compile_module(module, "native", cache=cache, name="net")
    assert artifact.manifest.name == "net"
    (function,) = artifact.manifest.functions
    assert str(function.inputs[0]) == "x: float32[N, 12]"
    with opened(artifact, threads=2) as opened_net:
        for batch in (1, 3, 64):
            x = np.random.default_rng(batch).standard_normal((batch, 12)).astype(np.float32)
            (got,) = opened_net.run({"x": x}).values()
            np.testing.assert_allclose(got, reference(params, x), rtol=1e-4, atol=1e-5)


def test_variants_share_their_weights(net, cache: KernelCache) -> None:  # type: ignore[no-untyped-def]
    module, _ = net
    artifact = compile_module(module, ["x86-64", "x86-64-v3", "raspberry-pi/4b", "x86-64"], cache=cache)
    variants = artifact.manifest.variants
    assert [v.arch for v in variants] == ["x86_64", "x86_64", "aarch64"]
    assert len({v.weights for v in variants}) == 1 and len({v.lib for v in variants}) == 3
    assert artifact.select("x86_64", parse("x86-64-v4").features).features == parse("x86-64-v3").features


def test_a_second_compile_takes_every_kernel_from_the_cache(net, cache: KernelCache) -> None:  # type: ignore[no-untyped-def]
    module, _ = net
    first = compile_module(module, "native", cache=cache)
    made = cache.misses
    assert made > 0 and cache.hits == 0
    again = KernelCache(cache.root)
    assert compile_module(module, "native", cache=again).digest == first.digest
    assert again.misses == 0 and again.hits >= made


def test_the_key_tells_targets_and_functions_apart_but_not_names() -> None:
    func = functions.dense(4, 4, 4)
    native, plain = parse("x86-64-v3"), parse("x86-64")
    assert kernel_key(func, native) == kernel_key(functions.dense(4, 4, 4), native)
    assert kernel_key(func, native) != kernel_key(func, plain)
    assert kernel_key(func, native) != kernel_key(functions.dense(4, 4, 5), native)
    # The number of cores is for schedules; it changes no instruction of a given schedule.
    assert kernel_key(func, native) == kernel_key(func, parse("x86-64-v3 -num-cores=2"))


def kernels_of(cache: KernelCache) -> list[Path]:
    return [path for path in cache.root.glob("code-*/??/*") if path.is_file()]


def test_a_second_compile_schedules_nothing(  # type: ignore[no-untyped-def]
    net, cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compile_module(net[0], "native", cache=cache)
    said: list[str] = []
    monkeypatch.setattr("kedge.compiler.lower.lower.lower_group", lambda *_: pytest.fail("lowered again"))
    monkeypatch.setattr("kedge.compiler.pipeline.emit_object", lambda *_, **__: pytest.fail("compiled again"))
    monkeypatch.setattr("kedge.compiler.kernels.schedule_func", lambda *_, **__: pytest.fail("scheduled again"))
    assert compile_module(net[0], "native", cache=cache, progress=said.append).digest == first.digest
    assert not [line for line in said if line.startswith("compiling")]
    monkeypatch.undo()
    monkeypatch.setattr("kedge.compiler.kernels.schedule_func", lambda *_, **__: pytest.fail("scheduled again"))
    with pytest.raises(pytest.fail.Exception):  # rules read more of the target than code generation does
        compile_module(net[0], f"{parse('native')} -l2=12345", cache=cache)


def test_kernels_that_are_gone_are_lowered_and_made_again(net, cache: KernelCache) -> None:  # type: ignore[no-untyped-def]
    first = compile_module(net[0], "native", cache=cache)
    kernels = kernels_of(cache)
    kernels[0].unlink()
    assert compile_module(net[0], "native", cache=cache).digest == first.digest and kernels[0].exists()
    others = [path for path in cache.root.rglob("[0-9a-f]*") if path.is_file() and path not in kernels]
    assert {path.parent.parent.name.partition("-")[0] for path in others} == {"lowered", "objects"}
    for path in others:
        path.write_bytes(b"cut")
    assert compile_module(net[0], "native", cache=cache).digest == first.digest


def old(path: Path, days: float) -> Path:
    """`path`, and all below, as if last changed so long ago."""
    at = time.time() - days * 24 * 3600
    for each in (*path.rglob("*"), path):
        os.utime(each, (at, at))
    return path


def test_what_other_versions_kept_and_do_not_use_is_removed(cache: KernelCache) -> None:
    compile_prim_func(functions.chain(8), "native", cache=cache)
    (own,) = cache.root.glob("code-*")
    assert (own / ".used").exists()
    key = "ab" * 32
    names = ("code-" + "0" * 16, "lowered-" + "1" * 16, ".gone-" + "2" * 16, "ab", "objects/ab", "groups/ab")
    for name in names:
        (cache.root / name).mkdir(parents=True)
        (cache.root / name / key).write_bytes(b"kept")
    gone = [old(cache.root / name.partition("/")[0], 31) for name in names]
    used = old(shutil.copytree(cache.root / names[0], cache.root / ("code-" + "3" * 16)), 31)
    (used / ".used").touch()
    young = old(shutil.copytree(cache.root / names[0], cache.root / ("code-" + "4" * 16)), 29)
    (cache.root / "cd").mkdir()
    (cache.root / "cd" / "notes.txt").write_text("somebody's")
    foreign = [old(cache.root / "cd", 31), old(shutil.copytree(cache.root / "cd", cache.root / "mine"), 31)]
    old(own, 31)
    cache.clean()
    assert all(path.exists() for path in gone), "the cache was cleaned on the same day"
    old(cache.root / ".cleaned", 1.1)
    cache.clean()
    assert not any(path.exists() for path in gone) and not list(cache.root.glob(".gone-*"))
    assert all(path.exists() for path in (own, used, young, *foreign))
    assert time.time() - (own / ".used").stat().st_mtime < 3600
    again = KernelCache(cache.root)
    compile_prim_func(functions.chain(8), "native", cache=again)
    assert again.misses == 0


def test_a_folder_that_is_removed_while_it_is_written_to_is_made_again(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = secrets.token_hex

    def late(nbytes: int) -> str:
        shutil.rmtree(cache.root)
        monkeypatch.undo()
        return made(nbytes)

    monkeypatch.setattr(secrets, "token_hex", late)
    cache.keep_object("ab" * 32, b"code")
    assert cache.find_object("ab" * 32) == b"code"


def test_the_key_of_a_draft_is_what_rules_see() -> None:
    def key(func: PrimFunc, target: str = "x86-64-v3") -> str:
        return draft_key(Draft(func, canonical(func)), parse(target))

    func = functions.dense(4, 4, 4)
    assert key(func) == key(functions.dense(4, 4, 4)) != key(functions.dense(4, 4, 5))
    assert key(func) != key(func, "x86-64-v3 -num-cores=2") and key(func) != kernel_key(func, parse("x86-64-v3"))
    renamed = map_stmt(func.body, lambda one: replace(one, name=f"{one.name}_") if isinstance(one, Block) else one)
    assert canonical(replace(func, body=renamed)) == canonical(func) and key(replace(func, body=renamed)) != key(func)
    assert key(replace(func, attrs={"kind": "injective"})) != key(func)
    assert key(replace(func, attrs={**func.attrs, "origin": ("node",)})) == key(func)


@pytest.mark.parametrize("damage", [b"", b"kedge-kernel 1\n{}", None])
def test_a_damaged_cache_entry_is_made_again(cache: KernelCache, damage: bytes | None) -> None:
    func = functions.chain(8)
    good = compile_prim_func(func, "native", cache=cache)
    (entry,) = kernels_of(cache)
    data = entry.read_bytes()
    entry.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if damage is None else damage)
    again = KernelCache(cache.root)
    assert compile_prim_func(func, "native", cache=again).digest == good.digest
    assert again.misses == 1 and entry.read_bytes() == data


def test_an_unwritable_kernel_cache_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ToolchainError, match="KEDGE_CACHE_DIR"):
        compile_prim_func(functions.chain(8), "native", cache=KernelCache(tmp_path / "file"))


@dataclass(frozen=True)
class Witness:
    name: str = "witness"

    def __call__(self, module: Module) -> Module:
        SEEN.append(module)
        return module


SEEN: list[Module] = []


def test_pipelines_can_be_changed(net, cache: KernelCache) -> None:  # type: ignore[no-untyped-def]
    default = pipeline("default")
    assert default.insert_after("fuse", Witness()).names == (*default.names, "witness")
    assert default.insert_before(default.names[0], Witness()).names[0] == "witness"
    at = default.names.index("fuse")
    assert default.replace("fuse", Witness()).names == (*default.names[:at], "witness", *default.names[at + 1 :])
    twice = default.insert_before("fuse", Witness()).insert_after("fuse", Witness())
    assert twice.replace("witness", Witness("one")).names == default.insert_before("fuse", Witness("one")).names
    assert "fuse" not in default.without("fuse").names and "fuse" in default.names
    SEEN.clear()
    compile_module(net[0], "native", pipeline=default.insert_after("fuse", Witness()), cache=cache)
    assert len(SEEN) == 1 and SEEN[0] is not net[0]
    with pytest.raises(CompileError, match="has no pass 'fuze'") as caught:
        default.insert_after("fuze", Witness())
    assert "fuse" in str(caught.value)
    with pytest.raises(CompileError, match="has no pass 'fuze'"):
        default.replace("fuze", Witness())
    with pytest.raises(CompileError, match="no pipeline 'fast'"):
        pipeline("fast")


def test_no_target_is_refused(net) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CompileError, match="no target"):
        compile_module(net[0], [])


def test_progress_names_each_kernel(net, cache: KernelCache) -> None:  # type: ignore[no-untyped-def]
    said: list[str] = []
    compile_module(net[0], "native", cache=cache, progress=said.append)
    assert said[:2] == ["optimizing the graph", "optimizing the graph for x86_64"] and said[-1] == "packaging"
    total = len(said) - 3
    assert total > 1 and all(
        line.startswith("compiling ") and line.endswith(f" for x86_64 ({number} of {total})")
        for number, line in enumerate(said[2:-1], 1)
    )


def test_every_stage_can_be_seen(  # type: ignore[no-untyped-def]
    net, cache: KernelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KEDGE_DUMP_DIR", str(tmp_path / "dump"))
    monkeypatch.setenv("KEDGE_DEBUG", "1")
    compile_module(net[0], "native", cache=cache)
    suffixes = {path.suffix for path in (tmp_path / "dump").iterdir()}
    assert suffixes == {".graph", ".tir", ".loops", ".ll", ".s"}
    for scheduled in (tmp_path / "dump").glob("*.tir"):
        prepared = scheduled.with_suffix(".loops").read_text()
        assert "block " in scheduled.read_text() and "block " not in prepared and "for " in prepared
    assert "kedge: link: " in capsys.readouterr().err
    monkeypatch.setenv("KEDGE_DEBUG", "3")
    compile_module(net[0], "x86-64", cache=cache)
    printed = capsys.readouterr().err
    assert "func " in printed and "define hidden i32" not in printed


def test_variants_of_one_architecture_are_seen_side_by_side(
    cache: KernelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEDGE_DUMP_DIR", str(tmp_path / "dump"))
    compile_prim_func(functions.transpose(4, 3), ["x86-64", "x86-64-v3"], cache=cache)
    for suffix in ("tir", "loops", "ll", "s"):
        assert len(list((tmp_path / "dump").glob(f"kernel-*.{suffix}"))) == 2
    assert len(list((tmp_path / "dump").glob("entry-*.ll"))) == 2


def test_stages_whose_names_no_file_can_have_get_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEDGE_DUMP_DIR", str(tmp_path))
    stages = ["a b", "a_b", "a/b", "名前", *("x" * 200 + end for end in "12"), "é" * 119]
    for stage in stages:
        debug.show(stage, "tir", debug.KERNEL, lambda stage=stage: f"stage {stage}")  # type: ignore[misc]
    assert {path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {f"stage {each}\n" for each in stages}
    assert all(path.name.isascii() for path in tmp_path.iterdir())


def test_a_dump_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("KEDGE_DUMP_DIR", str(folder))
        with pytest.raises(debug.DebugError, match="KEDGE_DUMP_DIR: cannot write"):
            debug.show("stage", "tir", debug.KERNEL, lambda: "text")


def test_a_symbol_that_no_input_has_as_a_dim_is_refused(cache: KernelCache) -> None:
    n = Var("N", lower=1)
    func = functions.transpose(n * 2, 3)
    with pytest.raises((CodegenError, CompileError), match="N"):
        compile_prim_func(func, "native", cache=cache)


def test_the_descriptor_says_what_the_runtime_checks(net, cache: KernelCache) -> None:  # type: ignore[no-untyped-def]
    artifact = compile_module(net[0], "native", cache=cache)
    with opened(artifact) as opened_net:
        with pytest.raises(NativeError, match="input"):
            opened_net.run({"x": np.zeros((2, 13), np.float32)})
        with pytest.raises(NativeError, match="input"):
            opened_net.run({"x": np.zeros((2, 12), np.float64)})


def test_the_same_input_gives_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from support import functions; from kedge.compiler.cache import KernelCache\n"
        "from kedge.compiler.pipeline import compile_prim_func\n"
        "print(compile_prim_func(functions.conv(2, 3, 8, 5), 'x86-64-v3', cache=KernelCache(Path('{}'))).digest)"
    )
    digests = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent.parent)}
        command = [sys.executable, "-c", code.format(tmp_path / seed)]
        digests.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(digests) == 1
