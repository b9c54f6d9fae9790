import functools
import re

import jax
import numpy as np
import pytest

from gqa import models
from gqa.convert import convert, convert_calibrated, convert_lazily, procrustes, walk
from gqa.convert.calibrated import Method
from gqa.convert.heads import read_heads
from gqa.convert.plan import plan_budget
from gqa.convert.statistics import collect
from gqa.errors import InputError

KEY = jax.random.key(0)
EXACT = ("t5", "t5, grouped", "llama", "qwen2, grouped")


def sites(model):
    return models.FAMILIES[models.family_of(model.config)].sites


def measured(model, rows):
    return collect(walk.shell_of(model), walk.layers_of(model), rows, sites(model))


def converted(model, kv_heads, method, **options):
    """The model with `kv_heads` at every site, or at those named."""
    kv_heads = kv_heads if isinstance(kv_heads, dict) else dict.fromkeys(sites(model), kv_heads)
    return convert_calibrated(model, kv_heads, method, KEY, **options)[0]


def is_rotary(model):
    return models.family_of(model.config) == "llama"


def arrays(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(left, right):
    assert left.config == right.config
    left, right = arrays(left), arrays(right)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def loss(logits, rows):
    """Cross-entropy of the inputs as their own targets: any targets will do."""
    targets = np.concatenate([batch["decoder_inputs"][batch["targets_segments"] > 0] for batch in rows])
    logits = logits.astype(np.float64)
    normalised = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    return -np.mean((normalised - logits.max(-1, keepdims=True))[np.arange(len(targets)), targets])


@pytest.fixture(scope="module")
def copies(teacher, with_heads, rebased, copied):
    """A function (case, units of a group) -> a teacher whose neighbours are copies of one another in other bases."""

    @functools.cache
    def make(case, size):
        model, rng = teacher(case), np.random.default_rng(1)
        rotary = is_rotary(model)
        return with_heads(model, lambda heads, site, number: rebased(rng, copied(heads, size), rotary))

    return make


@pytest.mark.parametrize("case", EXACT)
def test_as_many_heads_as_before_are_left_alone(case, teacher):
    model = teacher(case)
    assert_same(converted(model, 4, "svd+group"), model)
    first = sites(model)[-1]
    new = converted(model, {first: (4, 2)}, "svd")
    before, after = (walk.layers_of(each)("decoder", 0) for each in (model, new))
    for left, right in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("case", EXACT)
def test_copies_in_other_bases_are_shared_without_loss(case, copies, rows, logits):
    model = copies(case, 2)
    expected = logits(model)
    statistics = measured(model, rows)
    for found in (
        converted(model, 2, "svd", statistics=statistics),
        converted(model, 2, "svd"),  # from the weights alone
        converted(model, 2, "svd+group", statistics=statistics),
        converted(model, dict.fromkeys(sites(model), (4, 2)), "svd", statistics=statistics),
    ):
        assert np.abs(logits(found) - expected).max() <= 1e-3
    assert np.abs(logits(converted(model, 2, "mean")) - expected).max() > 1e-1
    kv_heads = dict.fromkeys(sites(model), 2)
    _, report = convert_calibrated(model, kv_heads, "svd+refit", KEY, batches=rows, statistics=statistics)
    assert max(entry["output_error"] for entry in report) <= 1e-4
    model = copies(case, 4)
    assert np.abs(logits(converted(model, 1, "svd+group")) - logits(model)).max() <= 1e-3


@pytest.mark.parametrize("case", EXACT)
def test_the_bases_of_a_teachers_heads_do_not_matter(case, teacher, with_heads, rebased, rows, logits):
    model, rng = teacher(case), np.random.default_rng(2)
    rotary = is_rotary(model)
    other = with_heads(model, lambda heads, site, number: rebased(rng, heads, rotary))
    losses = {}
    for method in ("svd", "svd+group", "mean"):
        losses[method] = [
            loss(logits(converted(each, 2, method, statistics=measured(each, rows))), rows) for each in (model, other)
        ]
    for method in ("svd", "svd+group"):
        assert abs(np.subtract(*losses[method])) <= 1e-4, losses
    assert abs(np.subtract(*losses["mean"])) > 1e-2, losses


def permuted_bias(module, order):
    units = np.arange(module.table.shape[-1]).reshape(len(order), -1)[order].reshape(-1)
    module.table = module.table.replace(np.asarray(module.table[...])[..., units])


def permuted(model, orders, with_heads):
    """The same function, `orders[site][layer]` of the units; bias tables go along."""
    new = with_heads(model, lambda heads, site, number: heads.permuted(orders[site][number]))
    for side, site in (("encoder", "encoder_self"), ("decoder", "decoder_self")):
        if is_rotary(model):
            continue
        if not model.config.relative_bias_per_layer:
            bias = jax.tree.map(lambda leaf: leaf, getattr(new, f"{side}_bias"))
            permuted_bias(bias, orders[site][0])
            setattr(new, f"{side}_bias", bias)
        else:
            (stack,) = getattr(new, side)
            table = np.asarray(stack.relative_bias.table[...])
            columns = [
                one[:, np.arange(one.shape[1]).reshape(4, -1)[order].reshape(-1)]
                for one, order in zip(table, orders[site], strict=True)
            ]
            stack.relative_bias.table = stack.relative_bias.table.replace(np.stack(columns))
    return new


@pytest.mark.parametrize("case", EXACT)
def test_the_order_of_heads_does_not_matter(case, teacher, with_heads, rows, logits):
    model, rng = teacher(case), np.random.default_rng(3)
    shared = models.family_of(model.config) == "t5" and not model.config.relative_bias_per_layer

    def orders(draw):
        found = {site: [draw(), draw()] for site in sites(model)}
        for site in ("encoder_self", "decoder_self"):
            if shared:
                found[site] = [found[site][0]] * 2
        return found

    anyhow = permuted(model, orders(lambda: rng.permutation(4)), with_heads)
    within = permuted(model, orders(lambda: np.append(rng.permutation(2), 2 + rng.permutation(2))), with_heads)
    np.testing.assert_allclose(logits(anyhow), logits(model), atol=1e-3)
    for other, methods in ((anyhow, ("svd+group",)), (within, ("svd", "mean", "procrustes"))):
        for method in methods:
            one, two = (logits(converted(each, 2, method, statistics=measured(each, rows))) for each in (model, other))
            assert np.abs(one - two).max() <= 1e-3, method
    assert np.abs(logits(converted(anyhow, 2, "mean")) - logits(converted(model, 2, "mean"))).max() > 1e-1


def test_layers_with_one_bias_table_are_grouped_together_though_one_is_not_converted(copies, with_heads, logits):
    order = np.array([2, 0, 1, 3])
    model = copies("t5", 2)
    scattered = permuted(model, {site: [order] * 2 for site in sites(model)}, with_heads)
    found, report = convert_calibrated(scattered, {"decoder_self": (2, 4), "cross": (4, 2)}, "svd+group", KEY)
    assert [(entry["site"], entry["layer"]) for entry in report] == [("decoder_self", 0), ("cross", 1)]
    for entry in report:
        assert {frozenset(order[group]) for group in entry["groups"]} == {frozenset((0, 1)), frozenset((2, 3))}
    assert np.abs(logits(found) - logits(model)).max() <= 1e-3


@pytest.mark.parametrize("kv_heads", [{"cross": 2}, {"encoder_self": 2, "cross": 2}])
def test_an_encoder_that_stays_is_not_passed_again(kv_heads, teacher, rows, monkeypatch):
    model = teacher("t5")
    statistics = measured(model, rows)
    again = [dict(batch) for batch in rows]  # not the rows that were collected on: the encoder reads them
    expected = converted(model, kv_heads, "svd+refit", batches=again, statistics=statistics)
    passed = []
    advance = walk.Stream.advance
    monkeypatch.setattr(
        walk.Stream, "advance", lambda self, layer: (passed.append(type(layer).__name__), advance(self, layer))
    )
    assert_same(converted(model, kv_heads, "svd+refit", batches=rows, statistics=statistics), expected)
    assert ("EncoderLayer" in passed) == ("encoder_self" in kv_heads)
    assert "DecoderLayer" in passed


def test_norms_of_keys_allow_shared_values_only(teacher, rows, logits):
    model = teacher("qwen3")
    for method in ("svd", "procrustes+renorm", "svd+group+refit"):
        base = method.split("+")[0]
        message = (
            f"method {base} changes the basis of keys, which this model's norms of keys do not allow; "
            "nearest: svd_values (keys by their mean), mean+refit"
        )
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            converted(model, 2, method, batches=rows)
    expected = logits(model)
    errors = {}
    for method in ("mean", "mean+refit", "svd_values+group+refit"):
        new, report = convert_calibrated(model, {"decoder_self": 2}, method, KEY, batches=rows)
        errors[method] = np.abs(logits(new) - expected).mean()
        for entry in report:
            if "refit" in method:
                assert entry["output_error"] < entry["output_error_before_refit"] < 2
    assert errors["svd_values+group+refit"] < errors["mean"] and errors["mean+refit"] < errors["mean"]


def test_refit_is_ridge_regression_on_head_outputs(teacher, rows, head_outputs):
    """Of the first layer, by least squares on explicit head outputs; RoPE's base is the reference's."""
    model = teacher("llama")
    model.config = models.replace(model.config, rope_theta=100.0)
    kv_heads = {"decoder_self": (1, 4)}
    new, (entry,) = convert_calibrated(model, kv_heads, "mean+refit", KEY, batches=rows)
    plain, (plain_entry,) = convert_calibrated(model, kv_heads, "mean", KEY, batches=rows)
    layer = walk.layers_of(model)("decoder", 0)
    old, pooled, refitted = (
        read_heads(walk.layers_of(each)("decoder", 0).self_attention) for each in (model, plain, new)
    )
    for left, right in zip(pooled[:3], procrustes.mean(old, 1)[:3], strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)
    z, y = [], []
    for batch in rows:
        for tokens, segments in zip(batch["decoder_inputs"], batch["targets_segments"], strict=True):
            x = np.asarray(model.embedding[...], np.float64)[tokens]
            x *= np.asarray(layer.self_attention_norm.scale[...]) / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)
            mask = np.tri(len(x), dtype=bool) & (segments[:, None] == segments)
            of_heads = [
                head_outputs(heads._replace(query=heads.query / 4), x, x, True, mask)[segments > 0]
                for heads in (pooled, old)
            ]
            z.append(of_heads[0].reshape(len(of_heads[0]), -1))
            y.append(np.einsum("THd,HdD->TD", of_heads[1], old.out))
    z, y = np.concatenate(z), np.concatenate(y)
    # 84 tokens for 64 dimensions; of 64,000 tokens and more it is 1e-3.
    root = np.sqrt(64 / 84 * np.square(z).sum() / z.shape[1])
    around = pooled.out.reshape(z.shape[1], -1)
    inputs, wanted = np.concatenate([z, root * np.eye(z.shape[1])]), np.concatenate([y, root * around])
    expected = np.linalg.lstsq(inputs, wanted)[0]
    np.testing.assert_allclose(refitted.out.reshape(expected.shape), expected, atol=2e-3)
    for kernel, error in ((expected, entry["output_error"]), (around, plain_entry["output_error"])):
        np.testing.assert_allclose(error, np.linalg.norm(z @ kernel - y) / np.linalg.norm(y), rtol=1e-3)
    assert entry["output_error_before_refit"] == plain_entry["output_error"]


@pytest.mark.parametrize("method", ["mean", "svd"])
def test_a_refit_on_few_tokens_does_not_spoil_other_text(method, teacher, rows, logits):
    """84 tokens for 64 dimensions; `logits` are of other tokens than the fit's."""
    model, rng = teacher("llama"), np.random.default_rng(9)
    few = [batch | {"decoder_inputs": rng.permuted(batch["decoder_inputs"] + 7, axis=None) % 256} for batch in rows]
    expected = logits(model)
    errors = [
        np.square(logits(converted(model, 2, each, batches=few)) - expected).mean()
        for each in (method, f"{method}+refit")
    ]
    assert errors[1] < 1.15 * errors[0], errors


def lazy(model):
    """`read` of a model, and the paths of all parameters in the order of the layers."""
    values = {}
    outside = walk.shell_of(model)
    values |= dict(zip(walk.parameter_names(outside), jax.tree.leaves(outside), strict=True))
    for side in walk.sides(model.config):
        for number in range(walk.num_layers(model.config, side)):
            layer = walk.layers_of(model)(side, number)
            names = (f"{side}.{number}.{name}" for name in walk.parameter_names(layer))
            values |= dict(zip(names, jax.tree.leaves(layer), strict=True))
    return lambda path: np.asarray(values[path]), list(values)


@pytest.mark.parametrize("case", ["t5", "llama"])
def test_converted_lazily_it_is_the_same(case, teacher, rows):
    model = teacher(case)
    read, paths = lazy(model)
    kv_heads = {sites(model)[-1]: (2, 1)} | ({"decoder_self": 2} if case == "t5" else {})
    options = dict(statistics=measured(model, rows), batches=rows)
    for method in ("svd+group+refit", "random+refit", "mean"):
        expected, expected_report = convert_calibrated(model, kv_heads, method, KEY, **options)
        config, read_converted, report = convert_lazily(model.config, read, kv_heads, method, KEY, **options)
        assert config == expected.config
        read_expected, _ = lazy(expected)
        for path in paths:
            np.testing.assert_allclose(read_converted(path), read_expected(path), atol=1e-5, err_msg=f"{method} {path}")
        for entry, expected_entry in zip(report, expected_report, strict=True):
            assert entry == {
                name: pytest.approx(value) if isinstance(value, float) else value
                for name, value in expected_entry.items()
            }


@pytest.mark.parametrize("method", ["mean", "first", "random"])
def test_pooled_heads_are_those_of_pooling(method, teacher):
    model, kv_heads = teacher("t5"), {"encoder_self": 1, "decoder_self": 2, "cross": (2, 1)}
    assert_same(converted(model, kv_heads, method), convert(model, kv_heads, method, KEY))


def test_dead_heads_are_named_by_their_number_before(teacher, with_heads):
    def kill(heads, site, number):
        query, value, out = heads.query.copy(), heads.value.copy(), heads.out.copy()
        if number == 1:
            value[:, 0] = 0
            query[:, 1] = 0  # still reads the mean of its values
            out[3] = 0
        return heads._replace(query=query, value=value, out=out)

    model = with_heads(teacher("llama"), kill)
    for method in ("svd", "svd+group", "mean+renorm"):
        _, report = convert_calibrated(model, {"decoder_self": 2}, method, KEY)
        assert [entry.get("dead_heads") for entry in report] == [None, [0, 3]], method


def test_weights_that_are_not_numbers_are_refused(teacher, with_heads):
    def spoil(heads, site, number):
        out = np.where(np.arange(len(heads.out))[:, None, None] == 2, np.nan, heads.out)
        return heads._replace(out=out) if (site, number) == ("cross", 1) else heads

    model = with_heads(teacher("t5"), spoil)
    for method in ("svd", "mean+group"):
        with pytest.raises(InputError, match=r"^weights of decoder\.1\.cross_attention are NaN or infinite; check "):
            converted(model, 2, method)


@pytest.mark.parametrize("size", [1e22, 1e38])  # squares overflow, or outputs
def test_outputs_that_are_not_numbers_are_refused(size, teacher, with_heads, rows):
    """Nothing else reads those of the last attention."""

    def spoil(heads, site, number):
        return heads._replace(out=heads.out * size) if (site, number) == ("cross", 1) else heads

    model = with_heads(teacher("t5"), spoil)
    expected = r"^outputs of decoder\.1\.cross_attention on the calibration text are NaN or infinite; check "
    for method in ("svd", "mean+refit"):
        with pytest.raises(InputError, match=expected):
            converted(model, 2, method, batches=rows, statistics=measured(model, rows))


def test_budgets_go_where_heads_differ(teacher, with_heads, copied, rebased):
    rng = np.random.default_rng(0)

    def change(heads, site, number):
        return rebased(rng, copied(heads, 4), rotary=False) if (site, number) == ("cross", 0) else heads

    model = with_heads(teacher("t5"), change)
    shell, load_layer = walk.shell_of(model), walk.layers_of(model)
    plan = plan_budget(shell, load_layer, 13, ["cross", "decoder_self"], None)
    assert plan == {"cross": (1, 4), "decoder_self": (4, 4)}
    with pytest.raises(
        InputError, match=r"^a budget of 1 key/value heads is under 1 for each layer and site; nearest: 2$"
    ):
        plan_budget(shell, load_layer, 1, ["cross"], None)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "median",
            "method='median' is unknown; expected one of mean, first, random, procrustes, svd, svd_values, "
            "with +group, +renorm, +tune, +refit",
        ),
        ("svd+", "method='svd+' has the step ''; expected each of +group, +renorm, +tune, +refit once at most"),
        (
            "svd+refit+refit",
            "method='svd+refit+refit' has the step 'refit'; "
            "expected each of +group, +renorm, +tune, +refit once at most",
        ),
        (
            "svd+renorm",
            "method='svd+renorm': renorm is for means of heads; nearest: mean+renorm, procrustes+renorm",
        ),
    ],
)
def test_bad_methods(method, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        Method.parse(method)


def test_methods():
    assert Method.parse("svd+refit+group") == Method.parse("svd+group+refit") == Method("svd", True, False, False, True)
    assert [Method.parse(name).calibrated for name in ("mean", "mean+renorm", "svd")] == [False, True, True]


def test_refit_without_text_is_refused(teacher):
    message = "^refit fits outputs on text; give some to calibrate on, or leave refit out$"
    for batches in (None, []):
        with pytest.raises(InputError, match=message):
            converted(teacher("llama"), 2, "mean+refit", batches=batches)
