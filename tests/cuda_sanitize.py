"""Small problems for each GPU kernel, to be run under a sanitizer.

    compute-sanitizer --tool memcheck python tests/cuda_sanitize.py
    compute-sanitizer --tool racecheck python tests/cuda_sanitize.py

Each is compared with the reference as well. NumPy alone touches the GPU beside our kernels.
"""

import ml_dtypes
import numpy as np

import fusedattn

BFLOAT16 = ml_dtypes.bfloat16
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


def operands(q_shape, heads_kv, keys, dim_v, dtype):
    batch, _, _, dim = q_shape
    shapes = q_shape, (batch, heads_kv, keys, dim), (batch, heads_kv, keys, dim_v)
    random = np.random.default_rng(0)
    return [random.standard_normal(shape).astype(dtype) for shape in shapes]


def problems():
    """Operands and options: tiles that are cut, rows and keys in splits, features."""
    random = np.random.default_rng(1)
    for dim, dim_v in ((64, 64), (128, 128), (72, 40), (256, 256)):
        some = operands((2, 4, 200, dim), 2, 333, dim_v, BFLOAT16)
        yield some, {}
        yield some, {"causal": True}
    some = operands((1, 2, 300, 64), 2, 1400, 64, np.float16)
    yield some, {"window_size": (100, 20), "seqused_k": 1200}
    yield operands((2, 8, 3, 128), 2, 1500, 128, BFLOAT16), {"causal": True}
    some = operands((1, 2, 150, 128), 2, 200, 128, BFLOAT16)
    mask = random.random((150, 200)) < 0.7
    mask[:, 40:50] = False
    bias = random.standard_normal((2, 150, 200))
    sinks, slopes = np.ones(2, np.float32), np.array([0.1, 0.2], np.float32)
    yield some, {"mask": mask}
    yield some, {"bias": bias.astype(BFLOAT16), "sinks": sinks}
    yield some, {"alibi_slopes": slopes, "softcap": 20.0}
    yield some, {"dropout_p": 0.2, "seed": 5, "causal": True}
    some = operands((1, 2, 150, 64), 2, 200, 64, BFLOAT16)
    yield some, {"mask": mask[:, ::-1], "causal": True}
    yield some, {"bias": bias[0]}
    yield operands((1, 2, 100, 64), 1, 130, 64, np.float32), {"causal": True}
    yield operands((1, 2, 100, 100), 2, 90, 100, np.float32), {}
    yield operands((1, 4, 40, 24), 2, 60, 24, np.float32), {"softcap": 3.0, "causal": True}
    yield operands((1, 4, 2, 24), 2, 1100, 24, np.float32), {"causal": True}


def main():
    count = 0
    for count, (some, options) in enumerate(problems(), 1):  # noqa: B007
        got, expected = (
            fusedattn.attention(*some, return_lse=True, backend=backend, **options)
            for backend in ("cuda", "reference")
        )
        for one, other in zip(got, expected, strict=True):
            one, other = (x.astype(np.float64) for x in (one, other))
            tolerance = TOLERANCE[some[0].dtype.name]
            np.testing.assert_allclose(one, other, atol=tolerance, rtol=tolerance)
    print(f"{count} problems are right")


if __name__ == "__main__":
    main()
