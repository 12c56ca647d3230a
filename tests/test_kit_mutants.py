"""The kit bites: every planted mutant is killed, and nothing that is right is."""

import re
from pathlib import Path

import numpy as np
import pytest
from kit_kills import KILLED_BY
from kit_mutants import MUTANTS
from kit_subject import Attention, plain_attention, plain_masked_attention

from fusedattn import attention
from fusedattn.testing import EVERYTHING, Kernel, check_attention
from fusedattn.testing.check import try_law
from fusedattn.testing.laws import ALL

DTYPES = ("float32", "float16", "bfloat16", "float64")
DOCS = Path(__file__).parents[1] / "docs" / "test-kit.md"
# What `plain_masked_attention` takes.
MASKED = {"causal", "mask", "scale", "return_lse"}


def killers(name, first_only=True, seed=0, max_examples=100):
    """Names of the laws that a mutant breaks within the default budget of examples."""
    factory, options = MUTANTS[name]
    options = {**options, "supports": frozenset(options["supports"])}
    found = []
    # The law that is known to kill it comes first; any other will do as well.
    for law in sorted(ALL, key=lambda law: law.name != KILLED_BY[name]):
        outcome = try_law(law, Kernel(factory(), **options), max_examples, seed, shrink=False)
        if outcome.status == "failed":
            found.append(law.name)
            if first_only:
                break
    return found


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mutant_is_killed(name):
    assert killers(name), f"no law kills {name}"


def test_the_docs_tell_of_every_mutant_and_its_law():
    table = DOCS.read_text().partition("Wrong gradients (")[0]
    rows = re.findall(r"^\| (\w+) \| ([\w\[\]]+) \| \d+ \|$", table, re.MULTILINE)
    assert dict(rows) == KILLED_BY
    assert KILLED_BY.keys() == MUTANTS.keys()


def rounds_bias_and_sinks_to_float32(q, k, v, *, bias=None, sinks=None):
    """Wrong for float64, and for nothing else."""
    with np.errstate(over="ignore"):
        narrow = [None if x is None else x.astype(np.float32) for x in (bias, sinks)]
    return attention(q, k, v, bias=narrow[0], sinks=narrow[1], backend="reference")


def test_a_kernel_of_many_types_is_given_those_that_go_together():
    supports = frozenset({"bias", "sinks"})
    kernel = Kernel(rounds_bias_and_sinks_to_float32, supports=supports, dtypes=DTYPES)
    law = next(law for law in ALL if law.name == "equals_reference")
    for seed in range(3):
        assert try_law(law, kernel, 100, seed, shrink=False).status == "failed"


@pytest.mark.deep
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_each_mutant_is_killed_whatever_the_seed(seed):
    assert [name for name in MUTANTS if not killers(name, seed=seed)] == []


@pytest.mark.deep
def test_the_reference_survives_2000_examples():
    report = check_attention(
        on_reference,
        supports=EVERYTHING,
        dtypes=DTYPES,
        laws=["equals_reference", "finite_in_finite_out", "split_and_merge"],
        max_examples=2000,
        seed=0,
    )
    assert report.ok, report


def on_reference(q, k, v, **keywords):
    return attention(q, k, v, backend="reference", **keywords)


def test_the_subject_of_the_mutants_is_right():
    report = check_attention(
        Attention(), supports=EVERYTHING, dtypes=DTYPES, max_examples=12, seed=1
    )
    assert report.ok, report


def test_a_plain_float32_attention_is_accepted():
    report = check_attention(plain_attention, max_examples=40, seed=2)
    assert report.ok, report


def test_a_masked_float32_attention_is_accepted():
    report = check_attention(plain_masked_attention, supports=MASKED, max_examples=20, seed=3)
    assert report.ok, report


@pytest.mark.deep
@pytest.mark.parametrize("seed", range(20))
def test_correct_kernels_never_fail(seed):
    for fn, supports, dtypes in (
        (Attention(), EVERYTHING, DTYPES),
        (plain_attention, (), ("float32",)),
        (plain_masked_attention, MASKED, ("float32",)),
    ):
        report = check_attention(fn, supports=supports, dtypes=dtypes, max_examples=15, seed=seed)
        assert report.ok, report
