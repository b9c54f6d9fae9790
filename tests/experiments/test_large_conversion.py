import sys

import pytest

from experiments import large_conversion
from gqa.errors import InputError


@pytest.mark.parametrize("layers", [0, -1, 33])
def test_layers_are_those_of_the_model(monkeypatch, layers):
    monkeypatch.setattr(sys, "argv", ["large_conversion.py", "--size=llama_2_7b", "--kv_heads=8", f"--layers={layers}"])
    with pytest.raises(InputError, match=rf"--layers={layers}; expected 1 to 32"):
        large_conversion.main()
