"""The best items for somebody who is not among the users of the data, by a profile, from a checkpoint or an export.

model = open_model("saved")
recommend_profile(model, {"age": 24, "occupation": "writer"})
"""

from collections.abc import Sequence

import numpy as np

from recbole_llm.export.errors import NO_PROFILES
from recbole_llm.export.reader import Export
from recbole_llm.export.search_tables import plain
from recbole_llm.retrieval.answers import Recommendation
from recbole_llm.retrieval.recommender import Recommender
from recbole_llm.retrieval.request import Request
from recbole_llm.retrieval.rules import NO_RULES, Rules
from recbole_llm.serving.profiles import Profile, text_of_profile
from recbole_llm.serving.text import TransformerEncoder


def recommend_profile(export: Export, profile: Profile, *, k: int = 10, rules: Rules = NO_RULES) -> Recommendation:
    """Find the best items for somebody of whom nothing but a profile is known; arguments as :func:`recommend_profiles`."""
    return recommend_profiles(export, [profile], k=k, rules=rules)[0]


def recommend_profiles(
    export: Export, profiles: Sequence[Profile], *, k: int = 10, rules: Rules = NO_RULES
) -> list[Recommendation]:
    """Find the best items for each of several people of whom nothing but a profile is known.

    Args:
        export: of :func:`recbole_llm.recommend.open_model`, of a model with ``text`` in ``user_tower``.
        profiles: texts, or values of columns of the ``.user`` file by name; columns that are left out are empty.
        k: how many items.
        rules: as for :func:`recbole_llm.recommend.recommend_users`.

    Raises:
        ValueError: if the model reads no texts of users, a column is unknown, a profile is empty, or the encoder is not to be
            had or was not named.
    """
    if isinstance(profiles, (str, dict)):
        raise ValueError("profiles is a single profile; give a list of profiles.")
    texts = [text_of_profile(export.manifest, profile) for profile in profiles]
    if not texts:
        return []
    recommender = Recommender(export)
    vectors = vectors_of_profiles(export, texts)
    return [recommender.recommend(Request(profile_vector=vector, k=k, rules=rules)) for vector in vectors]


def vectors_of_profiles(export: Export, texts: Sequence[str]) -> np.ndarray:
    """Encode texts of profiles, ``[n, F]`` float32, with the encoder of an export, which is loaded for it.

    Raises:
        ValueError: if the model reads none; as :class:`recbole_llm.serving.text.TransformerEncoder`.
    """
    if export.profile_map is None:
        raise ValueError(NO_PROFILES)
    vectors, _ = TransformerEncoder(export.folder, export.manifest, export.encoders).encode(
        [plain(text) for text in texts]
    )
    return vectors
