"""Mixed precision through RecBole's enable_amp and enable_scaler, clipping of the true gradients, fused optimizers."""

import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed


def build(config_dict):
    config = Config(model="LLMTwoTower", dataset="toy", config_dict=dict(config_dict))
    init_seed(config["seed"], True)
    train, valid, _ = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], True)
    model = get_model(config["model"])(config, train._dataset)
    return get_trainer(config["MODEL_TYPE"], config["model"])(config, model), train, valid


@pytest.fixture
def quick(run_config):
    return run_config | {"encoder": "", "blocks": "learned", "epochs": 2, "history_dropout": 0.0}


def scaled(trainer, scale):
    """RecBole scales on a GPU only; the arithmetic is the same on a CPU."""
    trainer.enable_amp = trainer.enable_scaler = True
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    return trainer


def gradients_of_first_step(trainer, train, monkeypatch):
    found = {}
    step = trainer.optimizer.step

    def spy(*args, **kwargs):
        found.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer.optimizer, "step", spy)
    trainer.model.train()
    trainer._step(next(iter(train)), trainer.model.calculate_loss)
    return found


def first_moments(trainer, train):
    """Of Adam after one step: a tenth of the gradients that it saw; its fused form divides by the scale on its own."""
    trainer.model.train()
    trainer._step(next(iter(train)), trainer.model.calculate_loss)
    return {n: trainer.optimizer.state[p]["exp_avg"] for n, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("loss_type", ["catalog_bce", "catalog_ce", "sampled_bce", "pair_bce"])
def test_bfloat16_trains_float32_parameters_to_nearly_the_same_loss(quick, loss_type, monkeypatch):
    quick |= {"loss_type": loss_type, "epochs": 3}
    full, train, valid = build(quick)
    full.fit(train, valid, verbose=False, saved=False)
    half, train, valid = build(quick | {"enable_amp": True})
    seen, calculate = set(), half.model.calculate_loss

    def spy(interaction):
        seen.add((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return calculate(interaction)

    monkeypatch.setattr(half.model, "calculate_loss", spy)
    half.fit(train, valid, verbose=False, saved=False)
    assert seen == {(True, torch.bfloat16)}
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    assert half.train_loss_dict != full.train_loss_dict  # bfloat16 did take part
    for epoch, loss in full.train_loss_dict.items():
        assert half.train_loss_dict[epoch] == pytest.approx(loss, rel=0.01)


def test_the_optimizer_sees_unscaled_gradients_in_float16(quick):
    full, train, _ = build(quick)
    expected = first_moments(full, train)
    half, train, _ = build(quick)
    found = first_moments(scaled(half, 2.0**10), train)
    assert half._amp_dtype is torch.float16
    for name, moment in expected.items():
        torch.testing.assert_close(found[name], moment, rtol=0.01, atol=0.01 * moment.abs().max().item())


@pytest.mark.parametrize("scale", [2.0**4, 2.0**12])
def test_the_limit_of_clipping_is_meant_for_unscaled_gradients(quick, scale):
    trainer, train, _ = build(quick | {"clip_grad_norm": {"max_norm": 1e-3, "norm_type": 2}})
    moments = first_moments(scaled(trainer, scale), train)
    assert torch.cat([m.flatten() for m in moments.values()]).norm().item() == pytest.approx(1e-4, rel=1e-3)


def test_an_overflow_skips_the_step_and_halves_the_scale(quick, monkeypatch):
    trainer, train, _ = build(quick)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    found = gradients_of_first_step(scaled(trainer, 2.0**120), train, monkeypatch)
    assert any(not g.isfinite().all() for g in found.values())
    assert trainer.scaler.get_scale() == 2.0**119
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert trainer._state(0)["scaler"]["scale"] == 2.0**119  # a resume goes on with it


@pytest.mark.parametrize("learner", ["adam", "adamw"])
def test_adam_is_fused_and_equals_the_plain_one(quick, learner):
    fused, train, _ = build(quick | {"learner": learner})
    assert fused.optimizer.defaults["fused"] is True
    plain, _, _ = build(quick | {"learner": learner})
    plain.optimizer = type(fused.optimizer)(
        [{key: g[key] for key in ("params", "lr", "weight_decay")} for g in plain.optimizer.param_groups], foreach=False
    )
    for batch in list(train)[:3]:
        for trainer in (fused, plain):
            trainer._step(batch, trainer.model.calculate_loss)
    for x, y in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_other_optimizers_stay_as_they_are(quick):
    assert type(build(quick | {"learner": "sgd"})[0].optimizer) is torch.optim.SGD
