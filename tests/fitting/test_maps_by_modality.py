"""The maps of an export, one of each modality, add up to the map that the model placed its cold items with."""

import numpy as np
import pytest
import torch

from recbole_llm.export.manifest import Block
from recbole_llm.export.model_tables import ModelTables
from recbole_llm.export.text_map import placed
from recbole_llm.fitting.cold_start.kernel_ridge import fit_cold_map


@pytest.mark.parametrize("shares", [None, {"text": 0.75, "image": 0.25}, {"text": 1.0, "image": 0.0}])
def test_the_sum_of_the_maps_is_the_masked_kernel_sum(shares):
    draw = torch.Generator().manual_seed(0)
    n, D = 30, 5
    content = {
        "text": (torch.randn(n, 6, generator=draw) + 1, torch.rand(n, generator=draw) < 0.8),
        "image": (torch.randn(n, 4, generator=draw) - 1, torch.rand(n, generator=draw) < 0.6),
    }
    warm = torch.arange(n) < 24
    values = torch.randn(n, 2 * D + 1, generator=draw)
    cold_map = fit_cold_map(content, warm, values, mu=0.3, shares=shares)
    none = np.zeros((0, D), np.float32)
    tables = ModelTables(
        blocks=(Block("closed_form", D, 0.0, 1.0),), vector=none, source=none, bias=none[:, 0], trained=none[:, 0],
        listed=none[:, 0], offset=none, user_part=None, similar_by="vector", cold_map=cold_map, kappa=0.7,
        shift=np.arange(D, dtype=np.float32), bias_scale=2.0, bias_offset=-0.5,
    )  # fmt: skip
    maps = {name: tables.map_of(name, torch.zeros(table.shape[1]), None) for name, (table, _) in content.items()}
    assert (maps["image"] is None) == (shares is not None and not shares["image"])
    rows = torch.arange(24, 30)
    for given in ({"text", "image"}, {"text"}, {"image"}):
        parts = [
            (maps[name], maps[name].directions(content[name][0][rows].numpy()))
            for name in sorted(given)
            if maps[name] is not None
        ]
        if not parts:
            continue
        vector, source, bias = placed(parts)
        found = cold_map({name: content[name][0][rows] for name in given}).double().numpy()
        np.testing.assert_allclose(vector, 0.7 * found[:, :D] + np.arange(D), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(source, found[:, D : 2 * D], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(bias, 0.7 * 2.0 * found[:, -1] - 0.5, rtol=1e-4, atol=1e-5)
    alone = maps["text"].apply(content["text"][0][rows].numpy())
    np.testing.assert_array_equal(
        alone[0], placed([(maps["text"], maps["text"].directions(content["text"][0][rows].numpy()))])[0]
    )
