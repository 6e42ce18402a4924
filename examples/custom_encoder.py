"""A text encoder of your own: recbole-llm run --dataset ml-100k --encoder=custom_encoder:encode, in this folder."""

import zlib

import numpy as np


def encode(texts: list[str]) -> np.ndarray:
    """Count words by hash: [len(texts), 256] float32, rows of length 1."""
    vectors = np.zeros((len(texts), 256), np.float32)
    for row, text in zip(vectors, texts, strict=True):
        for word in text.lower().split():
            row[zlib.crc32(word.encode()) % 256] += 1
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
