import re

import pytest
import torch

from convmixer_fast._types import ACTIVATIONS, DTYPES, NETWORK_DTYPES, either, name_of


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_operators_know_the_activations_of_the_table(device):
    """By the same numbers and names: those of csrc/params.h."""
    x, vector = torch.zeros(1, 2, 3, 3, device=device), torch.zeros(2, device=device)
    with pytest.raises(RuntimeError) as raised:
        torch.ops.convmixer_fast.activate_pool(x, vector, vector, vector, len(ACTIVATIONS))
    message = str(raised.value).splitlines()[0]
    listed, _, refused = message.partition(", got ")
    assert re.findall(r"(\d+) \((\w+)\)", listed) == [(str(known.code), name) for name, known in ACTIVATIONS.items()]
    assert refused == str(len(ACTIVATIONS))


def test_every_activation_has_its_layer():
    """A layer with the attributes of the table computes the function of the table, which torch calls by that name."""
    x = torch.linspace(-3, 3, 13)
    for name, known in ACTIVATIONS.items():
        if known.module is None:
            assert name == "none" and torch.equal(known.function(x), x)
            continue
        layer = known.module()
        assert all(getattr(layer, attribute) == value for attribute, value in known.attributes.items())
        assert torch.equal(layer(x), known.function(x))
        assert known.function is getattr(torch.nn.functional, name)


def test_arithmetic_is_of_float32_at_least():
    for dtype, known in DTYPES.items():
        assert known.arithmetic == torch.promote_types(dtype, torch.float32)
    assert [dtype for dtype in DTYPES if dtype not in NETWORK_DTYPES] == [torch.float64]


def test_a_choice_in_words():
    assert either(["a"]) == "a"
    assert either(map(name_of, NETWORK_DTYPES)) == "float32, float16 or bfloat16"
