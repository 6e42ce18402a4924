"""An encoder with gradients in a few of its weights: low-rank adapters (peft), or the last blocks themselves.

Everything else stays frozen, and the encoder stays in evaluation mode: no dropout, no running statistics.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recbole_llm.content.encoders.joint import TextTower
from recbole_llm.content.encoders.transformer import TextEncoder
from recbole_llm.content.encoders.vision import VisionEncoder
from recbole_llm.content.tuning.adapter_file import LORA_A, LORA_B, Adapters, base_digest, read_weights

NO_PEFT = "finetune.method lora needs peft: pip install -e '.[lora]' in the checkout, or set method to last_layers."


class TrainableEncoder:
    """A text or vision encoder of transformers, some of whose weights are trained.

    Args:
        encoder: fresh from its loader; it is changed in place.
        method: ``lora`` or ``last_layers``.
        layers: the last so many blocks; ``None`` for all of them.
        rank: of the adapters.
        alpha: their products are multiplied by alpha / rank.
        seed: of the adapters' first values.

    Raises:
        ValueError: if the encoder is of a kind that cannot be tuned, or peft is missing.
    """

    def __init__(
        self,
        encoder: Any,
        method: str,
        layers: int | None = None,
        rank: int = 8,
        alpha: float = 16.0,
        seed: int = 0,
    ) -> None:
        refuse_untunable(encoder)
        self.encoder, self.method = encoder, method
        self.scale = alpha / rank if method == "lora" else 1.0
        with torch.inference_mode(False):
            self.module: nn.Module = encoder.module
            self.module.requires_grad_(False)
            blocks = blocks_of(self.module)
            if layers is not None and layers > len(blocks):
                raise ValueError(
                    f"finetune.layers is {layers}, and encoder {encoder.files.name!r} has {len(blocks)} blocks: give at most that."
                )
            chosen = blocks[-(layers or len(blocks)) :]
            self._trained = self._adapters(chosen, rank, alpha, seed) if method == "lora" else self._own(chosen)

    def _adapters(
        self, blocks: list[tuple[str, nn.Module]], rank: int, alpha: float, seed: int
    ) -> dict[str, nn.Parameter]:
        targets = [
            f"{place}.{name}"
            for place, block in blocks
            for name, part in block.named_modules()
            if isinstance(part, nn.Linear)
        ]
        if not targets:
            raise ValueError(
                f"encoder {self.encoder.files.name!r} has no linear layers in its blocks for lora: set finetune.method to "
                "last_layers."
            )
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ValueError(NO_PEFT) from error
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, self.module)
        self.module.eval().requires_grad_(False)
        found = {}
        for name in targets:
            layer: Any = self.module.get_submodule(name)
            found[f"{name}.weight{LORA_A}"] = layer.lora_A["default"].weight
            found[f"{name}.weight{LORA_B}"] = layer.lora_B["default"].weight
        for parameter in found.values():
            parameter.requires_grad_(True)
        return found

    def _own(self, blocks: list[tuple[str, nn.Module]]) -> dict[str, nn.Parameter]:
        found = {f"{place}.{name}": each for place, block in blocks for name, each in block.named_parameters()}
        with torch.no_grad():
            for parameter in found.values():
                parameter.data = parameter.data.clone()  # transformers maps the file of the weights
                parameter.requires_grad_(True)
        return found

    def parameters(self) -> list[nn.Parameter]:
        """List what is trained."""
        return list(self._trained.values())

    def state(self) -> dict[str, Tensor]:
        """Copy what is trained, on the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self._trained.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave.

        Raises:
            ValueError: if it is of another encoder or method.
        """
        if state.keys() != self._trained.keys():
            raise ValueError("The state of the encoder's fine-tuning is of another encoder or method.")
        for name, parameter in self._trained.items():
            parameter.copy_(state[name])

    def adapters(self) -> Adapters:
        """What the training changed, by the names of the base's own weights.

        Raises:
            ValueError: if a trained weight is not found among them.
        """
        inner = self.encoder.files.transformer()
        weights = read_weights(inner)
        state, named = self.state(), {}
        for name, tensor in state.items():
            ending = next((end for end in (LORA_A, LORA_B) if name.endswith(end)), "")
            own = name.removesuffix(ending)
            named[own_key(own, self._shape(own), weights, self.encoder.files.name) + ending] = tensor
        modality = self.encoder.modality
        return Adapters(modality, self.method, self.scale, base_digest(inner), named)

    def _shape(self, name: str) -> torch.Size:
        if name in self._trained:
            return self._trained[name].shape
        layer: Any = self.module.get_submodule(name.removesuffix(".weight"))
        shape: torch.Size = layer.base_layer.weight.shape
        return shape


def refuse_untunable(encoder: Any) -> None:
    """Raise if an encoder has no layers that can be trained, or training them would break what it is for.

    Raises:
        ValueError: naming the encoder and the next step.
    """
    step = "Name another encoder, or leave finetune empty."
    if isinstance(encoder, TextTower) or (isinstance(encoder, VisionEncoder) and encoder.joint):
        raise ValueError(
            f"encoder {encoder.files.name!r} holds texts and pictures or sounds in one space, which tuning one of its towers would "
            f"take apart. {step}"
        )
    if not isinstance(encoder, (TextEncoder, VisionEncoder)):
        raise ValueError(f"An encoder of the kind {type(encoder).__name__} has no layers that can be trained. {step}")
    if encoder.dtype != "float32":
        raise ValueError(
            f"encoder {encoder.files.name!r} is {encoder.dtype}, in which small steps are lost: take float32."
        )
    if getattr(encoder, "trust_remote_code", False):
        raise ValueError(f"encoder {encoder.files.name!r} runs code of its own, which no export holds. {step}")


def blocks_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the blocks of a transformer, or the stages of a convolutional network, with their names, in order.

    They are the list of like modules with the most parameters.

    Raises:
        ValueError: if there is no such list.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and len(part) and len({type(each) for each in part}) == 1:
            size = sum(parameter.numel() for parameter in part.parameters())
            if best is None or size > best[0]:
                best = size, name, part
    if best is None:
        raise ValueError(f"{type(module).__name__} has no list of blocks, whose last ones could be trained.")
    _, place, blocks = best
    return [(f"{place}.{at}", block) for at, block in enumerate(blocks)]


def own_key(name: str, shape: torch.Size, weights: Mapping[str, Tensor], encoder: str) -> str:
    """Find the name that a parameter of the loaded model has in the model's files.

    Checkpoints put the base model's name before it, and old ones call the parameters of a LayerNorm gamma and beta.

    Args:
        name: of the parameter.
        shape: of it.
        weights: of the files.
        encoder: its name, for the message.

    Raises:
        ValueError: if there is none, or more than one.
    """
    spellings = (name, name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"))
    found = [
        key
        for key, tensor in weights.items()
        if any(key == each or key.endswith(f".{each}") for each in spellings) and tensor.shape == shape
    ]
    if len(found) != 1:
        raise ValueError(
            f"encoder {encoder!r}: its files hold {len(found)} tensors for {name}, so that none can be put in its place. "
            "Save it once with save_pretrained of this version of transformers, and name that folder."
        )
    return found[0]
