"""Addresses that stand for device memory, against a list of who has which."""

from __future__ import annotations

import ctypes
import random
from typing import Any

import pytest

from support import native


class Table(ctypes.Structure):
    """kedge_addresses; larger than any pthread_mutex_t needs."""

    _fields_ = [("room", ctypes.c_uint64 * 32)]


@pytest.fixture(scope="module")
def lib() -> Any:
    flags = ("-shared", "-fPIC", "-DKEDGE_EXPOSE_INTERNALS")
    loaded = ctypes.CDLL(str(native.compile_c(native.library_sources(), *flags)))
    pointer = ctypes.c_void_p
    loaded.kedge_new_address.restype = loaded.kedge_free_address.restype = loaded.kedge_any_address.restype = pointer
    loaded.kedge_new_address.argtypes = [pointer, ctypes.c_size_t, pointer]
    loaded.kedge_free_address.argtypes = [pointer, pointer]
    loaded.kedge_any_address.argtypes = [pointer]
    loaded.kedge_find_address.restype = ctypes.c_bool
    loaded.kedge_find_address.argtypes = [pointer, pointer, ctypes.c_uint64, pointer, pointer]
    return loaded


def find(lib: Any, table: Table, address: int, size: int) -> tuple[int, int] | None:
    """The object and the offset in it, or None."""
    found, offset = ctypes.c_void_p(), ctypes.c_uint64()
    known = lib.kedge_find_address(ctypes.byref(table), address, size, ctypes.byref(found), ctypes.byref(offset))
    return (found.value or 0, offset.value) if known else None


def test_each_address_leads_to_its_object(lib: Any) -> None:
    rng = random.Random(7)
    table, held = Table(), dict[int, tuple[int, int]]()
    lib.kedge_addresses_init(ctypes.byref(table))
    for number in range(1, 400):
        if held and rng.random() < 0.4:
            address = rng.choice(list(held))
            _, thing = held.pop(address)
            assert lib.kedge_free_address(ctypes.byref(table), address) == thing
            assert find(lib, table, address, 0) is None
        else:
            size = rng.choice([1, 64, 4095, 4096, 4097, 100_000, 1 << 33])
            address = lib.kedge_new_address(ctypes.byref(table), size, number)
            assert address % 4096 == 0
            assert all(
                address + size < other or other + other_size < address for other, (other_size, _) in held.items()
            )
            held[address] = (size, number)
        for address, (size, thing) in held.items():
            at = rng.randrange(size)
            assert find(lib, table, address + at, size - at) == (thing, at)
            assert find(lib, table, address + at, size - at + 1) is None
            assert find(lib, table, address + size, 0) == (thing, size)
            beyond = find(lib, table, address + size + 1, 0)
            assert beyond is None or beyond[0] != thing  # another may begin there
    while address := lib.kedge_any_address(ctypes.byref(table)):
        assert lib.kedge_free_address(ctypes.byref(table), address) == held.pop(address)[1]
    assert not held
    lib.kedge_addresses_destroy(ctypes.byref(table))


def test_only_the_first_address_is_taken_back(lib: Any) -> None:
    table = Table()
    lib.kedge_addresses_init(ctypes.byref(table))
    assert find(lib, table, 4096, 0) is None
    address = lib.kedge_new_address(ctypes.byref(table), 100, 5)
    for wrong in (address + 1, address - 4096, address + 100, 0):
        assert lib.kedge_free_address(ctypes.byref(table), wrong) is None
    assert find(lib, table, address, 100) == (5, 0)
    assert lib.kedge_free_address(ctypes.byref(table), address) == 5
    lib.kedge_addresses_destroy(ctypes.byref(table))
