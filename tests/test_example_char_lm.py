"""The example that trains: right gradients, a loss that falls, a cache that changes nothing."""

import itertools

import numpy as np
import pytest
from typer.testing import CliRunner

from examples.char_lm import __main__ as program
from examples.char_lm import trigram
from examples.char_lm.generation import Cache, draw, extend, generate
from examples.char_lm.model import (
    EPSILON,
    Shape,
    cross_entropy,
    forward,
    init,
    loss_and_gradients,
    normalise,
)
from examples.char_lm.text import Corpus, spread, standard_library, windows
from examples.char_lm.training import Adam, Plan, evaluate, learning_rate, train

SMALL = Shape(layers=2, heads=2, channels=8)
ALPHABET = 7
TEXT = b"the cat sat on the mat and the dog sat on the log; "


def weights_and_text(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    weights = init(SMALL, ALPHABET, seed, dtype)
    for name, x in weights.items():
        if name.endswith("norm"):
            x *= rng.uniform(0.5, 1.5, x.shape)
    tokens = rng.integers(0, ALPHABET, (2, 3, 10))
    return weights, tokens[0], tokens[1]


def naive_loss(weights, before, after):
    """The same model by its definition: one piece, one head, one softmax over all at a time."""
    total = 0.0
    for tokens, wanted in zip(before, after, strict=True):
        x = np.stack([weights["embedding"][token] for token in tokens])
        for layer in range(SMALL.layers):
            own = {n.split(".", 1)[1]: w for n, w in weights.items() if n[0] == str(layer)}
            q, k, v = np.split(rms(x) * own["attention.norm"] @ own["attention.qkv"], 3, axis=1)
            heads = []
            for h, part in enumerate(np.split(np.arange(SMALL.channels), SMALL.heads)):
                scores = q[:, part] @ k[:, part].T / np.sqrt(len(part))
                i, j = np.indices(scores.shape)
                scores = scores - 2.0 ** (-8 * (h + 1) / SMALL.heads) * abs(i - j)
                exps = np.exp(scores) * (j <= i)
                heads.append(exps / exps.sum(1, keepdims=True) @ v[:, part])
            x = x + np.concatenate(heads, axis=1) @ own["attention.join"]
            up = rms(x) * own["forward.norm"] @ own["forward.up"]
            x = x + np.maximum(up, 0) @ own["forward.down"]
        p = np.exp(rms(x) * weights["norm"] @ weights["unembedding"])
        p = p / p.sum(1, keepdims=True)
        total -= np.log(p[np.arange(len(wanted)), wanted]).sum()
    return total / after.size


def rms(x):
    return x / np.sqrt((x**2).mean(1, keepdims=True) + EPSILON)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_loss_is_that_of_the_naive_model(backend):
    weights, before, after = weights_and_text()
    loss, _ = loss_and_gradients(weights, SMALL, before, after, backend)
    np.testing.assert_allclose(loss, naive_loss(weights, before, after), rtol=1e-12)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_every_gradient_is_that_of_the_naive_model(backend):
    weights, before, after = weights_and_text()
    _, gradients = loss_and_gradients(weights, SMALL, before, after, backend)
    assert gradients.keys() == weights.keys()
    rng = np.random.default_rng(1)
    step = 1e-6
    for name, weight in weights.items():
        assert gradients[name].shape == weight.shape
        for _ in range(3):
            move = rng.standard_normal(weight.shape)
            ends = [
                naive_loss(weights | {name: weight + sign * step * move}, before, after)
                for sign in (1, -1)
            ]
            expected = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(
                (gradients[name] * move).sum(), expected, rtol=1e-6, atol=1e-8, err_msg=name
            )


def test_a_cache_changes_no_logits():
    weights, before, _ = weights_and_text()
    text = before[0]
    whole, *_ = forward(weights, SMALL, text[None])
    for sizes in ([1] * 10, [4, 1, 1, 3, 1], [10]):
        cache, done = Cache(SMALL, 12, np.float64), 0
        for size in sizes:
            logits = extend(weights, SMALL, cache, text[done : done + size])
            done += size
            np.testing.assert_allclose(logits, whole[0, done - 1], rtol=1e-11, atol=1e-12)


def test_a_text_written_with_the_cache_is_the_text_written_without():
    weights, before, _ = weights_and_text(np.float32)
    prompt = before[0, :3]
    written = list(generate(weights, SMALL, prompt, 30, temperature=0.9, seed=5))
    rng, text = np.random.default_rng(5), list(prompt)
    for _ in range(30):
        logits, *_ = forward(weights, SMALL, np.array([text]))
        text.append(draw(rng, logits[0, -1], 0.9))
    assert written == text[3:]
    assert len(set(written)) > 3


def test_a_cache_that_is_full_says_so():
    weights, before, _ = weights_and_text()
    with pytest.raises(ValueError, match="the cache holds 4 characters, not 5"):
        extend(weights, SMALL, Cache(SMALL, 4), before[0, :5])


def corpus():
    alphabet = bytes(sorted(set(TEXT)))
    table = {character: place for place, character in enumerate(alphabet)}
    tokens = np.array([table[character] for character in TEXT * 40], np.uint8)
    return Corpus(alphabet, tokens[:1500], tokens[1500:])


def test_the_loss_falls_below_the_trigram_models():
    text = corpus()
    plan = Plan(steps=80, batch=8, length=32, rate=1e-2, warmup=5)
    shape = Shape(layers=2, heads=2, channels=32)
    places = spread(text.validation, 10, plan.length)
    judged = windows(text.validation, places, plan.length)
    *_, last = (steps := list(train(plan, shape, text)))
    losses = [progress.loss for progress in steps]
    counted = trigram.trigram(text.training, len(text.alphabet))
    baseline = trigram.loss(counted, text.validation, places, plan.length)
    assert losses[0] == pytest.approx(np.log(len(text.alphabet)), rel=0.2)
    assert evaluate(last.weights, shape, *judged) < baseline < losses[0] / 3
    again = itertools.islice(train(plan, shape, text), 5)
    assert [progress.loss for progress in again] == losses[:5]  # one seed, one run


def test_adam_moves_by_the_rate_at_first_and_clips():
    weights = {"w": np.zeros(3)}
    Adam(weights).update(weights, {"w": np.array([3e3, -4e3, 0.0])}, 0.1)
    np.testing.assert_allclose(weights["w"], [-0.1, 0.1, 0.0], rtol=1e-5)


def test_the_learning_rate_rises_and_falls():
    plan = Plan(steps=100, rate=1.0, warmup=10)
    rates = [learning_rate(plan, step) for step in range(100)]
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 <= rates[-1] < 0.11


def test_normalised_rows_have_a_mean_square_of_one():
    x = np.random.default_rng(0).standard_normal((4, 5, 16)) * 7
    np.testing.assert_allclose((normalise(x, np.ones(16)) ** 2).mean(-1), 1, rtol=1e-5)


def test_cross_entropy_is_differentiated():
    rng = np.random.default_rng(0)
    logits, after = rng.standard_normal((2, 3, 5)), rng.integers(0, 5, (2, 3))
    _, gradient = cross_entropy(logits, after)
    for place in np.ndindex(2, 3, 5):
        move = np.zeros_like(logits)
        move[place] = 1e-6
        ends = [cross_entropy(logits + sign * move, after)[0] for sign in (1, -1)]
        np.testing.assert_allclose(gradient[place], (ends[0] - ends[1]) / 2e-6, atol=1e-9)


def test_the_trigram_model_is_a_distribution_and_knows_its_text():
    text = corpus()
    model = trigram.trigram(text.training, len(text.alphabet))
    np.testing.assert_allclose(model.sum(axis=-1), 1, rtol=1e-12)
    assert (model > 0).all()
    t, h, e = (text.alphabet.index(x) for x in b"the")
    assert model[t, h, e] == model[t, h].max() > 0.9


def test_the_trigram_loss_is_the_mean_over_all_characters_of_the_pieces():
    rng = np.random.default_rng(0)
    tokens, model = rng.integers(0, 3, 30), rng.dirichlet(np.ones(3), (3, 3))
    expected = [-np.log(model[tuple(tokens[i - 1 : i + 2])]) for i in (4, 5, 6, 20, 21, 22)]
    found = trigram.loss(model, tokens, np.array([4, 20]), 3)
    np.testing.assert_allclose(found, np.mean(expected))


def test_validation_is_text_that_was_not_learnt_from(tmp_path):
    for number in range(4):
        (tmp_path / f"m{number}.py").write_text(f"# module {number} é\n")
    text = standard_library(tmp_path, every=2)
    assert text.decode(text.training) == "# module 0 ?\n\n# module 2 ?\n"
    assert text.decode(text.validation) == "# module ? ?\n\n# module ? ?\n"
    assert text.decode(text.encode("mod é")) == "mod ?"


def test_pieces_do_not_overlap_and_targets_are_the_next_characters():
    tokens = np.arange(100, dtype=np.uint8)
    starts = spread(tokens, 5, 10)
    assert (np.diff(starts) >= 10).all()
    assert starts.min() >= 1
    before, after = windows(tokens, starts, 10)
    np.testing.assert_array_equal(after, before + 1)


def test_the_program_trains_writes_and_draws(tmp_path):
    picture = tmp_path / "loss.svg"
    options = "--steps 3 --layers 2 --heads 2 --channels 16 --batch 4 --length 16 --validation 20"
    done = CliRunner().invoke(
        program.app, [*options.split(), "--characters", "12", "--picture", str(picture)]
    )
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "nats per character" in text
    assert "3 steps in" in text
    assert "def " in text
    drawn = "is drawn in" in text
    assert drawn == picture.exists()
    if drawn:
        assert "<svg" in picture.read_text()


def test_wrong_options_are_named():
    done = CliRunner().invoke(program.app, ["--heads", "3"], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert "must be a multiple of --heads" in done.output
