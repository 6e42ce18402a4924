"""The map of content to vectors against an explicit kernel solve."""

import pytest
import torch

from recbole_llm.fitting.cold_start.kernel_ridge import any_present, fit_cold_map, map_weights

N_ITEMS = 30


def text(features, present):
    return {"text": (features, present)}


def catalogue(seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(N_ITEMS, 8, generator=generator) + 2.0
    present = torch.ones(N_ITEMS, dtype=torch.bool)
    present[[3, 20]] = False
    features[~present] = 1e4  # not read
    warm = torch.arange(N_ITEMS) % 3 != 0
    return features, present, warm, torch.randn(N_ITEMS, 5, generator=generator)


def explicit_map(features, present, warm, values, query, mu, h):
    known = warm & present
    centre = features[present].double().mean(0)

    def directions(rows):
        rows = rows.double() - centre
        return rows / rows.norm(dim=1, keepdim=True)

    def kernel(a, b):
        return torch.exp(-((a[:, None] - b[None]) ** 2).sum(2) / h)

    anchors = directions(features[known])
    K = kernel(anchors, anchors) + mu * torch.eye(len(anchors))
    return kernel(directions(query), anchors) @ torch.linalg.inv(K) @ values[known].double()


@pytest.mark.parametrize(("mu", "h"), [(0.5, 0.8), (1.0, 0.3), (0.01, 2.0)])
def test_map_is_the_explicit_kernel_ridge(mu, h):
    features, present, warm, values = catalogue()
    query = features[~warm & present]
    fitted = fit_cold_map(
        text(features, present), warm, values.masked_fill(~warm[:, None], torch.nan), mu=mu, bandwidth=h
    )
    expected = explicit_map(features, present, warm, values, query, mu, h)
    torch.testing.assert_close(fitted({"text": query}).double(), expected, rtol=1e-4, atol=1e-5)


def test_without_ridge_the_map_passes_through_what_it_was_fitted_on():
    features, present, warm, values = catalogue(seed=1)
    known = warm & present
    fitted = fit_cold_map(text(features, present), warm, values, mu=1e-5)
    torch.testing.assert_close(fitted({"text": features[known]}), values[known], rtol=1e-2, atol=1e-2)


def test_a_far_text_gets_the_zero_vector():
    features = torch.zeros(6, 4)
    features[:, 0] = 1.0
    features[:3, 1] = 0.01 * torch.arange(3)
    features[5, 0] = -1.0
    everything = torch.ones(6, dtype=torch.bool)
    fitted = fit_cold_map(text(features, everything), torch.arange(6) < 5, torch.ones(6, 2), bandwidth=0.05)
    assert fitted({"text": features[:1]}).min() > 0.5
    assert fitted({"text": features[5:]}).abs().max() < 1e-6


def test_with_too_many_items_the_most_popular_are_the_anchors():
    features, present, warm, values = catalogue(seed=2)
    popularity = torch.arange(N_ITEMS).float().flip(0)
    known = torch.nonzero(warm & present).squeeze(1)
    fitted = fit_cold_map(text(features, present), warm, values, popularity, max_anchors=5)
    few = torch.zeros(N_ITEMS, dtype=torch.bool)
    few[known[:5]] = True
    expected = explicit_map(features, present, few, values, features[[0, 6]], 1.0, 0.8)
    torch.testing.assert_close(fitted({"text": features[[0, 6]]}).double(), expected, rtol=1e-4, atol=1e-5)


def test_the_map_as_weights_is_the_map():
    features, present, warm, values = catalogue(seed=3)
    ids = torch.nonzero(~warm & present).squeeze(1)
    popularity = torch.rand(N_ITEMS, generator=torch.Generator().manual_seed(0))
    for most in (100, 6):
        mapped = fit_cold_map(text(features, present), warm, values, popularity, max_anchors=most)
        known, weights = map_weights(text(features, present), warm, ids, popularity, max_anchors=most)
        torch.testing.assert_close(weights @ values[known], mapped({"text": features[ids]}), rtol=1e-4, atol=1e-5)


def two_modalities(seed=0):
    """Items with a text, a picture, both or neither; what is absent holds numbers that nobody may read."""
    generator = torch.Generator().manual_seed(seed)
    content = {}
    for modality, width in (("text", 8), ("image", 5)):
        vectors = torch.randn(N_ITEMS, width, generator=generator) + 1.0
        present = torch.rand(N_ITEMS, generator=generator) < 0.6
        vectors[~present] = torch.nan
        content[modality] = (vectors, present)
    warm = torch.arange(N_ITEMS) % 3 != 0
    return content, warm, torch.randn(N_ITEMS, 5, generator=generator)


def masked_sum(content, ids, others, h):
    """The kernel of both modalities in float64: the sum over those that both items have, over all modalities."""
    K = torch.zeros(len(ids), len(others), dtype=torch.float64)
    for vectors, present in content.values():
        centre = vectors[present].double().mean(0)
        for a, i in enumerate(ids.tolist()):
            for b, j in enumerate(others.tolist()):
                if present[i] and present[j]:
                    one, two = (vectors[k].double() - centre for k in (i, j))
                    K[a, b] += torch.exp(-((one / one.norm() - two / two.norm()) ** 2).sum() / h) / len(content)
    return K


@pytest.mark.parametrize("seed", range(3))
def test_modalities_that_two_items_share_are_summed_and_others_left_out(seed):
    content, warm, values = two_modalities(seed)
    some = any_present(content)
    known, ids = torch.nonzero(warm & some).squeeze(1), torch.nonzero(~warm & some).squeeze(1)
    both = torch.stack([present for _, present in content.values()])
    assert {tuple(column) for column in both[:, known].T.tolist()} == {(True, True), (True, False), (False, True)}
    K = masked_sum(content, known, known, 0.8)
    assert float(torch.linalg.eigvalsh(K)[0]) > -1e-12, "the masked sum is a kernel"
    inverse = torch.linalg.inv(K + 0.3 * torch.eye(len(known)))
    expected = masked_sum(content, ids, known, 0.8) @ inverse
    found, weights = map_weights(content, warm, ids, mu=0.3)
    assert torch.equal(found, known)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-4, atol=1e-5)
    fitted = fit_cold_map(content, warm, values, mu=0.3)
    for modality, (vectors, present) in content.items():
        other = next(name for name in content if name != modality)
        alone = ids[present[ids] & ~content[other][1][ids]]
        wanted = (expected @ values[known].double())[torch.isin(ids, alone)]
        torch.testing.assert_close(fitted({modality: vectors[alone]}).double(), wanted, rtol=1e-4, atol=1e-5)
        # the map of items that have nothing else, as an export holds it
        centre, anchors, coefficients = fitted.of_modality(modality)
        one = vectors[alone].double() - centre.double()
        one = one / one.norm(dim=1, keepdim=True)
        near = torch.exp(-((one[:, None] - anchors.double()) ** 2).sum(2) / fitted.bandwidth)
        torch.testing.assert_close(near @ coefficients.double(), wanted, rtol=1e-4, atol=1e-5)
    whole = ids[both[:, ids].all(0)]
    wanted = (expected @ values[known].double())[torch.isin(ids, whole)]
    got = fitted({name: vectors[whole] for name, (vectors, _) in content.items()})
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_no_text_to_learn_from_is_an_error():
    features, present, warm, values = catalogue()
    with pytest.raises(ValueError, match="no trained item has content"):
        fit_cold_map(text(features, present & ~warm), warm, values)
