"""Results of a run that nobody made, for tests of what is computed from them."""

from bench import results
from bench.cases import all_cases
from bench.peers import PEERS

MACHINE_RATE = 1e11  # of whatever bounds a case, a second


def seconds(case, share):
    """Time that uses so large a part of the machine."""
    work = case.bytes_moved if case.bound_by_memory else case.flops
    return work / (MACHINE_RATE * share)


def record(case, share=0.5, slower=2.0, rms=1e-8):
    """One case: every peer is `slower` times slower than ours and twice as far off."""
    ours = seconds(case, share)
    peers = {}
    for name in PEERS:
        best = ours if name == "fused" else slower * ours
        peers[name] = {
            "way": "the way",
            "note": None,
            "refused": {},
            "rms": rms if name == "fused" else 2 * rms,
            "of_bound": 0.1,
            "rounds": [[3 * best, 2 * best], [best, 4 * best, 3 * best]],
        }
    names = ("group", "shape", "variant", "dtype", "source", "batch", "heads", "heads_kv")
    names += ("seqlen_q", "seqlen_k", "head_dim", "causal")
    return {
        "name": case.name,
        **{name: getattr(case, name) for name in names},
        "flops": case.flops,
        "bytes": case.bytes_moved,
        "machine": {
            "probe": "read" if case.bound_by_memory else "fma",
            "work": MACHINE_RATE / 100,
            "rounds": [[0.02, 0.01], [0.015]],
        },
        "peers": peers,
    }


def apart():
    """What is no ratio to a peer."""
    memory = [{"method": "fused", "seqlen": n, "bytes": 2**20, "note": None} for n in (512, 16384)]
    memory.append({"method": "naive", "seqlen": 512, "bytes": 24 * 2**20, "note": None})
    absent = {"bytes": None, "note": "does not fit into memory", "needed": 24 * 2**30}
    memory.append({"method": "naive", "seqlen": 16384, **absent})

    def own(name, threads, took, machine):
        times = {"rounds": [[2 * took], [took]], "machine": [[machine]]}
        return {"name": name, "flops": 1e9, "threads": threads, "work": 1e9 * threads, **times}

    return {
        "growth": {
            "length": [own("prefill/short", 2, 0.01, 0.005), own("length/long", 2, 0.0104, 0.005)],
            "threads": [
                own("prefill/short", 1, 0.019, 0.005),
                own("prefill/short", 2, 0.01, 0.005),
            ],
        },
        "memory": memory,
        "startup": {"import": [0.04, 0.03, 0.9], "cold": [2.0], "cached": [0.5, 0.7]},
    }


def about():
    """Where it would have been measured."""
    versions = {"python": "3.11.0", "numpy": "2.4.0", "torch": None}
    machine = {
        "cpu": "A Processor",
        "cpus": 2,
        "vector_unit": "AVX2",
        "memory": 2**33,
        "system": "Linux x86_64",
    }
    facts = {"date": "2026-01-01", "commit": "0123456789abcdef", "dirty": False, "threads": 2}
    return {**facts, "machine": machine, "versions": versions}


def whole(cases=None, **options):
    """A whole run, in which every case is alike."""
    records = [record(case, **options) for case in (all_cases() if cases is None else cases)]
    beside = apart()
    return results.Results(
        {"format": results.FORMAT, "about": about(), "apart": beside, "cases": records}
    )
