"""The items that a picture shows, from a checkpoint or an export.

model = open_model("saved", pictures=True)
recommend_picture(model, "photo.jpg")
"""

from pathlib import Path

import numpy as np

from recbole_llm.export.reader import Export
from recbole_llm.retrieval.answers import Recommendation
from recbole_llm.retrieval.recommender import Recommender
from recbole_llm.retrieval.request import Request
from recbole_llm.retrieval.rules import NO_RULES, Rules
from recbole_llm.serving.picture_encoder import load_picture_encoder


def recommend_picture(
    export: Export, file: str | Path, *, k: int = 10, by: str = "both", rules: Rules = NO_RULES
) -> Recommendation:
    """Find the items whose pictures are like a file, then what buyers of those items bought.

    Args:
        export: of :func:`recbole_llm.recommend.open_model`, of a model with pictures.
        file: a picture: JPEG, PNG, WEBP or GIF.
        k: how many.
        by: as for :func:`recbole_llm.recommend.recommend_text`.
        rules: as for :func:`recbole_llm.recommend.recommend_users`.

    Raises:
        ValueError: if the model has no pictures, their encoder is not to be had or was not named, or the file is no picture.
    """
    recommender = Recommender(export)
    if recommender.picture_searches is None:
        raise ValueError("image: this model has no pictures, or none can be asked for: export again with its pictures.")
    return recommender.recommend(Request(picture_vector=vector_of_picture(export, file), by=by, k=k, rules=rules))


def vector_of_picture(export: Export, file: str | Path) -> np.ndarray:
    """Encode a picture, ``[F]`` float32, with the encoder of an export's pictures, which is loaded for it.

    Raises:
        ValueError: if the file is no picture that can be read, or the encoder is not to be had, was not named by the caller,
            or is another one.
    """
    import torch

    from recbole_llm.content.images.reading import PictureError, open_picture, read_bytes

    spec = export.manifest.pictures
    if spec is None:
        raise ValueError("image: this model has no pictures, or its export holds no way to ask for one.")
    encoder = load_picture_encoder(spec, export.picture_encoders, "--item-modalities", "{image: %s}")
    try:
        picture = open_picture(read_bytes(Path(file)), encoder.side)
    except PictureError as error:
        raise ValueError(f"image: {str(file)!r} cannot be read as a picture: {error}.") from error
    with torch.inference_mode():
        vector: np.ndarray = encoder.encode(encoder.prepare([picture]))[0].float().cpu().numpy()
    if not np.isfinite(vector).all():
        raise ValueError(f"image: the encoder gives no finite vector for {str(file)!r}; ask by another picture.")
    return vector
