import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import models
from gqa.decode import speculative
from gqa.decode.generate import generate
from gqa.decode.sampling import next_tokens, processed_logits, row_keys, sampling
from gqa.decode.score import score
from gqa.decode.speculative import draft_and_own_key, verify
from gqa.errors import InputError

N = 9
INPUTS = np.random.default_rng(0).integers(2, 256, (4, 6), dtype=np.int32)
LENGTHS = [6, 2, 0, 4]
NAMES = ["t5_1_1_mini", "llama_mini"]


def model(name, seed=3, **changes):
    return models.create(models.replace(models.size(name), **changes), jax.random.key(seed)).unstacked()


def nearly(network):
    """A draft that agrees with `network` often, not always: its logits are a little off."""
    draft = jax.tree.map(lambda leaf: leaf, network)
    noise = 0.02 * jax.random.normal(jax.random.key(9), network.logits.shape)
    draft.logits = jax.tree.map(lambda leaf: leaf + noise, network.logits)
    return draft


@pytest.mark.parametrize("name", [pytest.param(NAMES[0], marks=pytest.mark.full), NAMES[1]])
def test_greedy_is_exactly_the_models_own(name):
    network = model(name)
    free = generate(network, INPUTS, LENGTHS, max_new_tokens=N, eos_ids=[])
    eos_ids = [int(free.tokens_BN[0, 4]), int(free.tokens_BN[3, 2])]
    expected = generate(network, INPUTS, LENGTHS, max_new_tokens=N, eos_ids=eos_ids)
    rates = []
    for draft in (network, nearly(network), model(name, seed=4)):
        found = speculative.generate(network, draft, INPUTS, LENGTHS, max_new_tokens=N, eos_ids=eos_ids, num_drafted=3)
        np.testing.assert_array_equal(found.tokens_BN, expected.tokens_BN)
        np.testing.assert_array_equal(found.counts_B, expected.counts_B)
        rates.append(float(found.num_accepted / found.num_proposed))
    print(f"acceptance rates: {rates}")
    assert rates[0] == 1 and 0.3 < rates[1] < 1 and rates[2] < 0.3


def test_proposals_after_the_last_token_do_not_count():
    network = model(NAMES[1])
    found = speculative.generate(network, network, INPUTS, LENGTHS, max_new_tokens=1, eos_ids=[], num_drafted=3)
    assert found.num_proposed == found.num_accepted == found.counts_B.sum() == 3  # a row is empty


V, G = 1000, 2
RNG = np.random.default_rng(0)
TARGET = RNG.normal(0, 2, (G + 1, V)).astype(np.float32)
DRAFT = TARGET[:G] + RNG.normal(0, 1, (G, V)).astype(np.float32)


def drawn(settings, key, batches: int, rows: int):
    """The first token of every row, and how many drafted tokens it kept."""

    def batch(number):
        draft, target = (jnp.broadcast_to(logits, (rows, *logits.shape)) for logits in (DRAFT, TARGET))
        row_numbers = number * rows + jnp.arange(rows)
        drafted = [
            next_tokens(draft[:, i], settings, jax.random.fold_in(key, 1), row_numbers, jnp.full(rows, i))
            for i in range(G)
        ]
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(row_numbers)
        accepted, following = verify(keys, jnp.stack(drafted, axis=1), draft, target, settings)
        return jnp.where(accepted > 0, drafted[0], following), accepted

    tokens, accepted = jax.lax.map(batch, jnp.arange(batches))
    return tokens.reshape(-1), accepted.reshape(-1)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(sampling(1.0), id="all", marks=pytest.mark.full),
        pytest.param(sampling(0.9, top_k=100, top_p=0.9), id="top", marks=pytest.mark.full),
    ],
)
def test_draws_have_the_models_distribution_whatever_the_draft(settings, check_frequencies, optimised):
    compiled = jax.jit(drawn, static_argnames=("batches", "rows"), compiler_options=optimised)
    tokens, accepted = compiled(settings, jax.random.key(2), batches=50, rows=2048)
    expected = np.asarray(jax.nn.softmax(processed_logits(jnp.asarray(TARGET[:1]), settings))[0], np.float64)
    assert len(tokens) >= 100_000
    check_frequencies(np.bincount(np.asarray(tokens), minlength=V), expected)
    rate = float(jnp.mean(accepted > 0))
    print(f"acceptance rate of the first token: {rate:.3f}")
    # In expectation the sum of min(p, q) (Leviathan et al. 2023, corollary 3.6).
    of_draft = np.asarray(jax.nn.softmax(processed_logits(jnp.asarray(DRAFT[:1]), settings))[0])
    np.testing.assert_allclose(rate, np.minimum(expected, of_draft).sum(), atol=0.01)


def test_no_draw_of_the_draft_has_a_key_of_the_models_own():
    rows, steps = (axis.reshape(-1) for axis in jnp.mgrid[:4, :4])
    draft, own = (row_keys(key, rows, steps) for key in draft_and_own_key(jax.random.key(0)))
    own = jax.vmap(jax.random.split)(own).reshape(-1)  # as `verify` does
    data = jax.random.key_data(jnp.concatenate([draft, own]))
    assert len(np.unique(data, axis=0)) == 16 + 32


@pytest.mark.parametrize("name", [NAMES[0], pytest.param(NAMES[1], marks=pytest.mark.full)])
def test_drawn_sequences_have_the_models_distribution(name, check_frequencies):
    # Six tokens, three steps: all 216 sequences.
    network, draft = (model(name, seed, vocab_size=6, d_model=16, d_ff=16) for seed in (3, 4))
    prompt = np.array([3, 5, 2], np.int32)
    sequences = [[a, b, c] for a in range(6) for b in range(6) for c in range(6)]
    expected = np.exp([scores.sum() for scores in score(network, [prompt] * 216, sequences)])
    found = np.zeros(216)
    for seed in range(4):
        rows = np.broadcast_to(prompt, (4096, 3))
        made = speculative.generate(
            network,
            draft,
            rows,
            None,
            max_new_tokens=3,
            eos_ids=[],
            sampling=sampling(1.0),
            seed=seed,
            num_drafted=2,
        )
        found += np.bincount(np.asarray(made.tokens_BN) @ [36, 6, 1], minlength=216)
    check_frequencies(found, expected)
    assert 0.2 < made.num_accepted / made.num_proposed < 0.95


def test_bad_input():
    network, settings = model("llama_mini"), dict(max_new_tokens=2, eos_ids=[])
    with pytest.raises(InputError, match="num_drafted=0 is below 1; expected 1 or more"):
        speculative.generate(network, network, INPUTS, None, num_drafted=0, **settings)
    small = model("llama_mini", vocab_size=99)
    with pytest.raises(
        InputError, match="the draft is a Llama of 99 tokens; expected the model's kind: a Llama of 256"
    ):
        speculative.generate(network, small, INPUTS, None, num_drafted=2, **settings)
