"""What a device and its labels may be called: one rule, checked before anything is started or replaced."""

from __future__ import annotations

import re
from typing import Dict, Iterable

from kedge.rpc.errors import UsageError

#: What every device tells about itself (see `kedge.rpc.selector.labels_of`): a label of that name would match nothing.
RESERVED = ("name", "arch", "cpu", "cores", "mem_mb", "target", "emulated")
#: What a deployment sets on its agent, with a value of its own each time.
DEPLOYMENT = "deployment"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_KEY = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_VALUE = re.compile(r"[A-Za-z0-9_.:/+@-]{1,100}")


def check_name(name: str) -> str:
    """The name of a device as it is; raises UsageError where no device may be called so."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name[:120]!r} cannot be a device's name",
            hint="use letters, digits, dots, dashes and underscores, a letter or digit first, e.g. --name rpi4-1",
        )
    return name


def parse_labels(items: Iterable[str]) -> Dict[str, str]:
    """`["rack=a"]` as `{"rack": "a"}`; raises UsageError for what is no label, or one that nothing would match."""
    labels: Dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not _KEY.fullmatch(key) or not _VALUE.fullmatch(value):
            raise UsageError(
                f"--label {item[:240]!r} is not KEY=VALUE",
                hint="with letters, digits and _.- in the key, also :/+@ in the value, e.g. --label rack=a",
            )
        if key in RESERVED:
            raise UsageError(
                f"--label {item!r}: {key!r} is what every device tells about itself", hint="choose another key"
            )
        labels[key] = value
    return labels
