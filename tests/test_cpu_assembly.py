"""The machine code of the inner loops: nothing but multiply-adds, and no trip to the stack."""

import functools
import re

import llvmlite.binding as llvm
import pytest

from fusedattn.cpu import tile
from fusedattn.cpu.compile import compile_micro, host_machine
from fusedattn.cpu.interface import BACKWARD_GROUPS, GROUPS

# Vector unit, LLVM's names of triple and processor, mnemonic and registers of a multiply-add, and
# what an access to the stack looks like.
TARGETS = {
    "AVX-512": (
        tile.AVX512,
        "x86_64-unknown-linux-gnu",
        "skylake-avx512",
        r"vfmadd\S+\s.*%zmm",
        "%rsp",
    ),
    "AVX2": (tile.AVX2, "x86_64-unknown-linux-gnu", "haswell", r"vfmadd\S+\s.*%ymm", "%rsp"),
    "NEON": (
        tile.SIMD128,
        "aarch64-unknown-linux-gnu",
        "neoverse-n1",
        r"fmla\sv\d+\.(4s|2d)",
        "[sp",
    ),
}


@pytest.fixture(params=TARGETS)
def target(request):
    isa, triple, cpu, multiply_add, stack = TARGETS[request.param]
    if triple.startswith("aarch64"):
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
    return isa, machine(cpu, triple), re.compile(multiply_add), stack


@functools.cache
def machine(cpu, triple):
    try:
        return host_machine(cpu, "", triple)
    except RuntimeError:
        pytest.skip(f"this LLVM knows no {triple}")


@functools.cache
def kernels_of(shape, group, machine):
    """The assembly of a group by function; several tests look at the same one."""
    return functions(compile_micro(shape, group, machine, assembly=True))


def functions(assembly):
    """The instructions and labels of each function."""
    found, name = {}, None
    for line in assembly.splitlines():
        text = line.split("//")[0].strip()
        label = re.fullmatch(r"([\w.$]+):.*", text)
        if label and not label[1].startswith((".L", "$")):
            name = label[1]
            found[name] = []
        elif name and text and (label or not text.startswith((".", "#"))):
            found[name].append(text)
    return found


def loops(lines):
    """Bodies of the loops that run straight through: from a label to a jump back to it."""
    at = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    for i, line in enumerate(lines):
        word, *operands = line.replace(",", " ").split()
        if operands and operands[-1] in at and at[operands[-1]] < i and not word.endswith(":"):
            body = lines[at[operands[-1]] + 1 : i]
            if not any(other.endswith(":") for other in body):
                yield body


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [8, 24, 4096])
def test_products_of_a_panel_keep_their_sums_in_registers(target, dtype, rows):
    isa, machine, multiply_add, stack = target
    shape = tile.tile_for(dtype, dtype, rows, isa)
    kernels = kernels_of(shape, "panels", machine)
    for name in ("scores", "accumulate"):
        check_products(kernels[name], shape, multiply_add, stack)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [8, 4096])
def test_products_of_the_backward_pass_keep_their_sums_in_registers(target, dtype, rows):
    isa, machine, multiply_add, stack = target
    shape = tile.backward_tile_for(dtype, dtype, rows, isa)
    kernels = kernels_of(shape, "panels", machine)
    for name in ("scores", "accumulate"):
        check_products(kernels[name], shape, multiply_add, stack)
    # Lanes along the head dim: there is a loop for each number of vectors of columns.
    lines = kernels_of(shape, "gradients", machine)["products"]
    bodies = [body for body in loops(lines) if any(multiply_add.match(line) for line in body)]
    whole = {2 * rows * vectors for vectors, rows in enumerate(shape.product_rows, start=1)}
    counts = [sum(bool(multiply_add.match(line)) for line in body) for body in bodies]
    assert max(counts) == max(whole)
    for body, count in zip(bodies, counts, strict=True):
        if count in whole:
            assert not [line for line in body if stack in line], "\n".join(body)


# For each inner loop of the matrix unit: how many products of two parts it makes, for how many of
# them it loads the rows, two tiles, and for how many the lanes. Values meet three parts of weights.
MATRIX_PRODUCTS = {
    "bfloat16": {
        "matrix_scores": (1, 1, 1),
        "add_rest_scores": (1, 1, 1),
        "matrix_accumulate": (3, 1, 3),
        "add_rest_values": (3, 1, 3),
    },
    "float16": {"matrix_scores": (4, 2, 3), "matrix_accumulate": (5, 3, 5)},
    "float32": {"matrix_scores": (6, 4, 5), "matrix_accumulate": (6, 4, 5)},
}


def matrix_kernels(dtype, rows):
    """For any machine: a processor with AMX is named, none is needed."""
    _, triple, _, _, stack = TARGETS["AVX-512"]
    shape = tile.tile_for(dtype, dtype, rows, tile.AMX)
    assert shape.matrix
    kernels = kernels_of(shape, "matrix", machine("sapphirerapids", triple))
    assert set(GROUPS["matrix"]) <= set(kernels)
    return shape, kernels, stack


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("rows", "lanes"), [(16, 1), (4096, 2)])
def test_products_of_the_matrix_unit_load_no_operand_twice_in_turn(dtype, rows, lanes):
    shape, kernels, stack = matrix_kernels(dtype, rows)
    assert shape.vectors == lanes
    for name, (products, of_rows, of_lanes) in MATRIX_PRODUCTS[dtype].items():
        bodies = [body for body in loops(kernels[name]) if any("tdpbf16ps" in x for x in body)]
        assert len(bodies) == 1
        found = [sum(word in x for x in bodies[0]) for word in ("tdpbf16ps", "tileloadd")]
        expected = [2 * lanes * products, 2 * of_rows + lanes * of_lanes]
        assert found == expected, "\n".join(bodies[0])
        # Many products have more addresses than there are registers for; those may go there.
        kept = [line for line in bodies[0] if stack in line and not line.startswith("movq")]
        assert not kept, "\n".join(bodies[0])
        assert "tilestored" not in "".join(bodies[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_beside_products_stay_in_registers(dtype):
    """Each loop that makes weights does nothing but that; the matrix unit works outside of it."""
    _, kernels, stack = matrix_kernels(dtype, 4096)
    lines = kernels["weights_and_products"]
    bodies = [body for body in loops(lines) if sum("vfmadd" in line for line in body) >= 4 * 6]
    # One for each turn of each product, whose first step stands alone.
    turns = 2 * sum(MATRIX_PRODUCTS[dtype][f"matrix_{x}"][0] for x in ("scores", "accumulate"))
    assert len(bodies) == turns + 2  # then what is left, and one for large maxima
    for body in bodies:
        assert not [line for line in body if stack in line], "\n".join(body)
        # Three parts of two vectors of two keys.
        stores = [line for line in body if re.search(r"zmm\d+, -?\d*\(%", line)]
        assert len(stores) == 6
    multiplies = sum("tdpbf16ps" in line for line in lines)
    # With weights beside and without; LLVM may repeat a first turn, between stores and without.
    assert 0 <= multiplies - 2 * 4 * turns <= 4 * 4


def test_sums_are_stored_one_by_one_between_products():
    """Four stores in a row take as long as four products, and nothing multiplies meanwhile."""
    _, kernels, _ = matrix_kernels("float32", 4096)
    for name in ("matrix_scores", "matrix_accumulate", "weights_and_products"):
        words = [line.split()[0] for line in kernels[name] if re.match("tdpbf|tilest", line)]
        text = "".join("x" if word == "tdpbf16ps" else "s" for word in words)
        assert "sxsxsxsx" in text, name


def check_products(lines, shape, multiply_add, stack):
    bodies = [body for body in loops(lines) if any(multiply_add.match(line) for line in body)]
    counts = [sum(bool(multiply_add.match(line)) for line in body) for body in bodies]
    # Two steps a turn, each with every row against every vector of the panel.
    whole = 2 * shape.rows * shape.vectors
    assert max(counts) == whole
    # Beside them at most a broadcast for each row and a load for each vector, a step, and what the
    # loop itself takes: moving some ten pointers on NEON, which has no address of three parts.
    body = bodies[counts.index(whole)]
    beside = 2 * (shape.rows + shape.vectors) + (12 if shape.width * shape.real_bytes == 16 else 3)
    assert len(body) <= whole + beside, "\n".join(body)
    for body in bodies:
        assert not [line for line in body if stack in line], "\n".join(body)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_softmax_pass_calls_nothing(target, dtype):
    isa, machine, multiply_add, _ = target
    shape = tile.tile_for(dtype, dtype, isa=isa)
    lines = kernels_of(shape, "common", machine)["weights"]
    assert not [line for line in lines if re.match(r"call|bl\s|blr\s", line)]
    # The longest loop is the polynomial, once for each vector of the panel.
    body = max(loops(lines), key=len)
    degree = 6 if dtype == "float32" else 11
    assert sum(bool(multiply_add.match(line)) for line in body) >= degree * shape.vectors


@pytest.mark.parametrize(
    ("dtype", "out"),
    [
        ("float16", "float32"),
        pytest.param("bfloat16", "bfloat16", marks=pytest.mark.deep),
        pytest.param("float64", "float16", marks=pytest.mark.deep),
    ],
)
def test_every_kernel_is_compiled_for_every_vector_unit(target, dtype, out):
    isa, machine, *_ = target
    shape = tile.tile_for(dtype, out, isa=isa)
    for group, kernels in (GROUPS | BACKWARD_GROUPS).items():
        if group == "matrix" and not isa.matrix:
            continue
        assert set(kernels) <= set(kernels_of(shape, group, machine))
