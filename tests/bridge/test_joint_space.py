"""A text finds pictures and a picture texts, where one model holds both: tiny CLIP, ranked by an oracle of transformers."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.quick_start import run_recbole

from recbole_llm import cli
from recbole_llm.content.encoders.joint import TextTower
from recbole_llm.content.encoders.transformer import load_encoder
from recbole_llm.media import MediaModel, open_media, recommend_media, vector_of_question
from tests.made_pictures import write_picture
from tests.toy_data import TOPICS

pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = [
    "[PAD]",
    "[BOS]",
    "[EOS]",
    "[UNK]",
    "a",
    "story",
    "of",
    *TOPICS,
    *(word for some in TOPICS.values() for word in some),
]


def write_model(folder, kind="clip"):
    """Write a tiny CLIP or SigLIP with a tokenizer of the toy data's words; returns its model and tokenizer."""
    import transformers as t
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, "[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]"
    )
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    text = small | {"vocab_size": len(WORDS), "max_position_embeddings": 12, "eos_token_id": 2, "pad_token_id": 0}
    vision = small | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "clip":
        text |= {"initializer_factor": 8.0}
        model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)).eval()
        processor = t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    else:
        model = t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=vision)).eval()
        processor = t.SiglipImageProcessor(size={"height": 32, "width": 32})
    for each in (model, tokenizer, processor):
        each.save_pretrained(folder)
    return model, tokenizer


@pytest.fixture(scope="module")
def shop(toy_path, tmp_path_factory):
    """A trained model whose texts and pictures come from one tiny CLIP, and what reads it."""
    folder = tmp_path_factory.mktemp("joint")
    data = folder / "data" / "toy"
    shutil.copytree(toy_path / "toy", data)
    (data / "images").mkdir()
    for at in range(44):
        write_picture(data / "images" / f"i{at}.png", at)
    model, tokenizer = write_model(folder / "clip")
    config = {
        "data_path": str(folder / "data"),
        "encoder": str(folder / "clip"),
        "item_modalities": {"image": {"encoder": str(folder / "clip")}},
        "feature_cache_dir": str(folder / "features"),
        "gpu_id": "",
        "epochs": 1,
        "embedding_size": 8,
        "show_progress": False,
        "state": "WARNING",
        "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id"]},
    }
    files = {}
    for name, changes in {"both": {}, "pictures": {"encoder": ""}}.items():
        saved = {"checkpoint_dir": str(folder / name)}
        run_recbole("LLMTwoTower", "toy", config_dict=config | saved | changes)
        (files[name],) = [path for path in (folder / name).glob("*.pth") if "-last" not in path.name]
    given = {key: config[key] for key in ("data_path", "feature_cache_dir", "item_modalities")}
    return files, given, config, data, model, tokenizer


def of_texts(model, tokenizer, texts):
    with torch.no_grad():
        found = [
            model.get_text_features(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
            for text in texts
        ]
    return torch.cat([getattr(each, "pooler_output", each) for each in found]).double().numpy()


def of_pictures(encoder, data, ids):
    pictures = [Image.open(data / "images" / f"{item}.png").convert("RGB") for item in ids]
    with torch.inference_mode():
        return encoder.encode(encoder.prepare(pictures)).double().numpy()


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def texts_of(data):
    """Id to text as the model reads it: the title and the year that the file has."""
    from recbole_llm.content.text import choose_text_fields, read_atomic_table, texts_of_tokens

    table = read_atomic_table(data / "toy.item", "item_id")
    ids = list(table.row_of)
    texts, _ = texts_of_tokens(table, ids, choose_text_fields(table))
    return dict(zip(ids, texts, strict=True))


@pytest.mark.slow
def test_a_text_finds_pictures_and_a_picture_texts(shop):
    files, given, config, data, tower, tokenizer = shop
    paths = given | {"encoder": config["encoder"]}
    from recbole_llm.content.encoders.images import load_image_encoder

    ids = [f"i{at}" for at in range(44)]
    pictures = of_pictures(load_image_encoder(config["encoder"]), data, ids)
    by_id = texts_of(data)
    named = [item for item, text in by_id.items() if text]
    texts = of_texts(tower, tokenizer, [by_id[item] for item in named])
    question = "a story of rocket and moon"
    asked = unit(of_texts(tower, tokenizer, [question])[0] - texts.mean(0))
    cosines = unit(pictures - pictures.mean(0)) @ asked
    expected = [ids[at] for at in np.argsort(-cosines, kind="stable")[:5]]
    model = open_media(files["both"], asked="text", compared="image", **paths)
    answer = recommend_media(model, question, k=5, by="likeness")
    assert [item.id for item in answer.items] == expected and answer.source == "text"

    photo = data / "images" / "i8.png"
    asked = unit(pictures[8] - pictures.mean(0))
    model = open_media(files["both"], asked="image", compared="text", **paths)
    answer = recommend_media(model, photo, k=5, by="likeness")
    cosines = unit(texts - texts.mean(0)) @ asked
    expected = [named[at] for at in np.argsort(-cosines, kind="stable")[:5]]
    assert [item.id for item in answer.items] == expected and answer.source == "picture"


@pytest.mark.slow
def test_a_model_of_pictures_alone_is_asked_by_text_without_an_option(shop, capsys):
    files, given, config, data, *_ = shop
    options = [f"--{key.replace('_', '-')}={given[key]}" for key in ("data_path", "feature_cache_dir")]
    options.append(f"--item-modalities={{image: '{config['encoder']}'}}")
    model = open_media(files["pictures"], asked="text", compared="image", **given)
    expected = [item.id for item in recommend_media(model, "whale island", k=4, by="likeness").items]
    for more in ([], ["--in", "image"]):
        asked = ["--text", "whale island", "--k", "4", "--by", "likeness", *more]
        assert cli.main(["recommend", str(files["pictures"]), *asked, *options]) == 0
        assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]] == expected


def test_a_question_that_says_nothing_or_has_no_finite_vector_is_refused():
    class Encoder:
        def prepare(self, texts):
            return texts

        def encode(self, texts):
            return torch.full((len(texts), 3), float("nan"))

    model = MediaModel(None, "text", "image", None, Encoder())
    with pytest.raises(ValueError, match="text is empty"):
        vector_of_question(model, " \n")
    with pytest.raises(ValueError, match="no finite vector for 'red'"):
        vector_of_question(model, "red")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_text_tower_is_that_of_transformers(kind, tmp_path):
    model, tokenizer = write_model(tmp_path / kind, kind)
    tower = load_encoder(str(tmp_path / kind))
    assert isinstance(tower, TextTower) and tower.dim == (10 if kind == "clip" else 16)
    texts = ["a story of whale", "cow", "", "a story of star rocket alien planet moon cow tractor barn field hay ship"]
    samples = tower.prepare(texts)
    assert [sample.cut for sample in samples] == [0, 0, 0, 4] and samples[3].ids[-1] == 2
    with torch.no_grad():
        for vector, sample in zip(tower.encode(samples), samples, strict=True):
            padded = (*sample.ids, *[0] * (12 - sample.size)) if kind == "siglip" else sample.ids
            found = model.get_text_features(input_ids=torch.tensor([padded]))
            torch.testing.assert_close(vector, getattr(found, "pooler_output", found)[0], atol=1e-5, rtol=1e-4)
    assert load_encoder(str(tmp_path / kind)).fingerprint == tower.fingerprint
    assert load_encoder(str(tmp_path / kind), prompt="a ").fingerprint != tower.fingerprint
    for wrong in ({"overflow": "chunk_mean"}, {"dim": 4}, {"max_tokens": 13}):
        with pytest.raises(ValueError, match="encoder"):
            load_encoder(str(tmp_path / kind), **wrong)


@pytest.mark.slow
def test_what_has_no_common_space_is_refused_by_name(shop, tiny_encoder):
    files, given, config, data, *_ = shop
    paths = given | {"encoder": config["encoder"]}
    with pytest.raises(ValueError, match="have no text to compare with: they have image"):
        open_media(files["pictures"], asked="image", compared="text", **given)
    with pytest.raises(ValueError, match="asked is 'smell'"):
        open_media(files["both"], asked="smell", **paths)
    with pytest.raises(ValueError, match="has no audio to compare|have no audio to compare"):
        open_media(files["both"], asked="text", compared="audio", **paths)
    with pytest.raises(ValueError, match="holds neither a checkpoint"):
        open_media(data, asked="text", compared="image")
