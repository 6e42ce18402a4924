"""The protocol of encoders, and Hugging Face transformers as text encoders.

The protocol knows nothing of stores and files of vectors. Encoders are usable with gradients; whoever fills a store
turns them off.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_llm.content.encoder_settings import OVERFLOWS, is_function
from recbole_llm.content.encoders.function import FunctionEncoder
from recbole_llm.content.encoders.joint import TextTower, is_joint
from recbole_llm.content.encoders.onednn import use_onednn
from recbole_llm.content.encoders.pretrained import DTYPES, quiet_transformers
from recbole_llm.content.encoders.resolve import (
    DEFAULT_ENCODER,
    ModelFiles,
    file_digest,
    refuse_code_from_elsewhere,
    relevant_config,
    resolve_encoder,
)
from recbole_llm.content.encoders.sentence_modules import content_digest, is_decoder, pool, read_head
from recbole_llm.content.encoders.static import StaticEncoder, is_static

# raised when the same inputs and settings begin to give other vectors: old stores are then not used
FINGERPRINT_FORMAT = 1

__all__ = ["DEFAULT_ENCODER", "Encoder", "TextEncoder", "TokenizedText", "load_encoder", "resolve_encoder"]


class Sample(Protocol):
    """A prepared value: ready for a batch."""

    @property
    def size(self) -> int:
        """Work that it takes, in the encoder's unit (tokens); batches are made of samples of similar size."""

    @property
    def cut(self) -> int:
        """Units of the raw value that the encoder does not see."""


S = TypeVar("S", bound=Sample)


class Encoder(Protocol[S]):
    """What a feature store needs to know of an encoder.

    Attributes:
        modality: ``text``, ``image``, ``audio``...
        dim: dimension of the vectors.
        fingerprint: hash of everything that changes a vector: weights, tokenizer, settings; never a path.
        batch_cost: most ``sum(size)`` of one batch that runs well on the encoder's device; ``None``: no limit.
    """

    @property
    def modality(self) -> str: ...  # noqa: D102
    @property
    def dim(self) -> int: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102
    @property
    def batch_cost(self) -> int | None: ...  # noqa: D102

    def prepare(self, raw: Sequence[Any]) -> list[S]:
        """Convert raw values to samples, in order."""

    def encode(self, batch: Sequence[S]) -> Tensor:
        """Encode samples to float32 vectors ``[len(batch), dim]`` on the encoder's device."""

    def describe(self) -> dict[str, Any]:
        """Name and settings as JSON, for logs and manifests."""


@dataclass(frozen=True)
class TokenizedText:
    """Token ids of one text with special tokens, in windows that the model takes.

    Attributes:
        windows: one int32 array per window; more than one only with ``chunk_mean``.
        cut: tokens that are in no window.
    """

    windows: tuple[np.ndarray, ...]
    cut: int

    @property
    def size(self) -> int:
        """Tokens in all windows."""
        return sum(map(len, self.windows))


class TextEncoder:
    """Any Hugging Face transformer as a text encoder.

    Nothing heavy is loaded before the first text: fingerprint and dimension come from the model's files.

    Args:
        files: from :func:`resolve_encoder`.
        pooling: ``auto``, ``mean``, ``cls``, ``last`` or ``max``; ``auto`` follows ``modules.json`` (dense layers,
            normalisation and prompts included), takes the last token of a decoder, and the mean otherwise.
        prompt: put before each text; the name of one of the model's own prompts stands for that prompt. ``None``: the
            model's default prompt or its prompt for documents, if it has one.
        max_tokens: tokens read per text, special tokens included. ``None``: the model's own limit.
        overflow: what becomes of longer texts. ``truncate``: the end is cut; ``head_tail``: the middle is cut;
            ``chunk_mean``: nothing is cut, windows are encoded and averaged by their number of tokens.
        dim: first dimensions kept (Matryoshka models); normalised again where the model normalises.
        dtype: of the transformer; pooling and what follows are float32.
        device: where it runs.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        ValueError: on a value out of its range, or a model that is not understood.
    """

    modality = "text"

    def __init__(
        self,
        files: ModelFiles,
        *,
        pooling: str = "auto",
        prompt: str | None = None,
        max_tokens: int | None = None,
        overflow: str = "truncate",
        dim: int | None = None,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        if overflow not in OVERFLOWS:
            raise ValueError(f"encoder_overflow must be one of {', '.join(OVERFLOWS)}, got {overflow!r}.")
        if dtype not in DTYPES:
            raise ValueError(f"encoder_dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        self.files = files
        self.overflow = overflow
        self.dtype = dtype
        self.device = torch.device(device)
        self.trust_remote_code = trust_remote_code
        self._inner = files.transformer()
        self._config = self._inner.json("config.json")
        if not self._config:
            raise ValueError(f"encoder {files.name!r}: there is no config.json in {self._inner.folder}.")
        if not trust_remote_code:
            refuse_code_from_elsewhere(self._inner)
        self.head = read_head(files, pooling, lambda: is_decoder(self._config))
        self.prompt = self._choose_prompt(prompt)
        self.max_tokens = self._choose_max_tokens(max_tokens)
        self._lower = bool(self._inner.json("sentence_bert_config.json").get("do_lower_case"))
        self._dim = dim
        if dim is not None and not 1 <= dim <= self._full_dim:
            raise ValueError(f"encoder_dim must be between 1 and {self._full_dim}, the model's dimension, got {dim}.")

    def _choose_prompt(self, prompt: str | None) -> str:
        config = self.files.json("config_sentence_transformers.json")
        own = {name: text for name, text in (config.get("prompts") or {}).items() if text}
        if prompt is not None:
            return own.get(prompt, prompt)
        default = config.get("default_prompt_name")
        # the names that sentence-transformers' encode_document looks for: items are documents
        names = [default] if default else ["document", "passage", "corpus"]
        return next((own[name] for name in names if name in own), "")

    def _choose_max_tokens(self, asked: int | None) -> int:
        positions = self._config.get("max_position_embeddings") or self._config.get("n_positions")
        if positions and self._config.get("model_type") in _POSITIONS_FROM_PADDING:
            positions -= self._config.get("pad_token_id", 1) + 1
        stated = self._inner.json("sentence_bert_config.json").get("max_seq_length")
        tokenizer = self._inner.json("tokenizer_config.json").get("model_max_length")
        limits = [limit for limit in (positions, tokenizer) if limit and limit < 10**9]
        if asked is None:
            limit = stated or min(limits, default=512)
            return int(min(limit, positions) if positions else limit)
        if asked < 4 or (positions and asked > positions):
            raise ValueError(
                f"encoder_max_tokens must be between 4 and {positions or 'the limit of the model'}, got {asked}."
            )
        return asked

    @cached_property
    def _full_dim(self) -> int:
        for key in ("hidden_size", "d_model", "dim", "n_embd"):
            if key in self._config:
                return self.head.width(self._config[key])
        return self.head.width(self._model.config.hidden_size)

    @property
    def dim(self) -> int:
        """Dimension of the vectors."""
        return self._dim or self._full_dim

    @property
    def batch_cost(self) -> int | None:
        """Tokens of a batch on a CPU, where activations should stay in its caches; ``None`` elsewhere."""
        return CPU_BATCH_TOKENS if self.device.type == "cpu" else None

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of weights, tokenizer and every setting that changes a vector."""
        code = sorted(self._inner.folder.glob("*.py")) if self.trust_remote_code else []
        identity = {
            "format": FINGERPRINT_FORMAT,
            "modality": self.modality,
            "weights": [file_digest(path) for path in self._inner.weights()],
            "tokenizer": [file_digest(path) for path in self._inner.tokenizer()],
            "code": [file_digest(path) for path in code],
            "config": relevant_config(self._config),
            "tokenizer_config": relevant_config(self._inner.json("tokenizer_config.json")),
            "head": self.head.identity(),
            "lower": self._lower,
            **self._settings(),
        }
        return content_digest(json.dumps(identity, sort_keys=True))

    def _settings(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "overflow": self.overflow,
            "dim": self.dim,
            "dtype": self.dtype,
        }

    def describe(self) -> dict[str, Any]:
        """Return name, source and settings as JSON, for logs and manifests."""
        return {
            "name": self.files.name,
            "source": self.files.source,
            "pooling": "+".join(self.head.pooling),
            "pooling_from": self.head.source,
            "normalized": self.head.normalizes,
            **self._settings(),
        }

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with quiet_transformers():
            return AutoTokenizer.from_pretrained(
                str(self._inner.folder), local_files_only=True, trust_remote_code=self.trust_remote_code
            )

    @cached_property
    def _frame(self) -> tuple[list[int], list[int], list[int]]:
        """Return the special tokens before a text, those after it, and the tokens of the prompt."""
        tokenizer = self._tokenizer
        probe = tokenizer("a", return_special_tokens_mask=True)
        ids, special = probe["input_ids"], probe["special_tokens_mask"]
        if 0 not in special:
            raise ValueError(f"encoder {self.files.name!r}: its tokenizer makes no token of a letter.")
        first = special.index(0)
        last = len(ids) - special[::-1].index(0)
        before, after = ids[:first], ids[last:]
        prompt = tokenizer(self.prompt, add_special_tokens=False)["input_ids"] if self.prompt else []
        room = self.max_tokens - len(before) - len(after) - len(prompt)
        if room < 1:
            raise ValueError(
                f"encoder_max_tokens {self.max_tokens} leaves no room for text beside {len(before) + len(after)} "
                f"special tokens and {len(prompt)} tokens of the prompt: raise it, or shorten encoder_prompt."
            )
        return before, after, prompt

    @cached_property
    def _model(self) -> Any:
        import transformers

        # the name of the argument changed in 4.56
        newer = tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56)
        with quiet_transformers():
            model, report = transformers.AutoModel.from_pretrained(
                str(self._inner.folder),
                local_files_only=True,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                **{"dtype" if newer else "torch_dtype": DTYPES[self.dtype]},
            )
        if getattr(model.config, "is_encoder_decoder", False):
            model = model.get_encoder()
        absent = [key for key in report["missing_keys"] if not key.startswith(("pooler.", "decoder."))]
        if absent:
            raise ValueError(
                f"encoder {self.files.name!r}: its weights lack {len(absent)} tensors of {type(model).__name__} "
                f"({', '.join(sorted(absent)[:3])}...), which would stay random. Give a model whose weights are whole."
            )
        # a cache of keys and values serves generation only
        model.config.use_cache = False
        model = model.to(self.device).eval()
        if self.device.type == "cpu" and self.dtype == "float32":
            use_onednn(model)
        return model

    @property
    def module(self) -> nn.Module:
        """The transformer itself, which is loaded for it."""
        found: nn.Module = self._model
        return found

    @cached_property
    def _layers(self) -> nn.Module:
        return self.head.load().to(self.device)

    def prepare(self, raw: Sequence[str]) -> list[TokenizedText]:
        """Tokenise texts and lay them out in windows of at most ``max_tokens`` tokens."""
        if not raw:
            return []
        before, after, prompt = self._frame
        texts = [self.prompt + text for text in raw]
        encoded = self._tokenizer(
            [text.lower() for text in texts] if self._lower else texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        room = self.max_tokens - len(before) - len(after)
        samples = []
        for ids in encoded:
            cut = 0
            if len(ids) <= room:
                pieces = [ids]
            elif self.overflow == "chunk_mean":
                step = room - len(prompt)
                pieces = [ids[:room], *(prompt + ids[at : at + step] for at in range(room, len(ids), step))]
            else:
                cut = len(ids) - room
                tail = room // 2 if self.overflow == "head_tail" else 0
                pieces = [ids[: room - tail] + (ids[-tail:] if tail else [])]
            windows = tuple(np.asarray(before + piece + after, dtype=np.int32) for piece in pieces)
            samples.append(TokenizedText(windows, cut))
        return samples

    def encode(self, batch: Sequence[TokenizedText]) -> Tensor:
        """Encode tokenised texts.

        Returns:
            float32 ``[len(batch), dim]`` on the encoder's device; carries gradients unless the caller turned them off.
        """
        if not batch:
            return torch.zeros(0, self.dim, device=self.device)
        before, _, prompt = self._frame
        windows = [window for text in batch for window in text.windows]
        lengths = torch.tensor([len(window) for window in windows])
        # always padded on the right: a decoder's tokens then see no padding, and positions start at 0
        ids = torch.full((len(windows), int(lengths.max())), self._tokenizer.pad_token_id or 0)
        for row, window in zip(ids, windows, strict=True):
            row[: len(window)] = torch.from_numpy(window)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        ids, mask = ids.to(self.device), mask.to(self.device)
        hidden = self._model(input_ids=ids, attention_mask=mask.long())[0]
        skip = 0 if self.head.include_prompt or not prompt else len(before) + len(prompt)
        vectors = self._layers(pool(hidden, mask, self.head.pooling, skip))
        if len(windows) > len(batch):
            vectors = self._join(vectors, lengths.to(self.device), [len(text.windows) for text in batch])
        if self._dim:
            vectors = vectors[:, : self._dim]
            if self.head.normalizes:
                vectors = F.normalize(vectors, dim=-1)
        return vectors

    def _join(self, vectors: Tensor, lengths: Tensor, counts: list[int]) -> Tensor:
        """Average each text's windows, weighted by their tokens."""
        owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(self.device)
        weight = lengths.to(vectors.dtype).unsqueeze(1)
        total = torch.zeros(len(counts), 1, device=self.device).index_add(0, owner, weight)
        joined = (
            torch.zeros(len(counts), vectors.shape[1], device=self.device).index_add(0, owner, vectors * weight) / total
        )
        return F.normalize(joined, dim=-1) if self.head.normalizes else joined


# tokens per batch on a CPU. MiniLM on 61 amazon-office texts, CPU seconds of one thread of a busy AMD EPYC:
# 256 1.35, 512 1.31, 1024 1.39, 2048 1.45, 4096 1.68, 16384 2.72; the larger of the equals leaves work for more threads
CPU_BATCH_TOKENS = 1024

# position ids of these start behind the padding id
_POSITIONS_FROM_PADDING = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "xlm-roberta-xl"})


def load_encoder(
    name: str = DEFAULT_ENCODER,
    *,
    revision: str | None = None,
    pooling: str = "auto",
    prompt: str | None = None,
    max_tokens: int | None = None,
    overflow: str = "truncate",
    dim: int | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> TextEncoder | StaticEncoder | FunctionEncoder | TextTower:
    """Find a text encoder and read its settings; the weights are loaded with the first text.

    Args:
        name: a folder, a name on the Hugging Face hub, or ``module:function``, which runs that function.
        revision: branch, tag or commit on the hub.
        pooling: see :class:`TextEncoder`, as the rest.
        prompt: put before each text.
        max_tokens: tokens read per text.
        overflow: what becomes of longer texts.
        dim: first dimensions kept.
        dtype: of the transformer.
        device: where it runs.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        EncoderNotFoundError: if the model is nowhere to be had; names the ways out.
        ValueError: on a bad setting or a model that is not understood.
    """
    if is_function(name):
        return FunctionEncoder(name, (revision, pooling, prompt, max_tokens, overflow, dim, dtype))
    files = resolve_encoder(name, revision)
    shared: dict[str, Any] = {"prompt": prompt, "max_tokens": max_tokens, "overflow": overflow, "dim": dim}
    if is_static(files):
        if pooling not in ("auto", "mean") or dtype != "float32":
            raise ValueError(
                f"encoder {name!r} is a static model, a float32 mean of token vectors: encoder_pooling {pooling!r} and "
                f"encoder_dtype {dtype!r} have no meaning for it. Leave them empty."
            )
        return StaticEncoder(files, **shared)
    if is_joint(files):
        return TextTower(files, dtype=dtype, device=device, **shared)
    return TextEncoder(
        files, pooling=pooling, dtype=dtype, device=device, trust_remote_code=trust_remote_code, **shared
    )
