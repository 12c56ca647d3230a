"""Imports go down only, and `import fusedattn` stays light."""

import ast
import importlib.util
import statistics
import subprocess
import sys
from pathlib import Path

import fusedattn

ROOT = Path(fusedattn.__file__).parent

# What each part of the package may import from the package; "" is the package itself. A module that
# is not listed here fails: say where it belongs.
MAY_IMPORT = {
    "masks": set(),
    "merge": set(),
    "philox": set(),
    "undisturbed": set(),
    "kernel_files": set(),
    "checks": set(),
    "bytecode": set(),
    "functions": {"bytecode", "checks"},
    "pointwise": {"functions"},
    "slopes": {"functions", "pointwise"},
    "block_mask": {"checks", "functions", "masks", "pointwise"},
    "operands": {"block_mask", "checks", "masks"},
    "problem": {"block_mask", "checks", "functions", "masks", "operands"},
    "reference": {"pointwise", "problem", "slopes"},
    "blocked": {"blocked", "masks", "merge", "philox", "pointwise", "problem", "slopes"},
    "cpu": {
        "block_mask",
        "cpu",
        "functions",
        "kernel_files",
        "masks",
        "merge",
        "philox",
        "pointwise",
        "problem",
        "undisturbed",
    },
    "cuda": {
        "block_mask",
        "checks",
        "cuda",
        "functions",
        "kernel_files",
        "masks",
        "philox",
        "pointwise",
        "problem",
        "undisturbed",
    },
    "dispatch": {"checks", "problem", "cpu", "cuda", "blocked", "reference", "undisturbed"},
    "plan": {"block_mask", "checks", "dispatch", "functions", "problem"},
    "arrays": {"checks"},
    "device_plan": {"arrays", "checks", "dispatch", "functions", "problem"},
    "api": {
        "arrays",
        "block_mask",
        "checks",
        "device_plan",
        "dispatch",
        "plan",
        "problem",
        "reference",
    },
    "gradients": {"block_mask", "checks", "functions", "dispatch", "problem"},
    "runtime": {"checks", "cpu", "dispatch"},
    "": {"api", "block_mask", "gradients", "merge", "problem", "runtime"},
    # The kit judges other people's kernels: it knows the specification and no kernel of ours.
    "testing": {
        "block_mask",
        "checks",
        "functions",
        "masks",
        "merge",
        "pointwise",
        "problem",
        "reference",
        "testing",
    },
    # Other people's automatic differentiation, on top of the public functions.
    "interop": {"api", "gradients", "problem"},
    "__main__": None,
    "cli": None,
}
# The compiler is loaded by the CPU kernels alone, and only when they are first asked.
OUTSIDE = {
    "masks": {"numpy"},
    "merge": {"numpy"},
    "philox": set(),
    "undisturbed": set(),
    "kernel_files": set(),
    "checks": {"numpy", "ml_dtypes"},
    "bytecode": set(),
    "functions": {"numpy"},
    "pointwise": {"numpy"},
    "slopes": {"numpy"},
    "block_mask": {"numpy", "matplotlib"},
    "operands": {"numpy"},
    "problem": {"numpy"},
    "reference": {"numpy", "ml_dtypes"},
    "blocked": {"numpy"},
    "dispatch": set(),
    "plan": {"numpy"},
    "arrays": {"numpy", "ml_dtypes"},
    "api": {"numpy"},
    "gradients": {"numpy"},
    "runtime": {"numpy"},
    "": set(),
    "interop": {"numpy", "ml_dtypes", "torch", "jax"},
}
LIGHT = "import fusedattn, sys; print(*sorted(sys.modules))"


def part_of(path):
    first = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(path):
    """Names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            if node.module == "fusedattn":
                yield from (f"fusedattn.{alias.name}" for alias in node.names)
            else:
                yield node.module


def sources():
    return sorted(ROOT.rglob("*.py"))


def test_imports_go_down_only():
    for path in sources():
        part = part_of(path)
        assert part in MAY_IMPORT, f"{path} belongs to no part that this test knows"
        allowed = MAY_IMPORT[part]
        if allowed is None:
            continue  # on top of everything
        for name in imported(path):
            package, *below = name.split(".")
            if package == "fusedattn":
                assert (below or [""])[0] in allowed, f"{path} imports {name}"


def test_nothing_imports_what_is_imported_on_request_only():
    for path in sources():
        if part_of(path) != "interop":
            assert not any(name.startswith("fusedattn.interop") for name in imported(path)), path


def test_modules_below_the_kernels_need_numpy_alone():
    for path in sources():
        outside = OUTSIDE.get(part_of(path))
        for name in imported(path):
            package = name.split(".")[0]
            if outside is None or package == "fusedattn" or package in sys.stdlib_module_names:
                continue
            assert package in outside, f"{path} imports {name}"


def test_nothing_imports_upwards_by_name():
    # Places that are imported by a string, such as the backends in dispatch, name existing modules.
    for module, attribute in fusedattn.dispatch._PLACES.values():
        assert importlib.util.find_spec(module) is not None, (module, attribute)


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    return done.stdout


def test_import_loads_nothing_optional():
    loaded = {name.split(".")[0] for name in run(LIGHT).split()}
    heavy = {"numba", "llvmlite", "hypothesis", "pytest", "typer", "rich", "scipy", "onnx"}
    heavy |= {"torch", "jax", "cupy", "cuda", "numba_cuda", "numba_cuda_mlir"}
    assert not loaded & heavy


def test_import_takes_less_than_a_tenth_of_a_second_beyond_numpy():
    # Both times are taken in the same process, one import after the other, so that a busy machine
    # slows the difference only in proportion; the median of several processes drops outliers.
    code = (
        "import time, numpy; start = time.perf_counter(); import fusedattn; "
        "print(time.perf_counter() - start)"
    )
    run(code)  # compiles to bytecode
    assert statistics.median(float(run(code)) for _ in range(5)) < 0.1
