"""Wrong gradients are killed, right ones pass."""

import dataclasses
import threading

import numpy as np
import pytest

from fusedattn import attention, reference
from fusedattn.problem import Gradients, make_problem
from fusedattn.testing import EVERYTHING, check_attention
from fusedattn.testing.check import try_law
from fusedattn.testing.kernel import Kernel
from fusedattn.testing.laws import ALL

SUPPORTS = EVERYTHING | {"d_lse"}
LAWS = {law.name: law for law in ALL}


def forward(q, k, v, **keywords):
    return attention(q, k, v, backend="reference", **keywords)


class Call:
    """One call of the gradient: what a mutant may look at and get wrong."""

    def __init__(self, d_out, q, k, v, out, lse, d_lse=None, bias_grad=True, **keywords):
        bshd = keywords.get("layout") == "bshd"
        self.swap = (lambda x: x.swapaxes(-3, -2)) if bshd else (lambda x: x)
        self.problem = make_problem(q, k, v, **keywords)
        self.d_out, self.out = self.swap(d_out), self.swap(out)
        self.lse, self.d_lse = lse, d_lse

    def gradients(self, **changes):
        """Right gradients, of a call with other options or operands where they are given."""
        own = {name: changes.pop(name, getattr(self, name)) for name in CALL}
        problem = dataclasses.replace(self.problem, **changes)
        return reference.backward(problem, *own.values())

    def restore(self, found):
        """Canonical gradients in the caller's layout."""
        return Gradients(*map(self.swap, found[:3]), *found[3:])


CALL = ("d_out", "out", "lse", "d_lse")


def gradient(*arguments, change=Call.gradients, **keywords):
    call = Call(*arguments, **keywords)
    return call.restore(change(call))


MUTANTS = {}


def mutant(law, **options):
    """Enter a wrong gradient with the law that kills it."""

    def enter(change):
        MUTANTS[change.__name__] = (change, law, options)
        return change

    return enter


def times(name, factor):
    def change(call):
        found = call.gradients()
        value = getattr(found, name)
        scaled = None if value is None else (value * factor).astype(value.dtype)
        return found._replace(**{name: scaled})

    return change


def with_other(**changes):
    """Differentiate another problem than the one that was computed."""
    return lambda call: call.gradients(out=None, lse=None, **changes)


EQUAL = "gradients_equal_reference"
for name, law, change in (
    ("d_q_sign", EQUAL, times("d_q", -1)),
    ("d_k_twice", EQUAL, times("d_k", 2)),
    ("d_v_off_by_a_millionth", EQUAL, times("d_v", 1 + 1e-6)),
    ("d_bias_sign", f"{EQUAL}[bias]", times("d_bias", -1)),
    ("d_sinks_sign", f"{EQUAL}[sinks]", times("d_sinks", -1)),
    ("softcap_not_differentiated", f"{EQUAL}[softcap]", with_other(softcap=None)),
    ("dropout_not_differentiated", f"{EQUAL}[dropout_p]", with_other(dropout_p=0.0)),
    ("d_q_off_by_a_hundredth", "adjoint_identity", times("d_q", 1.01)),
    ("d_bias_off_by_a_hundredth", "adjoint_identity", times("d_bias", 1.01)),
    ("d_sinks_off_by_a_tenth", "adjoint_identity", times("d_sinks", 1.1)),
):
    change.__name__ = name
    mutant(law)(change)


@mutant(EQUAL)
def d_q_without_scale(call):
    found = call.gradients()
    return found._replace(d_q=found.d_q / (call.problem.scale or 1))


@mutant(EQUAL)
def delta_left_out(call):
    return call.gradients(out=np.zeros(call.problem.out_shape))


@mutant(f"{EQUAL}[sinks]")
def sinks_forgotten(call):
    found = call.gradients()
    if call.problem.sinks is None:
        return found
    without = call.gradients(out=None, lse=None, sinks=None)
    return without._replace(d_sinks=found.d_sinks)


@mutant(EQUAL)
def d_lse_ignored(call):
    return call.gradients(d_lse=None)


@mutant("adjoint_identity")
def d_lse_halved(call):
    return call.gradients(d_lse=call.d_lse / 2)


@mutant(f"{EQUAL}[gqa]")
def one_head_of_a_group(call):
    found, problem = call.gradients(), call.problem
    if problem.group_size == 1:
        return found
    alone = call.d_out.copy()
    others = np.arange(problem.num_heads) % problem.group_size != 0
    alone[..., others, :, :] = 0
    return found._replace(d_v=call.gradients(d_out=alone).d_v)


@mutant(f"{EQUAL}[gqa]")
def transposed_heads(call):
    found = call.gradients()
    return found._replace(d_k=found.d_k[..., ::-1, :, :].copy())


@mutant(f"{EQUAL}[bias]")
def bias_not_summed_over_heads(call):
    found = call.gradients()
    shape = call.problem.bias_shape
    if shape is None or (len(shape) > 2 and shape[-3] != 1):
        return found
    alone = call.d_out.copy()
    alone[..., 1:, :, :] = 0
    d_lse = call.d_lse.copy()
    d_lse[..., 1:, :] = 0
    return found._replace(d_bias=call.gradients(d_out=alone, d_lse=d_lse).d_bias)


@mutant(f"{EQUAL}[bias]")
def bias_gradient_missing(call):
    return call.gradients()._replace(d_bias=None)


@mutant(f"{EQUAL}[sinks]")
def sinks_gradient_missing(call):
    return call.gradients()._replace(d_sinks=None)


@mutant("memory_layout_does_not_matter_to_gradients")
def strides_ignored(call):
    base = np.lib.stride_tricks.as_strided
    d_out = call.d_out
    if d_out.size == 0 or d_out.strides[-1] < 0:
        return call.gradients()
    steps = np.cumprod((d_out.itemsize, *d_out.shape[:0:-1]))[::-1]
    return call.gradients(d_out=base(d_out, strides=np.minimum(steps, np.abs(d_out.strides))))


@mutant(f"{EQUAL}[layout]")
def layout_of_d_out_ignored(call):
    same = call.problem.num_heads == call.problem.seqlen_q
    square = same and call.problem.layout == "bshd"
    return call.gradients(d_out=call.swap(call.d_out)) if square else call.gradients()


@mutant("finite_gradients", dtypes=("float32",))
def slope_in_half(call):
    """Values at the end of the range do not fit a smaller type."""
    found = call.gradients()
    with np.errstate(over="ignore"):
        return found._replace(d_q=found.d_q.astype(np.float16).astype(found.d_q.dtype))


@mutant("rows_without_keys_pull_nothing_back")
def nan_of_hidden_rows_leaks(call):
    found = call.gradients()
    lost = np.isnan(call.d_out).any()
    return found._replace(d_v=found.d_v * np.where(lost, np.nan, 1)) if lost else found


@mutant("d_lse_is_shared_out", dtypes=("float32",))
def coarse_lse_used(call):
    """Weights come from the stored lse however large it is."""
    found, problem = call.gradients(), call.problem
    if problem.bias is None or call.d_lse is None:
        return found
    exact = reference.forward(dataclasses.replace(problem, return_lse=True, out_dtype=np.float64))
    shift = np.nan_to_num(call.lse.astype(np.float64), neginf=0.0)
    _, lse, _ = reference._softmax(problem, *reference._scores(problem)[:2])
    assert exact.lse is not None
    off = np.exp(np.nan_to_num(lse, neginf=0.0) - shift)
    shape = (*problem.lse_shape, problem.seqlen_k)
    if problem.bias_shape != shape:
        return found
    return found._replace(d_bias=(found.d_bias * off[..., None]).astype(found.d_bias.dtype))


@mutant("hidden_entries_do_not_leak_into_gradients")
def hidden_nan_leaks(call):
    """0 * NaN is NaN: what a multiplication by hidden weights of 0 gives."""
    found, problem = call.gradients(), call.problem
    bad = np.isnan(np.repeat(problem.k, problem.group_size, axis=-3)).any(axis=(-2, -1))
    return found._replace(
        d_q=np.where(bad[..., None, None], np.nan, found.d_q).astype(found.d_q.dtype)
    )


@mutant("same_call_same_gradients")
def summed_in_any_order(call):
    """What atomic additions in the order of arrival do."""
    found = call.gradients()
    noise = np.random.default_rng().choice([1.0, 1 + 2.0**-52], found.d_q.shape)
    return found._replace(d_q=found.d_q * noise)


THREADS = threading.local()


@mutant(
    "threads_do_not_matter_to_gradients",
    bitwise=True,
    set_threads=lambda n: setattr(THREADS, "count", n),
)
def split_by_threads(call):
    """Each thread adds up a share of the rows."""
    found = call.gradients()
    return found._replace(d_k=found.d_k * (1 + 2.0**-52 * getattr(THREADS, "count", 1)))


@mutant("gradients_of_batch_items_are_independent", bitwise=True)
def scaled_by_the_batch(call):
    found = call.gradients()
    top = np.abs(call.d_out).max(initial=1.0)
    return found._replace(d_v=found.d_v / top * top)


@mutant("memory_layout_does_not_matter_to_gradients", bitwise=True)
def other_order_where_strided(call):
    found = call.gradients()
    if call.d_out.flags.c_contiguous:
        return found
    return found._replace(d_q=np.nextafter(found.d_q, np.inf))


@mutant(EQUAL)
def d_out_overwritten(call):
    call.d_out *= 2
    return call.gradients(d_out=call.d_out / 2)


@mutant(EQUAL)
def gradient_of_float64(call):
    return Gradients(*(None if x is None else x.astype(np.float32) for x in call.gradients()))


@mutant("rows_without_keys_pull_nothing_back")
def written_past_the_end(call):
    base = call.lse
    beside = np.lib.stride_tricks.as_strided(base, (base.size + 1,), (base.itemsize,))
    if base.size:
        beside[-1] = 0
    return call.gradients()


def kernel(change, **options):
    def pull_back(*arguments, **keywords):
        return gradient(*arguments, change=change, **keywords)

    options = {"dtypes": ("float64",), **options}
    return Kernel(forward, supports=SUPPORTS, gradient=pull_back, **options)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_gradient_is_killed(name):
    change, law, options = MUTANTS[name]
    outcome = try_law(LAWS[law], kernel(change, **options), 100, seed=0, shrink=False)
    assert outcome.status == "failed", f"{law} does not kill {name}"


@pytest.mark.deep
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_each_wrong_gradient_is_killed_whatever_the_seed(seed):
    for name, (change, law, options) in MUTANTS.items():
        outcome = try_law(LAWS[law], kernel(change, **options), 300, seed=seed, shrink=False)
        assert outcome.status == "failed", f"{law} does not kill {name}"


def test_the_right_gradient_passes():
    report = check_attention(
        forward,
        supports=SUPPORTS,
        dtypes=("float64", "float32", "bfloat16"),
        gradient=gradient,
        set_threads=lambda n: None,
        bitwise=True,
        laws=[law.name for law in ALL if "gradient" in law.name or "adjoint" in law.name],
        max_examples=8,
        seed=0,
    )
    assert report.ok, report


def table():
    """Markdown table: the law that kills each wrong gradient, and how many calls that took."""
    print("| mutant | killed by | calls |\n|---|---|---|")
    for name, (change, law, options) in MUTANTS.items():
        outcome = try_law(LAWS[law], kernel(change, **options), 100, 0, shrink=False)
        calls = outcome.examples if outcome.status == "failed" else "not within 100"
        print(f"| {name} | {law} | {calls} |")


if __name__ == "__main__":
    table()
