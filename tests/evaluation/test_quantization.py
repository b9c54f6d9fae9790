import json
import sys

import jax
import numpy as np
import pytest

from gqa import command_line, evaluate, models
from gqa.checkpoints import hf
from gqa.data import loader
from gqa.evaluation.quantization import with_int8_cache
from gqa.models.quantize import quantize
from gqa.sharding import make_mesh
from gqa.training.loop import heldout_metrics

TOKENS = np.random.default_rng(0).integers(2, 256, (2, 9), dtype=np.int32)


@pytest.mark.parametrize("name", ["t5_1_1_mini", "llama_mini"])
def test_one_pass_is_what_the_cache_gives_step_by_step(name):
    model = models.create(models.size(name), jax.random.key(0))
    segments = np.ones_like(TOKENS)
    batch = dict(inputs=TOKENS, inputs_segments=segments, decoder_inputs=TOKENS, targets_segments=None)
    apply = jax.jit(models.apply)
    exact, found = apply(model, batch), apply(with_int8_cache(model), batch)
    arguments = (TOKENS, segments, 9) if name.startswith("t5") else (2, 9)
    cache = jax.jit(lambda model: model.init_cache(*arguments, "int8"))(model)
    step = jax.jit(lambda model, tokens, cache: model.decode_step(tokens, cache))
    logits = []
    for position in range(9):
        logits_B1V, cache = step(model, TOKENS[:, position : position + 1], cache)
        logits.append(logits_B1V)
    stepwise = np.concatenate(logits, axis=1)
    np.testing.assert_allclose(found, stepwise, rtol=1e-4, atol=1e-4)
    assert np.abs(found - exact).max() > 10 * np.abs(found - stepwise).max()


@pytest.fixture
def call(monkeypatch, capsys):
    """A function (arguments) -> exit code, stdout and stderr of `gqa.evaluate`."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            command_line.run(evaluate.main)
        return exit.value.code, *capsys.readouterr()

    return run


def test_what_fewer_bits_cost(call, config_file, tiny_run, tmp_path):
    config = tiny_run("llama")
    model = models.create(config.model.architecture(), jax.random.key(0))
    hf.save(model, tmp_path / "model", dtype="float32")
    common = [f"--config={config_file('llama')}", f"--checkpoint={tmp_path / 'model'}"]
    code, out, _ = call(*common, "--weights=int8,int4", "--cache=int8", f"--output={tmp_path / 'scores.json'}")
    assert code == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    batches, mesh = loader.heldout_batches(config.records, 8, 8), make_mesh(config.mesh)
    expected = {
        "cache int8": heldout_metrics(with_int8_cache(model), batches, mesh)["loss"],
        "weights int8": heldout_metrics(quantize(model, "int8"), batches, mesh)["loss"],
        "weights int4": heldout_metrics(quantize(model, "int4"), batches, mesh)["loss"],
    }
    assert scores["quantized_loss"] == pytest.approx(expected, rel=1e-6)
    assert len({scores["loss"], *expected.values()}) == 4
    assert all(abs(expected[name] - scores["loss"]) < 0.05 for name in ("cache int8", "weights int8"))
    for name, loss in expected.items():
        assert f"| {name} | {loss:.4f} | {loss - scores['loss']:+.4f} |" in out

    for argument, message in (
        ("--weights=int3", "weights='int3'; expected int8, int4, nf4, or none for the model's own; nearest: int"),
        ("--weights=int8,", "weights=''; expected int8, int4, nf4"),
        ("--cache=int4", "cache type 'int4' is unknown; expected int8"),
    ):
        code, _, err = call(*common, argument)
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith(f"error: {message}")
