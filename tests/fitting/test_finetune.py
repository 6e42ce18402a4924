"""Fine-tuning through the towers' loss: its gradient is autograd's, it goes on where it stopped, it holds few activations."""

import pytest
import torch
from torch import nn

from recbole_llm.fitting.data import TrainingData
from recbole_llm.fitting.finetune import Frame, Tuning, fine_tune, gradient_at_vectors, propagate
from recbole_llm.fitting.finetune_recipe import Recipe
from recbole_llm.fitting.validation import TopKMetric, Validation
from recbole_llm.scoring.item_rows import AllRows
from recbole_llm.scoring.losses import LossOptions, TowerLoss
from recbole_llm.scoring.tables import FrozenTensor
from recbole_llm.scoring.towers import TowerOptions, TwoTowers
from tests.fitting.made_interactions import interactions

F, D, GIVEN = 10, 6, 8


class Layers:
    """An encoder of two layers over made inputs, a few items at a time."""

    def __init__(self, n_items, seed=0, chunk=7):
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(n_items, GIVEN, generator=generator)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(GIVEN, 12), nn.Tanh(), nn.Linear(12, F))
        self.chunk, self.most = chunk, 0

    def parameters(self):
        return list(self.net.parameters())

    def state(self):
        return {name: tensor.clone() for name, tensor in self.net.state_dict().items()}

    def load(self, state):
        self.net.load_state_dict(dict(state))

    def encode(self, rows):
        for places in torch.arange(len(rows)).flip(0).split(self.chunk):
            self.most = max(self.most, len(places))
            yield places, self.net(self.inputs[rows[places]])

    @torch.no_grad()
    def encode_all(self):
        return self.net(self.inputs)


def whitened(vectors):
    """Some affine map that follows the vectors."""
    centre = vectors.double().mean(0)
    return centre, torch.eye(F, dtype=torch.float64) * 1.5 + 0.1


def tuning_of(n_items=25, n_users=1000, seed=0, loss="catalog_bce", recipe=None, scoring="dot"):
    train, valid, _ = interactions(n_users, n_items, seed)
    encoder = Layers(n_items, seed)
    present = torch.ones(n_items, dtype=torch.bool)
    present[[0, 3]] = False
    vectors = encoder.encode_all() * present[:, None]
    frame = Frame(*whitened(vectors), present)
    table = FrozenTensor(frame(vectors))
    shape = TowerOptions(D, None, False, True, False, ("history",), 0.5, 0.5, scoring, 1.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        towers = TwoTowers(
            shape,
            n_users,
            torch.bincount(train.ids, minlength=n_items),
            n_users,
            {"text": (table, FrozenTensor(present))},
            None,
            AllRows(n_items),
        )
    terms = TowerLoss(towers, LossOptions(loss, 1.0, scoring, 0.5, "auto"))
    recipe = recipe or Recipe("text", steps=12, items_per_step=9, refresh=4, learning_rate=0.02)
    tuning = Tuning(recipe, towers, terms, table, vectors, present, whitened, encoder, 0.01, 0.0, 64, seed)
    return tuning, TrainingData(train, AllRows(n_items)), Validation(train, valid, train, TopKMetric("ndcg", 5))


def gradients(parameters):
    return [parameter.grad.clone() for parameter in parameters]


@pytest.mark.parametrize(("loss", "scoring"), [("catalog_bce", "dot"), ("catalog_ce", "cosine")])
def test_all_items_at_once_give_the_gradient_of_plain_autograd(loss, scoring):
    tuning, data, _ = tuning_of(loss=loss, scoring=scoring)
    users, n_items = torch.tensor([3, 9, 1, 30]), data.n_items
    parameters = tuning.encoder.parameters()
    frame = tuning.frame(tuning.vectors)

    def of_users():
        torch.manual_seed(5)  # of the history dropout
        return tuning.loss.of_users(users, data.history)

    # the whole computation in one graph
    tuning.table.value = frame(tuning.encoder.net(tuning.encoder.inputs) * tuning.present[:, None])
    expected_loss = of_users()
    expected_loss.backward()
    expected, towers = gradients(parameters), gradients(tuning.towers.parameters())
    for parameter in (*parameters, *tuning.towers.parameters()):
        parameter.grad = None

    rows = torch.nonzero(tuning.present).squeeze(1)
    found_loss, gradient = gradient_at_vectors(tuning.table, frame, tuning.vectors, of_users)
    assert gradient.shape == (n_items, F) and not tuning.table.value.requires_grad
    fresh = propagate(tuning.encoder, rows, gradient)
    torch.testing.assert_close(found_loss, expected_loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fresh, tuning.vectors[rows], rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients(parameters), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    for one, other in zip(gradients(tuning.towers.parameters()), towers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    assert max(float(each.abs().max()) for each in expected) > 1e-3, "a gradient of 0 would prove nothing"


def test_some_items_give_that_gradient_on_average():
    tuning, data, _ = tuning_of()
    users, parameters = torch.tensor([3, 9, 1, 30]), tuning.encoder.parameters()
    rows = torch.nonzero(tuning.present).squeeze(1)[:20]
    _, gradient = gradient_at_vectors(
        tuning.table, tuning.frame(tuning.vectors), tuning.vectors, lambda: tuning.loss.of_users(users, data.history)
    )
    propagate(tuning.encoder, rows, gradient)
    whole = gradients(parameters)
    total = [torch.zeros_like(each) for each in whole]
    for part in rows.split(5):
        for parameter in parameters:
            parameter.grad = None
        propagate(tuning.encoder, part, gradient, factor=4.0)
        for at, each in zip(total, gradients(parameters), strict=True):
            at += each / 4
    for one, other in zip(total, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_the_encoder_holds_is_the_same_for_every_catalogue():
    held = []
    for n_items in (40, 400):
        tuning, data, _ = tuning_of(n_items, n_users=80)
        gradient = torch.randn(n_items, F)
        sizes = []

        def kept(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            propagate(tuning.encoder, torch.arange(1, 17), gradient)
        held.append((max(sizes), sum(sizes), tuning.encoder.most))
    assert held[0] == held[1]


def test_a_step_changes_the_vectors_of_its_items_and_a_refresh_those_of_all():
    recipe = Recipe("text", steps=1, items_per_step=5, refresh=100, learning_rate=0.05)
    tuning, data, validation = tuning_of(recipe=recipe)
    states = []
    fine_tune(tuning, data, validation, save=states.append)
    (state,) = states  # the last step is followed by a refresh
    assert state["step"] == 1
    torch.testing.assert_close(state["vectors"], tuning.encoder.encode_all())
    assert not torch.allclose(state["vectors"], tuning.vectors, atol=1e-4)


@pytest.mark.parametrize("stopped_after", [1, 2])
def test_a_fine_tuning_that_was_stopped_ends_as_one_that_was_not(stopped_after):
    def run(resume=None, stop=None):
        tuning, data, validation = tuning_of()
        states = []

        def save(state):
            states.append(state)
            if len(states) == stop:
                raise KeyboardInterrupt

        try:
            outcome = fine_tune(tuning, data, validation, resume, save)
        except KeyboardInterrupt:
            return states[-1]
        return outcome.verdict, states[-1]

    whole, last = run()
    state = run(stop=stopped_after)
    assert state["step"] == 4 * stopped_after
    again, again_last = run(resume=state)
    assert again == whole
    assert torch.equal(again_last["vectors"], last["vectors"])
    assert all(torch.equal(one, other) for one, other in zip(again_last["towers"], last["towers"], strict=True))


def test_a_tuned_encoder_that_is_not_kept_leaves_towers_and_vectors_as_they_were():
    recipe = Recipe("text", steps=6, items_per_step=9, refresh=3, learning_rate=1.0)  # destroys it
    tuning, data, validation = tuning_of(recipe=recipe)
    before = [each.detach().clone() for each in tuning.towers.parameters()]
    table = tuning.table.value.clone()
    outcome = fine_tune(tuning, data, validation)
    assert not outcome.verdict.kept and outcome.vectors is None
    assert all(torch.equal(one, other) for one, other in zip(before, tuning.towers.parameters(), strict=True))
    assert torch.equal(tuning.table.value, table)


def test_too_few_users_make_no_step():
    tuning, data, validation = tuning_of(n_users=60)
    outcome = fine_tune(tuning, data, validation, save=lambda state: pytest.fail("a step was made"))
    assert not outcome.verdict.kept and "too few" in outcome.verdict.reason


def test_the_learning_rate_rises_and_falls():
    recipe = Recipe("text", steps=100, warmup=0.2, decay=0.1)
    rates = [recipe.rate(step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.05) and rates[19] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert rates[:20] == sorted(rates[:20]) and rates[19:] == sorted(rates[19:], reverse=True)
