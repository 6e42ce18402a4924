"""The items that a picture shows, from a checkpoint or an export.

model = open_model("saved", pictures=True)
recommend_picture(model, "photo.jpg")
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.export.reader import Export
from recbole_llm.retrieval.answers import Recommendation
from recbole_llm.retrieval.recommender import Recommender
from recbole_llm.retrieval.request import Request
from recbole_llm.retrieval.rules import NO_RULES, Rules
from recbole_llm.retrieval.search import Search
from recbole_llm.retrieval.searches import Searches


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
    recommender.searches = Searches(Search(export, recommender.catalog, pictures=True))
    vector = vector_of_picture(export, file)
    answer = recommender.recommend(Request(text_vector=vector, by=by, k=k, rules=rules))
    return replace(answer, source="picture")


def vector_of_picture(export: Export, file: str | Path) -> np.ndarray:
    """Encode a picture, ``[F]`` float32, with the encoder of an export's pictures, which is loaded for it.

    Raises:
        ValueError: if the file is no picture that can be read, or the encoder is not to be had, was not named by the caller,
            or is another one.
    """
    import torch

    from recbole_llm.content.images.reading import PictureError, open_picture, read_bytes

    encoder = _encoder(export)
    try:
        picture = open_picture(read_bytes(Path(file)), encoder.side)
    except PictureError as error:
        raise ValueError(f"image: {str(file)!r} cannot be read as a picture: {error}.") from error
    with torch.inference_mode():
        vector: np.ndarray = encoder.encode(encoder.prepare([picture]))[0].float().cpu().numpy()
    return vector


def _encoder(export: Export) -> Any:
    """The first encoder that the caller has named which is the one that the model was trained with."""
    from recbole_llm.content.encoders.images import load_image_encoder

    spec = export.manifest.pictures
    if spec is None:
        raise ValueError("image: this model has no pictures, or its export holds no way to ask for one.")
    if not export.picture_encoders:
        raise ValueError(
            f"image: the pictures of this export need the encoder {spec.name!r}, and nothing is loaded because a file names it. "
            f"Name it yourself: --item-modalities '{{image: {spec.name}}}'."
        )
    failures = []
    for name in export.picture_encoders:
        try:
            encoder = load_image_encoder(name)
        except ValueError as error:
            failures.append(str(error))
            continue
        if encoder.fingerprint == spec.fingerprint:
            return encoder
        failures.append(f"{name!r} is another one than the model was trained with, or Pillow is of another version")
    raise ValueError(f"image: {' '.join(failures)}")
