"""Compiles kernels in a fresh process: ``python cuda_compile.py COMPILER CHIP KERNEL...``.

Prints what the assembler said about each, as JSON.
"""

import json
import re
import sys

from fusedattn.cuda import combine, compiler, hopper, params, portable, simt, tensor_cores

PLAIN = (None, None, None, False, False, False)
ALL = ("float16", "float32", "bfloat16", True, True, True)


def kernels():
    """Kernels by name."""
    made = {}
    for dims, tile in tensor_cores._TILES.items():
        config = hopper.Config("bfloat16", "bfloat16", *dims, *tile)
        made[f"hopper-{dims[0]}-{dims[1]}"] = tensor_cores.kernel_of(config)
    for dims, tile in tensor_cores._FEW_TILES.items():
        config = hopper.Config("bfloat16", "float32", *dims, *tile, packed=True, split_keys=512)
        made[f"hopper-few-{dims[0]}-{dims[1]}"] = tensor_cores.kernel_of(config)
    config = hopper.Config("float16", "float32", 128, 128, *tensor_cores._TILES[128, 128])
    made["hopper-float16"] = tensor_cores.kernel_of(config)
    made["hopper-packed"] = tensor_cores.kernel_of(config._replace(packed=True))
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
    return made


def report(name, kernel, chip):
    """Compile, and read the assembler's report."""
    log = compiler.build(kernel, chip, compiler.toolchain(name)).log
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
