"""Bytes, and who touched them: the arguments of a launch, and the shared memory of a program.

Both raise where an access lies outside. What runs, but only by luck, is put down among the findings: a read of bytes that
nobody wrote, an access to what another warp or program has touched without a barrier between them.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ptx_emulator.program import EmulationError

Bytes = NDArray[np.uint8]
Index = NDArray[np.int64]
Report = Callable[[str], None]
GAP = 1 << 20  # between buffers: an access behind the end of one is not inside the next


class Buffer:
    """Memory that one or more arguments cover."""

    def __init__(self, base: int, data: Bytes, written: NDArray[np.bool_] | None) -> None:
        self.base, self.data, self.written = base, data, written  # written: None where all of it was before the launch
        self.writer: NDArray[np.int32] | None = None  # the program that has stored each byte, -1: none
        self.readers: list[NDArray[np.int32]] = []  # the first and the last program that has loaded it


class GlobalMemory:
    """The arguments of a launch."""

    def __init__(self, report: Report) -> None:
        self.buffers: list[Buffer] = []
        self.report, self.program, self._next = report, 0, 0x7F00_0000_0000

    def add(self, data: Bytes, written: NDArray[np.bool_] | None) -> int:
        """A new buffer over ``data``, whose address is returned."""
        self.buffers.append(Buffer(self._next, data, written))
        self._next += (data.size + GAP - 1) // GAP * GAP + GAP
        return self.buffers[-1].base

    def _find(self, address: NDArray[np.uint64], size: int, what: str) -> list[tuple[Buffer, NDArray[np.intp], Index]]:
        """Lanes and places by buffer."""
        found, left = [], np.arange(address.size)
        for buffer in self.buffers:
            place = (address[left] - np.uint64(buffer.base)).astype(np.int64)
            inside = (place >= 0) & (place + size <= buffer.data.size)
            if inside.any():
                found.append((buffer, left[inside], place[inside][:, None] + np.arange(size)))
                left = left[~inside]
            if not left.size:
                return found
        raise EmulationError(
            f"{what} outside every argument: {left.size} lanes, the first at {int(address[left[0]]):#x}"
        )

    def load(self, address: NDArray[np.uint64], size: int) -> Bytes:
        """``[lanes, size]`` bytes."""
        out = np.empty((address.size, size), np.uint8)
        for buffer, lanes, place in self._find(address, size, "load"):
            out[lanes] = buffer.data[place]
            if buffer.written is not None and not buffer.written[place].all():
                self.report("load of what nobody has written")
            if buffer.writer is not None:
                others = buffer.writer[place]
                if ((others >= 0) & (others != self.program)).any():
                    self.report("race: a program loads what another has stored")
            if not buffer.readers:
                buffer.readers = [np.full(buffer.data.size, -1, np.int32) for _ in range(2)]
            first, last = buffer.readers
            first[place] = np.where(first[place] < 0, self.program, first[place])
            last[place] = self.program
        return out

    def store(self, address: NDArray[np.uint64], data: Bytes) -> None:
        """Store ``[lanes, size]`` bytes."""
        for buffer, lanes, place in self._find(address, data.shape[1], "store"):
            if buffer.writer is None:
                buffer.writer = np.full(buffer.data.size, -1, np.int32)
            before = buffer.writer[place]
            if ((before >= 0) & (before != self.program)).any():
                self.report("race: two programs store to one address")
            for readers in buffer.readers:
                if ((readers[place] >= 0) & (readers[place] != self.program)).any():
                    self.report("race: a program stores to what another has loaded")
            buffer.data[place] = data[lanes]
            if (buffer.data[place] != data[lanes]).any():
                self.report("race: two lanes store different values to one address")
            buffer.writer[place] = self.program
            if buffer.written is not None:
                buffer.written[place] = True


class SharedMemory:
    """The shared memory of a program, with the copies and tensor-core reads under way."""

    def __init__(self, size: int, report: Report) -> None:
        self.size, self.report = size, report
        self.data = np.full(size, 0xFF, np.uint8)  # NaN, or an address outside everything
        self.written = np.zeros(size, bool)
        self.writer = np.full(size, -1, np.int16)  # the warp that has stored a byte since the last barrier
        self.readers = np.zeros(size, np.uint32)  # the warps that have loaded it, a bit each
        self.unfenced = np.zeros(size, bool)  # stored, but no fence has shown it to the tensor cores yet
        self.open: list[tuple[Index, Bytes, NDArray[np.int64]]] = []  # copies that no group holds yet
        self.groups: list[list[tuple[Index, Bytes, NDArray[np.int64]]]] = []
        self.read_by_matrix: list[Index] = []  # by products that are not waited for

    def place(self, address: NDArray[np.uint64], size: int) -> Index:
        """``[lanes, size]`` places of the bytes."""
        at = address.astype(np.int64)
        if (at < 0).any() or (at + size > self.size).any():
            raise EmulationError(f"shared memory has {self.size} bytes, access at {int(at.max()):#x}")
        return at[:, None] + np.arange(size)

    def load(self, address: NDArray[np.uint64], size: int, warps: NDArray[np.int64]) -> Bytes:
        """``[lanes, size]`` bytes."""
        place = self.place(address, size)
        self.note_read(place, warps)
        return self.data[place]

    def note_read(self, place: Index, warps: NDArray[np.int64], what: str = "load") -> None:
        """Check and put down a read of ``[lanes, size]`` places."""
        if not self.written[place].all():
            self.report(f"{what} of shared memory that nobody has written, or of a copy that is not waited for")
        writer = self.writer[place]
        if ((writer >= 0) & (writer != warps[:, None])).any():
            self.report(f"race: {what} of what another warp has stored, without a barrier")
        np.bitwise_or.at(self.readers, place, np.left_shift(np.uint32(1), warps.astype(np.uint32))[:, None])

    def store(self, address: NDArray[np.uint64], data: Bytes, warps: NDArray[np.int64]) -> None:
        """Store ``[lanes, size]`` bytes."""
        place = self.place(address, data.shape[1])
        self.note_write(place, warps, self.data[place] == data)
        self.data[place] = data
        self.written[place] = self.unfenced[place] = True

    def note_write(self, place: Index, warps: NDArray[np.int64], same: NDArray[np.bool_] | None = None) -> None:
        """Check and put down a write; where it changes nothing (``same``), other warps may have made it too.

        Warps that hold copies of a tensor all store it.
        """
        writer = self.writer[place]
        clash = (writer >= 0) & (writer != warps[:, None])
        if (clash if same is None else clash & ~same).any():
            self.report("race: two warps store to shared memory without a barrier")
        others = self.readers[place] & ~np.left_shift(np.uint32(1), warps.astype(np.uint32))[:, None]
        if others.any():
            self.report("race: store over what another warp has loaded, without a barrier")
        for reads in self.read_by_matrix:
            if np.isin(place, reads).any():
                self.report("race: store over what an unfinished product reads")
        self.writer[place] = warps[:, None]

    def copy(self, address: NDArray[np.uint64], data: Bytes, warps: NDArray[np.int64]) -> None:
        """Begin an asynchronous copy: its bytes are garbage until it is waited for."""
        place = self.place(address, data.shape[1])
        self.note_write(place, warps)
        self.data[place], self.written[place] = 0xFF, False
        self.unfenced[place] = False  # up to Triton 3.6 copies are shown by the barrier alone
        self.open.append((place, data, warps))

    def commit(self) -> None:
        """The copies since the last commit are a group."""
        self.groups.append(self.open)
        self.open = []

    def wait(self, pending: int) -> None:
        """Land all groups but the ``pending`` last; another warp sees them behind the next barrier."""
        while len(self.groups) > pending:
            for place, data, warps in self.groups.pop(0):
                self.data[place], self.written[place] = data, True
                self.writer[place] = warps[:, None]

    def barrier(self) -> None:
        """All warps have arrived."""
        self.writer.fill(-1)
        self.readers.fill(0)

    def fence(self) -> None:
        """What has been stored is shown to the tensor cores."""
        self.unfenced.fill(False)

    def read_matrix(self, place: Index, warps: Sequence[int]) -> Bytes:
        """Bytes that a product of ``warps`` reads; ``place`` has any shape."""
        if place.min() < 0 or place.max() >= self.size:
            raise EmulationError(f"a product reads beyond the {self.size} bytes of shared memory")
        if not self.written[place].all():
            self.report("a product reads what nobody has written, or a copy that is not waited for")
        writer = self.writer[place]
        for warp in warps:
            if ((writer >= 0) & (writer != warp)).any():
                self.report("race: a product reads what another warp has stored, without a barrier")
                break
        if self.unfenced[place].any():
            self.report("a product reads what no fence has shown to the tensor cores")
        for warp in warps:
            self.readers[place] |= np.uint32(1 << warp)
        return self.data[place]
