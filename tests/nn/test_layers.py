import jax
import jax.numpy as jnp
import numpy as np

from gqa.nn.layers import linear, logits, unembed


def test_logits_of_bfloat16_features_are_summed_in_float32():
    """In bfloat16 those near 24 would be multiples of 1/8: ties. Gradients are those of a product in bfloat16."""
    x_key, kernel_key = jax.random.split(jax.random.key(0))
    x = jax.random.normal(x_key, (2, 3, 16), jnp.bfloat16)
    kernel = 4 * jax.random.normal(kernel_key, (16, 50), jnp.float32)
    exact = np.einsum("BTD,DV->BTV", np.asarray(x, np.float64), np.asarray(kernel.astype(jnp.bfloat16), np.float64))
    for found in (logits(x, kernel), unembed(kernel.T, x)):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-4)

    def total(x, kernel, product):
        return jnp.sum(jnp.sin(product(x, kernel)))

    def rounded(x, kernel):
        # The same values, but a product in bfloat16 for the gradient to go through.
        plain = linear("BTD,DV->BTV", x, kernel, x.dtype).astype(jnp.float32)
        return plain + jax.lax.stop_gradient(logits(x, kernel) - plain)

    for one, other in zip(*(jax.grad(total, (0, 1))(x, kernel, product) for product in (logits, rounded)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=2e-2, atol=2e-2)
