"""CUDA kernels compile without a GPU to code that keeps its arrays in registers."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusedattn.cuda import hopper, ptx, tensor_cores
from fusedattn.cuda.inline import Block

PACKAGES = {"numba-cuda-mlir": "numba_cuda_mlir", "numba-cuda": "numba_cuda"}
SCRIPT = Path(__file__).with_name("cuda_compile.py")


def compiled(compiler, *arguments, script=SCRIPT):
    """Reports of some kernels, from a process of its own: two compilers do not share one."""
    for package in (PACKAGES[compiler], "cuda.bindings"):
        pytest.importorskip(package.partition(".")[0])
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("NUMBA_ENABLE_CUDASIM", None)
    done = subprocess.run(
        [sys.executable, str(script), compiler, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# The fallback takes minutes.
each_compiler = pytest.mark.parametrize(
    "compiler", ["numba-cuda-mlir", pytest.param("numba-cuda", marks=pytest.mark.deep)]
)


@each_compiler
@pytest.mark.parametrize("dims", [(64, 64), (128, 128)])
def test_the_hopper_kernel_keeps_everything_in_registers(compiler, dims):
    name = f"hopper-{dims[0]}-{dims[1]}"
    report = compiled(compiler, "sm_90a", name)[name]
    warpgroups = tensor_cores._TILES[dims][0]
    # All that a block of so many threads may have at the start.
    registers = 65536 // (128 * (1 + warpgroups)) // 8 * 8
    assert report == {"stack": 0, "spills": 0, "registers": registers, "warnings": []}


@pytest.mark.deep
@each_compiler
def test_other_hopper_kernels_keep_everything_in_registers(compiler):
    names = ("hopper-192-128", "hopper-256-256", "hopper-float16", "hopper-packed")
    for report in compiled(compiler, "sm_90a", *names).values():
        assert report == {"stack": 0, "spills": 0, "registers": 168, "warnings": []}


@pytest.mark.deep
@each_compiler
def test_kernels_for_few_queries_keep_everything_in_registers(compiler):
    names = [f"hopper-few-{dims[0]}-{dims[1]}" for dims in tensor_cores._FEW_TILES]
    for report in compiled(compiler, "sm_90a", *names).values():
        assert report == {"stack": 0, "spills": 0, "registers": 240, "warnings": []}


@each_compiler
@pytest.mark.parametrize("chip", ["sm_80", "sm_90a"])
def test_portable_kernels_keep_everything_in_registers(compiler, chip):
    for name, report in compiled(
        compiler, chip, "simt-many-plain-float32", "combine-bfloat16"
    ).items():
        assert (report["stack"], report["spills"], report["warnings"]) == (0, 0, []), name
        assert report["registers"] <= 255


@pytest.mark.deep
@each_compiler
def test_other_portable_kernels_keep_everything_in_registers(compiler):
    names = [
        f"simt-{tile}-all-{storage}"
        for tile in ("many", "few")
        for storage in ("float32", "bfloat16")
    ]
    names += ["simt-double", "simt-split", "combine-float64"]
    for name, report in compiled(compiler, "sm_80", *names).items():
        assert (report["stack"], report["spills"], report["warnings"]) == (0, 0, []), name


@pytest.mark.parametrize("tiles", [tensor_cores._TILES, tensor_cores._FEW_TILES])
@pytest.mark.parametrize("dims", tensor_cores._TILES)
def test_a_tile_asks_for_as_many_matrix_instructions_as_its_products_need(dims, tiles):
    warpgroups, keys, stages = tiles[dims]
    config = hopper.Config("bfloat16", "bfloat16", *dims, warpgroups, keys, stages)
    scores = ptx.products(keys, "bfloat16", dims[0], 1024, 1024)
    outputs = ptx.accumulate(dims[1], "bfloat16", keys)
    assert scores.text.count("wgmma.mma_async") == dims[0] // 16
    assert outputs.text.count("wgmma.mma_async") == keys // 16
    assert config.shared <= hopper.SHARED_LIMIT


def test_operands_of_a_block_are_numbered_as_llvm_numbers_them():
    # Written ones are results first and inputs again, before the others.
    arrays = (("f", 2, True), ("r", 3, False))
    assert Block.operands(arrays, "lr") == ([["$0", "$1"], ["$4", "$5", "$6"]], ["$7", "$8"])
