"""Generate the kedge.v1 modules from protos/v1/*.proto; `--check` compares them with what is committed instead."""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
V1 = ROOT / "protos" / "v1"
#: The .proto files import each other by their place in the kedge namespace.
IMPORT_ROOT = ROOT / ".paths"


def generate(out: Path) -> list[Path]:
    """Write the modules and stubs below `out`, and return their paths."""
    sources = sorted(f"kedge/protos/v1/{path.name}" for path in V1.glob("*.proto"))
    well_known = str(files("grpc_tools").joinpath("_proto"))
    arguments = ["protoc", f"-I{IMPORT_ROOT}", f"-I{well_known}", f"--python_out={out}", f"--pyi_out={out}"]
    if protoc.main([*arguments, f"--grpc_python_out={out}", *sources]) != 0:
        raise SystemExit("protoc refused the .proto files")
    return sorted((out / "kedge" / "protos" / "v1").iterdir())


def main() -> int:
    """Generate, or with --check report files that differ from the committed ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a file differs")
    check = parser.parse_args().check
    stale = []
    with tempfile.TemporaryDirectory() as scratch:
        for path in generate(Path(scratch)):
            committed, text = V1 / path.name, path.read_text()
            if path.suffix == ".pyi":  # protoc's stubs are not typed strictly; what uses them is
                text = f"# mypy: ignore-errors\n{text}"
            if not committed.exists() or committed.read_text() != text:
                stale.append(path.name)
                if not check:
                    committed.write_text(text)
    for name in stale:
        print(f"{'differs' if check else 'wrote'}: protos/v1/{name}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
