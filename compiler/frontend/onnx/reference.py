"""The oracle: ONNX's own reference evaluator, which shares no code with kedge.

Of the operators that users registered it knows nothing; for those it asks the interpreter of their definition.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx.reference import ReferenceEvaluator

from kedge.compiler.errors import FrontendError
from kedge.compiler.frontend.onnx.custom import evaluators

Array = np.ndarray[Any, Any]


def reference_outputs(model: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs by name that the reference evaluator of the `onnx` package computes for a model.

    Raises:
        FrontendError: the evaluator lacks an operator, or refuses the inputs.
    """
    try:
        evaluator = ReferenceEvaluator(str(model), new_ops=evaluators())
        values = evaluator.run(None, dict(inputs))
    except Exception as error:
        raise FrontendError(
            f"the ONNX reference evaluator cannot run {model}: {error}", hint="kedge validate needs a model that it can"
        ) from error
    return dict(zip(evaluator.output_names, values, strict=True))
