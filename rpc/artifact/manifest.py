"""The manifest of a `.kdg` artifact: what is inside, for which machines, and the digest of every byte.

Plain dataclasses with exact JSON forms. A reader refuses another major format, and ignores keys it does not know,
so that a newer writer may add some. A key that a reader must not ignore comes with another ABI version, which readers
refuse: so do the devices of variants, with ABI 2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from kedge.rpc.errors import ArtifactError

FORMAT_VERSION = 1

#: A dim in a manifest: a size, or an expression over the function's symbols as text ("N", "N*4").
ManifestDim = Union[int, str]


@dataclass(frozen=True)
class Port:
    """A named input or output of a function: dtype as a numpy name, shape with symbolic dims as text."""

    name: str
    dtype: str
    shape: Tuple[ManifestDim, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(str(dim) for dim in self.shape)}]"


@dataclass(frozen=True)
class Symbol:
    """A free dim with its inclusive bounds; `upper` None means unbounded."""

    name: str
    lower: int = 0
    upper: Optional[int] = None


@dataclass(frozen=True)
class Function:
    """A callable of the artifact; its index in the manifest is its index in the ABI."""

    name: str
    inputs: Tuple[Port, ...]
    outputs: Tuple[Port, ...]
    symbols: Tuple[Symbol, ...] = ()


@dataclass(frozen=True)
class Blob:
    """A run of bytes by content: `digest` is the lower-case hex SHA-256."""

    digest: str
    size: int


@dataclass(frozen=True)
class Member:
    """A file of the artifact. On the wire it travels as its `parts`, whose concatenation it is."""

    name: str
    digest: str
    size: int
    parts: Tuple[Blob, ...]


@dataclass(frozen=True)
class VariantDevice:
    """The GPU that a variant's kernels run on, and what it must have.

    `kind` is "opencl" or "cuda", `arch` the oldest generation that runs the code ("sm_87"; "" where the kind has
    none), `features` what else kernels use ("fp16", "fp64", OpenCL's extensions), the others the threads and the bytes
    of shared memory that a block may take.
    """

    kind: str
    arch: str = ""
    max_threads: int = 0
    shared_bytes: int = 0
    features: Tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """The code for one kind of machine. `arch` is what `uname -m` prints there, `features` LLVM's feature names.

    `weights_offset` is the byte offset of the tensor data in the weights member (after the safetensors header).
    Without a `device` the kernels run on the CPU; with one, the CPU launches them.
    """

    target: str
    arch: str
    triple: str
    features: Tuple[str, ...]
    lib: str
    weights: Optional[str] = None
    weights_offset: int = 0
    device: Optional[VariantDevice] = None


@dataclass(frozen=True)
class Manifest:
    """Everything about an artifact but its bytes."""

    name: str
    abi: int
    compiler: str
    functions: Tuple[Function, ...]
    variants: Tuple[Variant, ...]
    members: Tuple[Member, ...]
    info: Mapping[str, Any] = field(default_factory=dict)

    def function(self, name: str = "") -> Function:
        """The function called `name`; without a name the only one, or "main". Raises ArtifactError naming them."""
        if not name and len(self.functions) == 1:
            return self.functions[0]
        wanted = name or "main"
        for function in self.functions:
            if function.name == wanted:
                return function
        known = ", ".join(function.name for function in self.functions)
        raise ArtifactError(f"artifact {self.name!r} has no function {wanted!r}", hint=f"it has: {known}")

    def member(self, name: str) -> Member:
        """The member called `name`."""
        for member in self.members:
            if member.name == name:
                return member
        raise ArtifactError(f"artifact {self.name!r} has no member {name!r}", hint="compile the model again")

    def to_json(self) -> bytes:
        """The canonical bytes: sorted keys, no spaces. Their SHA-256 names the artifact."""
        return json.dumps(_encode(self), sort_keys=True, separators=(",", ":")).encode()

    @staticmethod
    def from_json(data: bytes) -> Manifest:
        """Read a manifest; raises ArtifactError on anything that is not one."""
        try:
            tree = json.loads(data)
            version = tree["format"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ArtifactError("manifest.json is not a kedge manifest", hint="compile the model again") from error
        if version != FORMAT_VERSION:
            raise ArtifactError(
                f"artifact format {version} is not supported by this kedge (it reads {FORMAT_VERSION})",
                hint="use the kedge version that wrote it, or compile the model again",
            )
        try:
            return _decode(tree)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(f"manifest.json is malformed ({error!r})", hint="compile the model again") from error


def _encode(manifest: Manifest) -> Dict[str, Any]:
    def plain(value: Any) -> Any:
        if hasattr(value, "__dataclass_fields__"):
            fields = {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
            if isinstance(value, Variant) and value.device is None:
                del fields["device"]  # as in manifests from before there were any: their digests stay
            return fields
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        return value

    tree: Dict[str, Any] = plain(manifest)
    tree["format"] = FORMAT_VERSION
    return tree


def _decode(tree: Dict[str, Any]) -> Manifest:
    members = tuple(
        Member(
            _member_name(m["name"]), _digest(m["digest"]), _size(m["size"]),
            tuple(Blob(_digest(b["digest"]), _size(b["size"])) for b in m["parts"]),
        )
        for m in tree["members"]
    )  # fmt: skip
    for member in members:
        if sum(part.size for part in member.parts) != member.size:
            raise ValueError(f"the parts of {member.name} do not add up to its size")
    _check_distinct("member", members)
    functions = tuple(_decode_function(f) for f in tree["functions"])
    _check_distinct("function", functions)
    variants = tuple(_decode_variant(v, {member.name: member.size for member in members}) for v in tree["variants"])
    return Manifest(
        _text(tree["name"]), _size(tree["abi"]), _text(tree["compiler"]), functions, variants, members,
        dict(tree["info"]),
    )  # fmt: skip


def _decode_function(f: Dict[str, Any]) -> Function:
    def ports(items: List[Dict[str, Any]]) -> Tuple[Port, ...]:
        return tuple(Port(_text(p["name"]), _text(p["dtype"]), tuple(_dim(d) for d in p["shape"])) for p in items)

    symbols = tuple(
        Symbol(_text(s["name"]), _size(s["lower"]), None if s["upper"] is None else _size(s["upper"]))
        for s in f["symbols"]
    )
    function = Function(_text(f["name"]), ports(f["inputs"]), ports(f["outputs"]), symbols)
    _check_distinct(f"input of {function.name}", function.inputs)
    _check_distinct(f"output of {function.name}", function.outputs)
    return function


def _decode_variant(v: Dict[str, Any], members: Mapping[str, int]) -> Variant:
    """`members`: the size of each."""
    lib, weights, offset = _text(v["lib"]), v["weights"], _size(v["weights_offset"])
    for name in (lib,) if weights is None else (lib, _text(weights)):
        if name not in members:
            raise ValueError(f"{name!r} of a variant is no member")
    if weights is not None and offset > members[weights]:
        raise ValueError(f"the data of {weights} begins at byte {offset}, after its end")
    features = tuple(_text(feature) for feature in v["features"])
    device = None if v.get("device") is None else device_from_json(v["device"])
    return Variant(_text(v["target"]), _text(v["arch"]), _text(v["triple"]), features, lib, weights, offset, device)


def device_from_json(d: Mapping[str, Any]) -> VariantDevice:
    """The GPU that a variant needs, from its JSON form; raises ValueError, TypeError or KeyError."""
    features = tuple(_text(feature) for feature in d.get("features", ()))
    max_threads, shared_bytes = _size(d.get("max_threads", 0)), _size(d.get("shared_bytes", 0))
    return VariantDevice(_text(d["kind"]), _text(d.get("arch", "")), max_threads, shared_bytes, features)


def _check_distinct(what: str, named: Sequence[Union[Function, Member, Port]]) -> None:
    names = [one.name for one in named]
    if len(set(names)) < len(names):
        raise ValueError(f"there is more than one {what} of the same name")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a size")
    return value


def _dim(value: Any) -> ManifestDim:
    return value if isinstance(value, str) else _size(value)


def _digest(value: Any) -> str:
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError(f"{value!r} is not a SHA-256 digest")
    return value


def _member_name(value: Any) -> str:
    # Members become files on a board: a name must never leave its folder.
    if not isinstance(value, str) or not value or value.startswith(".") or set(value) & set("/\\\0"):
        raise ValueError(f"{value!r} is not a member name")
    return value
