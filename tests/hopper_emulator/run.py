"""Launches the Hopper kernel on a problem, in the emulator."""

import functools
import threading
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from fusedattn.cuda import hopper, hopper_operands, tensor_cores, user
from fusedattn.cuda.params import compact
from fusedattn.cuda.portable import flat_of
from fusedattn.cuda.unroll import unroll
from fusedattn.merge import merge
from fusedattn.problem import Result, make_problem
from hopper_emulator.instructions import signed
from hopper_emulator.machine import WARPGROUP, Fault, Machine
from hopper_emulator.matrix import POISON, Warpgroup
from hopper_emulator.memory import SHARED_BASE, Global, Shared
from hopper_emulator.programs import compiled

# As many multiprocessors share out the tiles of a problem.
MULTIPROCESSORS = 2


class _Cuda:
    """What a kernel finds under ``cuda``."""

    def __init__(self, tools):
        self._tools = tools
        self.local = SimpleNamespace(array=lambda length, kind: [POISON] * length)

    threadIdx = property(lambda self: SimpleNamespace(x=self._tools.machine.current.index))
    blockIdx = property(lambda self: SimpleNamespace(x=self._tools.machine.block))
    gridDim = property(lambda self: SimpleNamespace(x=self._tools.machine.grid))

    def syncthreads(self):
        """Wait for all threads of the block."""
        machine = self._tools.machine
        machine.meet("syncthreads", len(machine.threads))


class Emulator:
    """A toolchain (`fusedattn.cuda.toolchains.Toolchain`) whose kernels run in the emulator."""

    name = "hopper-emulator"
    interprets = True

    def __init__(self):
        self.cuda = _Cuda(self)
        self.types = SimpleNamespace(
            int32=lambda x: signed(int(x)),
            int64=lambda x: signed(int(x), 64),
            uint64=lambda x: int(x) % 2**64,
            float32=np.float32,
        )
        self._lock = threading.Lock()
        self.machine = self.shared = self.memory = self.warpgroups = None

    def device(self, function, **uses):
        """Return the function: threads call it as it is."""
        return function

    def conversions(self):
        """Return the one that kernels use."""
        return {"int_as_float": lambda word: np.int32(signed(word)).view(np.float32)}

    def table(self, kind, real):
        """Hand on a table of the host."""
        return lambda table, *words: table

    def asm(self, op):
        """Return what interprets inline PTX."""
        return compiled(op, self)

    def special(self, name):
        """Value of a register that can only be read."""
        if name == "reserved_smem_offset_end":
            return SHARED_BASE
        if name == "tid.x":
            return self.machine.current.index
        raise Fault(f"the emulator knows no register %{name}")

    def launch(self, kernel, grid, config, memory, arguments, seed):
        """Run the blocks of a grid, one after the other; other launches have to wait."""
        with self._lock:
            self.memory = memory
            for block in range(grid):
                self.machine = Machine(config.threads, block, grid, seed * grid + block)
                self.shared = Shared(self.machine, config.shared, memory)
                self.warpgroups = [
                    Warpgroup(self.machine, self.shared, number)
                    for number in range(config.threads // WARPGROUP)
                ]
                self.machine.run(kernel, arguments)


@functools.cache
def kernel_for(config):
    """Return a toolchain and the kernel it made."""
    tools = Emulator()
    return tools, made_for(tools, config)


def made_for(tools, config):
    """Return the kernel that a toolchain makes, as `compiler.build` does."""
    arity = len(hopper.parameters(config))
    return unroll(hopper.make(tools, config), tools.types.uint64, arity)


def small(config):
    """Return the same with tiles as small as they get: threads are dear here, keys are too."""
    split_keys = 64 if config.split_keys else 0
    return config._replace(warpgroups=min(config.warpgroups, 2), block_k=32, split_keys=split_keys)


def forward(problem, *, tile=small, made=kernel_for, schedule=None):
    """Compute a problem that the Hopper kernel takes."""
    held = {name: np.array(getattr(problem, name), order="C") for name in ("q", "k", "v")}
    others = {
        name: compact(array)
        for name in ("mask", "bias", "alibi_slopes", "sinks")
        if (array := getattr(problem, name)) is not None
    }
    out = np.empty(problem.out_shape, problem.out_dtype)
    problem = replace(problem, **held, **others, out=out)
    if problem.out.size == 0:
        return Result(problem.out, np.empty(problem.lse_shape, np.float32))
    if reasons := tensor_cores.unsupported(problem):
        raise NotImplementedError("; ".join(reasons))
    config = tile(tensor_cores.config_of(problem))
    launch = tensor_cores.launch_of(problem, config, MULTIPROCESSORS)
    if launch.splits > 1 and config.out_storage != "float32":
        return forward(
            problem,
            tile=lambda _: config._replace(out_storage="float32", vectors=False),
            made=made,
            schedule=schedule,
        )
    # Partial results lie one split after the other.
    splits = (launch.splits,) if launch.splits > 1 else ()
    out = np.empty((*splits, *problem.out_shape), "float32" if splits else problem.out_dtype)
    lse = np.empty((*splits, *problem.lse_shape), np.float32)
    for array in (out, lse):
        array.view(np.uint8).fill(0xFF)
    if schedule is None:  # another one for each call, and the same in each run
        schedule = zlib.crc32(held["q"].tobytes() + held["k"].tobytes())
    _launch(problem, held, out, lse, launch, made, schedule)
    if splits:
        out, lse = merge(*zip(out, lse, strict=True))
    return Result(out.astype(problem.out_dtype), lse if problem.return_lse else None)


def _launch(problem, held, out, lse, launch, made, schedule):
    """Run the kernel on arrays that are registered with the emulator, and nothing beside them."""
    memory = Global()
    # Maps lie in memory of their own on a GPU; here any address will do.
    boxes = tensor_cores.boxes_of(problem, launch.config)
    for index, (array, box) in enumerate(zip(held.values(), boxes, strict=True)):
        address = memory.add(f"operand {index}", array)
        shape = (hopper.PANEL, box.rows, box.heads, 1)
        memory.add_map(128 * (index + 1), address, box.sizes, box.strides, shape)
    addresses = {"out": memory.add("out", out)}
    if problem.return_lse or launch.splits > 1:
        addresses["lse"] = memory.add("lse", lse)
    for name, array in hopper_operands.operands_of(problem).items():
        if array is not None:
            addresses[name] = memory.add(name, flat_of(array))
    tables = {
        "items": tensor_cores.item_table(problem, launch),
        "order": launch.order,
        "places": hopper_operands.place_table(problem),
    }
    tables = tuple(memory.add(*table) for table in tables.items())
    tools, kernel = made(launch.config)
    arguments = launch.arguments(128, addresses, tables)
    typed = [
        getattr(tools.types, kind)(value)
        for kind, value in zip(hopper.PARAMETERS, arguments, strict=True)
    ]
    functions = launch.config.features.functions
    if functions is not None:
        typed += [user.kind_table(problem.block_mask)]
        typed += [user.word_table(functions, problem.block_mask)]
        typed += user.host_tables(functions, np.dtype(np.float32))
    tools.launch(kernel, launch.grid, launch.config, memory, typed, schedule)


def attention(q, k, v, *, out=None, tile=small, made=kernel_for, schedule=None, **options):
    """`fusedattn.attention` by the Hopper kernel in the emulator."""
    problem = make_problem(q, k, v, out=out, **options)
    result = forward(problem, tile=tile, made=made, schedule=schedule)
    if problem.out is not None:
        problem.out[...] = result.out
    written = problem.restore(result.out) if out is None else out
    return written if result.lse is None else (written, result.lse)
