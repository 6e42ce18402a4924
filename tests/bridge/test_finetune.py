"""A run that fine-tunes its text encoder: kept, exported and served; stopped and resumed; not kept where nothing is gained."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
pytest.importorskip("peft")

from recbole_llm import cli
from recbole_llm.bridge.checkpoint import last_file, read_checkpoint, settings_for_resume
from recbole_llm.bridge.training import finetune
from recbole_llm.bridge.training.item_encoder import TextItems
from recbole_llm.bridge.watched_run import run_watched
from recbole_llm.checkpoints import load_trained
from recbole_llm.content.encoders.transformer import load_encoder
from recbole_llm.content.tuning.adapter_file import Adapters
from recbole_llm.content.tuning.trainable import TrainableEncoder
from recbole_llm.export.reader import load_export
from recbole_llm.fitting.finetune import propagate
from recbole_llm.serving.text import TransformerEncoder

pytestmark = pytest.mark.filterwarnings("ignore")
TOPICS = [["red", "blue", "green"], ["cat", "dog", "cow"], ["big", "tiny", "long"], ["run", "jump", "walk"]]
FILL = [first + rest for first in "bdfglmnr" for rest in ("ab", "eb", "ib", "ob", "ub", "ac", "ec", "oc")]
USERS, ITEMS, EACH = 640, 120, 12


def write_dataset(folder, seed=0):
    """Users like one of four topics; an item's text holds one word of its topic among three that say nothing."""
    rng = random.Random(seed)
    target = folder / "toy"
    target.mkdir(parents=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(USERS):
        pool = [item for item in range(ITEMS) if item % 4 == user % 4] * 30 + list(range(ITEMS))
        seen = []
        while len(seen) < EACH:
            item = rng.choice(pool)
            if item not in seen:
                seen.append(item)
        lines += [f"u{user}\ti{item}\t{at}" for at, item in enumerate(seen)]
    (target / "toy.inter").write_text("\n".join(lines) + "\n")
    items = ["item_id:token\ttitle:token_seq"]
    for item in range(ITEMS):
        words = [rng.choice(TOPICS[item % 4]), *rng.choices(FILL, k=3)]
        rng.shuffle(words)
        items.append(f"i{item}\t{' '.join(words)}")
    (target / "toy.item").write_text("\n".join(items) + "\n")


def write_encoder(folder):
    """A BERT of 32 dimensions with random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(word for topic in TOPICS for word in topic), *FILL]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **named).save_pretrained(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=len(words), max_position_embeddings=40, initializer_range=0.1, **shape)
        BertModel(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the data and the encoder, and a cache of its own."""
    folder = tmp_path_factory.mktemp("finetune")
    write_dataset(folder / "data")
    write_encoder(folder / "bert")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(folder)
        yield folder


def config_of(folder, saved="saved", **recipe):
    return {
        "data_path": str(folder / "data"),
        "encoder": str(folder / "bert"),
        "feature_cache_dir": str(folder / "features"),
        "checkpoint_dir": str(folder / saved),
        "gpu_id": "",
        "epochs": 15,
        "embedding_size": 16,
        "train_batch_size": 128,
        "show_progress": False,
        "state": "WARNING",
        "metrics": ["NDCG"],
        "topk": [10],
        "valid_metric": "NDCG@10",
        "blocks": "learned",
        "use_item_id": False,
        "encoder_dim": 4,  # in which a frozen encoder has no room for four topics
        "weight_decay": 0.1,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id"]},
        "finetune": {"encoder": "text", "learning_rate": 0.003, "steps": 80, "refresh": 40, "items_per_step": 96}
        | recipe,
    }


def run(config):
    result, watch = run_watched("LLMTwoTower", "toy", [], dict(config), lambda given: None)
    return result, watch.trainer


def scores_of(model):
    return model.eval().scores(torch.arange(1, 9))


@pytest.fixture(scope="module")
def kept(place):
    """A run whose tuned encoder is kept."""
    return run(config_of(place))


@pytest.fixture
def paths(place):
    return {
        "data_path": str(place / "data"),
        "encoder": str(place / "bert"),
        "feature_cache_dir": str(place / "features"),
    }


@pytest.mark.slow
def test_an_encoder_that_helps_is_kept_and_the_result_says_so(kept, place):
    result, trainer = kept
    verdict = result["finetune"]
    assert verdict["kept"] and verdict["low"] > 0 and verdict["users"] >= 500
    assert verdict["tuned"] > verdict["control"]
    assert json.loads(json.dumps(verdict)) == verdict == trainer.model.finetuning
    file = finetune.adapters_file(trainer.saved_model_file)
    adapters = Adapters.from_bytes(Path(file).read_bytes())
    assert adapters.method == "lora" and Path(file).stat().st_size < 200_000
    assert not Path(finetune.state_file(trainer.saved_model_file)).exists()
    stored = [each for each in (place / "features").iterdir() if each.is_dir()]
    assert len(stored) == 2, "vectors of the base and of the tuned encoder lie apart"


@pytest.mark.slow
def test_the_checkpoint_gives_the_same_scores(kept, paths):
    _, trainer = kept
    model, dataset = load_trained(trainer.saved_model_file, **paths)
    assert torch.equal(scores_of(model), scores_of(trainer.model))
    assert dataset.options.encoder != paths["encoder"]
    raw = dataset.item_features["text"].vectors
    assert torch.equal(raw, model.training_data().content["text"][0])


@pytest.mark.slow
def test_the_export_encodes_new_items_with_the_tuned_encoder(kept, place, paths):
    _, trainer = kept
    folder = place / "export"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in paths.items()]
    assert cli.main(["export", trainer.saved_model_file, "--output", str(folder), *options]) == 0
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {
        ".json",
        ".safetensors",
        ".md",
        ".txt",
        ".jsonl",
        ".npy",
        ".bin",
        ".index",
        "",
    }
    assert not [
        path
        for path in folder.rglob("*")
        if path.suffix in (".py", ".pkl", ".pth", ".pt") or path.name == "pytorch_model.bin"
    ]
    export = load_export(folder)
    spec = export.manifest.encoder
    base = load_encoder(paths["encoder"], dim=4)
    assert spec.bundled and spec.name == paths["encoder"] and spec.fingerprint != base.fingerprint
    served = TransformerEncoder(folder, export.manifest)
    model, dataset = load_trained(trainer.saved_model_file, **paths)
    texts = dataset.item_texts()
    vectors, _ = served.encode([texts[5], "red bab beb"])
    np.testing.assert_allclose(vectors[0], dataset.raw_vectors("text").vectors[5], atol=1e-5)
    with torch.no_grad():
        frozen = base.encode(base.prepare(["red bab beb"]))
    assert float((frozen - torch.from_numpy(vectors[1:])).abs().max()) > 1e-2
    # a new item with the text of a known one stands where that text belongs
    place_of = export.text_map.apply(vectors[:1])[0]
    assert np.isfinite(place_of).all()


@pytest.mark.slow
def test_a_fine_tuning_that_was_killed_goes_on_as_if_it_had_not_been(kept, place, paths, monkeypatch):
    result, trainer = kept
    write = finetune.write_checkpoint

    def write_and_stop(*given):
        write(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "write_checkpoint", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(config_of(place, "stopped"))
    (state,) = (place / "stopped").glob("*.finetune")
    assert read_checkpoint(state)["finetune"]["step"] == 40
    best = str(state).removesuffix(".finetune") + ".pth"
    shutil.rmtree(place / "cache")  # nothing but the checkpoint carries on
    model, dataset, settings = settings_for_resume(last_file(best), tuple(paths))
    again, other = run(settings | paths)
    assert again["finetune"] == result["finetune"]
    assert again["test_result"] == result["test_result"]
    assert torch.equal(scores_of(other.model), scores_of(trainer.model))
    assert not state.exists()


@pytest.mark.slow
def test_an_encoder_that_gains_nothing_leaves_the_run_as_it_would_have_been(place):
    config = config_of(place, "rejected", learning_rate=1e-9, steps=4, refresh=4)
    result, trainer = run(config)
    assert result["finetune"]["kept"] is False and trainer.model.tuned is None
    plain, other = run(config | {"finetune": None, "checkpoint_dir": str(place / "plain")})
    assert "finetune" not in plain
    assert plain["test_result"] == result["test_result"]
    assert torch.equal(scores_of(other.model), scores_of(trainer.model))
    assert not list((place / "rejected").glob("*-adapters.safetensors"))


def test_all_texts_at_once_give_the_gradient_of_plain_autograd(place):
    trainable = TrainableEncoder(load_encoder(str(place / "bert")), "last_layers", 1)
    texts = [None, "red bab", "cat beb bib", "big", "run bob bub bac", "blue"]
    items = TextItems(trainable, texts, batch_size=2)
    rows = torch.tensor([5, 1, 4, 2, 3])
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(len(texts), trainable.encoder.dim, generator=generator)
    fresh = propagate(items, rows, gradient)
    found = [parameter.grad.clone() for parameter in trainable.parameters()]
    for parameter in trainable.parameters():
        parameter.grad = None
    encoder = trainable.encoder
    whole = encoder.encode(encoder.prepare([texts[row] for row in rows.tolist()]))
    (whole * gradient[rows]).sum().backward()
    torch.testing.assert_close(fresh, whole.detach(), rtol=1e-5, atol=1e-5)
    for one, parameter in zip(found, trainable.parameters(), strict=True):
        most = float(parameter.grad.abs().max())
        torch.testing.assert_close(one, parameter.grad, rtol=1e-5, atol=1e-5 * max(most, 1.0))
    torch.testing.assert_close(items.encode_all()[rows], whole.detach(), rtol=1e-5, atol=1e-5)
    assert not bool(items.encode_all()[0].any())


def test_one_state_is_that_of_one_fine_tuning(tmp_path):
    file = tmp_path / "a.finetune"
    identity = {"data": "d", "base": "b", "recipe": {"steps": 3}}
    assert finetune._state_of(str(file), identity, torch.device("cpu")) is None
    content = {"format": "recbole-llm checkpoint", "version": 1, **identity, "finetune": {"step": 2}}
    torch.save(content, file)
    assert finetune._state_of(str(file), identity, torch.device("cpu")) == {"step": 2}
    with pytest.raises(ValueError, match=r"state of another fine-tuning \(recipe differ\)"):
        finetune._state_of(str(file), identity | {"recipe": {"steps": 4}}, torch.device("cpu"))
