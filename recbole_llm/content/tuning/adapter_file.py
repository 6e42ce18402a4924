"""What a fine-tuning changed in an encoder, as the bytes of a safetensors file.

    <key>.lora_A [r, in], <key>.lora_B [out, r]    with lora: the weight of that key gains scale * B A
    <key>                                          with last_layers: the weight of that key is this tensor

A key is the name of a tensor in the base's own weights. The metadata hold the sha256 of these weights, so that nothing else is
ever changed by it. A safetensors file holds numbers and no code.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from recbole_llm.content.encoders.resolve import ModelFiles, file_digest
from recbole_llm.content.encoders.sentence_modules import read_weights_file

FORMAT = "recbole-llm encoder adapters 1"
LORA_A, LORA_B = ".lora_A", ".lora_B"
METHODS = ("lora", "last_layers")


@dataclass(frozen=True, eq=False)
class Adapters:
    """What a fine-tuning changed.

    Attributes:
        modality: of the encoder, ``text`` or ``image``.
        method: ``lora`` or ``last_layers``.
        scale: of the products; 1 with ``last_layers``.
        base: sha256 of the base's weights, of :func:`base_digest`.
        tensors: float32, by the names of the module docstring.
    """

    modality: str
    method: str
    scale: float
    base: str
    tensors: Mapping[str, Tensor]

    def to_bytes(self) -> bytes:
        """The file's bytes; equal adapters give equal bytes."""
        metadata = {"format": FORMAT, "modality": self.modality, "method": self.method}
        metadata |= {"scale": repr(self.scale), "base_sha256": self.base}
        return stable_bytes({name: tensor.contiguous() for name, tensor in self.tensors.items()}, metadata)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Adapters":
        """Read the bytes of such a file.

        Raises:
            ValueError: if they are none.
        """
        try:
            tensors = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
            found = cls(header["modality"], header["method"], float(header["scale"]), header["base_sha256"], tensors)
            if header["format"] != FORMAT or found.method not in METHODS or not tensors:
                raise ValueError(f"format {header['format']!r}, method {found.method!r}")
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"adapters: these bytes are no file of an encoder's adapters ({error}).") from error
        return found

    @property
    def changed(self) -> list[str]:
        """Keys of the base's weights that they change, sorted."""
        return sorted({name.removesuffix(LORA_A).removesuffix(LORA_B) for name in self.tensors})

    def applied(self, key: str, weight: Tensor) -> Tensor:
        """Return the changed weight of a key, in float32.

        The sum of products runs rank by rank in float64: a matrix product would round by the machine, and the fingerprint of the
        merged encoder is a hash of the bytes.

        Raises:
            ValueError: if the shapes do not fit.
        """
        if self.method != "lora":
            found = self.tensors[key]
            if found.shape != weight.shape:
                raise ValueError(f"adapters: {key} is {tuple(found.shape)}, and the base's is {tuple(weight.shape)}.")
            return found.float()
        down, up = self.tensors[key + LORA_A].double(), self.tensors[key + LORA_B].double()
        if weight.dim() != 2 or (len(up), down.shape[1]) != tuple(weight.shape) or up.shape[1] != len(down):
            raise ValueError(
                f"adapters: {key} is changed by {tuple(up.shape)} x {tuple(down.shape)}, and is {tuple(weight.shape)} itself."
            )
        total = torch.zeros_like(weight, dtype=torch.float64)
        for left, right in zip(up.T, down, strict=True):
            total += left[:, None] * right
        return (weight.double() + total * self.scale).float()


def stable_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Write a safetensors file whose bytes depend on its contents alone; the library puts metadata in any order.

    Args:
        tensors: by name, none of which shares memory with another.
        metadata: by name.
    """
    data = save(dict(tensors))
    length = int.from_bytes(data[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(data[8 : 8 + length])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def base_digest(files: ModelFiles) -> str:
    """Compute the sha256 of a model's weights; of several files that of their digests.

    Args:
        files: of the transformer itself.
    """
    digests = [file_digest(path) for path in files.weights()]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def read_weights(files: ModelFiles) -> dict[str, Tensor]:
    """Read all tensors of a model's weights on the CPU, without running code of the files."""
    found: dict[str, Tensor] = {}
    for path in files.weights():
        found |= read_weights_file(path)
    return found
