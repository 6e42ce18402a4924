"""The layers that turn a transformer's hidden states into one vector per text.

Folders of sentence-transformers list their modules in ``modules.json``: pooling, dense layers, normalisation. They are
honoured here without that library.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_llm.content.encoder_settings import POOLINGS
from recbole_llm.content.encoders.resolve import ModelFiles, file_digest

# the names in 1_Pooling/config.json, old (one flag each) and new (pooling_mode), to ours
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "last",
}
_NEW_MODES = {"lasttoken": "last", "mean_sqrt_len_tokens": "mean_sqrt_len"}
_MODES = (*POOLINGS, "mean_sqrt_len", "weightedmean")
# what a dense layer may name: looked up here, and never among everything that torch.nn holds
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        nn.Identity, nn.Tanh, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
        nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Tanhshrink,
    )
}  # fmt: skip


@dataclass
class SentenceHead:
    """What follows the transformer.

    Attributes:
        pooling: one or more modes; several are concatenated.
        source: what decided the pooling, for the log.
        include_prompt: whether the prompt's tokens take part in the pooling.
        layers: dense layers and normalisation, in order; parameters are loaded by :meth:`load`.
    """

    pooling: tuple[str, ...]
    source: str
    include_prompt: bool = True
    layers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def normalizes(self) -> bool:
        """Whether the vectors have length one."""
        return bool(self.layers) and self.layers[-1]["type"] == "Normalize"

    def width(self, hidden: int) -> int:
        """Return the dimension of the vectors for a transformer of width ``hidden``."""
        out = hidden * len(self.pooling)
        for layer in self.layers:
            out = layer.get("out_features", out)
        return out

    def identity(self) -> dict[str, Any]:
        """Describe everything here that changes a vector, for the fingerprint."""
        layers = [{key: value for key, value in layer.items() if key != "weights"} for layer in self.layers]
        for layer, known in zip(layers, self.layers, strict=True):
            if "weights" in known:
                layer["digest"] = file_digest(known["weights"])
        return {"pooling": self.pooling, "include_prompt": self.include_prompt, "layers": layers}

    def load(self) -> nn.Module:
        """Load the layers after the pooling, in evaluation mode, float32."""
        modules: list[nn.Module] = []
        for layer in self.layers:
            if layer["type"] == "Normalize":
                modules.append(_Normalize())
                continue
            state = read_weights_file(layer["weights"])
            if layer["type"] == "LayerNorm":
                module: nn.Module = nn.LayerNorm(layer["out_features"])
                module.load_state_dict({key.removeprefix("norm."): value for key, value in state.items()})
                modules.append(module)
                continue
            module = nn.Linear(layer["in_features"], layer["out_features"], bias=layer["bias"])
            module.load_state_dict({key.removeprefix("linear."): value for key, value in state.items()})
            modules += [module, _ACTIVATIONS[layer["activation"]]()]
        return nn.Sequential(*modules).float().eval()


class _Normalize(nn.Module):
    def forward(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1)


def read_head(files: ModelFiles, pooling: str, is_decoder: Callable[[], bool]) -> SentenceHead:
    """Read which layers follow the transformer.

    Args:
        files: the model's folder.
        pooling: ``auto`` (from the model's files, else by architecture), or one of :data:`POOLINGS`, which replaces the
            model's pooling and keeps its dense layers and normalisation.
        is_decoder: asked where the files name no pooling: whether the transformer reads from left to right, so that its
            last token alone has seen the whole text.

    Raises:
        ValueError: on an unknown pooling, or a module that is not known here.
    """
    if pooling not in ("auto", *POOLINGS):
        raise ValueError(f"encoder_pooling must be one of auto, {', '.join(POOLINGS)}, got {pooling!r}.")
    head = SentenceHead((), "")
    for module in files.json("modules.json").get("", [])[1:]:
        kind, path = module["type"].rpartition(".")[2], module.get("path", "")
        config = files.json(f"{path}/config.json") if path else {}
        if kind == "Pooling":
            head.pooling = _pooling_modes(config, files)
            head.include_prompt = config.get("include_prompt", True)
            head.source = "the model's own files"
        elif kind == "Normalize":
            head.layers.append({"type": "Normalize"})
        elif kind == "Dense":
            head.layers.append(_dense(config, files, path))
        elif kind == "LayerNorm":
            weights = _module_weights(files, path)
            head.layers.append({"type": "LayerNorm", "out_features": config["dimension"], "weights": weights})
        elif kind != "Dropout":
            raise ValueError(
                f"encoder {files.name!r}: its module {module['type']} is not known (known: Pooling, Dense, LayerNorm, "
                "Normalize, Dropout). Make the vectors with sentence-transformers and give them as item_features_file."
            )
    if pooling != "auto":
        head.pooling, head.source = (pooling,), "encoder_pooling"
    elif not head.pooling:
        last = is_decoder()
        head.pooling = ("last",) if last else ("mean",)
        head.source = f"the architecture ({'decoder' if last else 'encoder'}); the model's files name none"
    return head


def is_decoder(config: dict[str, Any]) -> bool:
    """Return whether a model reads from left to right, by the architectures that transformers knows."""
    if (
        config.get("is_encoder_decoder")
        or config.get("is_causal") is False
        or config.get("use_bidirectional_attention")
    ):
        return False
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = config.get("model_type")
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _pooling_modes(config: dict[str, Any], files: ModelFiles) -> tuple[str, ...]:
    if "pooling_mode" in config:
        named = config["pooling_mode"]
        modes = [_NEW_MODES.get(mode, mode) for mode in ([named] if isinstance(named, str) else named)]
    else:
        modes = [mode for flag, mode in _OLD_MODES.items() if config.get(flag)]
    if not modes or not set(modes) <= set(_MODES):
        raise ValueError(
            f"encoder {files.name!r}: its pooling configuration {config} is not known. Set encoder_pooling to one of "
            f"{', '.join(POOLINGS)}."
        )
    return tuple(modes)


def _dense(config: dict[str, Any], files: ModelFiles, path: str) -> dict[str, Any]:
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    name = activation.rpartition(".")[2]
    known = activation.startswith("torch.nn.") and name in _ACTIVATIONS
    source = config.get("module_input_name", "sentence_embedding")
    if not known or config.get("use_residual") or source not in ("sentence_embedding", None):
        raise ValueError(
            f"encoder {files.name!r}: its dense layer {path} ({config}) is of a kind not known here. Make the vectors "
            "with sentence-transformers and give them as item_features_file."
        )
    return {
        "type": "Dense",
        "in_features": config["in_features"],
        "out_features": config["out_features"],
        "bias": config.get("bias", True),
        "activation": name,
        "weights": _module_weights(files, path),
    }


def _module_weights(files: ModelFiles, path: str) -> Path:
    for name in ("model.safetensors", "pytorch_model.bin"):
        file = files.inside(f"{path}/{name}")
        if file.is_file():
            return file
    raise ValueError(
        f"encoder {files.name!r}: the module {path} has no weights in {files.folder}; fetch the whole model."
    )


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file of weights on the CPU; no code of the file runs."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def pool(hidden: Tensor, mask: Tensor, modes: tuple[str, ...], skip: int = 0) -> Tensor:
    """Pool hidden states, padded on the right, to one vector per row.

    Args:
        hidden: ``[B, L, H]``.
        mask: ``[B, L]`` bool, True on tokens; a row's tokens come first.
        modes: see :class:`SentenceHead`.
        skip: tokens at the start of each row that are left out (a prompt), as far as the row has more.

    Returns:
        float32 ``[B, H * len(modes)]``.
    """
    length = mask.sum(1)
    if skip:
        position = torch.arange(mask.shape[1], device=mask.device)
        mask = mask & (position >= skip.__index__()) | (mask & (length <= skip)[:, None])
    hidden = hidden.float()
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    pooled = []
    for mode in modes:
        if mode == "cls":
            pooled.append(hidden[torch.arange(len(hidden), device=hidden.device), mask.int().argmax(1)])
        elif mode == "last":
            pooled.append(hidden[torch.arange(len(hidden), device=hidden.device), length - 1])
        elif mode == "max":
            pooled.append(hidden.masked_fill(~mask.unsqueeze(-1), float("-inf")).amax(1))
        else:
            if mode == "weightedmean":
                weight = weight * torch.arange(1, mask.shape[1] + 1, device=hidden.device).view(1, -1, 1)
            count = weight.sum(1)
            pooled.append((hidden * weight).sum(1) / (count.sqrt() if mode == "mean_sqrt_len" else count))
    return torch.cat(pooled, -1)


def content_digest(content: str) -> str:
    """Compute the sha256 of a string in hexadecimal."""
    return hashlib.sha256(content.encode()).hexdigest()
