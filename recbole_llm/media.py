"""The items that a sound, a picture or a text shows: also by a text in pictures or sounds, where one space holds both.

From a checkpoint, and by sounds and by texts in sounds from an export too.

model = open_media("saved", asked="audio")
recommend_media(model, "song.ogg")
recommend_media(open_media("saved", asked="text", compared="image"), "a red dress")
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.export.manifest import MANIFEST
from recbole_llm.export.reader import Export, load_export
from recbole_llm.export.search_tables import TEXTS_OF_A_CENTRE, TextSpace
from recbole_llm.retrieval.answers import Recommendation
from recbole_llm.retrieval.recommender import Recommender
from recbole_llm.retrieval.request import Request
from recbole_llm.retrieval.rules import NO_RULES, Rules
from recbole_llm.retrieval.search import Search
from recbole_llm.retrieval.searches import Searches

ASKED = ("text", "image", "audio")
SOURCES = {"text": "text", "image": "picture", "audio": "sound"}


@dataclass(frozen=True, eq=False)
class MediaModel:
    """A trained model that answers questions of one modality by another's likeness, or by its own.

    Attributes:
        export: the model.
        asked: the modality of a question.
        compared: the modality of the items that it is compared with.
        space: how a question's vector comes into the space of these.
        encoder: of questions.
    """

    export: Export
    asked: str
    compared: str
    space: TextSpace
    encoder: Any


def open_media(
    path: str | Path,
    *,
    asked: str,
    compared: str | None = None,
    data_path: str | Path | None = None,
    encoder: str | None = None,
    item_features_file: str | Path | None = None,
    item_modalities: str | Mapping[str, Any] | None = None,
    feature_cache_dir: str | Path | None = None,
    history: str | None = None,
) -> MediaModel:
    """Open a model for questions by a sound, a picture or a text.

    Args:
        path: a checkpoint (``.pth``) of LLMTwoTower, or a folder of checkpoints, of which the newest counts. For sounds, and for
            texts in sounds, an export too: ``item_modalities`` names their encoder then, and nothing else is given.
        asked: what questions are: ``text``, ``image`` or ``audio``.
        compared: what of the items they are compared with; ``None`` for the same. Another modality needs an encoder that has both
            in one space: CLIP and SigLIP texts and pictures, CLAP texts and sounds.
        data_path: as for :func:`recbole_llm.recommend.open_model`, like the rest.
        encoder: as there.
        item_features_file: as there.
        item_modalities: as there.
        feature_cache_dir: as there.
        history: as there.

    Raises:
        ValueError: if there is no such model, its items have no such content, or no encoder holds both in one space; of an
            export, if their encoder is not named or another one.
    """
    from recbole_llm.checkpoints import load_trained, newest_checkpoint
    from recbole_llm.content.store.feature_table import fit_transform
    from recbole_llm.export.export_model import contents_of
    from recbole_llm.export.in_memory import export_in_memory
    from recbole_llm.export.model_tables import text_space

    compared = compared or asked
    for name, value in (("asked", asked), ("compared", compared)):
        if value not in ASKED:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(ASKED)}.")
    file = newest_checkpoint(path) or Path(path)
    if file.is_dir():
        beside = {
            "data_path": data_path,
            "encoder": encoder,
            "item_features_file": item_features_file,
            "feature_cache_dir": feature_cache_dir,
            "history": history,
        }
        for name in (name for name, value in beside.items() if value is not None):
            raise ValueError(f"{name} belongs to a checkpoint; an export holds all it needs.")
        return _of_export(file, asked, compared, item_modalities)
    model, dataset = load_trained(
        file,
        data_path=data_path,
        encoder=encoder,
        item_features_file=item_features_file,
        item_modalities=item_modalities,
        feature_cache_dir=feature_cache_dir,
    )
    data = model.training_data()
    if compared not in data.content:
        raise ValueError(
            f"This model's items have no {compared} to compare with: they have {', '.join(data.content) or 'no content'}."
        )
    questions = dataset.encoder_of(asked, compared)
    center, transform = fit_transform(dataset.raw_vectors(compared), model.options.feature_transform)
    if asked != compared:  # texts and pictures lie apart in a common space: each is centred by its own kind
        own = dataset.centre_of(asked, questions, TEXTS_OF_A_CENTRE)
        center = center if own is None else own
    contents = contents_of(
        model, dataset, map_texts=False, map_pictures=False, map_sounds=False, history=history or "all"
    )
    space = text_space(data, center, transform, compared)
    return MediaModel(export_in_memory(contents), asked, compared, space, questions)


def _of_export(folder: Path, asked: str, compared: str, item_modalities: str | Mapping[str, Any] | None) -> MediaModel:
    """Open an export; the encoder is one that the caller names, since a file's word alone loads nothing."""
    from recbole_llm.checkpoints import sound_encoder_of
    from recbole_llm.content.encoders.joint import TextTower
    from recbole_llm.content.encoders.sounds import load_sound_encoder

    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{str(folder)!r} holds neither a checkpoint (LLMTwoTower-....pth) nor an export ({MANIFEST})."
        )
    if compared != "audio" or asked == "image":
        raise ValueError(
            f"{str(folder)!r} is no checkpoint. An export holds no way to ask by {SOURCES[asked]} in {compared}: give the "
            "checkpoint that 'recbole-llm run' saved."
        )
    export = load_export(folder)
    spec, tables = export.manifest.sounds, export.search
    if spec is None or tables is None or tables.sound_space is None:
        raise ValueError(
            "audio: this export holds no way to ask by a sound: its model has no sounds, or it was written before exports held "
            "one. Export again, or give the checkpoint that 'recbole-llm run' saved."
        )
    given = sound_encoder_of(item_modalities)
    if given is None:
        named = shlex.quote(f"{{audio: {spec.name}}}")
        raise ValueError(
            f"audio: the sounds of this export need the encoder {spec.name!r}, and nothing is loaded because a file names it. "
            f"Name it yourself: --item-modalities {named}."
        )
    name, seconds = given
    encoder: Any = load_sound_encoder(name, seconds=seconds)
    if encoder.fingerprint != spec.fingerprint:
        raise ValueError(
            f"audio: {name!r} is another encoder than {spec.name!r}, which the model was trained with, or it reads other "
            "seconds of a sound; name that one."
        )
    if asked == "audio":
        return MediaModel(export, asked, compared, tables.sound_space, encoder)
    if tables.sound_text_space is None:
        raise ValueError(
            f"The encoder of the items' sounds ({spec.name!r}) has no text tower: texts find sounds with CLAP."
        )
    return MediaModel(export, asked, compared, tables.sound_text_space, TextTower(encoder.files, device="cpu"))


def recommend_media(
    model: MediaModel, question: str | Path, *, k: int = 10, by: str = "both", rules: Rules = NO_RULES
) -> Recommendation:
    """Find the items that are like a question, then what buyers of those items bought.

    Args:
        model: of :func:`open_media`.
        question: a text, or the file of a picture or of a sound.
        k: how many.
        by: as for :func:`recbole_llm.recommend.recommend_text`.
        rules: as for :func:`recbole_llm.recommend.recommend_users`.

    Raises:
        ValueError: if the file cannot be read.
    """
    recommender = Recommender(model.export)
    recommender.searches = Searches(Search(model.export, recommender.catalog, other=(model.compared, model.space)))
    answer = recommender.recommend(Request(text_vector=vector_of_question(model, question), by=by, k=k, rules=rules))
    return replace(answer, source=SOURCES[model.asked])


def vector_of_question(model: MediaModel, question: str | Path) -> np.ndarray:
    """Encode a question, ``[F]`` float32.

    Raises:
        ValueError: if it is a file that cannot be read, a text without a word, or the encoder gives no finite vector for it.
    """
    import torch

    from recbole_llm.content.images.files import PICTURES
    from recbole_llm.content.media.kinds import UnreadableError
    from recbole_llm.content.sounds.files import SOUNDS

    raw: Any = question
    if model.asked != "text":
        kind = PICTURES if model.asked == "image" else SOUNDS
        try:
            raw = kind.decode(kind.read(Path(question)), model.encoder)
        except UnreadableError as error:
            raise ValueError(f"{model.asked}: {str(question)!r} cannot be read as a {kind.one}: {error}.") from error
    elif not str(question).strip():
        raise ValueError("text is empty; say what is asked for.")
    with torch.inference_mode():
        vector: np.ndarray = model.encoder.encode(model.encoder.prepare([raw]))[0].float().cpu().numpy()
    if not np.isfinite(vector).all():
        raise ValueError(
            f"{model.asked}: the encoder gives no finite vector for {str(question)!r}; ask by another one."
        )
    return vector
