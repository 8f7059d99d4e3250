"""The compiler's refusals: one class per reason, each saying what was wrong, where, and what to do about it."""

from __future__ import annotations

from kedge.rpc.errors import KedgeError


class CompileError(KedgeError):
    """Base of everything the compiler refuses."""


class FrontendError(CompileError):
    """A model could not be imported: a corrupt file, a malformed node, a value outside the operator's domain."""


class UnsupportedOperatorError(FrontendError):
    """A model uses operators that kedge does not know; names every one of them with its node."""


class ShapeError(CompileError):
    """Shapes, dtypes or attributes of an operator do not fit together."""


class ParseError(CompileError):
    """The text of a module or a function is malformed; says where."""


class VerifyError(CompileError):
    """An IR invariant does not hold; carries the printed IR."""


class ScheduleError(CompileError):
    """A schedule primitive was refused; carries the primitive, the argument, the reason and the printed nest."""


class TargetError(CompileError):
    """A target string that names nothing kedge knows, or that contradicts itself."""


class CodegenError(CompileError):
    """Valid IR that this back end cannot turn into machine code."""


class ToolchainError(CompileError):
    """The linker or the C compiler is missing or refused its input."""


class CacheError(CompileError):
    """A setting of the cache that is none, or files in it that cannot be read or removed."""


class WorkerError(CompileError):
    """A process that compiled kernels could not be started, or ended before its work was done."""


class CompileWarning(UserWarning):
    """Something that the compiler did, or left, and that its user should know of; nothing is wrong with the result."""
