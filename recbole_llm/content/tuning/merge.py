"""A base encoder and what a fine-tuning changed in it, merged into a folder that every loader of encoders reads.

The folder lies in the cache under the sha256 of the adapters, which name the base by the sha256 of its weights. Its fingerprint is
that of its own weights, which carry both digests: vectors of a tuned encoder never mix with the base's, and encoding is no slower.
"""

import hashlib
import shutil
from logging import getLogger
from pathlib import Path

from recbole_llm.atomic import atomic_folder
from recbole_llm.content.cache_folder import cache_folder
from recbole_llm.content.encoders.resolve import ModelFiles
from recbole_llm.content.tuning.adapter_file import Adapters, base_digest, read_weights, stable_bytes

WEIGHTS = "model.safetensors"
KEPT = (".safetensors", ".json", ".txt", ".model")  # numbers and settings; no pickles and no code

log = getLogger(__name__)


def merged_folder(files: ModelFiles, data: bytes) -> Path:
    """Find the merged encoder in the cache, and write it there first where it is not.

    Args:
        files: of the base.
        data: of :meth:`Adapters.to_bytes`.

    Raises:
        ValueError: if the adapters are of another base, or no adapters.
    """
    adapters = Adapters.from_bytes(data)
    inner = files.transformer()
    found = base_digest(inner)
    if found != adapters.base:
        raise ValueError(
            f"encoder {files.name!r}: its weights have the sha256 {found[:16]}..., and the model was fine-tuned from "
            f"{adapters.base[:16]}...: give the encoder that it was trained with."
        )
    digest = hashlib.sha256(data).hexdigest()
    folder = cache_folder() / "encoders" / f"tuned-{digest[:32]}"
    if (folder / inner.folder.relative_to(files.folder) / WEIGHTS).is_file():  # it came here whole, by its last step
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    log.info("Merging the fine-tuned encoder into %s", folder)
    try:
        with atomic_folder(folder) as temporary:
            write_merged(files, adapters, digest, temporary)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
    return folder


def write_merged(files: ModelFiles, adapters: Adapters, digest: str, target: Path) -> None:
    """Write the merged encoder: its weights in one safetensors file, the base's other files beside them.

    Args:
        files: of the base.
        adapters: of these weights.
        digest: sha256 of the adapters' file.
        target: a folder that exists.

    Raises:
        ValueError: if the adapters change a tensor that the base does not have.
    """
    inner = files.transformer()
    weights = read_weights(inner)
    unknown = [key for key in adapters.changed if key not in weights]
    if unknown:
        raise ValueError(f"encoder {files.name!r} has no weights {', '.join(unknown[:3])}, which the adapters change.")
    for key in adapters.changed:
        weights[key] = adapters.applied(key, weights[key])
    own = {path.name for path in inner.weights()} | {f"{path.name}.index.json" for path in inner.weights()}
    own |= {f"{WEIGHTS}.index.json", "pytorch_model.bin.index.json", WEIGHTS}
    place = inner.folder.relative_to(files.folder)
    for path in sorted(files.folder.rglob("*")):
        relative = path.relative_to(files.folder)
        if not path.is_file() or path.suffix not in KEPT or len(relative.parts) > 2:
            continue
        if relative.parent == place and path.name in own:
            continue
        (target / relative.parent).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / relative)
    (target / place).mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "base_sha256": adapters.base, "adapters_sha256": digest}
    # tensors that share memory in the base's files are copies here
    own_memory = {key: tensor.contiguous().clone() for key, tensor in weights.items()}
    (target / place / WEIGHTS).write_bytes(stable_bytes(own_memory, metadata))
