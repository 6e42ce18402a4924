"""Models of a few thousand parameters, made here: a BERT and a decoder with tokenizers of their own."""

import json
import string

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """Folder of a bidirectional encoder: 32 hidden units, 64 positions, one token per letter."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    letters = string.ascii_lowercase + string.digits + ".,:;!?()'"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.4,  # texts should lie apart: a mistake of padding must show
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory):
    """Folder of a causal model: byte tokens, an end token added by the tokenizer, padding on the left (as Qwen3-Embedding)."""
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2Model

    folder = tmp_path_factory.mktemp("tiny-decoder")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", padding_side="left", model_max_length=128
    ).save_pretrained(folder)
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    Qwen2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture
def sentence_folder(tiny_bert, tmp_path):
    """A function that makes a folder of sentence-transformers around the tiny BERT."""
    import shutil

    def make(*modules, prompts=None, default_prompt_name=None, **sentence_bert_config):
        folder = tmp_path / f"sentence-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_bert, folder)
        listed = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
        for index, (kind, config, weights) in enumerate(modules, start=1):
            path = f"{index}_{kind}"
            (folder / path).mkdir()
            if config is not None:
                (folder / path / "config.json").write_text(json.dumps(config))
            if weights is not None:
                from safetensors.torch import save_file

                save_file(weights, folder / path / "model.safetensors")
            entry = {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            listed.append(entry)
        (folder / "modules.json").write_text(json.dumps(listed))
        (folder / "config_sentence_transformers.json").write_text(
            json.dumps({"prompts": prompts or {}, "default_prompt_name": default_prompt_name})
        )
        if sentence_bert_config:
            (folder / "sentence_bert_config.json").write_text(json.dumps(sentence_bert_config))
        return folder

    return make
