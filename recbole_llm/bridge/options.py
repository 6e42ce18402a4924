"""The configuration keys we own, in one table: type, check, default and meaning of each.

The dataclass :class:`Options`, its validation, ``properties/LLMTwoTower.yaml`` and the key reference of the documentation
(:mod:`recbole_llm.bridge.option_reference`) follow from the table. RecBole's own keys keep their meaning and are not touched
here. A key that RecBole, a stock model's YAML or this file knows is never an error, however similar it looks to one of ours
(``reg_weight`` is 0.9 similar to ``neg_weight``).
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from recbole_llm.bridge import option_values as values
from recbole_llm.bridge.finetune_option import read_finetune, settle_finetune
from recbole_llm.bridge.option_checks import (
    CATALOG_LOSSES,
    reject_functions_of_files,
    reject_what_shards_lack,
    stock_keys,
)
from recbole_llm.bridge.preloaded import preloaded_vectors
from recbole_llm.content.encoder_settings import DTYPES, OVERFLOWS, POOLINGS
from recbole_llm.fitting.finetune_recipe import Recipe

LOSS_TYPES = ("catalog_bce", "catalog_ce", "sampled_bce", "pair_bce")
USER_TOWER_PARTS = ("history", "id", "text")
BLOCKS = ("closed_form", "learned", "sequence", "auto_sequence")
EVAL_BACKENDS = ("streamed", "stock")
NEG_VALID_FIELD = "neg_valid"  # column of a batch whose rows share their negatives: where one counts
MISSPELLING_RATIO = 0.85  # at this similarity an unknown key is taken for a misspelt one of ours


@dataclass(frozen=True)
class Key:
    """One configuration key.

    Attributes:
        read: checks a value and gives its final form.
        default: as the YAML file holds it.
        group: heading it stands under.
        kind: type, in words.
        meaning: what it does.
        of_dataset: whether it changes what the dataset carries, so that a saved dataset made with another value is stale.
    """

    read: values.Reader
    default: Any
    group: str
    kind: str
    meaning: str
    of_dataset: bool = False


def _key(read: values.Reader, default: Any, group: str, kind: str, meaning: str, of_dataset: bool = False) -> Any:
    return field(metadata={"key": Key(read, default, group, kind, meaning, of_dataset)})


@dataclass(frozen=True)
class Options:
    """Every key of ours with its value in final form; ``properties/LLMTwoTower.yaml`` says what each one does."""

    # Text and features
    item_text_fields: tuple[str, ...] | None = _key(
        values.names,
        None,
        "Text and features",
        "list",
        "Columns of the .item file that make an item's text. Empty: chosen from the file, said in the log.",
        of_dataset=True,
    )
    item_text_template: str | None = _key(
        values.text,
        None,
        "Text and features",
        "str",
        'A sentence with the columns in braces, such as "{title}. Genres: {class}". Empty: all chosen columns, named.',
        of_dataset=True,
    )
    user_text_fields: tuple[str, ...] | None = _key(
        values.names,
        None,
        "Text and features",
        "list",
        "Columns of the .user file; read only when user_tower contains text.",
        of_dataset=True,
    )
    item_features_file: str | Mapping[str, str] | None = _key(
        values.files,
        None,
        "Text and features",
        "str|dict",
        "Item vectors made elsewhere (.npy with ids beside it, .safetensors, .parquet). One path: used "
        "instead of a text encoder; RecBole's preload_weight of the items counts as one. By modality, such as"
        " {text: a.npy, image: b.npy}: each joins the model.",
        of_dataset=True,
    )
    item_modalities: Mapping[str, values.ModalitySource] | None = _key(
        values.modalities,
        None,
        "Text and features",
        "dict",
        "What describes items beside their texts: {image: {encoder: NAME, column: image}, audio: {encoder: NAME, seconds: 10}}. "
        "NAME is a vision or audio model (Hugging Face name or folder), onnx:FILE, or module:function; the column holds paths "
        "inside the dataset's folder, and without one files are images/ITEM_ID.jpg and audio/ITEM_ID.wav. Each joins the model "
        "with a weight chosen on validation, 0 among the choices.",
        of_dataset=True,
    )
    item_columns: Mapping[str, str] | str | None = _key(
        values.columns,
        None,
        "Text and features",
        "str|list|dict",
        "Columns of the .item file that are kernels of their own, each with a weight chosen on validation, 0 among the choices: "
        "[class, release_year], {brand: category, price: number}, or auto. Empty: none.",
        of_dataset=True,
    )
    encoder: str | None = _key(
        values.text,
        "sentence-transformers/all-MiniLM-L6-v2",
        "Text and features",
        "str",
        "Hugging Face name, local folder, or module:function (on a command line or in a program). Empty: no text, IDs only.",
        of_dataset=True,
    )
    encoder_revision: str | None = _key(
        values.text, None, "Text and features", "str", "Branch, tag or commit on the hub.", of_dataset=True
    )
    encoder_pooling: str = _key(
        values.choice("auto", *POOLINGS),
        "auto",
        "Text and features",
        "str",
        "auto (from the model's own files), mean, cls, last or max.",
        of_dataset=True,
    )
    encoder_prompt: str | None = _key(
        values.text, None, "Text and features", "str", "Put before each text.", of_dataset=True
    )
    encoder_max_tokens: int | None = _key(
        values.optional_count,
        None,
        "Text and features",
        "int",
        "Tokens read per text. Empty: the model's own limit.",
        of_dataset=True,
    )
    encoder_overflow: str = _key(
        values.choice(*OVERFLOWS),
        "truncate",
        "Text and features",
        "str",
        "What to do with longer texts: truncate, chunk_mean or head_tail.",
        of_dataset=True,
    )
    encoder_dim: int | None = _key(
        values.optional_count,
        None,
        "Text and features",
        "int",
        "Keep the first so many dimensions (Matryoshka models).",
        of_dataset=True,
    )
    encoder_batch_size: int = _key(values.count, 64, "Text and features", "int", "Texts per forward pass.")
    encoder_dtype: str = _key(
        values.choice(*DTYPES),
        "float32",
        "Text and features",
        "str",
        "float32, bfloat16 or float16.",
        of_dataset=True,
    )
    feature_cache_dir: str | None = _key(
        values.text,
        None,
        "Text and features",
        "str",
        "Where vectors are kept. Empty: recbole_llm in the user's cache folder.",
    )
    feature_transform: str = _key(
        values.choice("center", "none", "standardize", "whiten"),
        "center",
        "Text and features",
        "str",
        "center, none, standardize or whiten; statistics of the items that have a text.",
        of_dataset=True,
    )
    finetune: Recipe | None = _key(  # noqa: RUF009  # a frozen dataclass
        read_finetune,
        None,
        "Text and features",
        "dict",
        "Tune the encoder through the towers' loss: {encoder: text or image, method: lora or last_layers, layers, rank: 8, "
        "alpha: 16, learning_rate, warmup: 0.2, decay: 0.05, steps: 200, items_per_step: 256, refresh: 100, max_tokens, "
        "gate_level: 0.01, gate_users: 500}. Kept only where a paired test against the frozen encoder says so.",
        of_dataset=True,
    )

    # Blocks
    blocks: tuple[str, ...] = _key(
        values.sum_of(BLOCKS),
        ["closed_form", "learned", "auto_sequence"],
        "Blocks",
        "list",
        "Summands: closed_form (fitted at once), learned (towers); split by time, sequence (attention over the order)."
        " auto_sequence: sequence where there are at least 1,000 items and at most 300,000 training interactions.",
    )
    closed_form_dim: int | str = _key(
        values.rank,
        "auto",
        "Blocks",
        "str|int",
        "Rank of the closed form: auto (by validation and memory), full, or a number.",
    )
    tower_features: bool = _key(
        values.auto_flag,
        "auto",
        "Blocks",
        "str|bool",
        "Whether content enters the towers. auto: only where the closed form does not carry it; of large catalogues see loss_type.",
    )

    # Towers
    embedding_size: int = _key(values.count, 128, "Towers", "int", "Dimension D of the shared space.")
    adapter_hidden_size: int | None = _key(
        values.hidden,
        None,
        "Towers",
        "int",
        "Hidden units of the map from features to the shared space. Empty: linear.",
    )
    use_item_id: bool = _key(
        values.flag, True, "Towers", "bool", "Add a learned vector per trained item to the map of its features."
    )
    use_item_bias: bool = _key(values.flag, True, "Towers", "bool", "A bias per item.")
    user_tower: tuple[str, ...] = _key(
        values.sum_of(USER_TOWER_PARTS), "history", "Towers", "str", "history, id, text, or a sum such as history+id."
    )
    history_dropout: float = _key(
        values.share, 0.5, "Towers", "float", "Share of a user's history hidden from its own vector while training."
    )
    history_exponent: float = _key(
        values.not_negative, 0.5, "Towers", "float", "A history of h items is summed and divided by h to this power."
    )
    history_decay: float | None = _key(
        values.optional_positive,
        None,
        "Towers",
        "float",
        "Weight exp(-rank/decay), rank 0 the newest; needs interactions ordered by time. Empty: equal weights.",
    )
    use_order: bool = _key(
        values.flag,
        True,
        "Towers",
        "bool",
        "With eval_args.order TO: the closed form's histories fade, a next-item block joins it, and at test a"
        " history holds the validation items too, as RecBole gives sequential models. Not beside "
        "history_decay.",
    )
    order_test: bool = _key(
        values.flag,
        True,
        "Towers",
        "bool",
        "Split by time: run measures what the order of histories is worth, by one more solution with shuffled histories.",
    )
    share_parameters: bool = _key(
        values.flag, False, "Towers", "bool", "One tower for an item as history and as candidate, instead of two."
    )
    scoring: str = _key(values.choice("dot", "cosine"), "dot", "Towers", "str", "dot or cosine.")
    scale_init: float = _key(
        values.positive, 1.0, "Towers", "float", "Initial value of the learned factor on the score."
    )

    # Signals
    weight_field: str | None = _key(
        values.text,
        None,
        "Signals",
        "str",
        "Column of the .inter file with how much each interaction counts, above 0; recbole-llm import writes one.",
    )
    weight_exponent: float | str = _key(
        values.auto_or_not_negative,
        "auto",
        "Signals",
        "str|float",
        "Exponent of these weights. auto: in the fit and in histories by validation, 0 where that gains nothing.",
    )
    dislike_weight: float | str = _key(
        values.auto_or_not_negative,
        "auto",
        "Signals",
        "str|float",
        "How much an item of label 0 counts against what it would add to a history. auto: by validation.",
    )

    # Items without a training interaction
    cold_map: str = _key(
        values.choice("ridge", "none"),
        "ridge",
        "Items without a training interaction",
        "str",
        "ridge: vectors from their content by kernel ridge regression onto the trained items. none.",
    )
    cold_boost: float | str = _key(
        values.boost,
        "auto",
        "Items without a training interaction",
        "str|float",
        "Factor on their scores. auto: factor and offset by validation, trained items kept at 99.5%.",
    )

    # Loss
    loss_type: str = _key(
        values.choice(*LOSS_TYPES),
        "catalog_bce",
        "Loss",
        "str",
        "catalog_bce, catalog_ce (a row is a user); sampled_bce, pair_bce (a row is an interaction). Negatives of the last two "
        "follow RecBole's train_neg_sample_args; one more key in it, shared: 1024, lets the rows of a batch share so many "
        "negatives (sampled_bce), the choice for large catalogues on a CPU. RecBole's names: CE stands for catalog_ce, BCE for "
        "pair_bce; there is no BPR. Beyond 4,096 items validation chooses it, scoring, scale_init and tower_features if not given.",
    )
    neg_weight: float = _key(
        values.not_negative, 1.0, "Loss", "float", "Weight of the negatives; not used by catalog_ce and pair_bce."
    )
    kernel_backend: str = _key(
        values.choice("auto", "triton", "torch"), "auto", "Loss", "str", "auto (by device), triton or torch."
    )

    # Running
    eval_backend: str = _key(
        values.choice(*EVAL_BACKENDS),
        "streamed",
        "Running",
        "str",
        "streamed: no users x items matrix; stock: RecBole's loop. Stock models may be given it too.",
    )
    shard_items: bool = _key(
        values.flag,
        False,
        "Running",
        "bool",
        "For catalogues larger than one device, of several processes (torchrun, --nproc): each holds a part "
        "of the items, their gradients and optimizer state, and sees whole batches of users. blocks: learned,"
        " a catalogue loss; cold items are not placed (cold_map). One process: no effect.",
    )
    resume_from: str | None = _key(
        values.text, None, "Running", "str", "A *-last.pth checkpoint to go on from; recbole-llm run --resume sets it."
    )
    refit_rows: str | None = _key(
        values.optional_choice("valid", "all"),
        None,
        "Running",
        "str",
        "Rows of a fit with given choices: valid (training and validation) or all. recbole-llm fit sets it.",
        of_dataset=True,
    )
    refit_from: str | None = _key(
        values.text, None, "Running", "str", "The checkpoint whose choices such a fit repeats."
    )

    @property
    def trains_on_users(self) -> bool:
        """Whether a training row is a user with all its items (catalogue losses) and not an interaction."""
        return self.loss_type in CATALOG_LOSSES

    @property
    def feature_files(self) -> Mapping[str, str]:
        """``item_features_file`` by modality; a single path is text."""
        given = self.item_features_file
        return {"text": given} if isinstance(given, str) else given or {}

    @property
    def text_encoder(self) -> str | None:
        """The encoder of the items' texts; ``None`` where their vectors come from a file or there are none."""
        return None if "text" in self.feature_files else self.encoder

    @classmethod
    def from_config(cls, config: Any) -> "Options":
        """Read and validate our keys.

        Args:
            config: RecBole's ``Config``, or any mapping that gives ``None`` for an absent key.

        Raises:
            ValueError: on a value of the wrong type or outside its range, or a key that looks like a misspelt one of ours.
        """
        external = getattr(config, "external_config_dict", None)
        if external is not None:
            reject_misspelt_keys(external)
        if getattr(config, "file_config_dict", None):
            reject_functions_of_files(config)
        given: dict[str, Any] = {  # a checkpoint may be older than a key
            name: key.read(name, config[name] if name in config else key.default)  # noqa: SIM401
            for name, key in KEYS.items()
        }
        preloaded = None if given["item_features_file"] else preloaded_vectors(config)
        if preloaded is not None:
            given["item_features_file"] = preloaded.file
        if given["tower_features"] is None:  # the closed form already carries the content
            given["tower_features"] = "closed_form" not in given["blocks"] or not given["use_item_id"]
        settle_finetune(given, config)
        if given["shard_items"]:
            reject_what_shards_lack(given, config)
        return cls(**given)


KEYS: dict[str, Key] = {each.name: each.metadata["key"] for each in fields(Options)}
OWN_KEYS = tuple(KEYS)
DATASET_KEYS = tuple(name for name, key in KEYS.items() if key.of_dataset)

# RecBole's keys whose defaults are other ones for this model
RECBOLE_KEYS: dict[str, tuple[Any, str]] = {
    "epochs": (120, "(int) Of the learned block; under a catalogue loss an epoch visits every user once."),
    "train_batch_size": (512, "(int) Users under a catalogue loss, interactions otherwise."),
    "eval_batch_size": (4_000_000, "(int) Scores held at once; RecBole divides it by the number of items."),
    "learner": ("adamw", "(str) As in RecBole; rowwise_adagrad visits only the rows that a batch names."),
    "learning_rate": (0.003, "(float) As in RecBole."),
    "weight_decay": (
        1.0,
        "(float) AdamW: times learning_rate per step, chosen on validation of three datasets.",
    ),
    "valid_metric": ("NDCG@10", "(str) By it every choice is made. Not given, it follows metrics and topk."),
    "stopping_step": (
        15,
        "(int) Validations without a better one, after which training ends. Not given: as many as 100 steps hold, at least "
        "15; beyond 4,096 items at least 3.",
    ),
}


def default_values() -> dict[str, Any]:
    """Return every default of the model: ours, and those of RecBole's keys that differ from RecBole's."""
    own = {name: key.default for name, key in KEYS.items()}
    return own | {name: value for name, (value, _) in RECBOLE_KEYS.items()}


def reject_misspelt_keys(given: Iterable[str]) -> None:
    """Raise on a key that nobody knows and that looks like one of ours; :mod:`recbole_llm.bridge.model_keys` tells of others."""
    for key in sorted(key for key in given if key not in OWN_KEYS and key not in stock_keys()):
        near = difflib.get_close_matches(key, OWN_KEYS, n=1, cutoff=MISSPELLING_RATIO)
        if near:
            raise ValueError(
                f"Unknown configuration key {key!r}: did you mean {near[0]!r}? "
                "Rename it, or remove it if it belongs to something else."
            )
