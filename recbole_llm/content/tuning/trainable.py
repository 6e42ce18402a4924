"""An encoder with gradients in a few of its weights: low-rank adapters (peft), or the last blocks themselves.

Everything else stays frozen, and the encoder stays in evaluation mode: no dropout, no running statistics.
"""

from collections.abc import Mapping
from itertools import takewhile
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
        ValueError: if the encoder is of a kind that cannot be tuned, a trained weight is not found in its files, or peft is
            missing.
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
            weights = read_weights(encoder.files.transformer())
            self._trained = (
                self._adapters(chosen, weights, rank, alpha, seed) if method == "lora" else self._own(chosen, weights)
            )

    def _adapters(
        self, blocks: list[tuple[str, nn.Module]], weights: Mapping[str, Tensor], rank: int, alpha: float, seed: int
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
            import peft
        except ImportError as error:
            raise ValueError(NO_PEFT) from error
        given: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none"}
        config = peft.LoraConfig(target_modules=targets, **given)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, self.module)
        self.module.eval().requires_grad_(False)
        found, frozen = {}, {}
        for name in targets:
            layer: Any = self.module.get_submodule(name)
            frozen[f"{name}.weight"] = layer.base_layer.weight
            found[f"{name}.weight{LORA_A}"] = layer.lora_A["default"].weight
            found[f"{name}.weight{LORA_B}"] = layer.lora_B["default"].weight
        for parameter in found.values():
            parameter.requires_grad_(True)
        self._keys = own_keys(frozen, weights, self.encoder.files.name)
        return found

    def _own(self, blocks: list[tuple[str, nn.Module]], weights: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        found = {f"{place}.{name}": each for place, block in blocks for name, each in block.named_parameters()}
        self._keys = own_keys(found, weights, self.encoder.files.name)
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
        """What the training changed, by the names of the base's own weights."""
        named = {}
        for name, tensor in self.state().items():
            ending = next((end for end in (LORA_A, LORA_B) if name.endswith(end)), "")
            named[self._keys[name.removesuffix(ending)] + ending] = tensor
        base = base_digest(self.encoder.files.transformer())
        return Adapters(self.encoder.modality, self.method, self.scale, base, named)


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


def own_keys(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor], encoder: str) -> dict[str, str]:
    """Find the names that parameters of a loaded model have in the model's files.

    Files put the base model's name before them, old ones call the parameters of a LayerNorm gamma and beta, and transformers
    renames modules from version to version. So what the name does not tell, the values tell, then a layer's weight tells of its
    bias, and of several that are left the one with the longest common ending is taken.

    Args:
        parameters: by name, with the values of the files.
        weights: of the files.
        encoder: its name, for the message.

    Raises:
        ValueError: if one has none, or more than one.
    """
    found: dict[str, str] = {}
    for name in sorted(parameters, key=lambda each: each.endswith("bias")):  # weights first
        shape = parameters[name].shape
        like = [key for key, tensor in weights.items() if tensor.shape == shape]
        named = [key for key in like if any(key == each or key.endswith(f".{each}") for each in _spellings(name))]
        if len(named) != 1:
            named = [key for key in like if torch.equal(weights[key].float(), parameters[name].detach().cpu().float())]
        if len(named) > 1:
            layer = found.get(name.removesuffix("bias") + "weight", "").removesuffix("weight")
            endings = {key: _common_ending(key, name) for key in named}
            longest = [key for key, length in endings.items() if length == max(endings.values())]
            named = [key for key in named if layer and key == f"{layer}bias"] or longest
        if len(named) != 1 or named[0] in found.values():
            raise ValueError(
                f"encoder {encoder!r}: its files hold {len(named)} tensors for {name}, so that none can be put in its place. "
                "Save it once with save_pretrained of this version of transformers, and name that folder."
            )
        found[name] = named[0]
    return found


def _spellings(name: str) -> tuple[str, str]:
    return name, name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def _common_ending(one: str, other: str) -> int:
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
