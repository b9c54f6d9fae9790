import sys

import pytest

from experiments import large_conversion
from gqa.errors import InputError


@pytest.mark.parametrize("layers", [0, -1, 33])
def test_layers_are_those_of_the_model(monkeypatch, layers):
    monkeypatch.setattr(sys, "argv", ["large_conversion.py", "--size=llama_2_7b", "--kv_heads=8", f"--layers={layers}"])
    with pytest.raises(InputError, match=rf"--layers={layers}; expected 1 to 32"):
        large_conversion.main()


def test_a_further_layer_takes_as_long_as_those_between_first_and_last():
    begun = {"encoder.0": 10.0, "encoder.1": 15.0, "encoder.2": 17.0, "decoder.0": 21.0}
    assert large_conversion.further_layer(begun, 31.5) == {"encoder": 2.0, "decoder": 10.5}
