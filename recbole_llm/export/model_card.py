"""The model card of an export, for the person who puts it online."""

from collections.abc import Sequence

from recbole_llm.export.writer import ExportContents


def model_card(contents: ExportContents, dataset: str, quality: Sequence[str] = ()) -> str:
    """Write Markdown about the data (counts, no ids), the model, its quality, its limits and its use.

    Args:
        contents: of the export.
        dataset: its name.
        quality: lines of the section on quality, such as :func:`recbole_llm.reporting.words.card` gives.
    """
    trained = int(contents.trained.sum())
    number = contents.fitted_interactions
    fitted = "" if number is None else f", {number} fitted on"
    lines = [
        f"# LLMTwoTower export{f': {dataset}' if dataset else ''}",
        "",
        "Recommends items by the score <x_u, w_i> + b_i; a monotone map of it, fitted on validation, gives the probability "
        "P(i|u) that the item is among the user's next interactions, as many as validation held: about an eighth of the "
        "history where RecBole's default split was used.",
        "",
        "For: ranking the items of this data set for its users, for a list of items or for a text; finding similar items. "
        "Not for: decisions about persons, prices or credit; predictions of how much somebody will buy; another catalogue.",
        "",
        "## Data",
        "",
        f"{len(contents.item_ids)} items, {trained} of them with a training interaction, the others known by their content; "
        f"{len(contents.user_ids)} users; {len(contents.history_items)} interactions in their histories{fitted}.",
        "",
        "## Model",
        "",
        *(f"- {b.name}: {b.dim} columns, {b.scoring}, scale {b.scale:.4g}" for b in contents.blocks),
        "",
    ]
    if contents.encoder is not None:
        where = "in this folder" if contents.encoder.bundled else "not in this folder: texts need --encoder NAME"
        lines += [f"Texts: {contents.encoder.name}, {contents.encoder.feature_dim} dimensions, {where}.", ""]
    if contents.text_map is None:
        lines += ["Items cannot be added by their text: no map from texts to item vectors was fitted.", ""]
    lines += quality
    if contents.metrics:
        lines += ["## Metrics", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in contents.metrics.items()]
        lines += [""]
    lines += [
        "## Limits",
        "",
        "- The item tables and the histories come from the interactions of the training users: treat them as personal data.",
        "- An item without training interactions is placed by its text; its score is less certain than a known item's.",
        "- The licence of the data, and that of the encoder, apply to what is derived from them.",
        "",
        "## Use",
        "",
        "    recbole-llm serve FOLDER",
        "",
        "```python",
        "from recbole_llm.export.reader import load_export",
        "from recbole_llm.retrieval.recommender import Recommender, Request",
        'Recommender(load_export("FOLDER")).recommend(Request(items=["..."], k=10, explain=3))',
        "```",
    ]
    return "\n".join(lines) + "\n"
