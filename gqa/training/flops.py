"""Model FLOPs of a training step, read off a model's shapes."""

import math

import jax

from gqa import models, sharding
from gqa.models import t5
from gqa.training.metrics import Attention, MatrixProduct, model_flops_per_step


def train_step_flops(
    model: models.Model, batch_shapes: dict[str, tuple[int, ...]], frozen: bool = False, *, scores: bool = False
) -> int:
    """FLOPs of one step, forward and backward, for a model (or its abstract form) and a batch's shapes by name.

    `frozen`: only adapters are trained. `scores`: a head of one output stands for the logits.
    """
    config = model.config
    rows, targets = batch_shapes["targets"]
    logits = (1 if scores else config.vocab_size) * config.d_model
    decoder = _kernels(model.decoder)
    heads = (config.num_heads, config.head_dim)
    if not isinstance(model, t5.T5):
        attentions = [Attention(config.num_layers, *heads, queries=rows * targets, keys=targets)]
        return model_flops_per_step([MatrixProduct(decoder + logits, rows * targets)], attentions, frozen)
    inputs = batch_shapes["inputs"][1]
    cross_kv = sum(_kernels((site.key, site.value)) for site in models.site_attention(model, "cross"))
    products = [
        MatrixProduct(_kernels(model.encoder) + cross_kv, rows * inputs),
        MatrixProduct(decoder - cross_kv + logits, rows * targets),
    ]
    attentions = [
        Attention(config.num_encoder_layers, *heads, queries=rows * inputs, keys=inputs),
        Attention(config.num_decoder_layers, *heads, queries=rows * targets, keys=targets),
        Attention(config.num_decoder_layers, *heads, queries=rows * targets, keys=inputs),
    ]
    return model_flops_per_step(products, attentions, frozen)


def _kernels(stacks) -> int:
    """Elements of the kernels: all of them map from or to the model width; biases and norm scales map nothing."""
    axes = sharding.logical_axes(stacks)
    kernels = {key for key, names in axes.items() if "embed" in names and len(names) > 1}
    leaves = jax.tree_util.tree_leaves_with_path(stacks)
    return sum(math.prod(leaf.shape) for path, leaf in leaves if jax.tree_util.keystr(path) in kernels)
