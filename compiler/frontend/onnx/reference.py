"""The oracle: ONNX's own reference evaluator, which shares no code with kedge.

Of the operators that users registered it knows nothing; for those it asks the interpreter of their definition.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from kedge.compiler.errors import FrontendError
from kedge.compiler.frontend.onnx.custom import attributes_of
from kedge.compiler.ops import custom
from kedge.compiler.ops.custom import OnnxOperator

Array = np.ndarray[Any, Any]


def reference_outputs(model: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs by name that the reference evaluator of the `onnx` package computes for a model.

    Raises:
        FrontendError: the evaluator lacks an operator, or refuses the inputs.
    """
    try:
        evaluator = ReferenceEvaluator(str(model), new_ops=_evaluators())
        values = evaluator.run(None, dict(inputs))
    except Exception as error:
        raise FrontendError(
            f"the ONNX reference evaluator cannot run {model}: {error}", hint="kedge validate needs a model that it can"
        ) from error
    return dict(zip(evaluator.output_names, values, strict=True))


def _evaluators() -> list[type[OpRun]]:
    """What ONNX's reference evaluator runs for the registered operators: the interpreter of their definition."""
    return [_evaluator(operator) for operator in custom.registered()]


def _evaluator(operator: OnnxOperator) -> type[OpRun]:
    def _run(self: OpRun, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
        given = [None if array is None else np.asarray(array) for array in inputs]
        while given and given[-1] is None:
            given.pop()
        results = operator.reference(given, attributes_of(self.onnx_node))
        return results[: len(self.onnx_node.output)]

    return type(operator.op_type, (OpRun,), {"op_domain": operator.domain, "_run": _run})
