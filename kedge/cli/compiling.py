"""`kedge compile` and `kedge inspect`: from a model to an artifact, and what is inside of either."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import kedge
from kedge.artifact import external_functions
from kedge.cli import output
from kedge.cli.arguments import Shape, check_output, is_artifact, load_artifact, parse_shapes, reading
from kedge.cli.externals import load_externals
from kedge.rpc.artifact import Manifest, VariantDevice
from kedge.rpc.errors import UsageError


def _targets(incomplete: str) -> list[str]:
    """The tags that complete what was typed."""
    from kedge.compiler.target import known_tags

    return [tag for tag in known_tags() if tag.startswith(incomplete)]


def compile_(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="An ONNX model.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.kdg", help="Where to write the artifact.")],
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help="A tag, 'native', 'llvm -mtriple=… -mcpu=…', 'opencl' or 'cuda -arch=…'; "
            "repeat it for several variants, the preferred one first.",
            show_default="native",
            autocompletion=_targets,
        ),
    ] = None,
    shape: output.ShapeOption = None,
    external: output.ExternalOption = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Take no artifact or kernel from the cache, and keep none.")
    ] = False,
    as_json: output.JsonFlag = False,
) -> None:
    """Compile an ONNX model into an artifact for one or several targets.

    What was compiled before is taken from the cache (see 'kedge cache'): the artifact, or kernels of others.

    Examples:

      kedge compile digits.onnx -o digits.kdg

      kedge compile resnet18.onnx --shape x=1,3,224,224 --target raspberry-pi/4b -o resnet18.kdg

      kedge compile digits.onnx --target cuda --target native -o digits-gpu.kdg

      kedge compile digits.onnx --target x86-64 --target x86-64-v3 --target aws/graviton2 -o digits.kdg

      kedge compile digits.onnx --external my_dense.py -o digits.kdg

      kedge compile digits.onnx --no-cache -o digits.kdg
    """
    shapes = parse_shapes(shape)
    _check_targets(target or ())
    check_output(out, model)
    externals = load_externals(external)
    started = time.perf_counter()
    with output.compile_warnings(), output.progress("compile") as report:
        report(f"reading {model.name}")
        with reading(model):
            artifact = kedge.compile(
                model, target=target or ["native"], shapes=shapes, externals=externals, cache=not no_cache,
                progress=report,
            )  # fmt: skip
        report("writing")
        artifact.save(out)
    if artifact.cached:
        output.stderr().print("taken from the cache; --no-cache compiles it again", soft_wrap=True)
    seconds = time.perf_counter() - started
    if as_json:
        output.emit_json(
            {"artifact": str(out), "seconds": seconds, "cached": artifact.cached, **manifest_facts(artifact.manifest)}
        )
        return
    targets = "; ".join(output.target_text(variant.target) for variant in artifact.manifest.variants)
    output.stdout().print(
        f"{out}: {output.size_text(out.stat().st_size)} for {targets}, in {seconds:.2f} s",
        soft_wrap=True,
    )


def _check_targets(texts: Iterable[str]) -> None:
    """Raise UsageError for a target that is none."""
    from kedge.compiler.errors import TargetError
    from kedge.compiler.target import parse

    for text in texts:
        try:
            parse(text)
        except TargetError as error:
            raise UsageError(error.message, hint=error.hint) from error


def inspect(
    path: Annotated[Path, typer.Argument(metavar="MODEL.onnx|OUT.kdg", help="What to look into.", show_default=False)],
    shape: output.ShapeOption = None,
    as_json: output.JsonFlag = False,
) -> None:
    """Show what is inside a model (operators, supported or not, shapes, sizes) or an artifact.

    Exits with 1 when the model uses operators that kedge does not support.

    Examples:

      kedge inspect digits.onnx

      kedge inspect digits.kdg --json
    """
    if is_artifact(path):
        manifest = load_artifact(path).manifest
        if as_json:
            output.emit_json(manifest_facts(manifest))
        else:
            _show_manifest(path, manifest)
    else:
        with reading(path):
            _inspect_model(path, parse_shapes(shape), as_json)


def manifest_facts(manifest: Manifest) -> dict[str, Any]:
    """What people ask of an artifact, JSON-able."""
    return {
        "name": manifest.name,
        "abi": manifest.abi,
        "compiler": manifest.compiler,
        "functions": [
            {"name": f.name, "inputs": [str(p) for p in f.inputs], "outputs": [str(p) for p in f.outputs]}
            for f in manifest.functions
        ],
        "variants": [
            {
                "target": v.target,
                "arch": v.arch,
                "features": list(v.features),
                "device": None if v.device is None else asdict(v.device),
            }
            for v in manifest.variants
        ],
        "external": list(external_functions(manifest)),
        "members": [{"name": m.name, "bytes": m.size, "sha256": m.digest} for m in manifest.members],
    }


def _show_manifest(path: Path, manifest: Manifest) -> None:
    console = output.stdout()
    console.print(f"{path}: artifact {manifest.name!r}, ABI {manifest.abi}, {manifest.compiler}", soft_wrap=True)
    for function in manifest.functions:
        inputs, outputs = (", ".join(map(str, ports)) for ports in (function.inputs, function.outputs))
        console.print(f"\n{function.name}({inputs})\n  -> {outputs}", soft_wrap=True)
    console.print()
    variants = output.table("variant", "arch", "required CPU features", "runs on", "code")
    for variant in manifest.variants:
        features = ", ".join(variant.features) or "baseline"
        target = output.target_text(variant.target)
        variants.add_row(target, variant.arch, features, _device_text(variant.device), variant.lib)
    output.show(variants)
    external = external_functions(manifest)
    if external:
        console.print(f"\nexternal code: {', '.join(external)}", soft_wrap=True)
    console.print()
    members = output.table("member", ">size", "sha256")
    for member in manifest.members:
        members.add_row(member.name, output.size_text(member.size), member.digest[:16])
    output.show(members)


def _device_text(device: VariantDevice | None) -> str:
    """Where a variant's kernels run, and what they need there."""
    if device is None:
        return "cpu"
    generation = f"{device.arch} or newer" if device.arch and not device.arch.endswith("a") else device.arch
    block = f"blocks of {device.max_threads} threads and {output.size_text(device.shared_bytes)}"
    return f"{device.kind}: " + ", ".join(filter(None, (generation, block, *device.features)))


def _inspect_model(path: Path, shapes: dict[str, Shape], as_json: bool) -> None:
    from kedge.compiler.frontend.onnx import coverage

    report = coverage(path)
    if as_json:
        output.emit_json(asdict(report) | {"supported": report.supported})
    else:
        output.stdout().print(str(report), soft_wrap=True)
        if report.supported:
            summary = kedge.load(path, shapes=shapes).summary()
            output.stdout().print("\n" + summary, soft_wrap=True)
    if not report.supported:
        raise typer.Exit(1)
