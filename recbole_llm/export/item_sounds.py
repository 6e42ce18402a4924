"""How an export is asked by a sound, and by words where the encoder of the items' sounds reads both."""

from logging import getLogger
from typing import Any, NamedTuple

from recbole_llm.content.store.feature_table import fit_transform
from recbole_llm.export.manifest import EncoderSpec
from recbole_llm.export.model_tables import text_space
from recbole_llm.export.search_tables import TEXTS_OF_A_CENTRE, TextSpace
from recbole_llm.fitting.data import TrainingData

log = getLogger(__name__)


class Sounds(NamedTuple):
    """The encoder of the items' sounds, the way of its vectors into their space, and that of texts if it reads both."""

    encoder: EncoderSpec
    space: TextSpace
    of_texts: TextSpace | None


def sounds_of(data: TrainingData, dataset: Any, options: Any) -> Sounds | None:
    """Find out how sounds are asked for; ``None`` where the model has none, or no encoder of them is known.

    Args:
        data: what the model was fitted on.
        dataset: that it was made from.
        options: of its configuration.
    """
    source = (options.item_modalities or {}).get("audio")
    if source is None or "audio" not in data.content:
        return None
    raw = dataset.media_vectors("audio")
    center, transform = fit_transform(raw, options.feature_transform)
    try:
        tower = dataset.encoder_of("text", "audio")
    except ValueError as error:
        log.info("Sounds are not asked for by texts. %s", error)
        of_texts = None
    else:  # texts and sounds lie apart in a common space: each is centred by its own kind
        own = dataset.centre_of("text", tower, TEXTS_OF_A_CENTRE)
        of_texts = text_space(data, center if own is None else own, transform, "audio")
    spec = EncoderSpec(source.encoder, None, {}, raw.dim, raw.fingerprint)
    return Sounds(spec, text_space(data, center, transform, "audio"), of_texts)
