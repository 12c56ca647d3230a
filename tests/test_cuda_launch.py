"""What a prepared launch of a Hopper kernel is given; the driver is a stand-in."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from fusedattn import make_block_mask, make_problem
from fusedattn.cuda import compiler, driver, exact, hopper, hopper_exact, tensor_cores


def shifted(score, batch, head, q_idx, k_idx, table):
    return score + table[k_idx]


CASES = {
    "plain": {},
    "lse": {"return_lse": True},
    "operands": {"mask": np.ones((40, 40), bool), "sinks": np.ones(2, np.float32)},
    "aux": {"score_mod": shifted, "score_mod_aux": (np.ones(40, np.float32),)},
    "blocks": {"block_mask": make_block_mask(lambda b, h, q, k: q >= k, None, None, 40, 40)},
}


class Launches:
    """A GPU that notes the words of each launch, and the thread."""

    multiprocessors = 4

    def __init__(self, monkeypatch):
        self.found = []
        uploads = iter(range(4096, 2**20, 4096))
        tools = SimpleNamespace(array_words=lambda address, length, size: (address, length))
        monkeypatch.setattr(compiler, "toolchain", lambda: tools)
        monkeypatch.setattr(tensor_cores, "encode", lambda *_: bytes(128))
        monkeypatch.setattr(driver, "upload", lambda *_: SimpleNamespace(address=next(uploads)))

    def function(self, *arguments):
        return SimpleNamespace(launch=self.launch)

    def launch(self, grid, block, stream, words):
        self.found.append(bytes(words._buffer))


def expected(prepared, addresses):
    """All words of a launch, made from nothing."""
    order, items = prepared._order.address, addresses.get("items", prepared._items.address)
    if isinstance(prepared, exact.Prepared):
        values = prepared._launch.arguments(addresses, items, order)
        return bytes(driver.Words(hopper_exact.FORMATS, values)._buffer)
    maps = prepared._maps[addresses["q"], addresses["k"], addresses["v"]].address
    values = prepared._launch.arguments(maps, addresses, (items, order, prepared._places.address))
    others = ()
    if prepared._functions is not None:
        known = prepared._functions.addresses(addresses)
        for name, _, length, _, bare in prepared._functions.arguments:
            others += (known[name],) if bare else (known[name], length)
    return bytes(driver.Words(hopper.FORMATS + "q" * len(others), (*values, *others))._buffer)


def given(name, first, *others):
    """Addresses of a call."""
    operands = {"operands": ("mask", "sinks"), "aux": ("score_mod_aux_0",), "lse": ("lse",)}
    names = ("q", "k", "v", "out", *operands.get(name, ()), *others)
    return {name: first + 64 * i for i, name in enumerate(names)}


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(np.float32, "plain"), (np.float32, "lse"), *((np.float16, name) for name in CASES)],
)
def test_a_launch_is_given_its_own_addresses_whatever_came_before(monkeypatch, dtype, name):
    launches = Launches(monkeypatch)
    q = np.zeros((1, 2, 40, 64), dtype)
    problem = make_problem(q, q, q, out=np.empty_like(q), **CASES[name])
    prepared = (tensor_cores if dtype == np.float16 else exact).Prepared(problem, launches)
    calls = [given(name, 1 << 20, "items"), given(name, 1 << 40), given(name, 3 << 20)]
    for addresses in (*calls, calls[0]):
        prepared.run(addresses, 7)
        assert launches.found[-1] == expected(prepared, addresses)
    assert len(set(launches.found)) == len(calls)


def test_threads_do_not_share_what_a_launch_is_given(monkeypatch):
    launches = Launches(monkeypatch)
    q = np.zeros((1, 2, 40, 64), np.float16)
    prepared = tensor_cores.Prepared(make_problem(q, q, q, out=np.empty_like(q)), launches)
    words = []
    launches.launch = lambda grid, block, stream, given: words.append(given)
    prepared._function = SimpleNamespace(launch=launches.launch)
    for _ in range(2):
        thread = threading.Thread(target=prepared.run, args=(given("plain", 16), 0))
        thread.start()
        thread.join()
    assert words[0] is not words[1]
