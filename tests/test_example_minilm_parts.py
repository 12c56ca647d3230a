"""The forward pass of the example on a small random model: needs no weights."""

import numpy as np
import pytest
from scipy.special import erf

from examples.minilm import model as example
from examples.minilm.model import Model, embed_packed, embed_padded, gelu
from fusedattn import attention

LENGTHS = [5, 2, 9, 5, 3, 9, 5]


@pytest.fixture
def model():
    rng = np.random.default_rng(0)
    hidden, inner, layers = 12, 20, 2
    shapes = {
        "embeddings.word_embeddings.weight": (50, hidden),
        "embeddings.position_embeddings.weight": (16, hidden),
        "embeddings.token_type_embeddings.weight": (2, hidden),
        "embeddings.LayerNorm.weight": (hidden,),
        "embeddings.LayerNorm.bias": (hidden,),
    }
    for layer in range(layers):
        name = f"encoder.layer.{layer}"
        for part, rows, columns in (
            ("attention.self.query", hidden, hidden),
            ("attention.self.key", hidden, hidden),
            ("attention.self.value", hidden, hidden),
            ("attention.output.dense", hidden, hidden),
            ("intermediate.dense", inner, hidden),
            ("output.dense", hidden, inner),
        ):
            shapes[f"{name}.{part}.weight"] = (rows, columns)
            shapes[f"{name}.{part}.bias"] = (rows,)
        for part in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{name}.{part}.weight"] = shapes[f"{name}.{part}.bias"] = (hidden,)
    weights = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return Model(weights, num_layers=layers, num_heads=3, epsilon=1e-12)


@pytest.fixture
def tokens():
    rng = np.random.default_rng(1)
    return [rng.integers(50, size=length).tolist() for length in LENGTHS]


def arrangements(model, tokens):
    return {
        "lengths": embed_padded(model, tokens, hide="lengths"),
        "mask": embed_padded(model, tokens, hide="mask"),
        "packed": embed_packed(model, tokens),
    }


def test_gelu_is_that_of_the_error_function():
    x = np.concatenate([np.linspace(-12, 12, 1001), [0.0, -0.0, 1e-300, -40.0, 40.0]])
    expected = 0.5 * x * (1 + erf(x * np.sqrt(0.5)))
    np.testing.assert_allclose(gelu(x), expected, rtol=0, atol=4e-15)
    single = x.astype(np.float32)
    assert gelu(single).dtype == np.float32
    np.testing.assert_allclose(gelu(single), expected, rtol=1e-6, atol=1e-6)


def test_padded_and_packed_give_what_each_sentence_gives_alone(model, tokens):
    alone = np.concatenate(
        [embed_padded(model, [sentence], backend="reference") for sentence in tokens]
    )
    for name, vectors in arrangements(model, tokens).items():
        np.testing.assert_allclose(vectors, alone, rtol=0, atol=1e-12, err_msg=name)


def test_without_its_padding_hidden_a_batch_gives_something_else(model, tokens, monkeypatch):
    right = embed_padded(model, tokens)

    def attends_to_padding(q, k, v, *, seqused_k, **options):
        return attention(q, k, v, **options)

    monkeypatch.setattr(example, "attention", attends_to_padding)
    assert np.abs(embed_padded(model, tokens) - right).max() > 1e-2


@pytest.mark.parametrize("hide", ["lengths", "mask"])
def test_what_stands_in_the_padding_changes_no_bit(hide, model, tokens, monkeypatch):
    right = embed_padded(model, tokens, hide=hide)
    ids, lengths = example.pad(tokens)
    ids[np.arange(ids.shape[1]) >= lengths[:, None]] = 49
    monkeypatch.setattr(example, "pad", lambda _: (ids, lengths))
    np.testing.assert_array_equal(embed_padded(model, tokens, hide=hide), right)


def test_packed_attention_computes_each_row_once_in_every_layer(model, tokens, monkeypatch):
    shapes = []

    def counted(q, k, v, **options):
        shapes.append(q.shape)
        assert set(options) == {"out", "layout", "backend"}
        return attention(q, k, v, **options)

    monkeypatch.setattr(example, "attention", counted)
    embed_packed(model, tokens)
    assert shapes == [(1, 2, 3, 4), (1, 3, 3, 4), (3, 5, 3, 4), (2, 9, 3, 4)] * model.num_layers


def test_packed_attention_copies_nothing(monkeypatch):
    q, k, v = np.random.default_rng(2).standard_normal((3, 10, 2, 4))
    lengths = np.array([2, 2, 3, 3])
    seen = []

    def look(*arrays, out, **options):
        seen.extend(np.shares_memory(x, y) for x, y in zip(arrays, (q, k, v), strict=True))
        return attention(*arrays, out=out, **options)

    monkeypatch.setattr(example, "attention", look)
    out = example.packed_attention(q, k, v, lengths=lengths)
    assert seen == [True] * 6
    for stop, length in zip(np.cumsum(lengths), lengths, strict=True):
        rows = slice(stop - length, stop)
        alone = attention(q[rows], k[rows], v[rows], layout="bshd")
        np.testing.assert_array_equal(out[rows], alone)


def test_the_backend_reaches_every_layer(model, tokens, monkeypatch):
    asked = []

    def named(*arrays, backend, **options):
        asked.append(backend)
        return attention(*arrays, backend=backend, **options)

    monkeypatch.setattr(example, "attention", named)
    embed_padded(model, tokens, backend="blocked")
    embed_packed(model, tokens, backend="reference")
    per_layer = len(set(LENGTHS))
    expected = ["blocked"] * model.num_layers + ["reference"] * (per_layer * model.num_layers)
    assert asked == expected
