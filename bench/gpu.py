"""Forward attention on an NVIDIA GPU beside torch's cuDNN and FlashAttention-2, interleaved.

    python bench/gpu.py [--json FILE] [--rounds N]

Each shape is checked against float64 on some rows before anything is timed. Then all contenders
take turns, and the ratio of medians is the result. Times are taken by CUDA events around several
calls, which wait on the GPU behind a pause: so they are those of the GPU alone. What the host takes
is measured apart.
"""

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import fusedattn

Shape = tuple[int, int, int, int, int]
Run = Callable[[], Any]

# (batch, heads, heads_kv, seqlen, head_dim); short and long, full and grouped heads.
PREFILL = [
    (32, 16, 16, 512, 64),
    (16, 16, 16, 1024, 128),
    (4, 16, 16, 4096, 128),
    (1, 16, 16, 16384, 128),
    (2, 32, 8, 8192, 128),
    (1, 32, 32, 16384, 64),
    (1, 8, 8, 16384, 256),
]
FLOAT32 = [(1, 16, 16, 4096, 64), (1, 16, 16, 4096, 128), (2, 32, 8, 8192, 128)]
# The same with queries: (batch, heads, heads_kv, keys, head_dim, queries).
DECODE = [
    (64, 32, 8, 8192, 128, 1),
    (64, 32, 8, 8192, 128, 4),
    (64, 32, 8, 8192, 64, 1),
    (8, 32, 32, 4096, 128, 1),
    (1, 32, 8, 32768, 128, 1),
]
FEATURES = (2, 16, 16, 4096, 128)
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash2": SDPBackend.FLASH_ATTENTION}
CHECKED_ROWS = 64
# Cycles for which the GPU sleeps before it is timed, while the host prepares: about a millisecond.
PAUSE = 2_000_000


def tensors(shape: Shape, dtype: Any, seed: int = 0) -> list[Any]:
    batch, heads, heads_kv, seqlen, dim = shape
    generator = torch.Generator("cuda").manual_seed(seed)
    sizes = [(batch, n, seqlen, dim) for n in (heads, heads_kv, heads_kv)]
    return [torch.randn(s, generator=generator, device="cuda", dtype=dtype) for s in sizes]


def contenders(q: Any, k: Any, v: Any, causal: bool, peers: dict[str, Any]) -> dict[str, Run]:
    """Functions of no arguments, by name."""

    def peer(backend: Any) -> Run:
        def call() -> Any:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
                )

        return call

    calls: dict[str, Run] = {"fusedattn": lambda: fusedattn.attention(q, k, v, causal=causal)}
    return calls | {name: peer(backend) for name, backend in peers.items()}


def expected(q: Any, k: Any, v: Any, causal: bool, rows: Any) -> Any:
    """Some rows of the last head of the last item, in float64."""
    group = q.shape[1] // k.shape[1]
    head = q.shape[1] - 1
    q64, k64, v64 = (
        x.double() for x in (q[-1, head, rows], k[-1, head // group], v[-1, head // group])
    )
    scores = q64 @ k64.T / np.sqrt(q.shape[-1])
    if causal:
        position = torch.arange(q.shape[2], device="cuda")[rows]
        hidden = torch.arange(k.shape[2], device="cuda")[None] > position[:, None]
        scores.masked_fill_(hidden, -torch.inf)
    return torch.softmax(scores, -1) @ v64


def error_of(call: Run, q: Any, k: Any, v: Any, causal: bool) -> float:
    """Relative error of some rows, by norms."""
    rows = torch.linspace(0, q.shape[2] - 1, CHECKED_ROWS, device="cuda").long()
    out = call()[-1, -1, rows].double()
    reference = expected(q, k, v, causal, rows)
    return float((out - reference).norm() / reference.norm())


def milliseconds(call: Run, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(PAUSE)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def in_turns(calls: Mapping[str, Run], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Times of all contenders, who take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(milliseconds(call, repeats))
    return times


def measure(
    shape: Shape, dtype: Any, causal: bool, rounds: int, peers: dict[str, Any]
) -> dict[str, Any]:
    q, k, v = tensors(shape, dtype)
    calls = contenders(q, k, v, causal, peers)
    errors: dict[str, float] = {}
    for name, call in list(calls.items()):
        try:
            errors[name] = error_of(call, q, k, v, causal)
        except RuntimeError as error:
            print(f"  {name} cannot: {str(error).splitlines()[0]}")
            del calls[name]
    for call in calls.values():
        for _ in range(3):
            call()
    repeats = max(1, int(3.0 / max(0.02, milliseconds(calls["fusedattn"], 3))))
    times = in_turns(calls, rounds, repeats)
    batch, heads, _, seqlen, dim = shape
    work = 4 * batch * heads * seqlen * seqlen * dim / (2 if causal else 1)
    result: dict[str, Any] = {
        "shape": shape,
        "dtype": str(dtype),
        "causal": causal,
        "repeats": repeats,
    }
    result["errors"], result["milliseconds"] = errors, times
    result["tflops"] = {n: work / statistics.median(t) / 1e9 for n, t in times.items()}
    return result


def ceilings() -> dict[str, float]:
    """Rates of a large bf16 product and a large copy on this GPU."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**30, device="cuda", dtype=torch.float32).normal_()
    target = torch.empty_like(source)
    product = statistics.median(milliseconds(lambda: a @ b, 10) for _ in range(5))
    copy = statistics.median(milliseconds(lambda: target.copy_(source), 3) for _ in range(5))
    return {"bf16_tflops": 2 * 8192**3 / product / 1e9, "copy_tb_s": 2 * 2**32 / copy / 1e9}


def measure_decode(shape: tuple[int, ...], rounds: int, copy: float) -> dict[str, Any]:
    """Time of few queries against many keys, and the rate at which those are read."""
    *sizes, queries = shape
    _, k, v = tensors(tuple(sizes), torch.bfloat16)  # type: ignore[arg-type]
    q = torch.randn(sizes[0], sizes[1], queries, sizes[4], device="cuda", dtype=torch.bfloat16)
    calls = contenders(q, k, v, False, PEERS)
    rows = torch.arange(queries, device="cuda")
    reference = expected(q, k, v, False, rows)
    errors = {}
    for name, call in calls.items():
        errors[name] = float((call()[-1, -1].double() - reference).norm() / reference.norm())
        for _ in range(3):
            call()
    times = in_turns(calls, rounds, 10)
    size = (k.numel() + v.numel()) * 2
    rates = {name: size / statistics.median(t) / 1e9 for name, t in times.items()}
    shares = {name: rate / copy for name, rate in rates.items()}
    result = {"shape": shape, "errors": errors, "milliseconds": times}
    return result | {"tb_s": rates, "share_of_copy": shares}


def features(q: Any) -> dict[str, dict[str, Any]]:
    """Keywords of one feature at a time."""
    _, heads, seqlen, _ = q.shape
    table = torch.randn(2 * seqlen, device="cuda")

    def squash(score, batch, head, q_idx, k_idx):  # type: ignore[no-untyped-def]
        return 20.0 * math.tanh(score / 20.0)

    def relative(score, batch, head, q_idx, k_idx, table):  # type: ignore[no-untyped-def]
        return score + table[q_idx - k_idx + seqlen]

    return {
        "plain": {},
        "softcap": {"softcap": 20.0},
        "alibi_slopes": {"alibi_slopes": torch.rand(heads, device="cuda")},
        "sinks": {"sinks": torch.randn(heads, device="cuda")},
        "bias": {"bias": torch.randn(heads, seqlen, seqlen, device="cuda", dtype=q.dtype)},
        "mask": {"mask": torch.rand(seqlen, seqlen, device="cuda") < 0.9},
        "dropout": {"dropout_p": 0.1, "seed": 1},
        "score_mod tanh": {"score_mod": squash},
        "score_mod table": {"score_mod": relative, "score_mod_aux": (table,)},
    }


def block_masks(seqlen: int) -> dict[str, Any]:
    """Masks by functions: of the causal triangle, of a band of it, and of documents."""
    document = np.sort(np.random.default_rng(0).integers(0, 8, seqlen))

    def causal(batch, head, q_idx, k_idx):  # type: ignore[no-untyped-def]
        return k_idx <= q_idx

    def window(batch, head, q_idx, k_idx):  # type: ignore[no-untyped-def]
        return k_idx <= q_idx and q_idx - k_idx < 512

    def same(batch, head, q_idx, k_idx, document):  # type: ignore[no-untyped-def]
        return document[q_idx] == document[k_idx]

    return {
        "causal": fusedattn.make_block_mask(causal, None, None, seqlen, seqlen),
        "window of 512": fusedattn.make_block_mask(window, None, None, seqlen, seqlen),
        "8 documents": fusedattn.make_block_mask(same, None, None, seqlen, seqlen, aux=(document,)),
    }


def measure_blocks(rounds: int) -> dict[str, dict[str, float]]:
    """Time with block masks, beside that of all keys and that of the causal keyword."""
    q, k, v = tensors(FEATURES, torch.bfloat16)
    masks = block_masks(FEATURES[3])
    calls: dict[str, Run] = {
        name: functools.partial(fusedattn.attention, q, k, v, block_mask=mask)
        for name, mask in masks.items()
    }
    calls["no mask"] = lambda: fusedattn.attention(q, k, v)
    calls["causal=True"] = lambda: fusedattn.attention(q, k, v, causal=True)
    for call in calls.values():
        call()
    times = in_turns(calls, rounds, 5)
    kept = {name: float((mask.kinds > 0).mean()) for name, mask in masks.items()}
    return {
        name: {"milliseconds": statistics.median(t), "kept": kept.get(name, 1.0)}
        for name, t in times.items()
    }


def measure_features(rounds: int) -> dict[str, float]:
    """TFLOP/s of one feature at a time, causal; the operations are those of plain attention."""
    q, k, v = tensors(FEATURES, torch.bfloat16)
    calls = {
        name: functools.partial(fusedattn.attention, q, k, v, causal=True, **keywords)
        for name, keywords in features(q).items()
    }
    for call in calls.values():
        call()
    times = in_turns(calls, rounds, 3)
    batch, heads, _, seqlen, dim = FEATURES
    work = 2 * batch * heads * seqlen * seqlen * dim
    return {name: work / statistics.median(t) / 1e9 for name, t in times.items()}


def host_microseconds(count: int = 2000) -> dict[str, float]:
    """Time of the host for one call on tensors, as the GPU keeps up."""
    q, k, v = tensors((1, 1, 1, 64, 64), torch.bfloat16)
    out = torch.empty_like(q)
    step: Any = fusedattn.plan(q, k, v)
    into: Any = fusedattn.plan(q, k, v, out=out)
    _, prompt, _ = tensors((1, 32, 8, 4096, 128), torch.bfloat16)
    token = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    addresses = {name: x.data_ptr() for name, x in zip("qkv", (q, k, v), strict=True)}
    addresses["out"] = out.data_ptr()
    stream = torch.cuda.current_stream().cuda_stream
    calls: dict[str, Run] = {
        "attention": lambda: fusedattn.attention(q, k, v),
        "attention(out=)": lambda: fusedattn.attention(q, k, v, out=out),
        "plan": lambda: step(q, k, v),
        "plan(out=)": lambda: into(q, k, v, out=out),
        "prepared launch": lambda: into._prepared.run(addresses, stream),
        "attention, split keys": lambda: fusedattn.attention(token, prompt, prompt),
    }
    result = {}
    for name, call in calls.items():
        call()
        times = []
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(count // 20):
                call()
            times.append((time.perf_counter() - start) / (count // 20) * 1e6)
        torch.cuda.synchronize()
        result[name] = statistics.median(times)
    return result


def write(found: dict[str, Any], path: str | None) -> None:
    """Keep what was found so far."""
    if path:
        with open(path, "w") as file:
            json.dump(found, file, indent=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    found["cudnn"] = torch.backends.cudnn.version()
    found["ceilings"], found["host"] = ceilings(), host_microseconds()
    print(found)
    found["decode"] = []
    for decode in DECODE:
        result = measure_decode(decode, options.rounds, found["ceilings"]["copy_tb_s"])
        found["decode"].append(result)
        shares = {name: round(share, 2) for name, share in result["share_of_copy"].items()}
        print(decode, "share of the copy rate", shares, result["errors"])
    found["results"] = []
    for dtype, shapes, peers in (
        (torch.bfloat16, PREFILL, PEERS),
        (torch.float32, FLOAT32, {"efficient": SDPBackend.EFFICIENT_ATTENTION}),
    ):
        for shape in shapes:
            for causal in (False, True):
                result = measure(shape, dtype, causal, options.rounds, peers)
                found["results"].append(result)
                rates = {name: round(rate) for name, rate in result["tflops"].items()}
                print(shape, dtype, "causal" if causal else "full", rates, result["errors"])
                write(found, options.json)
    found["features"] = measure_features(options.rounds)
    print({name: round(rate) for name, rate in found["features"].items()})
    found["blocks"] = measure_blocks(options.rounds)
    print(found["blocks"])
    write(found, options.json)


if __name__ == "__main__":
    main()
