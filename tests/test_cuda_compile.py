"""CUDA kernels compile without a GPU to code that keeps its arrays in registers."""

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_user_compile import GAPS
from test_user_function_errors import MISTAKES

from fusedattn.cuda import hopper, hopper_tiles, ptx
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
    warpgroups = hopper_tiles.PLAIN_TILES[dims].warpgroups
    # All that a block of so many threads may have at the start.
    registers = 65536 // (128 * (1 + warpgroups)) // 8 * 8
    assert report == {"stack": 0, "spills": 0, "registers": registers, "warnings": []}


@pytest.mark.deep
@each_compiler
def test_other_hopper_kernels_keep_everything_in_registers(compiler):
    names = ("hopper-192-128", "hopper-256-256", "hopper-float16", "hopper-packed")
    for report in compiled(compiler, "sm_90a", *names).values():
        assert report == {"stack": 0, "spills": 0, "registers": 168, "warnings": []}


def assert_in_registers(report):
    assert (report["stack"], report["spills"], report["warnings"]) == (0, 0, [])


@pytest.mark.parametrize("feature", ["block-mask"])
def test_hopper_kernels_with_a_feature_keep_everything_in_registers(feature):
    name = f"hopper-128-128-{feature}"
    assert_in_registers(compiled("numba-cuda-mlir", "sm_90a", name)[name])


@pytest.mark.deep
@pytest.mark.parametrize("dims", [(64, 64), (128, 128)])
@pytest.mark.parametrize(
    "feature",
    [
        *("softcap", "alibi", "sinks", "bias", "bias-pairs", "mask", "mask-pairs", "score-mod"),
        "block-mask",
    ],
)
def test_hopper_kernels_with_other_features_keep_everything_in_registers(dims, feature):
    name = f"hopper-{dims[0]}-{dims[1]}-{feature}"
    assert_in_registers(compiled("numba-cuda-mlir", "sm_90a", name)[name])


@pytest.mark.deep
@each_compiler
def test_kernels_for_few_queries_keep_everything_in_registers(compiler):
    names = [f"hopper-few-{dims[0]}-{dims[1]}" for dims in hopper_tiles.FEW_TILES]
    for report in compiled(compiler, "sm_90a", *names).values():
        assert report == {"stack": 0, "spills": 0, "registers": 240, "warnings": []}


@each_compiler
def test_the_exact_kernel_keeps_everything_in_registers(compiler):
    report = compiled(compiler, "sm_90a", "exact-128")["exact-128"]
    assert report == {"stack": 0, "spills": 0, "registers": 168, "warnings": []}


@pytest.mark.deep
@each_compiler
def test_other_exact_kernels_keep_everything_in_registers(compiler):
    names = ("exact-64", "exact-64-elements", "exact-128-elements")
    for name, report in compiled(compiler, "sm_90a", *names).items():
        # The fallback finds no register for a product that has to be rounded by itself.
        spilled = 8 if (compiler, name) == ("numba-cuda", "exact-128-elements") else 0
        assert report == {"stack": spilled, "spills": spilled, "registers": 168, "warnings": []}


@each_compiler
@pytest.mark.parametrize("chip", ["sm_80", "sm_90a"])
def test_portable_kernels_keep_everything_in_registers(compiler, chip):
    of_the_user = "simt-score-mod" if chip == "sm_80" else "simt-block-mask"
    names = ("simt-many-plain-float32", "combine-bfloat16", of_the_user)
    for name, report in compiled(compiler, chip, *names).items():
        assert (report["stack"], report["spills"], report["warnings"]) == (0, 0, []), name
        assert report["registers"] <= 255


@each_compiler
def test_functions_of_the_users_compile_and_their_mistakes_are_told(compiler):
    reports = compiled(compiler, script=SCRIPT.with_name("cuda_user_compile.py"))
    assert reports["single"].pop("result") == "float32"
    told = MISTAKES | {function: (TypeError, message) for function, message in GAPS.items()}
    mistakes = {function.__name__: function for function in told}
    assert set(mistakes) < set(reports)
    for name, report in reports.items():
        if name not in mistakes:
            assert (report["stack"], report["spills"], report["warnings"]) == (0, 0, []), name
            continue
        function = mistakes[name]
        kind, message = told[function]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        assert report["error"] in {one.__name__ for one in kinds}
        assert len(report["told"]) < 600
        code = function.__code__
        place = f'File "{code.co_filename}", line {code.co_firstlineno}'
        assert report["told"].startswith(f"score_mod {name} ({place})"), report["told"]
        if compiler == "numba-cuda" and "{" in message:
            continue  # its messages have no lines
        lines, first = inspect.getsourcelines(function)
        message = message.format(last=first + len(lines) - 1, second=first + 1)
        assert re.search(f"(?is){message}", report["told"]), report["told"]


@pytest.mark.deep
@each_compiler
def test_other_portable_kernels_keep_everything_in_registers(compiler):
    names = [
        f"simt-{tile}-all-{storage}"
        for tile in ("many", "few")
        for storage in ("float32", "bfloat16")
    ]
    names += ["simt-double", "simt-split", "combine-float64"]
    reports = compiled(compiler, "sm_80", *names, "simt-block-mask")
    for name, report in (reports | compiled(compiler, "sm_90a", "simt-score-mod")).items():
        assert (report["stack"], report["spills"], report["warnings"]) == (0, 0, []), name


@pytest.mark.parametrize("tiles", [hopper_tiles.PLAIN_TILES, hopper_tiles.FEW_TILES])
@pytest.mark.parametrize("dims", hopper_tiles.PLAIN_TILES)
def test_a_tile_asks_for_as_many_matrix_instructions_as_its_products_need(dims, tiles):
    config = hopper.Config("bfloat16", "bfloat16", *dims, *tiles[dims])
    keys = config.block_k
    scores = ptx.products(keys, "bfloat16", dims[0], 1024, 1024)
    outputs = ptx.accumulate(dims[1], "bfloat16", keys)
    assert scores.text.count("wgmma.mma_async") == dims[0] // 16
    assert outputs.text.count("wgmma.mma_async") == keys // 16
    assert config.shared <= hopper.SHARED_LIMIT


def test_operands_of_a_block_are_numbered_as_llvm_numbers_them():
    # Written ones are results first and inputs again, before the others.
    arrays = (("f", 2, True), ("r", 3, False))
    assert Block.operands(arrays, "lr") == ([["$0", "$1"], ["$4", "$5", "$6"]], ["$7", "$8"])
