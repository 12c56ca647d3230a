"""Hold other libraries' attention to the laws, and print what breaks as Markdown.

One command: ``python docs/peers.py [NAME ...] [--examples N]``, with the names below. A library
that is not installed is left out. Versions are printed with the results.
"""

import argparse
import importlib.metadata
import os
import warnings

import numpy as np

from fusedattn.testing import adapters, check_attention
from fusedattn.testing.rows import attended

os.environ.setdefault("KERAS_BACKEND", "numpy")


def torch_sdpa():
    """`torch.nn.functional.scaled_dot_product_attention` on the CPU, with its gradient."""
    from torch.nn.functional import scaled_dot_product_attention

    adapted = adapters.torch(scaled_dot_product_attention)
    return "torch", {**adapted.options(), "dtypes": ("float32", "float64")}


def torch_flex():
    """`torch.nn.attention.flex_attention`, eager, with score_mod and block_mask."""
    import torch
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    def flex(
        q,
        k,
        v,
        *,
        scale=None,
        causal=False,
        window_size=None,
        q_offset=None,
        alibi_slopes=None,
        softcap=None,
        return_lse=False,
    ):
        offset = k.shape[-2] - q.shape[-2] if q_offset is None else q_offset
        offset = torch.as_tensor(np.broadcast_to(offset, q.shape[:1]).astype(np.int64))
        left, right = window_size or (None, None)
        slopes = (
            None
            if alibi_slopes is None
            else torch.as_tensor(np.broadcast_to(alibi_slopes.astype(q.dtype), q.shape[:2]).copy())
        )

        def seen(b, h, i, j):
            p = i + offset[b]
            kept = j >= 0
            if causal:
                kept = kept & (j <= p)
            if left is not None:
                kept = kept & (j >= p - left)
            if right is not None:
                kept = kept & (j <= p + right)
            return kept

        def score(s, b, h, i, j):
            if softcap is not None:
                s = softcap * torch.tanh(s / softcap)
            if slopes is not None:
                s = s - slopes[b, h] * (i + offset[b] - j).abs()
            return s

        block_mask = None
        if causal or window_size is not None:
            sizes = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
            block_mask = create_block_mask(seen, *sizes, device="cpu")
        out, aux = flex_attention(
            *(torch.from_numpy(x) for x in (q, k, v)),
            score_mod=score,
            block_mask=block_mask,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=True),
        )
        return (out.numpy(), aux.lse.numpy()) if return_lse else out.numpy()

    supports = {
        "scale",
        "causal",
        "window_size",
        "q_offset",
        "alibi_slopes",
        "softcap",
        "return_lse",
        "gqa",
        "head_dim_v",
    }
    return "torch", {"fn": flex, "supports": supports}


def jax_nn():
    """`jax.nn.dot_product_attention` on the CPU."""
    import jax

    return "jax", adapters.jax(jax.nn.dot_product_attention).options()


def onnxruntime():
    """ONNX Runtime's Attention of opset 24 on the CPU."""
    import onnxruntime as library

    return "onnxruntime", adapters.onnxruntime(library.InferenceSession).options()


def keras_numpy():
    """`keras.ops.dot_product_attention` on Keras' NumPy backend."""
    import keras

    def attention(q, k, v, *, scale=None, causal=False, mask=None, bias=None):
        q, k, v = (x.swapaxes(-3, -2) for x in (q, k, v))
        four = [None if x is None else adapters.four_axes(x) for x in (mask, bias)]
        out = keras.ops.dot_product_attention(
            q,
            k,
            v,
            mask=four[0],
            bias=four[1],
            scale=scale,
            is_causal=causal,
        )
        return np.asarray(out).swapaxes(-3, -2)

    def domain(problem):
        top_left = "is_causal aligns to the top left"
        return top_left if problem.causal and problem.q_offset.any() else None

    supports = {"scale", "causal", "mask", "bias", "head_dim_v"}
    return "keras", {"fn": attention, "supports": supports, "domain": domain}


PEERS = {f.__name__: f for f in (torch_sdpa, torch_flex, jax_nn, onnxruntime, keras_numpy)}


def main():
    """Check the chosen peers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PEERS))
    parser.add_argument("--examples", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    results = {}
    for name in given.names or PEERS:
        warnings.simplefilter("ignore")
        try:
            package, options = PEERS[name]()
        except ImportError as missing:
            print(f"## {name}: not installed ({missing.name})\n")
            continue
        print(f"## {PEERS[name].__doc__} ({package} {importlib.metadata.version(package)})\n")
        numbers = {"max_examples": given.examples, "seed": given.seed}
        report = check_attention(**options, **numbers)
        results[name] = {o.law: o.status for o in report.outcomes}
        show(report)
        if any(o.law == "rows_without_keys" and o.status == "failed" for o in report.outcomes):
            print("### The same, on calls in which every row sees a key\n")
            options["domain"] = every_row_sees_a_key(options.get("domain"))
            narrow = check_attention(**options, **numbers)
            results[f"{name}, keys in every row"] = {o.law: o.status for o in narrow.outcomes}
            show(narrow)
    show_table(results)


def every_row_sees_a_key(domain):
    """Narrow a domain, so that what is known does not hide the rest."""

    def narrow(problem):
        if not attended(problem).any(-1).all():
            return "a row without keys"
        return None if domain is None else domain(problem)

    return narrow


def show_table(results):
    """Print which law holds where."""
    print("## Law by law\n")
    print("| law |", " | ".join(results), "|")
    print("|---" * (len(results) + 1) + "|")
    names = {"held": "holds", "failed": "**breaks**", "not promised": ""}
    for law in next(iter(results.values())):
        states = [names[found[law]] for found in results.values()]
        if any(states):
            print(f"| {law} |", " | ".join(states), "|")


def show(report):
    """Print a report as Markdown."""
    held = [o.law for o in report.outcomes if o.status == "held"]
    print(f"{len(held)} laws hold, {len(report.failures)} break.\n")
    for failure in report.failures:
        case = failure.code[failure.code.index("case = ") :]
        print(f"**{failure.law}**: {failure.message}\n\n```python\n{case}```\n", flush=True)


if __name__ == "__main__":
    main()
