"""Every level of x86-64 executes the digits network here; the other architectures do so in tests/boards."""

from __future__ import annotations

import platform

import numpy as np
import pytest

import kedge
from kedge.compiler.frontend.onnx.reference import reference_outputs
from kedge.compiler.target import parse
from kedge.data import digits_model, digits_test
from kedge.rpc.errors import IncompatibleTargetError


@pytest.mark.skipif(platform.machine() != "x86_64", reason="executes x86-64 code")
@pytest.mark.parametrize("target", ["x86-64", "x86-64-v3", "x86-64-v4", "native"])
def test_the_digits_network_on_every_x86_level(target: str) -> None:
    images, labels = digits_test()
    expected = reference_outputs(digits_model(), {"image": images})["probabilities"]
    artifact = kedge.compile(digits_model(), target=target)
    with kedge.local(threads=2) as device:
        lacking = sorted(set(parse(target).required_features) - set(parse("native").required_features))
        if lacking:
            with pytest.raises(IncompatibleTargetError, match=lacking[0]):
                device.load(artifact)
            pytest.skip(f"this machine lacks {', '.join(lacking)}; refused as it should be")
        module = device.load(artifact)
        probabilities = module.run({"image": images})["probabilities"]
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-6)
    assert (probabilities.argmax(1) == labels).mean() > 0.95
