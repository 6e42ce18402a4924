"""Audio models of a few thousand parameters, made here."""

import logging

import pytest
import torch


def _models():
    import transformers as t

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    heard = {
        "hidden_size": 16,
        "patch_embeds_hidden_size": 8,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
        "spec_size": 64,
        "num_mel_bins": 16,
        "window_size": 4,
        "patch_size": 4,
        "patch_stride": [4, 4],
        "projection_dim": 10,
    }
    clap = t.ClapConfig(
        text_config=small | {"vocab_size": 60, "max_position_embeddings": 20, "projection_dim": 10},
        audio_config=heard,
        projection_dim=10,
    )
    mel = {"feature_size": 16, "sampling_rate": 8000, "hop_length": 80, "fft_window_size": 256}
    wave = small | {
        "conv_dim": (8, 8),
        "conv_stride": (8, 5),
        "conv_kernel": (10, 8),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "initializer_range": 0.4,
    }
    whisper = t.WhisperConfig(
        vocab_size=60,
        num_mel_bins=16,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=100,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        init_std=0.4,
    )
    ast = t.ASTConfig(num_mel_bins=16, max_length=64, patch_size=8, frequency_stride=4, time_stride=4, **small)
    return {
        "clap": (t.ClapModel, clap, t.ClapFeatureExtractor(max_length_s=2, truncation="rand_trunc", **mel), 10),
        "ast": (t.ASTModel, ast, t.ASTFeatureExtractor(sampling_rate=8000, num_mel_bins=16, max_length=64), 16),
        "wav2vec2": (
            t.Wav2Vec2Model,
            t.Wav2Vec2Config(**wave),
            t.Wav2Vec2FeatureExtractor(sampling_rate=8000, do_normalize=True),
            16,
        ),
        "whisper": (
            t.WhisperModel,
            whisper,
            t.WhisperFeatureExtractor(feature_size=16, sampling_rate=8000, hop_length=80, chunk_length=2, n_fft=256),
            16,
        ),
    }


@pytest.fixture(scope="session")
def hearing(tmp_path_factory):
    """Name of a kind -> folder of a tiny model, its own model in transformers, its extractor and the length of its vectors."""
    made = {}
    logging.getLogger("transformers").setLevel(logging.ERROR)

    def make(kind):
        if kind not in made:
            model_class, config, extractor, dim = _models()[kind]
            torch.manual_seed(0)
            model, folder = model_class(config).eval(), tmp_path_factory.mktemp(f"tiny-{kind}")
            model.save_pretrained(folder)
            extractor.save_pretrained(folder)
            made[kind] = folder, model, extractor, dim
        return made[kind]

    return make
