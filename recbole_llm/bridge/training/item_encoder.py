"""The items' texts or pictures through a trainable encoder, as :class:`recbole_llm.fitting.finetune.ItemEncoder`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recbole_llm.content.features import encode_texts
from recbole_llm.content.images.files import PICTURES
from recbole_llm.content.media.encode import encode_files, usable_files
from recbole_llm.content.media.kinds import UnreadableError
from recbole_llm.content.tuning.trainable import TrainableEncoder


class _Items:
    """What both kinds share: the trainable encoder."""

    def __init__(self, trainable: TrainableEncoder) -> None:
        self.trainable, self.encoder = trainable, trainable.encoder

    def parameters(self) -> list[nn.Parameter]:
        """List what is trained."""
        return self.trainable.parameters()

    def state(self) -> dict[str, Tensor]:
        """Copy what is trained."""
        return self.trainable.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over such a copy."""
        self.trainable.load(state)


class TextItems(_Items):
    """Items by their texts.

    Args:
        trainable: of a text encoder.
        texts: of every item; ``None`` where there is none.
        batch_size: most texts of a pass.
    """

    def __init__(self, trainable: TrainableEncoder, texts: Sequence[str | None], batch_size: int) -> None:
        super().__init__(trainable)
        self.texts, self.batch_size = texts, batch_size

    def encode(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Give places in ``rows`` and vectors with gradients, texts of like length together."""
        samples = self.encoder.prepare([self.texts[row] or "" for row in rows.tolist()])
        order = sorted(range(len(samples)), key=lambda at: (-samples[at].size, at))
        cost, at = self.encoder.batch_cost, 0
        while at < len(order):
            count = self.batch_size if cost is None else min(self.batch_size, cost // max(samples[order[at]].size, 1))
            some = order[at : at + max(count, 1)]
            at += len(some)
            yield torch.tensor(some, device=rows.device), self.encoder.encode([samples[each] for each in some])

    def encode_all(self) -> Tensor:
        """Encode every item without gradients, ``[N, F]``."""
        return encode_texts(self.texts, self.encoder, None, batch_size=self.batch_size).vectors


class PictureItems(_Items):
    """Items by their pictures; the mean of several is the item's.

    Args:
        trainable: of a vision encoder.
        paths: the pictures of every item.
    """

    def __init__(self, trainable: TrainableEncoder, paths: Sequence[Sequence[Path]]) -> None:
        super().__init__(trainable)
        self.paths = paths
        self._usable = usable_files(PICTURES, paths, self.encoder)

    def encode(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Give places in ``rows`` and vectors with gradients; pictures are read once more for it."""
        for places in torch.arange(len(rows)).split(self.encoder.batch_size):
            samples, owner = [], []
            for place in places.tolist():
                for path in self._usable[int(rows[place])]:
                    sample = self._sample(path)
                    if sample is not None:
                        samples.append(sample)
                        owner.append(place)
            if not samples:
                continue
            vectors = self.encoder.encode(samples)
            found, of = torch.unique(torch.tensor(owner), return_inverse=True)
            total = vectors.new_zeros(len(found), vectors.shape[1]).index_add(0, of.to(vectors.device), vectors)
            yield found.to(rows.device), total / torch.bincount(of).to(vectors)[:, None]

    def _sample(self, path: Path) -> Any | None:
        try:
            return self.encoder.prepare([PICTURES.decode(PICTURES.read(path), self.encoder)])[0]
        except UnreadableError:  # counted where the pictures were first encoded; such an item has no vector
            return None

    def encode_all(self) -> Tensor:
        """Encode every item without gradients, ``[N, F]``."""
        return encode_files(PICTURES, self.paths, self.encoder)[0].vectors
