"""Compiles functions of the user's in small kernels: ``python cuda_user_compile.py COMPILER``.

Prints for each what the assembler said, or the error, as JSON.
"""

import inspect
import json
import math
import sys

import ml_dtypes
import numpy as np
from cuda_compile import said
from test_user_function_errors import MISTAKES, TABLE

from fusedattn import make_problem
from fusedattn.cuda import compiler, user
from fusedattn.cuda.tables import kind_of

Q = np.zeros((2, 4, 40, 64), np.float32)
FACTOR = 2.0


def helper(x):
    return x * FACTOR


def bucket(distance):
    if distance < 8:
        return distance
    return min(15, 8 + int(math.log(distance / 8) / math.log(16) * 8))


def default(score, batch, head, q_idx, k_idx, table, factor=0.5):
    return score + factor * table[0, k_idx]


def starred(score, *others):
    return score + others[4][0, others[3]]


def relative(score, batch, head, q_idx, k_idx, table):
    return score + table[head, k_idx - q_idx + 60] * (batch + 1)


def by_parts(score, batch, head, q_idx, k_idx, table):
    whole = score + table[head][k_idx - q_idx] * len(table) + table.shape[1] + table.ndim
    return whole if table[head, k_idx] else score


def of_numpy(score, batch, head, q_idx, k_idx):
    some = np.where(q_idx > k_idx, np.exp(score), np.clip(np.tanh(score), -1.0, 1.0))
    return some + np.float32(2.0) * np.pi + np.maximum(q_idx, k_idx)


def hidden(score, batch, head, q_idx, k_idx):
    return -math.inf if q_idx > k_idx else helper(score)


def single(score, batch, head, q_idx, k_idx, table, shift=0.25):
    """Floats of Python's wherever they can stand: none makes a float64 of a score."""
    both = (0.5, 1.5)
    capped = FACTOR * 20.0 * math.tanh(score / 20.0) + both[1] * helper(table[0, k_idx]) - shift
    return capped if k_idx <= q_idx else -1e9


def counted(score, batch, head, q_idx, k_idx):
    total = 0
    for i in range(k_idx):
        total += i
    return score + total


def t5(score, batch, head, q_idx, k_idx, table):
    return score + table[head, bucket(max(0, q_idx - k_idx))]


def whole_number(score, batch, head, q_idx, k_idx):
    return q_idx - k_idx


def factorial(n):
    return 1.0 if n <= 1 else n * factorial(n - 1)


def recursive(score, batch, head, q_idx, k_idx):
    return score + 1 / factorial(k_idx % 5)


def listed(score, batch, head, q_idx, k_idx):
    return [score, 1.0][0]


# What kernels on the CPU can do and these cannot, and what is said.
GAPS = {recursive: "a function in it calls itself", listed: "build_list|NRT"}


def cases():
    """Functions with their arrays, by name."""
    table = np.zeros((4, 200), np.float32)
    made = {function.__name__: (function, (table,)) for function in (default, starred, t5, single)}
    for function in (of_numpy, hidden, counted, whole_number):
        made[function.__name__] = (function, ())
    kinds = ("float16", ml_dtypes.bfloat16, "float64", "int8", "uint16", "int64", "uint64", "bool")
    for kind in kinds:
        for function in (relative, by_parts)[: 1 + (kind != "bool")]:
            name = f"{function.__name__}-{np.dtype(kind).name}"
            made[name] = (function, (table.astype(kind),))
    for function in [*MISTAKES, *GAPS]:
        reads = "table" in inspect.signature(function).parameters
        made[function.__name__] = (function, (TABLE,) if reads else ())
    return made


def make(tools, functions):
    """A kernel that does nothing but ask."""
    cuda, types = tools.cuda, tools.types
    modify = user.device_functions(tools, functions, types.float32).modify

    def kernel(scores, *extra):
        row, key = types.int64(cuda.threadIdx.x), types.int64(cuda.blockIdx.x)
        scores[row] = modify(scores[row], key, key, row, key + row, *extra)

    return kernel


def report(tools, function, aux):
    """Compile, and read the assembler's report."""
    problem = make_problem(Q, Q, Q, score_mod=function, score_mod_aux=aux)
    functions = user.functions_of(problem)
    parameters = ("[float32]", *user.parameters_of(functions))
    kernel = compiler.Kernel("user", make, functions, parameters, 128)
    found = said(compiler.build(kernel, "sm_80", tools).log)
    if function is single:
        found["result"] = str(result_of(tools, functions))
    return found


def result_of(tools, functions):
    """Type of what a score_mod with one table returns, before it is made the score's."""
    types, (table,) = tools.types, functions.arrays
    given = (types.float32, *[types.int64] * 4)
    arguments = (*given, tools.table_type(kind_of(table), types.float32))
    compiled, _ = user._compilable(tools, functions.score_mod, len(arguments), types.float32)
    return tools.result_of(compiled, arguments)


if __name__ == "__main__":
    tools = compiler.toolchain(sys.argv[1])
    reports = {}
    for name, case in cases().items():
        try:
            reports[name] = report(tools, *case)
        except Exception as error:
            reports[name] = {"error": type(error).__name__, "told": str(error)}
    print(json.dumps(reports))
