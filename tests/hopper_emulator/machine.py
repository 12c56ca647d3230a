"""One block of threads: each is a Python thread, and one of them runs at a time.

Who runs next is drawn from a seed. Warps and the units that work beside them (TMA, the matrix
units) have priorities that change now and then, and the first that can go on does: a warp may so
run far ahead of the others, and a load or a product be done at once or as late as it can be
(probabilistic concurrency testing, Burckhardt et al., ASPLOS 2010). When nobody can go on, that is
a deadlock, and says so.
"""

import _thread
import random
import threading
from collections import Counter, deque

import numpy as np

WARP = 32
WARPGROUP = 128
# Registers that the threads of a block share.
REGISTERS = 65536
# What the assembler gives a thread at most where setmaxnreg is used.
MOST_REGISTERS = 240
# How often, when the next to run is chosen, somebody's priority changes first.
_CHANGE = 1 / 40
# 384 stacks of the default size may be more than a process may have.
_STACK_BYTES = 2**20


class Fault(Exception):
    """What no correct kernel does."""


class _Stopped(BaseException):
    """Ends a thread after another one failed."""


class Thread:
    """One thread of a block: its number, and what it has under way."""

    def __init__(self, index):
        self.index = index
        self.warp, self.lane = divmod(index, WARP)
        self.gate = threading.Lock()
        self.gate.acquire()
        self.waits_for = ""
        self.ended = False
        self.registers = 0
        self.products = []  # of wgmma, not committed yet
        self.fenced = False  # by wgmma.fence
        self.in_flight = {}  # accumulators: by id, the group that writes them last
        self.committed = self.delivered = 0  # groups of products
        self.unfenced = []  # what was written to shared memory, and no proxy told


class Agent:
    """A warp with the threads that can go on, or a unit with the work it has been given."""

    def __init__(self, *, unit):
        self.unit = unit
        self.work = deque()


class Meeting:
    """Where threads wait for each other and leave values."""

    def __init__(self):
        self.values = {}
        self.waiting = []


class Machine:
    """A block of threads that runs a kernel."""

    def __init__(self, threads, block, grid, seed):
        self.threads = [Thread(index) for index in range(threads)]
        self.block, self.grid = block, grid
        self.current = None
        self.warps = [Agent(unit=False) for _ in range(-(-threads // WARP))]
        self._agents = list(self.warps)
        self._random = random.Random(seed)
        self._alive = self._running = threads
        self._counting, self._over = threading.Lock(), threading.Lock()
        self._over.acquire()
        self._failure = None
        self._meetings = {}
        # setmaxnreg: what each thread begins with, in eights, and what is left of the rest.
        share = min(REGISTERS // threads // 8 * 8, MOST_REGISTERS)
        self.free_registers = 0
        self.registers_waiting = []
        for thread in self.threads:
            thread.registers = share

    def unit(self):
        """Add a unit that works beside the threads."""
        agent = Agent(unit=True)
        self._agents.append(agent)
        return agent

    # How threads take turns.

    def run(self, kernel, arguments):
        """Run the kernel to its end; raise what went wrong in it."""
        self._random.shuffle(self._agents)
        before = threading.stack_size(_STACK_BYTES)
        try:
            for thread in self.threads:
                # threading.Thread would wait for each to have begun.
                _thread.start_new_thread(self._live, (thread, kernel, arguments))
                self.warps[thread.warp].work.append(thread)
        finally:
            threading.stack_size(before)
        self._choose().gate.release()
        self._over.acquire()
        if self._failure is not None:
            raise self._failure
        if any(agent.work for agent in self._agents):
            raise Fault("the kernel ended with loads or products under way")

    def _live(self, thread, kernel, arguments):
        thread.gate.acquire()
        try:
            if self._failure is None:
                with np.errstate(all="ignore"):
                    kernel(*arguments)
                if thread.products or thread.in_flight:
                    raise Fault("a thread ended with products under way")
                thread.ended = True
                self._alive -= 1
                if self._alive:
                    self._choose().gate.release()
        except _Stopped:
            pass
        except BaseException as error:
            thread.ended = True
            error.add_note(f"in block {self.block}, thread {thread.index}")
            self._failure = error
            for other in self.threads:
                if not other.ended:
                    other.gate.release()
        finally:
            thread.ended = True
            with self._counting:
                self._running -= 1
                if not self._running:
                    self._over.release()

    def _choose(self):
        """Let units work that come first, and return the thread that runs next."""
        draw = self._random.random
        while True:
            if draw() < _CHANGE:
                agent = self._agents.pop(int(draw() * len(self._agents)))
                self._agents.insert(int(draw() * (len(self._agents) + 1)), agent)
            for agent in self._agents:
                if agent.work:
                    if not agent.unit:
                        self.current = agent.work.popleft()
                        return self.current
                    agent.work.popleft()()
                    break
            else:
                raise Fault(f"deadlock: {self._who_waits()}")

    def _who_waits(self):
        waiting = (thread for thread in self.threads if not thread.ended)
        counts = Counter((thread.warp // 4, thread.waits_for) for thread in waiting)
        return "; ".join(
            f"{count} threads of warpgroup {group} wait for {what}"
            for (group, what), count in sorted(counts.items())
        )

    def _switch(self, me):
        other = self._choose()
        if other is not me:
            other.gate.release()
            me.gate.acquire()
            if self._failure is not None:
                raise _Stopped

    def give_way(self):
        """Let somebody else run, if the order of things says so."""
        me = self.current
        self.warps[me.warp].work.appendleft(me)
        self._switch(me)

    def sleep(self, waiting, what):
        """Wait until somebody wakes those in the list."""
        me = self.current
        waiting.append(me)
        me.waits_for = what
        self._switch(me)

    def wake(self, waiting):
        """Let threads go on."""
        for thread in waiting:
            self.warps[thread.warp].work.append(thread)
        waiting.clear()

    def meet(self, key, count, value=None, waits=True):
        """Wait until `count` threads are here; return what each left, by its number.

        One that does not wait counts as the others do.
        """
        meeting = self._meetings.setdefault(key, Meeting())
        me = self.current
        if me.index in meeting.values:
            raise Fault(f"thread {me.index} is at {key} twice")
        meeting.values[me.index] = value
        if len(meeting.values) == count:
            del self._meetings[key]
            self.wake(meeting.waiting)
        if waits and len(meeting.values) < count:
            self.sleep(meeting.waiting, f"others at {key}")
        else:
            self.give_way()
        return meeting.values

    def set_registers(self, count):
        """Give registers back to the block, or wait until there are as many more."""
        me = self.current
        more = count - me.registers
        while more > self.free_registers:
            self.sleep(self.registers_waiting, "registers")
        self.free_registers -= more
        me.registers = count
        self.wake(self.registers_waiting)
