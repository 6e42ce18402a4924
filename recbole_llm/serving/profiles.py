"""The text of somebody's profile, made as the training made those of its users."""

from collections.abc import Mapping
from numbers import Real

from recbole_llm.content.text.template import Template
from recbole_llm.export.errors import NO_PROFILES
from recbole_llm.export.manifest import Manifest

Profile = str | Mapping[str, str | int | float | None]


def text_of_profile(manifest: Manifest, profile: Profile) -> str:
    """Render a profile.

    Args:
        manifest: of the export.
        profile: a text, which stays as it is, or values of columns of the ``.user`` file; columns that are left out are empty, as
            are ``None`` and NaN.

    Raises:
        ValueError: if the model reads no texts of users, a column is unknown, or there is nothing in the profile.
    """
    spec = manifest.profile_text
    if spec is None:
        raise ValueError(NO_PROFILES)
    if isinstance(profile, str):
        text = profile.strip()
    else:
        unknown = [name for name in profile if name not in spec.fields]
        if unknown:
            raise ValueError(
                f"profile: unknown column {unknown[0][:64]!r}; the text of a user is made of {', '.join(spec.fields)}."
            )
        template = Template(spec.template)
        text = template.render({name: _cell(profile.get(name, "")) for name in template.fields})
    if not text:
        raise ValueError(f"profile is empty; give a text, or values of {', '.join(spec.fields)}.")
    return text


def _cell(value: str | int | float | None) -> str:
    """A value as a file's column holds it: 24 and 24.0 are '24', and what is missing is empty."""
    if value is None or value != value:  # NaN, by which pandas says that there is none
        return ""
    is_whole = isinstance(value, Real) and not isinstance(value, bool) and float(value).is_integer()
    return str(int(value)) if is_whole else str(value).strip()
