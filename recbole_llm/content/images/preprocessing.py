"""What becomes of a picture before an encoder sees it, read from a ``preprocessor_config.json``.

One reader serves transformers' image processors and the JSON beside an ONNX file, which has the same entries:

    size            224, {"shortest_edge": 224} or {"height": 224, "width": 224}
    crop_pct        of ConvNeXt: the shorter side is size / crop_pct before the crop
    do_center_crop  with crop_size
    resample        Pillow's number; 2 bilinear, 3 bicubic
    rescale_factor  1 / 255
    image_mean, image_std

Kinds of processors that do something else are refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

MAX_SIDE = 2048
BICUBIC = 3
_KINDS = frozenset(
    f"{name}{kind}"
    for name in ("CLIP", "Siglip", "ViT", "DeiT", "Bit", "ConvNext", "DINOv3ViT", "MobileNetV2")
    for kind in ("ImageProcessor", "ImageProcessorFast", "FeatureExtractor", "ImageProcessorPil")
)
_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Preprocessing:
    """The steps, in this order.

    Attributes:
        height: of the resized picture; 0 where ``shortest`` says it.
        width: likewise.
        shortest: length of the shorter side; 0 where height and width say it.
        crop: height and width of the part in the middle; ``None`` for all.
        resample: Pillow's number.
        scale: factor of the values 0 to 255.
        mean: subtracted from each channel.
        std: that each channel is divided by.
    """

    height: int
    width: int
    shortest: int
    crop: tuple[int, int] | None
    resample: int
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def side(self) -> int:
        """The shorter side that a picture should have at least."""
        return self.shortest or max(self.height, self.width)

    def identity(self) -> dict[str, Any]:
        """What changes a vector, for a fingerprint."""
        return asdict(self)

    def __call__(self, picture: "Image.Image") -> np.ndarray:
        """Convert an RGB picture to ``[3, height, width]`` float32."""
        width, height = picture.size
        if self.shortest:
            short, long = min(width, height), max(width, height)
            edge = self.shortest, int(self.shortest * long / short)
            size = edge if width <= height else edge[::-1]
        else:
            size = self.width, self.height
        if size != picture.size:
            picture = picture.resize(size, self.resample)  # type: ignore[arg-type]
        if self.crop is not None:
            picture = _cropped(picture, *self.crop)
        values: np.ndarray = np.asarray(picture, np.float32) * np.float32(self.scale)
        values = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(values.transpose(2, 0, 1))


def _cropped(picture: "Image.Image", height: int, width: int) -> "Image.Image":
    """The middle; where the picture is smaller, black around it."""
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def read_preprocessing(config: Mapping[str, Any], name: str) -> Preprocessing:
    """Read the steps from a processor's configuration.

    Args:
        config: of a ``preprocessor_config.json``, or the JSON beside an ONNX file.
        name: of the encoder, for messages.

    Raises:
        ValueError: on a processor that does something else, or a value out of its range.
    """
    kind = _kind(config, name)

    def fail(key: str, expected: str) -> ValueError:
        return ValueError(
            f"encoder {name!r}: {key} of its image processor is {str(config.get(key))[:64]!r}; expected {expected}."
        )

    try:
        height, width, shortest = _size(config.get("size", 224))
        crop = None
        if config.get("do_center_crop", False):
            crop = _height_width(config.get("crop_size", 224))
            if type(config.get("size")) is int:  # as files of CLIP's first years have it
                height, width, shortest = 0, 0, height
    except (TypeError, ValueError, KeyError):
        raise fail("size" if "size" in config else "crop_size", f"a side, or sides, of 1 to {MAX_SIDE}") from None
    if str(kind).startswith("ConvNext") or "crop_pct" in config:
        height, width, shortest, crop = _convnext(shortest or height, config.get("crop_pct", 224 / 256), fail)
    if not config.get("do_resize", True):
        raise fail("do_resize", "true: every picture must come to one size")
    if shortest and crop is None:  # sides would differ from picture to picture
        height, width, shortest = shortest, shortest, 0
    scale, mean, std = _values(config, fail)
    resample = config.get("resample", BICUBIC)
    if resample not in (0, 1, 2, 3, 4, 5):
        raise fail("resample", "Pillow's number, 0 to 5")
    return Preprocessing(height, width, shortest, crop, int(resample), scale, mean, std)


def _kind(config: Mapping[str, Any], name: str) -> Any:
    kind = config.get("image_processor_type") or config.get("feature_extractor_type")
    if kind is not None and kind not in _KINDS:
        raise ValueError(
            f"encoder {name!r}: its image processor is {str(kind)[:64]}, which is not understood. Known are those of CLIP, SigLIP, "
            "ViT, DINOv2 and 3, ConvNeXt, ResNet and MobileNetV2; or make vectors elsewhere (item_features_file)."
        )
    return kind


_Three = tuple[float, float, float]


def _values(config: Mapping[str, Any], fail: Callable[[str, str], ValueError]) -> tuple[float, _Three, _Three]:
    """Factor, means and deviations of the values."""
    scale = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    if not isinstance(scale, (int, float)) or not 0 < scale <= 1:
        raise fail("rescale_factor", "a number from 0 to 1")
    if not config.get("do_normalize", True):
        return float(scale), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = _three(config.get("image_mean", _HALF)), _three(config.get("image_std", _HALF))
    if mean is None or std is None or min(std) <= 0:
        raise fail("image_std" if mean is not None else "image_mean", "three numbers, of a deviation above 0")
    return float(scale), mean, std


def _convnext(
    size: int, share: Any, fail: Callable[[str, str], ValueError]
) -> tuple[int, int, int, tuple[int, int] | None]:
    """Height, width, shorter side and crop of ConvNeXt's processor."""
    if not isinstance(share, (int, float)) or not 0.1 <= share <= 1:
        raise fail("crop_pct", "a number from .1 to 1")
    return (size, size, 0, None) if size >= 384 else (0, 0, int(size / share), (size, size))


def _size(value: Any) -> tuple[int, int, int]:
    """Height, width and shorter side; either the first two or the last is 0."""
    if isinstance(value, Mapping) and "shortest_edge" in value:
        return 0, 0, _side(value["shortest_edge"])
    height, width = _height_width(value)
    return height, width, 0


def _height_width(value: Any) -> tuple[int, int]:
    if isinstance(value, Mapping):
        return _side(value["height"]), _side(value["width"])
    return _side(value), _side(value)


def _side(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_SIDE:
        raise ValueError
    return value


def _three(value: Any) -> _Three | None:
    numbers = isinstance(value, (list, tuple)) and len(value) == 3
    if not numbers or not all(isinstance(each, (int, float)) and abs(each) < 1e6 for each in value):
        return None
    return float(value[0]), float(value[1]), float(value[2])
