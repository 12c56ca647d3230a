"""The asynchronous products of a warpgroup: wgmma.

A product begins when all 128 threads have committed the group it is in, and its operands are read
then or later: when is up to the machine. Until a thread has waited for it, its accumulators hold
NaN, and may not be written.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from hopper_emulator.machine import WARPGROUP, Fault
from hopper_emulator.memory import SHARED_BASE, swizzled

POISON = np.float32(np.nan)
_LANES = np.arange(WARPGROUP)[:, None]


class Registers(NamedTuple):
    """Some elements of a local array."""

    array: list
    first: int
    count: int

    def read(self):
        """Return the values."""
        return self.array[self.first : self.first + self.count]

    def write(self, values):
        """Overwrite them."""
        self.array[self.first : self.first + self.count] = values


class Shape(NamedTuple):
    """What is the same for all threads of a warpgroup: ``D[64, n] = A B (+ D)``."""

    n: int
    kind: str
    a: int | None  # a descriptor, unless it is in registers
    b: int
    add: bool
    transposed: bool  # B lies with n contiguous


class Product(NamedTuple):
    """One wgmma, as one thread gives it."""

    shape: Shape
    sums: Registers
    before: Any  # what was in the accumulators, or None where a product is under way
    a: Registers | None
    a_values: list


class Group:
    """Products that have been committed together, of each thread."""

    def __init__(self):
        self.members = {}
        self.results = {}


def rows_and_columns(n):
    """Which element of ``D[64, n]`` each thread of a warpgroup has in each register."""
    i = np.arange(n // 2)
    rows = 16 * (_LANES // 32) + _LANES % 32 // 4 + 8 * (i % 4 // 2)
    return rows, np.broadcast_to(8 * (i // 4) + 2 * (_LANES % 4) + i % 2, rows.shape)


rows_and_columns = functools.cache(rows_and_columns)


@functools.cache
def places(descriptor, rows, transposed):
    """Where the 16-bit elements of a matrix of `rows` x 16 lie, as indices of shared memory."""
    if descriptor >> 62 != 1 or descriptor >> 49 & 7:
        raise Fault("only descriptors with a swizzle of 128 bytes and no base offset are emulated")
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    row, column = np.arange(rows)[:, None], np.arange(16)
    if transposed:
        offsets = row // 64 * leading + row % 64 * 2 + column // 8 * stride + column % 8 * 128
    else:
        offsets = row // 8 * stride + row % 8 * 128 + column * 2
    return (swizzled(start + offsets) - SHARED_BASE) // 2


def numbers(bits, kind):
    """Return what 16-bit elements stand for."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def rounded(a, b, before):
    """``A B^T`` (+ what was there before), rounded once."""
    product = a @ b.T
    if before is not None:
        product += before
    return product.astype(np.float32)


def cut_off(a, b, before):
    """The same as Hopper does it, or worse: addends and sums are cut off, not rounded.

    All addends are aligned with the largest and keep 26 binary digits of it (Fasi, Higham, Mikaitis
    and Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ 2021, found two to three more
    than the 24 of float32 on the generations before).
    """
    addends = a[:, None] * b
    if before is not None:
        addends = np.concatenate([addends, before[..., None]], axis=-1, dtype=np.float64)
    finite = np.isfinite(addends).all(-1)
    largest = np.frexp(np.where(finite[..., None], np.abs(addends), 0).max(-1))[1]
    unit = np.ldexp(1.0, np.maximum(largest - 26, -1000))
    total = (np.trunc(addends / unit[..., None]) * unit[..., None]).sum(-1)
    unit = np.ldexp(1.0, np.maximum(np.frexp(total)[1] - 24, -149))
    total = np.where(np.isfinite(total), np.trunc(total / unit) * unit, total)
    return np.where(finite, total, addends.sum(-1)).astype(np.float32)


class Warpgroup:
    """The matrix unit as one warpgroup sees it."""

    add_up = staticmethod(rounded)

    def __init__(self, machine, shared, number):
        self._machine, self._shared = machine, shared
        self._unit = machine.unit()
        self._number = number
        self._groups = []
        self._done = 0
        self._sums = {}
        self._waiting = []

    def multiply(self, shape, sums, a):
        """Take a thread's part of a product; its group is not committed yet."""
        thread = self._machine.current
        if not thread.fenced:
            raise Fault("wgmma without wgmma.fence before it")
        key, before = id(sums.array), None
        if key not in thread.in_flight:
            before = sums.read()
            sums.write([POISON] * sums.count)
        thread.in_flight[key] = thread.committed
        thread.products.append(Product(shape, sums, before, a, a.read() if a else []))

    def commit(self):
        """End a thread's part of a group."""
        thread = self._machine.current
        if thread.committed == len(self._groups):
            self._groups.append(Group())
        group = self._groups[thread.committed]
        group.members[thread.index % WARPGROUP] = thread.products
        thread.products, thread.fenced = [], False
        thread.committed += 1
        if len(group.members) == WARPGROUP:
            self._unit.work.append(functools.partial(self._work, group))
        self._machine.give_way()

    def wait(self, pending):
        """Wait for all groups of a thread but the last few."""
        thread = self._machine.current
        target = max(thread.committed - pending, thread.delivered)
        while self._done < target:
            self._machine.sleep(self._waiting, f"products of warpgroup {self._number}")
        for index in range(thread.delivered, target):
            self._deliver(thread, index)
        thread.delivered = target

    def _work(self, group):
        for steps in zip(*(group.members[i] for i in range(WARPGROUP)), strict=True):
            shape = steps[0].shape
            if any(step.shape != shape for step in steps):
                raise Fault("the threads of a warpgroup do not agree about a product")
            rows, columns = rows_and_columns(shape.n)
            key = id(steps[0].sums.array), steps[0].sums.first
            if steps[0].before is not None:
                self._sums[key] = sums = np.empty((64, shape.n), np.float32)
                sums[rows, columns] = [step.before for step in steps]
            b = self._read(shape.b, shape.n, shape.transposed, shape.kind)
            before = self._sums[key] if shape.add else None
            self._sums[key] = self.add_up(self._left(shape, steps), b, before)
            group.results[key] = self._sums[key]
        group.results = {
            key: sums[rows_and_columns(sums.shape[1])] for key, sums in group.results.items()
        }
        self._done += 1
        self._machine.wake(self._waiting)

    def _left(self, shape, steps):
        if shape.a is not None:
            return self._read(shape.a, 64, False, shape.kind)
        words = np.array([step.a.read() for step in steps], np.int64).astype(np.uint32)
        values = numbers(words.view(np.uint16).reshape(WARPGROUP, 4, 2), shape.kind)
        left = np.empty((64, 16))
        # Four registers of two columns each: rows 0 and 8 on, columns 0 and 8 on.
        rows, columns = rows_and_columns(16)
        left[rows, columns] = values.reshape(WARPGROUP, 8)
        return left

    def _read(self, descriptor, rows, transposed, kind):
        where = places(descriptor, rows, transposed)
        if where.min() < 0 or where.max() >= self._shared.halves.size:
            raise Fault("an operand of wgmma lies beyond shared memory")
        if self._shared.unfenced[2 * where].any():
            raise Fault("wgmma reads what threads have written, without a fence for the proxy")
        return numbers(self._shared.halves[where], kind)

    def _deliver(self, thread, index):
        group, lane = self._groups[index], thread.index % WARPGROUP
        lead = group.members[0]
        for step, (product, first) in enumerate(zip(group.members[lane], lead, strict=True)):
            if product.a is not None and product.a.read() != product.a_values:
                raise Fault("an operand in registers changed while its product was under way")
            array = id(product.sums.array)
            if thread.in_flight.get(array) != index or any(
                later.sums.array is product.sums.array for later in group.members[lane][step + 1 :]
            ):
                continue
            if any(value is not POISON for value in product.sums.read()):
                raise Fault("an accumulator was written while its product was under way")
            result = group.results[id(first.sums.array), first.sums.first]
            product.sums.write(list(result[lane]))
            del thread.in_flight[array]
