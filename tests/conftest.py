"""Hypothesis profiles: choose one with `pytest --hypothesis-profile=nightly`. Fixtures."""

import pytest
from hypothesis import HealthCheck, settings

import fusedattn

# One slow first example (a compile) is no sign of a slow property.
_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

# The same draws each time: a first run says what ours say. New ones are for "nightly".
settings.register_profile("default", max_examples=40, derandomize=True, **_common)
settings.register_profile("ci", max_examples=300, derandomize=True, print_blob=True, **_common)
settings.register_profile("nightly", max_examples=3000, print_blob=True, **_common)
settings.load_profile("default")


@pytest.fixture
def set_threads():
    """`fusedattn.set_num_threads`; afterwards there are as many threads as before."""
    before = fusedattn.get_num_threads()
    yield fusedattn.set_num_threads
    fusedattn.set_num_threads(before)
