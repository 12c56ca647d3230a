"""Launches the exact Hopper kernel on a problem, in the emulator."""

import ctypes
import functools
import zlib
from dataclasses import replace

import numpy as np

from fusedattn.cuda import exact, hopper_exact
from fusedattn.cuda.unroll import unroll
from fusedattn.problem import Result, make_problem
from hopper_emulator.memory import Global
from hopper_emulator.run import MULTIPROCESSORS, Emulator


@functools.cache
def kernel_for(config):
    """Return a toolchain and the kernel it made, as `compiler.build` makes it."""
    tools = Emulator()
    return tools, unroll(hopper_exact.make(tools, config), tools.types.uint64)


def small(config):
    """Return the same with tiles of few keys: threads are dear here, keys are too."""
    return config._replace(block_k=16)


def memory_of(array):
    """Return the bytes from an array's first to its last in memory."""
    low, high = np.lib.array_utils.byte_bounds(array)
    return np.frombuffer((ctypes.c_uint8 * (high - low)).from_address(low), np.uint8)


def forward(problem, *, tile=small, made=kernel_for, seed=None):
    """Compute a problem that the exact kernel takes, where its arrays lie."""
    out = (
        np.full(problem.out_shape, np.nan, problem.out_dtype)
        if problem.out is None
        else problem.out
    )
    lse = np.full(problem.lse_shape, np.nan, np.float32)
    problem = replace(problem, out=out)
    reasons = exact.unsupported(problem)
    if reasons or problem.score_mod is not None or problem.block_mask is not None:
        raise NotImplementedError("; ".join(reasons))
    if out.size == 0:
        return Result(out, lse)
    config = tile(exact.config_of(problem))
    memory = Global()
    addresses = {}
    for name in ("q", "k", "v", "out"):
        array = getattr(problem, name)
        memory.add(name, memory_of(array))
        addresses[name] = array.__array_interface__["data"][0]
    if problem.return_lse:
        addresses["lse"] = memory.add("lse", lse)
    launch = exact.launch_of(problem, config, MULTIPROCESSORS)
    items = exact.item_table(problem)
    order = memory.add("order", launch.order)
    arguments = launch.arguments(addresses, memory.add("items", items), order)
    assert len(arguments) == len(hopper_exact.PARAMETERS)
    if seed is None:  # another one for each call, and the same in each run
        seed = zlib.crc32(problem.q.tobytes() + problem.k.tobytes())
    tools, kernel = made(config)
    kinds = zip(hopper_exact.PARAMETERS, arguments, strict=True)
    typed = [getattr(tools.types, kind)(value) for kind, value in kinds]
    tools.launch(kernel, launch.grid, config, memory, typed, seed)
    return Result(out, lse if problem.return_lse else None)


def attention(q, k, v, *, out=None, tile=small, made=kernel_for, seed=None, **options):
    """`fusedattn.attention` by the exact kernel in the emulator."""
    problem = make_problem(q, k, v, out=out, **options)
    result = forward(problem, tile=tile, made=made, seed=seed)
    written = problem.restore(result.out) if out is None else out
    return written if result.lse is None else (written, result.lse)
