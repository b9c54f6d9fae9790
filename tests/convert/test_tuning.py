import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import models
from gqa.convert import convert_calibrated, tuning
from gqa.convert.calibrated import Method
from gqa.errors import InputError

KEY = jax.random.key(0)
CASES = ("t5, grouped", "llama", "qwen2, grouped", "qwen3")


def convert_all(model, method, batches, kv_heads=1):
    sites = models.FAMILIES[models.family_of(model.config)].converted_sites
    return convert_calibrated(model, dict.fromkeys(sites, kv_heads), method, KEY, batches=batches)


@pytest.fixture(scope="module")
def text(rows):
    """8 batches of other tokens, the last of five rows; padding and packing as in `rows`."""
    rng = np.random.default_rng(3)

    def drawn(batch, size):
        some = {name: np.concatenate([array, array])[:size] for name, array in batch.items()}
        tokens = {name: rng.integers(2, 256, some[name].shape) for name in ("inputs", "decoder_inputs")}
        return some | {name: array.astype(np.int32) for name, array in tokens.items()}

    return [drawn(rows[number % 2], 5 if number == 7 else 8) for number in range(8)]


@pytest.mark.parametrize(
    "case", [case if case in ("t5, grouped", "qwen3") else pytest.param(case, marks=pytest.mark.full) for case in CASES]
)
def test_a_tuned_attention_is_nearer_to_the_teachers_on_other_text(case, teacher, text, rows, logits):
    model, expected = teacher(case), logits(teacher(case))
    base = "svd_values" if case == "qwen3" else "svd"
    plain, tuned = (convert_all(model, method, text) for method in (base, f"{base}+tune"))
    errors = [np.square(logits(new) - expected).mean() for new, _ in (plain, tuned)]
    assert errors[1] < errors[0], errors
    for before, entry in zip(plain[1], tuned[1], strict=True):
        assert entry["output_error"] <= entry["output_error_before_tune"]
        assert entry.keys() - before.keys() == {"output_error_before_tune"}
    assert any(entry["output_error"] < entry["output_error_before_tune"] for entry in tuned[1])
    assert tuned[1][0]["output_error_before_tune"] == plain[1][0]["output_error"]
    # What is no part of the attention stays.
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(plain[0])}
    outside = [name for name in names if ("attention." not in name and "attention_norm" in name) or "mlp" in name]
    arrays = [
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(new)}
        for new, _ in (plain, tuned)
    ]
    assert outside
    for name in outside:
        np.testing.assert_array_equal(*(one[name] for one in arrays), err_msg=name)


@pytest.mark.parametrize("case", [pytest.param("t5", marks=pytest.mark.full), "llama"])
def test_a_conversion_without_loss_is_left_alone(case, teacher, with_heads, copied, text, logits):
    model = with_heads(teacher(case), lambda heads, site, number: copied(heads, 2))
    new, report = convert_all(model, "svd+tune", text, kv_heads=2)
    assert np.abs(logits(new) - logits(model)).max() <= 1e-3
    assert max(entry["output_error"] for entry in report) <= 1e-4


def test_a_few_rows_do_not_spoil_other_text(teacher, text, rows, logits):
    model, expected = teacher("llama"), logits(teacher("llama"))
    few = [{name: array[:3] for name, array in text[0].items()}]
    errors = [np.square(logits(convert_all(model, each, few)[0]) - expected).mean() for each in ("svd", "svd+tune")]
    assert errors[1] < 1.15 * errors[0], errors


def test_tuned_twice_it_is_the_same_in_the_models_dtype(teacher, rows):
    model = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), teacher("llama"))
    one, two = (convert_all(model, "mean+tune+refit", rows)[0] for _ in range(2))
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert left.dtype == right.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(left, np.float32), np.asarray(right, np.float32))


def test_what_cannot_be_tuned_is_refused(teacher, rows):
    model = teacher("llama")
    message = "tune fits outputs on text; give some to calibrate on, or leave tune out"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        convert_all(model, "svd+tune", None)
    one = [{name: array[:1] for name, array in rows[0].items()}]
    with pytest.raises(InputError, match=r"^tune keeps a row back to judge itself by and there is one row; "):
        convert_all(model, "svd+tune", one)
    assert Method.parse("svd+refit+tune") == Method.parse("svd+tune+refit")
    assert Method.parse("mean+tune").calibrated


def test_rows_that_judge_are_not_trained_on(teacher, rows, monkeypatch):
    trained, judged = set(), set()
    for name, seen in (("_train", trained), ("_missed", judged)):
        function = getattr(tuning, name)

        def spy(*arguments, function=function, seen=seen, **keywords):
            *_, batch, first, _ = arguments
            if not isinstance(first, jax.core.Tracer):  # the error inside of a step
                seen.add((float(jnp.sum(batch.output)), int(first)))
            return function(*arguments, **keywords)

        monkeypatch.setattr(tuning, name, spy)
    convert_all(teacher("llama"), "mean+tune", rows, kv_heads=(1, 4))
    assert (len(trained), len(judged)) == (3, 1) and not trained & judged
