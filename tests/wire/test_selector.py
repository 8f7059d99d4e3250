from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.rpc.selector import Selector, SelectorError, Term, labels_of, parse
from kedge.rpc.types import Accelerator, DeviceInfo

PI = {"name": "pi", "arch": "aarch64", "soc": "bcm2711", "mem_mb": "4096", "emulated": "false", "key": "rpi4"}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("", True),
        ("  ", True),
        ("arch=aarch64", True),
        ("arch = aarch64 , soc in ( bcm2711 , bcm2712 ), mem_mb>=2048, emulated!=true", True),
        ("arch=x86_64", False),
        ("arch=aarch64,soc=other", False),
        ("soc not in (bcm2711)", False),
        ("soc not in (a, b)", True),
        ("rack!=a", True),
        ("rack=a", False),
        ("rack not in (a)", True),
        ("rack in (a)", False),
        ("mem_mb>4096", False),
        ("mem_mb<=4096,mem_mb<4097", True),
        ("rack>=1", False),
        ("soc>1", False),
        ("key=rpi4", True),
        ("pi", True),
        ("pi,arch=aarch64", True),
        ("other", False),
        ('key="rpi4"', True),
        ("in=1", False),
    ],
)
def test_what_matches(text: str, matches: bool) -> None:
    assert parse(text).matches(PI) is matches


@pytest.mark.parametrize(
    ("text", "column", "why"),
    [
        ("arch=", 6, "expected a value after '='"),
        ("a,,b", 3, "expected a label or a device name"),
        ("a=b c=d", 5, "expected ','"),
        ("a b", 3, "expected an operator after 'a'"),
        ("soc in a", 8, "expected '('"),
        ("soc in (a", 10, "expected ')'"),
        ("soc in ()", 9, "expected a value"),
        ("soc not (a)", 9, "expected 'in'"),
        ("mem_mb>=lots", 9, "'lots' is not a number"),
        ("a=b,", 5, "expected a label or a device name"),
        ("a=%", 3, "unexpected character"),
        ("a(b", 2, "expected an operator after 'a'"),
    ],
)
def test_errors_point_at_the_place(text: str, column: int, why: str) -> None:
    with pytest.raises(SelectorError) as caught:
        parse(text)
    first, shown, pointer = caught.value.message.splitlines()
    assert first == f"selector, column {column}: {why}"
    assert shown[4:] == text and pointer == " " * (4 + column - 1) + "^"
    assert caught.value.hint


def test_a_mistake_in_a_long_selector_is_shown_with_what_is_around_it() -> None:
    with pytest.raises(SelectorError) as caught:
        parse("name in (" + "board-1," * 1_000 + "%" + ",board-2" * 100 + ")")
    first, shown, pointer = caught.value.message.splitlines()
    assert first.startswith("selector, column 8010: ") and len(shown) < 140
    assert shown.strip().startswith("…") and shown.endswith("…") and shown[len(pointer) - 1] == "%"


def test_a_selector_has_many_values_and_few_conditions() -> None:
    boards = [f"board-{i:03}" for i in range(1_000)]
    selector = parse(f"name in ({','.join(boards)})")
    assert selector.matches({"name": "board-999"}) and not selector.matches({"name": "board-1000"})
    assert len(parse(",".join(["a!=b"] * 250)).terms) == 250
    with pytest.raises(SelectorError, match="column 1251: more than 250 conditions"):
        parse(",".join(["a!=b"] * 251))


words = st.text("abcXYZ019_.:/+@-", min_size=1, max_size=8)
values = st.one_of(words, st.text("ab ,=()", max_size=6))
terms = st.one_of(
    st.builds(Term, words, st.sampled_from(["=", "!="]), st.tuples(values)),
    st.builds(Term, words, st.sampled_from(["<", "<=", ">", ">="]), st.tuples(st.integers(0, 99).map(str))),
    st.builds(Term, words, st.sampled_from(["in", "not in"]), st.lists(values, min_size=1, max_size=3).map(tuple)),
)


@given(st.lists(terms, max_size=4))
@settings(max_examples=200, deadline=None)
def test_what_is_printed_reads_back(found: list[Term]) -> None:
    selector = Selector(tuple(found))
    assert parse(str(selector)) == selector


@given(st.text(max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_selector_or_an_error(text: str) -> None:
    try:
        parse(text)
    except SelectorError as error:
        assert text in error.message or "\n" in text


def test_facts_win_over_labels() -> None:
    info = DeviceInfo("pi", "aarch64", {"arch": "lie", "rack": "a"}, memory_bytes=1 << 30, num_cores=4, emulated=True)
    labels = labels_of(info)
    assert (labels["arch"], labels["rack"], labels["mem_mb"], labels["cores"]) == ("aarch64", "a", "1024", "4")
    assert labels["emulated"] == "true" and labels["name"] == "pi"


def test_gpus_are_facts_and_targets() -> None:
    gpus = (
        Accelerator("opencl", 0, "Mali (T860) MP4", "1.2", "OpenCL C 1.2", (), 2 << 30, 16384, 512),
        Accelerator("cuda", 0, "NVIDIA H200", "580", "sm_90", memory_bytes=141 << 30),
        Accelerator("cuda", 1, "NVIDIA T4", "580", "sm_75", memory_bytes=16 << 30),
    )
    labels = labels_of(DeviceInfo("box", "x86_64", {"cuda": "9"}, accelerators=gpus))
    assert (labels["gpu"], labels["cuda"], labels["opencl"]) == ("cuda", "2", "1")
    assert (labels["cuda.1.name"], labels["cuda.0.mem_mb"], labels["cuda.0.arch"]) == ("NVIDIA-T4", "144384", "sm_90")
    assert labels["opencl.0.name"] == "Mali-T860-MP4"
    assert DeviceInfo("box", "x86_64", target="llvm -mcpu=znver4", accelerators=gpus).targets == (
        'cuda -arch=sm_90 -host="llvm -mcpu=znver4"',
        'cuda -arch=sm_75 -host="llvm -mcpu=znver4"',
        'opencl -max-threads=256 -shared=16384 -host="llvm -mcpu=znver4"',
        "llvm -mcpu=znver4",
    )
    for text in ("gpu=cuda,cuda>=2", "cuda.0.arch=sm_90", "cuda.1.mem_mb>=16000", "opencl.0.arch=OpenCL-C-1.2"):
        assert parse(text).matches(labels), text
    assert not parse("gpu=cuda").matches(labels_of(DeviceInfo("plain", "x86_64")))
