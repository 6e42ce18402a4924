"""A model of transformers from a folder, with nothing of it left at random."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from recbole_llm.content.encoders.onednn import use_onednn
from recbole_llm.content.encoders.resolve import ModelFiles

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bar and load report of transformers, which we check and word ourselves."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def load_pretrained(files: ModelFiles, dtype: str, device: torch.device, unread: Sequence[str]) -> Any:
    """Load a model for encoding.

    Args:
        files: of the model.
        dtype: of its weights.
        device: where it runs.
        unread: beginnings of the names of tensors that no vector reads, which may be absent.

    Raises:
        ValueError: if other tensors are absent.
    """
    import transformers

    # the name of the argument changed in 4.56
    newer = tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56)
    with quiet_transformers(), torch.inference_mode(False):  # whoever loads it first may encode without gradients
        model, report = transformers.AutoModel.from_pretrained(
            str(files.folder),
            local_files_only=True,
            output_loading_info=True,
            **{"dtype" if newer else "torch_dtype": DTYPES[dtype]},
        )
    absent = [key for key in report["missing_keys"] if not key.startswith(tuple(unread))]
    if absent:
        raise ValueError(
            f"encoder {files.name!r}: its weights lack {len(absent)} tensors of {type(model).__name__} "
            f"({', '.join(sorted(absent)[:3])}...), which would stay random. Give a model whose weights are whole."
        )
    model = model.to(device).eval()
    if device.type == "cpu" and dtype == "float32":
        use_onednn(model)
    return model
