import pytest

from gqa.errors import InputError, nearest, one_of


def test_nearest():
    assert nearest("kv_head", ["kv_heads", "method", "output"]) == "kv_heads"
    assert nearest("anything", []) is None


def test_one_of():
    one_of("dtype", "float32", ["bfloat16", "float32"])
    with pytest.raises(InputError, match="dtype: unknown 'float'; expected one of bfloat16, float32; nearest: float32"):
        one_of("dtype", "float", ["bfloat16", "float32"])
