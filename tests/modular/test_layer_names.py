import torch
from torch import nn

from eclm_flower.modular import modularize


def test_layers_of_nested_blocks_have_names_of_their_own():
    inner = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    body = nn.Sequential(inner, nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model = modularize(body, modules_per_layer=4, example_input=torch.zeros(1, 6), selector_share=1)
    assert len(model.layers) == 2
    assert {layer.mixer for layer in model.layers.values()} == {"0.2", "3"}
