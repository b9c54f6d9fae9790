"""Numbers of key/value heads: one for all layers of a site, or one per layer; and which sizes there can be."""

from collections.abc import Iterable

from gqa.errors import InputError

KVHeads = int | tuple[int, ...]

# What a file may say of a model; larger numbers are damage, and cost time and memory before anything else shows it.
MAX_LAYERS = 1000  # in a stack
MAX_HEADS = 100_000


def divisors(number: int) -> list[int]:
    """All divisors in increasing order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of `number` on either side of `wanted`, for an error message."""
    below = [n for n in divisors(number) if n <= wanted][-1:]
    above = [n for n in divisors(number) if n > wanted][:1]
    return ", ".join(str(n) for n in below + above)


def per_layer_kv_heads(kv_heads: KVHeads, num_layers: int) -> tuple[int, ...]:
    """One number per layer."""
    return (kv_heads,) * num_layers if isinstance(kv_heads, int) else tuple(kv_heads)


def check_sizes(config, names: Iterable[str]) -> None:
    """Raises `InputError` unless each of these fields of an architecture is at least 1 or `None`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"{name}={value}; expected at least 1; nearest: 1")


def check_kv_heads(name: str, kv_heads: KVHeads, num_heads: int, num_layers: int) -> None:
    """Raises `InputError` unless every layer's number divides `num_heads`."""
    per_layer = per_layer_kv_heads(kv_heads, num_layers)
    if len(per_layer) != num_layers:
        raise InputError(
            f"{name} names {len(per_layer)} layers, the model has {num_layers}; give one number or {num_layers}"
        )
    for number in per_layer:
        if not isinstance(number, int) or number < 1 or num_heads % number:
            wanted = number if isinstance(number, int) else 1
            raise InputError(
                f"{name}={number} does not divide num_heads={num_heads}; nearest: {nearest_divisors(num_heads, wanted)}"
            )
