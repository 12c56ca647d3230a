"""Our own backends are held to every law, with every capability declared."""

import pytest
from hypothesis import settings

import fusedattn
from fusedattn.testing import EVERYTHING
from fusedattn.testing.suite import make_suite

DTYPES = ("float32", "float16", "bfloat16", "float64")
# Calls for each law: 8 in a default run, 42 under the profile ci, 428 in a nightly run.
EXAMPLES = settings().max_examples // 7


def on(backend):
    """`attention` on one backend."""

    def attention(q, k, v, **keywords):
        return fusedattn.attention(q, k, v, backend=backend, **keywords)

    attention.__name__ = backend
    attention.source = (
        "import fusedattn\n"
        "from types import SimpleNamespace\n"
        "adapted = SimpleNamespace(fn=lambda *qkv, **keywords: fusedattn.attention(\n"
        f"    *qkv, backend={backend!r}, **keywords))"
    )
    return attention


def gradient_on(backend):
    """`attention_backward` on one backend."""

    def gradient(*arguments, **keywords):
        return fusedattn.attention_backward(*arguments, backend=backend, **keywords)

    gradient.source = (
        "import fusedattn\n"
        "from types import SimpleNamespace\n"
        "adapted = SimpleNamespace(gradient=lambda *given, **keywords: "
        "fusedattn.attention_backward(\n"
        f"    *given, backend={backend!r}, **keywords))"
    )
    return gradient


TestReference = make_suite(
    on("reference"),
    supports=EVERYTHING | {"d_lse"},
    dtypes=DTYPES,
    gradient=gradient_on("reference"),
    max_examples=EXAMPLES,
)

TestBlocked = make_suite(
    on("blocked"),
    supports=EVERYTHING | {"d_lse"},
    dtypes=DTYPES,
    gradient=gradient_on("blocked"),
    max_examples=EXAMPLES,
)


TestCpu = make_suite(
    on("cpu"),
    supports=EVERYTHING | {"d_lse"},
    dtypes=DTYPES,
    gradient=gradient_on("cpu"),
    bitwise=True,
    set_threads=fusedattn.set_num_threads,
    max_examples=EXAMPLES,
)


@pytest.fixture(autouse=True, scope="module")
def _threads_as_before():
    before = fusedattn.get_num_threads()
    yield
    fusedattn.set_num_threads(before)
