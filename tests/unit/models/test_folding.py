"""Affine maps folded into the layers beside them, held to applying them first."""

import pytest
import torch
from torch import nn

from conveyor_models import UnsupportedModuleError
from conveyor_models.importers import ImportOptions, folding
from conveyor_models.importers.common import ImportedLayer
from conveyor_models.importers.torch_state import model_from_state


def randomly(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def layer(inputs: int, **kind: bool) -> ImportedLayer:
    torch.manual_seed(1)
    return model_from_state(nn.LSTM(inputs, 4, **kind).state_dict()).layers[0]


MAPS = {
    "matrix": folding.linear("matrix", randomly(3, 5), randomly(3)),
    "matrix without bias": folding.linear("plain", randomly(3, 5), None),
    "factors": folding.scale("factors", randomly(3), randomly(3) * 2),
    "batch normalisation": folding.batch_norm(
        "norm", randomly(3), randomly(3).abs(), 1e-3, randomly(3) + 1, randomly(3)
    ),
}


@pytest.mark.parametrize("first", MAPS)
@pytest.mark.parametrize("then", [name for name, each in MAPS.items() if each.weight.dim() == 1])
def test_two_maps_as_one(first: str, then: str) -> None:
    x = randomly(7, MAPS[first].input_size)
    whole = folding.chained([MAPS[first], MAPS[then]])
    expected = MAPS[then].apply(MAPS[first].apply(x))
    torch.testing.assert_close(whole.apply(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_into_a_recurrent_layer(name: str, bidirectional: bool) -> None:
    below, affine = layer(3, bidirectional=bidirectional), MAPS[name]
    folded = folding.into_layer(affine, below)
    x = randomly(7, affine.input_size).double()
    for way in ["", "reverse."][: 1 + bidirectional]:
        weights = [each.tensors[f"{way}weight_input"].double() for each in (below, folded)]
        biases = [each.tensors[f"{way}bias"].double() for each in (below, folded)]
        expected = affine.apply(x) @ weights[0].T + biases[0]
        torch.testing.assert_close(x @ weights[1].T + biases[1], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(
            folded.tensors[f"{way}weight_recurrent"], below.tensors[f"{way}weight_recurrent"]
        )


def test_into_an_embedding() -> None:
    table = randomly(11, 5)
    found = folding.into_embedding(table, MAPS["matrix"])
    expected = table @ MAPS["matrix"].weight.float().T + MAPS["matrix"].bias.float()
    torch.testing.assert_close(found, expected)


def test_batch_normalisation_is_that_of_torch() -> None:
    torch.manual_seed(3)
    norm = nn.BatchNorm1d(6)
    norm(torch.randn(50, 6) * 3 + 1)
    norm.eval()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    found = folding.batch_norm(
        "norm", norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    x = torch.randn(9, 6)
    torch.testing.assert_close(found.apply(x).float(), norm(x).detach())


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModuleError, match="reads 3 numbers, and wide gives 7"):
        folding.into_layer(folding.linear("wide", randomly(7, 2), None), layer(3))
    with pytest.raises(UnsupportedModuleError, match="wide: reads 2 numbers, not 5"):
        folding.into_embedding(randomly(4, 5), folding.linear("wide", randomly(7, 2), None))
    with pytest.raises(UnsupportedModuleError, match="not positive"):
        folding.batch_norm("norm", randomly(3), -torch.ones(3), 1e-3, None, None)
    huge = folding.scale("scale", torch.full((3,), 1e38), torch.zeros(3))
    with pytest.raises(UnsupportedModuleError, match="NaN or an infinity"):
        folding.into_layer(huge, folding.into_layer(huge, layer(3)))


def test_two_small_maps_whose_product_is_huge_are_refused() -> None:
    narrow = folding.linear("narrow", torch.zeros(1, 2**16), None)
    wide = folding.linear("wide", torch.zeros(2**16, 1), None)
    with pytest.raises(UnsupportedModuleError, match="wide: folds to 4294967296 values"):
        folding.chained([narrow, wide])


@pytest.mark.parametrize("gamma", [None, torch.full((3,), 1e-6)])
def test_a_mean_far_from_zero_is_refused_whatever_gamma_makes_of_it(
    gamma: torch.Tensor | None,
) -> None:
    mean, ones = torch.tensor([0.0, 5e4, 0.0]), torch.ones(3)
    with pytest.raises(
        UnsupportedModuleError, match=r"norm: adds -50000 to feature 1.*lose digits"
    ):
        folding.batch_norm("norm", mean, ones, 0.0, gamma, None)


def test_an_offset_may_be_large_in_a_head_and_not_before_a_layer() -> None:
    affine = folding.scale("rescaling", torch.ones(3), torch.full((3,), 2e4))
    _, bias = affine.as_linear()
    assert torch.equal(bias, torch.full((3,), 2e4))
    with pytest.raises(UnsupportedModuleError, match="rescaling: adds 20000 to feature 0"):
        folding.into_layer(affine, layer(3))


def test_a_batch_normalisation_of_a_state_dict_is_held_to_the_same_limit() -> None:
    module = nn.ModuleDict({"norm": nn.BatchNorm1d(3), "lstm": nn.LSTM(3, 4)})
    state = module.state_dict() | {"norm.running_mean": torch.tensor([0.0, 1e6, 0.0])}
    options = ImportOptions(order=("norm", "lstm"), between="none", epsilon={"": 1e-5})
    with pytest.raises(UnsupportedModuleError, match=r"norm: adds -999995 to feature 1"):
        model_from_state(state, options)
