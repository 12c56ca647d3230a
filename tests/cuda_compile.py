"""Compiles kernels in a fresh process: ``python cuda_compile.py COMPILER CHIP KERNEL...``.

Prints what the assembler said about each, as JSON.
"""

import json
import math
import re
import sys

import numpy as np

from fusedattn import make_block_mask, make_problem
from fusedattn.cuda import (
    combine,
    compiler,
    exact,
    hopper,
    hopper_exact,
    hopper_tiles,
    params,
    portable,
    simt,
    tensor_cores,
    user,
)
from fusedattn.cuda.hopper_scores import Features

PLAIN = (None, None, None, False, False, False)
ALL = ("float16", "float32", "bfloat16", True, True, True)


def tabled(score, batch, head, q_idx, k_idx, table):
    """Add what the distance says."""
    return score + table[q_idx - k_idx]


def of_score_mod():
    """What a kernel is compiled with for a score_mod that reads a table."""
    q, table = np.zeros((1, 1, 1, 8), np.float32), np.zeros(4, np.float32)
    problem = make_problem(q, q, q, score_mod=tabled, score_mod_aux=(table,))
    return user.functions_of(problem)


def same(batch, head, q_idx, k_idx, document):
    """Whether two positions are of one document."""
    return document[q_idx] == document[k_idx]


def of_block_mask():
    """What a kernel is compiled with for a block mask that reads a table."""
    q, document = np.zeros((1, 1, 8, 8), np.float32), np.arange(8)
    mask = make_block_mask(same, None, None, 8, 8, aux=(document,))
    return user.functions_of(make_problem(q, q, q, block_mask=mask))


FEATURES = {
    "softcap": Features(softcap=True),
    "alibi": Features(slopes="float32"),
    "sinks": Features(sinks="bfloat16"),
    "bias": Features(bias="float64"),
    "bias-pairs": Features(bias="bfloat16", bias_pairs=True),
    "mask": Features(mask=True),
    "mask-pairs": Features(mask=True, mask_pairs=True),
    "dropout": Features(dropout=True),
    "score-mod": Features(functions=of_score_mod()),
    "block-mask": Features(functions=of_block_mask()),
    "all": Features(
        *(True, "float32", "float32", "float16", True, True, True, True),
        functions=of_score_mod(),
    ),
}


def kernels():
    """Kernels by name."""
    made = {}
    for dims, tile in hopper_tiles.PLAIN_TILES.items():
        config = hopper.Config("bfloat16", "bfloat16", *dims, *tile, vectors=True)
        made[f"hopper-{dims[0]}-{dims[1]}"] = tensor_cores.kernel_of(config)
    for dims, tile in hopper_tiles.FEW_TILES.items():
        config = hopper.Config("bfloat16", "float32", *dims, *tile, packed=True, split_keys=512)
        made[f"hopper-few-{dims[0]}-{dims[1]}"] = tensor_cores.kernel_of(config)
    config = hopper.Config("float16", "float32", 128, 128, *hopper_tiles.PLAIN_TILES[128, 128])
    made["hopper-float16"] = tensor_cores.kernel_of(config)
    made["hopper-packed"] = tensor_cores.kernel_of(config._replace(packed=True))
    for dims, tile in exact._TILES.items():
        for whole, label in ((True, ""), (False, "-elements")):
            config = hopper_exact.Config(dims, dims, *tile, whole, whole, exact._REGISTERS)
            made[f"exact-{dims}{label}"] = exact.kernel_of(config)
    for name, features in FEATURES.items():
        for dims in hopper_tiles.PLAIN_TILES:
            tile = hopper_tiles.tile_for(dims, features)
            config = hopper.Config("bfloat16", "bfloat16", *dims, *tile, False, 0, features, True)
            made[f"hopper-{dims[0]}-{dims[1]}-{name}"] = tensor_cores.kernel_of(config)
        for dims, tile in hopper_tiles.FEW_TILES.items():
            config = hopper.Config("bfloat16", "float32", *dims, *tile, True, 512, features)
            made[f"hopper-few-{dims[0]}-{dims[1]}-{name}"] = tensor_cores.kernel_of(config)
    tiles = {"many": portable._MANY, "narrow": portable._NARROW, "few": portable._FEW}
    for name, tile in tiles.items():
        for features, label in ((PLAIN, "plain"), (ALL, "all")):
            for storage in ("float32", "bfloat16"):
                config = simt.Config(storage, storage, *features, *tile)
                made[f"simt-{name}-{label}-{storage}"] = portable.kernel_of(config)
    config = simt.Config("float64", "float64", *ALL, *portable._DOUBLE)
    made["simt-double"] = portable.kernel_of(config)
    config = simt.Config("bfloat16", "float32", *ALL, *portable._FEW, params.SPLIT_KEYS)
    made["simt-split"] = portable.kernel_of(config)
    for real, out_storage in (("float32", "bfloat16"), ("float64", "float64")):
        config = combine.Config(real, out_storage, *combine._ON_GPU)
        made[f"combine-{out_storage}"] = combine.kernel_of(config)
    for name, options in functions().items():
        problem = make_problem(*OPERANDS, **options)
        config = portable.config_of(problem, portable.tile_of(problem))
        made[f"simt-{name}"] = portable.kernel_of(config)
    return made


OPERANDS = tuple(np.zeros((2, heads, 100, 64), np.float32) for heads in (4, 2, 2))


def functions():
    """A score_mod and a block mask, as options of a call."""
    document, table = np.arange(100) // 30, np.zeros((4, 200), np.float16)

    def near(batch, head, q_idx, k_idx):
        return abs(q_idx - k_idx) < 9 * (head + 1)

    def relative(score, batch, head, q_idx, k_idx, table):
        return math.tanh(score) + table[head, q_idx - k_idx]

    mask = make_block_mask(near, None, 4, 100, 100, block=(16, 8))
    mask &= ~make_block_mask(same, None, None, 100, 100, aux=(document,), block=(16, 8))
    return {
        "score-mod": {"score_mod": relative, "score_mod_aux": (table,)},
        "block-mask": {"block_mask": mask},
    }


def report(name, kernel, chip):
    """Compile, and read the assembler's report."""
    return said(compiler.build(kernel, chip, compiler.toolchain(name)).log)


def said(log):
    """Return what the assembler said."""
    number = {
        "stack": r"(\d+) bytes stack frame",
        "spills": r"(\d+) bytes spill stores",
        "registers": r"Used (\d+) registers",
    }
    found = {key: int(re.search(pattern, log)[1]) for key, pattern in number.items()}
    found["warnings"] = re.findall(r".*(?:C75\d\d|[Ww]arning).*", log)
    return found


if __name__ == "__main__":
    name, chip, *wanted = sys.argv[1:]
    print(json.dumps({key: report(name, kernels()[key], chip) for key in wanted}))
