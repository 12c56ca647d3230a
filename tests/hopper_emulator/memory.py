"""Shared and global memory, barriers in shared memory, and TMA, which loads from one to the other.

Shared memory begins as NaN in every type. Global memory is what has been registered, and nothing
else: an access beside it is a fault.
"""

import math

import numpy as np

from hopper_emulator.machine import Fault

# Where shared memory begins: 16 bytes behind a multiple of 1 KiB, which is the worst there can be.
SHARED_BASE = 1040
SWIZZLED_ROW = 128


def swizzled(addresses):
    """Where the swizzle of 128 bytes puts bytes of shared memory, in chunks of 16."""
    return addresses ^ ((addresses >> 7 & 7) << 4)


class Global:
    """Arrays that a kernel may touch, and maps of them for TMA, by their addresses."""

    def __init__(self):
        self._spans = []
        self.maps = {}

    def add(self, name, array):
        """Register a contiguous array; return its address."""
        assert array.flags.c_contiguous
        flat = array.reshape(-1).view(np.uint8)
        address = array.__array_interface__["data"][0]
        self._spans.append((address, address + flat.size, name, flat))
        return address

    def bytes_at(self, address, size):
        """View some bytes, all of one array."""
        for low, high, _, flat in self._spans:
            if low <= address and address + size <= high:
                if address % size:
                    raise Fault(f"{size} bytes at address {address:#x} are not aligned")
                return flat[address - low : address - low + size]
        near = [
            f"{address - low} bytes into {name} of {high - low}"
            for low, high, name, _ in self._spans
            if low - 4096 <= address < high + 4096
        ]
        raise Fault(
            f"{size} bytes at {address:#x} lie in no array ({', '.join(near) or 'far off'})"
        )

    def add_map(self, at, address, sizes, strides, box):
        """Register a map of 16-bit elements, axes from the innermost, strides in bytes."""
        last = address + sum((n - 1) * s for n, s in zip(sizes, (2, *strides), strict=True))
        for low, high, _, flat in self._spans:
            if low <= address and last + 2 <= high:
                elements = flat[address - low :][: (high - address) // 2 * 2].view(np.uint16)
                self.maps[at] = (
                    np.lib.stride_tricks.as_strided(
                        elements, sizes[::-1], (2, *strides)[::-1], writeable=False
                    ),
                    box[::-1],
                )
                return
        raise Fault("a map of TMA reaches beyond its array")

    def map_at(self, at):
        """Return an array and the shape of a box, axes from the outermost."""
        if at not in self.maps:
            raise Fault(f"there is no map at {at:#x}")
        return self.maps[at]


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes are there."""

    def __init__(self, count):
        self.count = self.pending = count
        self.bytes = 0
        self.phase = 0
        self.waiting = []
        self.told = False  # to TMA, by a fence


class Shared:
    """Shared memory of a block, its barriers and its TMA."""

    def __init__(self, machine, size, storage):
        self.data = np.full(size, 0xFF, np.uint8)
        self.halves = self.data[: size // 2 * 2].view(np.uint16)
        self.unfenced = np.zeros(size, bool)
        self._machine, self._global = machine, storage
        self._barriers = {}
        self._tma = machine.unit()

    def place(self, address, size):
        """Return the index of some bytes."""
        index = address - SHARED_BASE
        if index < 0 or index + size > self.data.size:
            raise Fault(f"{size} bytes at {index} of shared memory of {self.data.size}")
        if address % min(size, 16):
            raise Fault(f"{size} bytes at {address:#x} of shared memory are not aligned")
        return index

    def store(self, address, bits):
        """Write as a thread does: TMA and the matrix unit have to be told by a fence."""
        at = self.place(address, bits.size)
        self._keep_off_barriers(address, bits.size)
        self.data[at : at + bits.size] = bits
        self.unfenced[at : at + bits.size] = True
        self._machine.current.unfenced.append((at, bits.size))

    def load(self, address, size):
        """Read as a thread does."""
        at = self.place(address, size)
        return self.data[at : at + size]

    def fence(self):
        """Tell TMA and the matrix unit what this thread has written, barriers as well."""
        thread = self._machine.current
        for at, size in thread.unfenced:
            self.unfenced[at : at + size] = False
        thread.unfenced.clear()
        for barrier in self._barriers.values():
            barrier.told = True

    def _keep_off_barriers(self, address, size):
        for at in self._barriers:
            if address < at + 8 and at < address + size:
                raise Fault(f"a write to {address:#x} hits the barrier at {at:#x}")

    def _barrier(self, address):
        if address not in self._barriers:
            raise Fault(f"there is no barrier at {address:#x}")
        return self._barriers[address]

    def init(self, address, count):
        """Make a barrier."""
        self.place(address, 8)
        self._barriers[address] = Barrier(count)

    def arrive(self, address, expected=0):
        """Arrive once, and let a barrier wait for some more bytes."""
        barrier = self._barrier(address)
        if not barrier.pending:
            raise Fault(f"more than {barrier.count} arrive at the barrier at {address:#x}")
        barrier.pending -= 1
        self._count(barrier, expected)
        self._machine.give_way()

    def _count(self, barrier, change):
        barrier.bytes += change
        if not barrier.pending and not barrier.bytes:
            barrier.pending = barrier.count
            barrier.phase ^= 1
            self._machine.wake(barrier.waiting)

    def wait(self, address, parity):
        """Wait until the phase of this parity is over."""
        barrier = self._barrier(address)
        while barrier.phase == parity:
            offset = address - SHARED_BASE
            self._machine.sleep(barrier.waiting, f"parity {parity} of the barrier at {offset}")
        return True

    def load_box(self, address, map_address, coordinates, barrier_address):
        """Begin to load a box; beyond its array there are zeros."""
        array, shape = self._global.map_at(map_address)
        barrier = self._barrier(barrier_address)
        if not barrier.told:
            raise Fault("TMA is given a barrier that no fence has told it of")
        if shape[-1] * 2 != SWIZZLED_ROW or address % SWIZZLED_ROW:
            raise Fault("only rows of 128 bytes, at multiples of 128 bytes, are emulated")
        at = self.place(address, 2 * math.prod(shape))
        self._keep_off_barriers(address, 2 * math.prod(shape))
        low = coordinates[::-1]
        if len(low) != array.ndim:
            raise Fault(f"{len(low)} coordinates for a map of {array.ndim} axes")

        def work():
            box = np.zeros(shape, np.uint16)
            from_, to = [], []
            for first, n, length in zip(low, shape, array.shape, strict=True):
                begin, end = max(first, 0), max(min(first + n, length), 0)
                from_.append(slice(begin, max(begin, end)))
                to.append(slice(begin - first, max(begin, end) - first))
            if all(part.stop > part.start for part in from_):
                box[tuple(to)] = array[tuple(from_)]
            chunks = box.reshape(-1, 8)
            places = address + 16 * np.arange(len(chunks))
            target = self.data[at : at + box.nbytes].view(np.uint16).reshape(-1, 8)
            target[(swizzled(places) - address) // 16] = chunks
            self._count(barrier, -box.nbytes)

        self._tma.work.append(work)
        self._machine.give_way()
