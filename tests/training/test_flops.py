"""FLOPs of a step against sums by hand."""

import pytest

from gqa import models
from gqa.training.flops import train_step_flops

SMALL = dict(vocab_size=10, d_model=8, num_heads=2, head_dim=4, d_ff=16)


@pytest.mark.parametrize(
    ("kv_heads", "expected"),
    [
        # B=3, T=4, L=2: a layer's kernels are 64 query + 2 * 32 K key, value + 64 out + 384 MLP; the logits' are 80.
        # K=1: (2 * 576 + 80) * 12 tokens = 14_784; K=2: (2 * 640 + 80) * 12 = 16_320. Twice that for multiply and add;
        # scores and values 4 * 2 layers * 2 heads * 4 * 12 queries * 4 keys = 3_072. Times 3 for the backward pass.
        (1, 3 * (2 * 14_784 + 3_072)),
        (2, 3 * (2 * 16_320 + 3_072)),
        ((1, 2), 3 * (2 * 15_552 + 3_072)),
    ],
)
def test_llama(kv_heads, expected):
    config = models.replace(models.size("llama_mini"), num_layers=2, decoder_self_kv_heads=kv_heads, **SMALL)
    shapes = {name: (3, 4) for name in ("targets", "decoder_inputs", "targets_segments")}
    assert train_step_flops(models.abstract(config), shapes) == expected


@pytest.mark.parametrize(
    ("cross_kv_heads", "expected"),
    [
        # B=3, S=6, T=4; one encoder layer of 256 + 384 = 640, one decoder layer of 256 self, 384 MLP and a cross
        # attention of 64 query + 64 out on targets and 2 * 32 K key, value on inputs; logits 80.
        # K=2: (640 + 128) * 18 + (256 + 384 + 128 + 80) * 12 = 13_824 + 10_176 = 24_000; K=1: 64 * 18 fewer.
        # scores and values: 4 * 2 * 4 * (18 * 6 + 12 * 4 + 12 * 6) = 7_296
        (2, 3 * (2 * 24_000 + 7_296)),
        (1, 3 * (2 * 22_848 + 7_296)),
    ],
)
def test_t5(cross_kv_heads, expected):
    config = models.replace(
        models.size("t5_1_1_mini"),
        num_encoder_layers=1,
        num_decoder_layers=1,
        encoder_self_kv_heads=2,
        decoder_self_kv_heads=2,
        cross_kv_heads=cross_kv_heads,
        **SMALL,
    )
    shapes = {"inputs": (3, 6), "inputs_segments": (3, 6), "targets": (3, 4), "decoder_inputs": (3, 4)}
    assert train_step_flops(models.abstract(config), shapes) == expected


def test_logits_from_the_embedding_cost_as_much():
    base = models.replace(models.size("llama_mini"), num_layers=1, decoder_self_kv_heads=2, **SMALL)
    # (640 + 80) * 12 = 8_640 and 4 * 2 * 4 * 12 * 4 = 1_536
    for tied in (True, False):
        model = models.abstract(models.replace(base, tied_logits=tied))
        assert train_step_flops(model, {"targets": (3, 4)}) == 3 * (2 * 8_640 + 1_536)
        # A reward model's head: 8 instead of 80.
        assert train_step_flops(model, {"targets": (3, 4)}, scores=True) == 3 * (2 * (640 + 8) * 12 + 1_536)


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        ("llama_mini", dict(qkv_bias=True)),
        ("llama_mini", dict(qk_norm=True)),
        ("t5_1_1_mini", dict(relative_bias_per_layer=True)),
    ],
)
def test_biases_and_norms_are_no_matrix_products(size, changes):
    plain = models.size(size)
    shapes = {"inputs": (3, 6), "targets": (3, 4)}
    found = train_step_flops(models.abstract(models.replace(plain, **changes)), shapes)
    assert found == train_step_flops(models.abstract(plain), shapes)
