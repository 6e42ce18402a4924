"""The key finetune: its parts and defaults, and every combination that it refuses by name."""

import pytest

pytest.importorskip("recbole_llm.bridge.options")
from recbole_llm.bridge.finetune_option import read_finetune
from recbole_llm.fitting.finetune_recipe import Recipe
from tests.bridge.test_options import read

TOWERS = {"blocks": "learned", "use_item_id": False}


@pytest.mark.parametrize("value", [None, "", False, {}, "{}"])
def test_it_is_off_where_nothing_is_given(value):
    assert read_finetune("finetune", value) is None
    assert read(finetune=value).finetune is None


def test_the_parts_that_are_left_out_have_their_defaults():
    found = read(**TOWERS, finetune={"encoder": "text"}).finetune
    assert found == Recipe("text")
    assert (found.method, found.layers, found.rank, found.alpha) == ("lora", None, 8, 16.0)
    assert (found.learning_rate, found.warmup, found.decay) == (1e-4, 0.2, 0.05)
    assert (found.steps, found.items_per_step, found.refresh) == (200, 256, 100)
    assert (found.gate_level, found.gate_users, found.max_tokens) == (0.01, 500, None)
    last = read_finetune("finetune", "{encoder: image, method: last_layers}")
    assert (last.encoder, last.layers, last.learning_rate) == ("image", 1, 3e-5)


def test_the_frozen_encoder_reads_as_many_tokens_as_the_tuned_one():
    assert read(**TOWERS, finetune={"encoder": "text", "max_tokens": 32}).encoder_max_tokens == 32
    assert (
        read(**TOWERS, encoder_max_tokens=32, finetune={"encoder": "text", "max_tokens": 32}).encoder_max_tokens == 32
    )
    assert read(**TOWERS, encoder_max_tokens=48, finetune={"encoder": "text"}).encoder_max_tokens == 48


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "finetune must be the parts of a fine-tuning"),
        ({"method": "lora"}, "names encoder"),
        ({"encoder": "audio"}, "finetune.encoder must be one of text, image, got 'audio'"),
        ({"encoder": "text", "layer": 1}, "finetune has no part 'layer'. Did you mean 'layers'"),
        ({"encoder": "text", "lr": 1}, "finetune has no part 'lr'. Known are encoder"),
        ({"encoder": "text", "method": "adapter"}, "finetune.method must be one of lora, last_layers"),
        ({"encoder": "text", "layers": 0}, "finetune.layers must be an integer of at least 1"),
        ({"encoder": "text", "rank": 0}, "finetune.rank must be an integer of at least 1"),
        (
            {"encoder": "text", "method": "last_layers", "rank": 4},
            "finetune.rank must be left out with method last_layers",
        ),
        ({"encoder": "text", "method": "last_layers", "alpha": 4}, "finetune.alpha must be left out"),
        ({"encoder": "text", "alpha": 0}, "finetune.alpha must be a finite number above 0"),
        ({"encoder": "text", "learning_rate": 0}, "finetune.learning_rate must be a finite number above 0"),
        ({"encoder": "text", "warmup": 0}, "finetune.warmup must be a number from 0.1 to 0.25"),
        ({"encoder": "text", "decay": 2}, "finetune.decay must be a number from 0 to 1"),
        ({"encoder": "text", "steps": True}, "finetune.steps must be an integer of at least 1"),
        ({"encoder": "text", "items_per_step": "all"}, "finetune.items_per_step must be an integer"),
        ({"encoder": "text", "refresh": 0}, "finetune.refresh must be an integer of at least 1"),
        ({"encoder": "image", "max_tokens": 32}, "Pictures have no tokens"),
        ({"encoder": "text", "gate_level": 0.2}, "finetune.gate_level must be a number from 0.0001 to 0.05"),
        ({"encoder": "text", "gate_users": 100}, "finetune.gate_users must be an integer of at least 500"),
    ],
)
def test_a_wrong_part_is_named(value, message):
    with pytest.raises(ValueError, match=message):
        read(**TOWERS, finetune=value)


TEXT = {"encoder": "text"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetune": TEXT}, "the towers read no content here .* Next step: set tower_features to true"),
        ({"finetune": TEXT, "blocks": "closed_form"}, "blocks is closed_form, without towers"),
        ({**TOWERS, "finetune": TEXT, "tower_features": False}, "the towers read no content"),
        ({**TOWERS, "finetune": TEXT, "loss_type": "sampled_bce"}, "loss_type is sampled_bce"),
        ({**TOWERS, "finetune": TEXT, "shard_items": True}, "shard_items is true"),
        (
            {**TOWERS, "finetune": TEXT, "item_features_file": "a.npy"},
            "the vectors of the text come from item_features_file",
        ),
        ({**TOWERS, "finetune": TEXT, "encoder": ""}, "there is no encoder to tune, encoder is empty"),
        ({**TOWERS, "finetune": TEXT, "encoder": "mine:encode"}, "encoder is the function 'mine:encode'"),
        ({**TOWERS, "finetune": TEXT, "encoder_dtype": "bfloat16"}, "encoder_dtype is bfloat16"),
        (
            {**TOWERS, "finetune": TEXT | {"max_tokens": 32}, "encoder_max_tokens": 64},
            "max_tokens is 32 and encoder_max_tokens 64",
        ),
        ({**TOWERS, "finetune": TEXT, "user_tower": "history+text"}, "user_tower is history\\+text"),
        ({**TOWERS, "finetune": TEXT, "refit_rows": "all"}, "a fit that repeats the choices .*EXPORT/encoder"),
        ({**TOWERS, "finetune": TEXT, "enable_scaler": True}, "enable_scaler is true"),
        ({**TOWERS, "finetune": {"encoder": "image"}}, "there is no encoder to tune, item_modalities.image is empty"),
        (
            {**TOWERS, "finetune": {"encoder": "image"}, "item_modalities": {"image": "onnx:a.onnx"}},
            "an ONNX file holds no layers to train",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_next_step(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(**changes)
    assert str(caught.value).startswith("finetune: ") and "Next step: " in str(caught.value)


def test_the_hybrid_may_be_tuned_where_its_towers_read_content():
    assert read(tower_features=True, finetune=TEXT).finetune == Recipe("text")
