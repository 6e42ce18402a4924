"""Our configuration keys: every default is valid, every mistake is named, stock keys are never touched."""

from pathlib import Path

import pytest
import yaml

import recbole_llm

options = pytest.importorskip("recbole_llm.bridge.options")
DEFAULTS = yaml.safe_load((Path(recbole_llm.__file__).parent / "properties" / "LLMTwoTower.yaml").read_text())


class Config(dict):
    """RecBole's Config gives None for an absent key."""

    external_config_dict = {}

    def __missing__(self, key):
        return None


def read(**changes):
    return options.Options.from_config(Config(DEFAULTS, **changes))


def test_the_yaml_gives_every_key_of_ours_a_default():
    assert [key for key in options.OWN_KEYS if key not in DEFAULTS] == []
    assert read().loss_type == "catalog_bce"


def test_every_key_in_the_yaml_is_ours_or_recboles():
    assert [key for key in DEFAULTS if key not in options.OWN_KEYS and key not in options.stock_keys()] == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("loss_type", "BCE", "loss_type must be one of catalog_bce"),
        ("loss_type", "catalog_bec", "Did you mean 'catalog_bce'"),
        ("encoder_pooling", 3, "encoder_pooling must be one of auto"),
        ("embedding_size", 0, "embedding_size must be an integer of at least 1, got 0"),
        ("embedding_size", True, "embedding_size must be an integer"),
        ("embedding_size", "64", "embedding_size must be an integer"),
        ("history_dropout", 1.0, r"history_dropout must be a number in \[0, 1\)"),
        ("use_item_id", "yes", "use_item_id must be true or false"),
        ("scale_init", float("inf"), "scale_init must be a finite number above 0"),
        ("history_decay", 0, "history_decay must be a finite number above 0"),
        ("neg_weight", -1, "neg_weight must be a finite number of at least 0"),
        ("item_text_fields", {"a": 1}, "item_text_fields must be a list of column names"),
        ("user_tower", "history+age", "Unknown: \\['age'\\]"),
        ("user_tower", [], "user_tower must be one of history"),
        ("encoder", ["a"], "encoder must be a string"),
    ],
)
def test_a_wrong_value_names_the_key_what_was_given_and_what_is_expected(key, value, message):
    with pytest.raises(ValueError, match=message):
        read(**{key: value})


def test_values_arrive_in_their_final_form():
    got = read(
        item_text_fields="title, brand",
        user_tower="history + id",
        adapter_hidden_size=0,
        encoder=2020,
        encoder_prompt="",
    )
    assert got.item_text_fields == ("title", "brand")
    assert got.user_tower == ("history", "id")
    assert got.adapter_hidden_size is None
    assert got.encoder == "2020"
    assert got.encoder_prompt is None


@pytest.mark.parametrize(("key", "meant"), [("encoder_poolng", "encoder_pooling"), ("embeding_size", "embedding_size")])
def test_a_misspelt_key_of_ours_is_an_error_that_names_it(key, meant):
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        options.reject_misspelt_keys({key: 1})


@pytest.mark.parametrize(
    "key", ["reg_weight", "mlp_hidden_size", "n_layers", "load_col", "epochs", "nproc", "my_own_note"]
)
def test_a_stock_key_or_a_foreign_one_is_never_an_error(key):
    options.reject_misspelt_keys({key: 1})


def test_a_checkpoint_older_than_a_key_gets_its_default():
    config = Config(DEFAULTS)
    del config["cold_map"]
    assert options.Options.from_config(config).cold_map == DEFAULTS["cold_map"]


SHARDS = {"shard_items": True, "blocks": "learned"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": "closed_form+learned"}, "blocks must be learned"),
        ({"loss_type": "sampled_bce"}, "loss_type must be catalog_bce or catalog_ce, got 'sampled_bce'"),
        (
            {"loss_type": "catalog_ce", "kernel_backend": "triton"},
            "kernel_backend must be auto or torch for catalog_ce",
        ),
        ({"eval_backend": "stock"}, "eval_backend must be streamed, got 'stock'"),
        ({"eval_args": {"mode": {"valid": "full", "test": "uni100"}}}, "eval_args.mode must be full"),
        ({"enable_scaler": True}, "enable_scaler must be false"),
    ],
)
def test_what_shards_of_the_items_lack_is_refused_with_the_next_step(changes, message):
    assert read(**SHARDS).shard_items
    with pytest.raises(ValueError, match=f"With shard_items, {message}.*Or set shard_items to false"):
        read(**SHARDS | changes)
