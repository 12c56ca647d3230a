"""The report, the command, the pytest class and the adapters say what happened, truly."""

import json

import numpy as np
import pytest
import typer
from kit_subject import Attention, plain_attention, plain_masked_attention
from typer.testing import CliRunner

from fusedattn.testing import (
    EVERYTHING,
    Case,
    Kernel,
    adapters,
    check_attention,
    laws,
    unpack,
)
from fusedattn.testing import cli as kit_cli
from fusedattn.testing.check import read_xfail, select_laws, try_law
from fusedattn.testing.suite import make_suite

pytest_plugins = ["pytester"]


def top_left_attention(q, k, v, *, causal=False):
    """Wrong: aligned to the top left."""
    mask = np.tri(q.shape[-2], k.shape[-2], dtype=bool) if causal else None
    return plain_masked_attention(q, k, v, mask=mask)


def ignores_keywords(q, k, v, **keywords):
    """Wrong: takes any keyword and does nothing about it."""
    return plain_attention(q, k, v)


def test_a_failure_names_law_and_numbers_and_its_code_runs():
    report = check_attention(
        top_left_attention, supports={"causal"}, laws=["equals_reference[causal]"], seed=0
    )
    assert not report.ok
    (failure,) = report.failures
    assert failure.law == "equals_reference[causal]"
    assert "expected" in failure.message
    code = failure.code.replace("from test_kit_check import top_left_attention as fn", "")
    names = {"fn": top_left_attention}
    with pytest.raises(AssertionError, match="expected"):
        exec(code, names)
    assert isinstance(names["case"], Case)
    # Small enough to read: the smallest calls that show it are a few rows by a few keys.
    assert failure.case.q.size <= 64
    assert "np.array" in code


def test_a_report_prints_as_a_table_and_as_json():
    report = check_attention(
        top_left_attention,
        supports={"causal"},
        laws=["equals_reference[", "in_hull"],
        max_examples=10,
        seed=0,
    )
    text = str(report)
    assert "equals_reference[causal]" in text
    assert "not promised" in text
    assert report.failures[0].code in text
    data = json.loads(report.as_json())
    assert data["ok"] is False
    assert {row["status"] for row in data["laws"]} >= {"held", "failed", "not promised"}


def test_the_same_seed_finds_the_same():
    def once():
        report = check_attention(
            top_left_attention, supports={"causal"}, laws=["in", "order"], max_examples=20, seed=7
        )
        return [
            (o.law, o.status, o.examples, o.failure and o.failure.message)
            for o in report.outcomes
            if o.status == "held"
        ]

    assert once() == once()


def test_an_ignored_keyword_is_found():
    report = check_attention(ignores_keywords, laws=["undeclared"], max_examples=1, seed=0)
    assert "no or another effect" in report.failures[0].message


def test_a_known_failure_must_fail():
    known = {"equals_reference[causal]": "top left"}
    options = {"supports": {"causal"}, "laws": ["equals_reference[causal]"], "seed": 0}
    assert check_attention(top_left_attention, xfail=known, **options).ok
    options["max_examples"] = 10
    report = check_attention(plain_masked_attention, xfail=known, **options)
    assert not report.ok
    assert report.outcomes[0].status == "xpassed"


def test_an_xfail_file_is_read(tmp_path):
    path = tmp_path / "known.txt"
    path.write_text("# what fails\nin_hull: rounding  # see above\n\n")
    assert read_xfail(path) == {"in_hull": "rounding"}
    path.write_text("no_such_law: never")
    with pytest.raises(ValueError, match="no_such_law"):
        read_xfail(path)


def test_laws_are_chosen_by_their_beginnings():
    assert {law.name for law in select_laws(["equals_reference[s"])} >= {
        "equals_reference[scale]",
        "equals_reference[sinks]",
    }
    with pytest.raises(ValueError, match="there is no law"):
        select_laws(["nonsense"])


def test_an_unknown_capability_is_an_error():
    with pytest.raises(ValueError, match="flying"):
        check_attention(plain_attention, supports={"flying"})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fn": None}, TypeError, "fn must be callable, but is None"),
        ({"gradient": 3}, TypeError, "gradient must be callable, but is 3"),
        ({"domain": "x"}, TypeError, "domain must be callable, but is 'x'"),
        ({"supports": "causal"}, TypeError, "supports must hold names, but is 'causal'"),
        ({"supports": 5}, TypeError, "supports must hold names, but is 5"),
        ({"dtypes": "float32"}, TypeError, "dtypes must hold names, but is 'float32'"),
        ({"dtypes": ("int8",)}, TypeError, "dtypes must hold float16, .* but holds 'int8'"),
        ({"dtypes": ()}, ValueError, "dtypes must hold at least one"),
        ({"laws": "in_hull"}, TypeError, "laws must hold names, but is 'in_hull'"),
        ({"laws": []}, ValueError, "laws must name at least one"),
        ({"xfail": ["in_hull"]}, TypeError, "xfail must be a mapping"),
        ({"max_examples": 0}, ValueError, "max_examples must be in the range 1"),
        ({"max_examples": 2.5}, TypeError, "max_examples must be an int"),
        ({"seed": "a"}, TypeError, "seed must be an int"),
        ({"bitwise": 1}, TypeError, "bitwise must be True or False"),
    ],
)
def test_a_wrong_argument_is_named_and_never_passes_for_a_check(changes, error, message):
    with pytest.raises(error, match=message):
        check_attention(**{"fn": plain_attention, "max_examples": 1, "seed": 0, **changes})


def test_an_exception_is_a_failure_with_its_text():
    def raises(q, k, v):
        raise RuntimeError("no kernel for this shape")

    report = check_attention(raises, laws=["equals_reference"], max_examples=3, seed=0)
    assert "RuntimeError: no kernel for this shape" in report.failures[0].message


def test_a_domain_is_kept_to():
    seen = []

    def picky(q, k, v, *, mask=None):
        seen.append((q.shape[-1], q.shape[-2] % 16, k.shape[-2] % 16))
        return plain_masked_attention(q, k, v, mask=mask)

    def domain(problem):
        if problem.head_dim not in (32, 64) or problem.head_dim_v != problem.head_dim:
            return "head_dim must be 32 or 64"
        return "lengths in 16" if problem.seqlen_q % 16 or problem.seqlen_k % 16 else None

    report = check_attention(picky, domain=domain, max_examples=4, seed=0, supports={"mask"})
    assert report.ok, report
    assert {d for d, _, _ in seen} == {32, 64}
    assert {(a, b) for _, a, b in seen} == {(0, 0)}
    assert sum(o.examples for o in report.outcomes) >= 25


def test_a_kernel_that_promises_nothing_is_asked_for_nothing():
    asked = set()

    def fn(q, k, v, **keywords):
        asked.update(keywords)
        assert all(x.flags.c_contiguous for x in (q, k, v))
        assert q.shape[1] == k.shape[1]
        assert q.ndim == 4
        return plain_attention(q, k, v)

    check_attention(fn, max_examples=4, seed=0, laws=[law.name for law in laws.ALL[1:]])
    assert asked == set()


@pytest.mark.parametrize("law", [law for law in laws.ALL if law.name != "adjoint_identity"])
def test_each_law_is_tried_on_a_kernel_that_promises_all(law):
    from test_kit_gradients import forward, gradient

    kernel = Kernel(
        forward, supports=EVERYTHING | {"d_lse"}, gradient=gradient, set_threads=lambda n: None
    )
    if law.name == "undeclared_keywords_are_refused":
        kernel = Kernel(plain_attention)
    outcome = try_law(law, kernel, 10, 0)
    assert outcome.status == "held"
    assert outcome.examples >= 1
    assert law.promise.endswith(".")
    assert "If this does not hold" in " ".join(law.check.__doc__.split())


def test_a_case_prints_as_code_that_makes_it_again():
    rng = np.random.default_rng(0)
    case = Case(
        rng.standard_normal((1, 2, 3, 4)).astype(np.float32),
        rng.standard_normal((1, 2, 50, 4)).astype(np.float32),
        np.full((1, 2, 50, 4), np.inf, np.float32),
        {"mask": np.array([True, False] * 25), "causal": True, "seed": 2**64 - 1},
        {"q": "reversed"},
        seed=3,
    )
    names = {"np": np, "Case": Case, "unpack": unpack, "inf": np.inf, "nan": np.nan}
    again = eval(case.code(), names)
    for name in "qkv":
        assert getattr(again, name).tobytes() == getattr(case, name).tobytes()
    assert again.code() == case.code()


def rounds_weights(q, k, v):
    """Exact but for its weights, which are rounded to the type of the inputs."""
    wide = [x.astype(np.float32) for x in (q, k, v)]
    scores = wide[0] @ wide[1].swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    return ((weights.astype(q.dtype).astype(np.float32) @ wide[2]) / total).astype(q.dtype)


def test_half_weights_have_to_be_confessed():
    options = {"dtypes": ("float16", "bfloat16"), "max_examples": 15, "seed": 0}
    report = check_attention(rounds_weights, supports={"half_weights"}, **options)
    assert report.ok, report
    assert not check_attention(rounds_weights, laws=["equals_reference", "linear"], **options).ok


def test_a_suite_has_one_test_a_promised_law(pytester):
    pytester.makepyfile(
        """
        import numpy as np
        from fusedattn.testing.suite import make_suite

        def attention(q, k, v, *, causal=False):
            scores = q @ k.swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5)
            if causal:
                scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            return (weights / weights.sum(-1, keepdims=True)) @ v

        TestAttention = make_suite(
            attention,
            supports={"causal"},
            laws=["equals_reference", "equals_reference[", "linear_in_v", "order_of_keys"],
            xfail={"equals_reference[causal]": "top left", "order_of_keys": "it holds"},
        )
        """
    )
    result = pytester.runpytest(
        "-p", "fusedattn.testing.plugin", "--attention-examples=20", "--attention-seed=0", "-q"
    )
    outcomes = result.parseoutcomes()
    assert outcomes["xfailed"] == 1  # as known
    assert outcomes["failed"] >= 1  # order_of_keys holds although it is known to fail
    result.stdout.fnmatch_lines(["*laws.equality.*(kernel, case)*", "*XPASS(strict)*"])


def test_a_suite_names_its_tests_for_laws():
    suite = make_suite(Attention(), supports={"gqa"})
    (mark,) = suite.test_law.pytestmark
    names = [case.id for case in mark.args[1]]
    assert "equals_reference[gqa]" in names
    assert "equals_reference[causal]" not in names


class TestCommand:
    def run(self, *arguments):
        app = typer.Typer()
        app.command()(kit_cli.check)
        return CliRunner().invoke(app, list(arguments))

    def test_a_report_that_cannot_be_written_is_printed(self, tmp_path):
        where = ("--json", str(tmp_path / "nowhere/report.json"))
        done = self.run(
            "kit_subject:plain_attention", "--examples", "1", "--laws", "in_hull", *where
        )
        output = done.output.replace("\n", "")  # long paths are wrapped
        assert (done.exit_code, "held" in output, "nowhere" in output) == (2, True, True)

    def test_exit_status_0_only_if_all_laws_hold(self, tmp_path):
        path = tmp_path / "report.json"
        good = self.run("kit_subject:plain_attention", "--examples", "3", "--json", str(path))
        assert good.exit_code == 0, good.output
        assert json.loads(path.read_text())["ok"] is True
        bad = self.run(
            "test_kit_check:top_left_attention",
            "--supports",
            "causal",
            "--seed",
            "0",
            "--laws",
            "equals_reference[causal]",
        )
        assert bad.exit_code == 1
        assert "from test_kit_check import top_left_attention as fn" in bad.output

    @pytest.mark.parametrize(
        ("arguments", "word"),
        [
            (["kit_subject"], "MODULE:FUNCTION"),
            (["no_such_module:fn"], "no_such_module"),
            (["kit_subject:nothing"], "nothing"),
            (["kit_subject:plain_attention", "--adapter", "magic"], "magic"),
            (["kit_subject:plain_attention", "--laws", "gravity"], "gravity"),
            (["kit_subject:plain_attention", "--supports", "flying"], "flying"),
        ],
    )
    def test_a_mistaken_command_has_status_2_and_says_why(self, arguments, word):
        result = self.run(*arguments)
        assert result.exit_code == 2
        assert word in result.output


def flash_style(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Stand-in with the signature of flash_attn_func, on NumPy arrays."""
    q, k, v = (x.swapaxes(-3, -2) for x in (q, k, v))
    sides = tuple(None if side < 0 else side for side in window_size)
    out, lse = Attention()(
        q,
        k,
        v,
        scale=softmax_scale,
        causal=causal,
        window_size=sides,
        softcap=softcap or None,
        alibi_slopes=alibi_slopes,
        return_lse=True,
    )
    out = np.ascontiguousarray(out.swapaxes(-3, -2))
    return (out, lse, None) if return_attn_probs else out


def test_the_flash_attn_adapter():
    adapted = adapters.flash_attn(flash_style)
    report = check_attention(**adapted.options(), max_examples=4, seed=0)
    assert report.ok, report
    assert {"causal", "window_size", "softcap"} <= adapted.supports


def test_the_torch_adapter():
    torch = pytest.importorskip("torch")
    adapted = adapters.torch(torch.nn.functional.scaled_dot_product_attention)
    # Laws that hold for any version; what does not is in docs/peers.md.
    held = ["in_hull", "linear_in_v", "batch_items", "gradients", "undeclared", "far_memory"]
    options = {**adapted.options(), "supports": adapted.supports - {"scale"}}
    report = check_attention(**options, laws=held, max_examples=5, seed=0)
    assert report.ok, report


def test_the_onnxruntime_adapter():
    library = pytest.importorskip("onnxruntime")
    adapted = adapters.onnxruntime(library.InferenceSession)
    report = check_attention(
        **adapted.options(), laws=["equals_reference", "in_hull"], max_examples=8, seed=0
    )
    assert report.ok, report
