"""The feature store: nothing is encoded twice, nothing is lost, and what a run uses is what is stored."""

import contextlib
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from waiting import LIMIT, happens, join

from recbole_llm.atomic import is_temporary
from recbole_llm.content import features as features_module
from recbole_llm.content.encoders.transformer import load_encoder
from recbole_llm.content.features import FeatureStore, encode_texts
from recbole_llm.content.processes import number_of_processes
from recbole_llm.content.store.store import default_folder


class HashEncoder:
    """Vectors from a hash of the text and, in the last bits, of its batch, as matrix products have it."""

    modality = "text"
    dim = 8
    batch_cost = None

    def __init__(self, fingerprint="f" * 64, seconds=0.0, memory=None):
        self.fingerprint, self.seconds, self.memory = fingerprint, seconds, memory
        self.batches = []

    def describe(self):
        return {"name": "hash"}

    def prepare(self, raw):
        return [SimpleNamespace(text=text, size=len(text), cut=max(len(text) - 20, 0)) for text in raw]

    def encode(self, batch):
        if self.memory is not None and len(batch) > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.batches.append([sample.text for sample in batch])
        time.sleep(self.seconds)
        company = int(hashlib.sha256("".join(s.text for s in batch).encode()).hexdigest()[:4], 16)
        rows = [np.frombuffer(hashlib.sha256(s.text.encode()).digest(), np.int32) / 2**31 for s in batch]
        return torch.from_numpy(np.stack(rows).astype(np.float32)) + company * 2**-40

    @property
    def encoded(self):
        return [text for batch in self.batches for text in batch]


def sentences(n, seed=0):
    rng = random.Random(seed)
    return [f"text {i} " + "word " * rng.randint(0, 20) for i in range(n)]


def files(folder):
    """Name and bytes of everything in the store but leftovers of killed writes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not is_temporary(path)
    }


def shards(folder):
    return sorted(folder.rglob("*.safetensors"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(features_module, "SHARD_ROWS", 32)


@pytest.fixture
def store(tmp_path):
    return FeatureStore(tmp_path / "store")


class TestEncodeTexts:
    def test_aligned_absent_and_distinct(self, store):
        encoder = HashEncoder()
        table = encode_texts([None, "b", "a", None, "b"], encoder, store)
        assert table.present.tolist() == [False, True, True, False, True]
        assert table.vectors[[0, 3]].abs().sum() == 0
        assert torch.equal(table.vectors[1], table.vectors[4])
        assert not torch.equal(table.vectors[1], table.vectors[2])
        assert sorted(encoder.encoded) == ["a", "b"]
        assert (table.modality, table.fingerprint, table.dim) == ("text", "f" * 64, 8)

    def test_second_run_encodes_nothing_and_uses_the_same_bits(self, store):
        texts = sentences(200)
        first = encode_texts(texts, HashEncoder(), store)
        again = HashEncoder()
        second = encode_texts(texts[::-1], again, FeatureStore(store.folder))
        assert again.batches == []
        assert torch.equal(first.vectors, second.vectors.flip(0))

    def test_ten_more_items_encode_ten(self, store):
        encode_texts(sentences(200), HashEncoder(), store)
        more = HashEncoder()
        encode_texts(sentences(200) + [f"new {i}" for i in range(10)], more, store)
        assert sorted(more.encoded) == [f"new {i}" for i in range(10)]

    def test_another_encoder_has_a_folder_of_its_own(self, store):
        encode_texts(["a"], HashEncoder(), store)
        other = HashEncoder(fingerprint="e" * 64)
        encode_texts(["a"], other, store)
        assert other.encoded == ["a"]
        assert len(list(store.folder.iterdir())) == 2

    def test_works_without_a_store(self):
        table = encode_texts(["a", None], HashEncoder())
        assert table.present.tolist() == [True, False]

    def test_no_texts_at_all(self, store):
        table = encode_texts([None, None], HashEncoder(), store)
        assert table.vectors.shape == (2, 8)
        assert not table.present.any()

    def test_batches_are_of_similar_length(self, store):
        encoder = HashEncoder()
        encode_texts(sentences(100), encoder, store, batch_size=10)
        lengths = [[len(text) for text in batch] for batch in encoder.batches]
        assert all(len(batch) <= 10 for batch in lengths)
        assert list(itertools.chain(*lengths)) == sorted(itertools.chain(*lengths), reverse=True)

    def test_batch_cost_bounds_a_batch(self):
        encoder = HashEncoder()
        encoder.batch_cost = 100
        encode_texts(sentences(50), encoder)
        assert all(len(batch) == 1 or len(batch) * max(map(len, batch)) <= 100 for batch in encoder.batches)

    def test_order_of_the_rows_changes_no_bit(self, tmp_path):
        texts = sentences(100)
        one = encode_texts(texts, HashEncoder(), FeatureStore(tmp_path / "one"))
        two = encode_texts(texts[::-1], HashEncoder(), FeatureStore(tmp_path / "two"))
        assert torch.equal(one.vectors, two.vectors.flip(0))
        assert files(tmp_path / "one") == files(tmp_path / "two")

    def test_log_says_what_was_done(self, store, caplog):
        caplog.set_level(logging.INFO)
        encode_texts([None, "short", "short", "long " * 10], HashEncoder(), store)
        assert "Encoded 2 texts" in caplog.text
        assert "3 of 4 rows have a vector; 2 distinct texts" in caplog.text
        assert "1 of 2 texts were longer than encoder_max_tokens; 30 tokens were cut" in caplog.text
        caplog.clear()
        encode_texts(["short", "long " * 10], HashEncoder(), store)
        assert "All 2 distinct texts came from the store" in caplog.text
        assert "30 tokens were cut" in caplog.text

    def test_progress_bar(self, store, capsys):
        encode_texts(sentences(40), HashEncoder(), store, show_progress=True)
        bar = capsys.readouterr().err
        assert "Encoding: 100%" in bar
        assert "40/40" in bar
        assert "tokens/s" in bar
        encode_texts(sentences(40), HashEncoder(), store, show_progress=True)
        assert capsys.readouterr().err == ""

    def test_batch_halves_on_out_of_memory(self, store, caplog):
        encoder = HashEncoder(memory=5)
        table = encode_texts(sentences(60), encoder, store, batch_size=32)
        assert table.present.all()
        assert max(map(len, encoder.batches)) <= 5
        assert [r.getMessage() for r in caplog.records if "Out of memory" in r.getMessage()] == [
            f"Out of memory: encoder_batch_size is lowered to {size}" for size in (16, 8, 4)
        ]

    def test_one_text_that_does_not_fit(self, store):
        with pytest.raises(MemoryError, match="does not fit into memory alone. Lower encoder_max_tokens"):
            encode_texts(["a"], HashEncoder(memory=0), store)

    def test_other_errors_are_not_taken_for_memory(self):
        encoder = HashEncoder()
        encoder.encode = lambda batch: (_ for _ in ()).throw(RuntimeError("shapes differ"))
        with pytest.raises(RuntimeError, match="shapes differ"):
            encode_texts(["a", "b"], encoder)

    def test_not_a_number_is_an_error_and_is_not_stored(self, store):
        encoder = HashEncoder()
        encoder.encode = lambda batch: torch.full((len(batch), 8), float("nan"))
        with pytest.raises(ValueError, match="NaN or infinity for 'a'. Set encoder_dtype to float32"):
            encode_texts(["a"], encoder, store)
        assert not store.folder.exists()

    def test_batch_size(self):
        with pytest.raises(ValueError, match="encoder_batch_size must be at least 1, got 0"):
            encode_texts(["a"], HashEncoder(), batch_size=0)

    def test_no_gradient_is_kept(self, tiny_bert):
        assert not encode_texts(["a"], load_encoder(str(tiny_bert))).vectors.requires_grad

    @given(st.lists(st.integers(1, 15), min_size=30, max_size=200), st.randoms(use_true_random=False))
    def test_without_some_shards_the_others_stay(self, sizes, rng):
        """What makes a resumed run bitwise equal: leaving finished shards out does not move the borders of the rest."""
        samples = dict(enumerate(SimpleNamespace(size=size) for size in sizes))
        encoder = HashEncoder()
        encoder.batch_cost = 60
        order = sorted(samples, key=lambda i: -samples[i].size)

        def plan(order):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(features_module, "SHARD_ROWS", 10)
                return list(features_module._group(features_module._Batches(encoder, 7).plan(order, samples)))

        whole = plan(order)
        rest = [shard for shard in whole if rng.random() < 0.5]
        members = {i for shard in rest for batch in shard for i in batch}
        assert plan([i for i in order if i in members]) == rest


class TestDamage:
    @pytest.fixture
    def filled(self, store):
        texts = sentences(120)
        return texts, encode_texts(texts, HashEncoder(), store, batch_size=16), files(store.folder)

    @pytest.mark.parametrize("place", ["header", "keys", "vectors", "end"])
    def test_flipped_byte_is_found_and_encoded_again(self, store, filled, caplog, place):
        texts, table, before = filled
        path = shards(store.folder)[1]
        data = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(data[:8], "little")
        spans = json.loads(data[8:header])
        at = {"header": 3, "end": len(data) - 1}
        at |= {name: header + spans[name]["data_offsets"][0] + 40 for name in ("keys", "vectors")}
        data[at[place]] ^= 1
        path.write_bytes(data)
        encoder = HashEncoder()
        again = encode_texts(texts, encoder, store, batch_size=16)
        assert torch.equal(again.vectors, table.vectors)
        assert 32 <= len(encoder.encoded) <= 64
        assert str(path) in caplog.text
        assert "its texts are encoded again" in caplog.text
        assert files(store.folder) == before

    def test_truncated_and_empty_shards(self, store, filled):
        texts, table, before = filled
        paths = shards(store.folder)
        paths[0].write_bytes(paths[0].read_bytes()[:-100])
        paths[1].write_bytes(b"")
        paths[2].unlink()
        assert torch.equal(encode_texts(texts, HashEncoder(), store, batch_size=16).vectors, table.vectors)
        assert files(store.folder) == before

    @pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b'{"format": 0}'])
    def test_manifest_is_written_again(self, store, filled, caplog, content):
        texts, _, before = filled
        (manifest,) = store.folder.rglob("manifest.json")
        manifest.write_bytes(content)
        encode_texts([*texts, "one more"], HashEncoder(), store, batch_size=16)
        assert (
            files(store.folder)[str(manifest.relative_to(store.folder))]
            == before[str(manifest.relative_to(store.folder))]
        )
        assert "written again" in caplog.text

    def test_foreign_files_are_left_alone(self, store, filled):
        texts, table, _ = filled
        folder = shards(store.folder)[0].parent
        (folder / "note.txt").write_text("mine")
        (folder / "mine.safetensors").write_text("mine")
        encoder = HashEncoder()
        assert torch.equal(encode_texts(texts, encoder, store, batch_size=16).vectors, table.vectors)
        assert encoder.batches == []
        assert (folder / "note.txt").exists()
        assert (folder / "mine.safetensors").exists()

    def test_store_that_cannot_be_written(self, tmp_path, caplog):
        (tmp_path / "file").write_text("in the way")
        table = encode_texts(sentences(100), HashEncoder(), FeatureStore(tmp_path / "file" / "store"), batch_size=16)
        assert table.present.all()
        said = [r for r in caplog.records if "cannot be written" in r.getMessage()]
        assert len(said) == 1
        assert "the vectors are used and not kept" in said[0].getMessage()

    def test_manifest_describes_the_encoder(self, store, filled):
        (manifest,) = store.folder.rglob("manifest.json")
        content = json.loads(manifest.read_text())
        assert content["modality"] == "text"
        assert content["fingerprint"] == "f" * 64
        assert content["dim"] == 8
        assert content["encoder"] == {"name": "hash"}

    def test_describe(self, store, filled):
        assert "1 encoders, 4 shards" in store.describe()
        assert "0 encoders, 0 shards" in FeatureStore(store.folder / "nowhere").describe()


def _encode_slowly(folder, texts, seconds, started, die_at=None):
    """Fill a store in a process that may be killed; ``die_at`` = (function of os, count, before or after)."""
    features_module.SHARD_ROWS = 32
    torch.set_num_threads(1)
    if die_at is not None:
        name, count, moment = die_at
        original, calls = getattr(os, name), itertools.count(1)

        def deadly(*args):
            if next(calls) == count:
                if moment == "after":
                    original(*args)
                os._exit(9)
            return original(*args)

        setattr(os, name, deadly)
    started.set()
    encode_texts(texts, HashEncoder(seconds=seconds), FeatureStore(folder), batch_size=8)


@pytest.fixture(scope="module")
def fork():
    """Processes forked from one that has done the imports, and no more: quick to start, and without threads or locks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
class TestProcesses:
    texts = sentences(400)

    def run(self, fork, *args):
        started = fork.Event()
        process = fork.Process(target=_encode_slowly, args=(*args[:3], started, *args[3:]))
        process.start()
        happens(started, "the process has begun to encode")
        return process

    @pytest.fixture
    def undisturbed(self, tmp_path):
        encode_texts(self.texts, HashEncoder(), FeatureStore(tmp_path / "undisturbed"), batch_size=8)
        return files(tmp_path / "undisturbed")

    @pytest.mark.slow
    def test_twenty_random_kills(self, fork, tmp_path, undisturbed):
        """Killed after none, one or two more shards and a random while; a finished store is compared and begun anew."""
        folder, rng, kills, finished = tmp_path / "killed", random.Random(1), 0, 0
        while kills < 20:
            goal = len(shards(folder)) + rng.randint(0, 2)
            process = self.run(fork, folder, self.texts, 0.005)
            while process.is_alive() and len(shards(folder)) < goal:
                time.sleep(0.001)
            process.join(rng.uniform(0, 0.05))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                join(process)
            kills += process.exitcode == -signal.SIGKILL
            if process.exitcode == 0:
                assert files(folder) == undisturbed
                finished += 1
                folder = tmp_path / f"killed-{finished}"
        encode_texts(self.texts, HashEncoder(), FeatureStore(folder), batch_size=8)
        assert files(folder) == undisturbed

    @pytest.mark.parametrize("name", ["replace", "fsync"])
    @pytest.mark.parametrize("count", [1, 2, 5])
    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_killed_while_writing(self, fork, tmp_path, undisturbed, name, count, moment):
        folder = tmp_path / "killed"
        process = self.run(fork, folder, self.texts, 0, (name, count, moment))
        join(process)
        assert process.exitcode == 9
        again = HashEncoder()
        encode_texts(self.texts, again, FeatureStore(folder), batch_size=8)
        assert files(folder) == undisturbed
        assert len(again.encoded) <= 400

    def test_work_before_a_kill_is_not_repeated(self, fork, tmp_path):
        process = self.run(fork, tmp_path / "killed", self.texts, 0, ("replace", 6, "after"))
        join(process)
        again = HashEncoder()
        encode_texts(self.texts, again, FeatureStore(tmp_path / "killed"), batch_size=8)
        # the first replace wrote the manifest, five more a shard of 32 each
        assert len(again.encoded) == 400 - 5 * 32

    def test_two_at_once(self, fork, tmp_path, undisturbed):
        processes = [self.run(fork, tmp_path / "both", self.texts, 0.002) for _ in range(2)]
        join(*processes)
        assert [process.exitcode for process in processes] == [0, 0]
        assert files(tmp_path / "both") == undisturbed
        assert not [path for path in (tmp_path / "both").rglob("*") if is_temporary(path)]


def _encode_as_rank(folder, texts, rank, world, meeting, counts, step):
    torch.set_num_threads(1)
    features_module.SHARD_ROWS = 32
    if meeting is None:  # what torchrun gives
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    else:
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    encoder = HashEncoder()
    encode = encoder.encode

    def in_step(batch):
        with contextlib.suppress(threading.BrokenBarrierError):  # the other has no more to do
            step.wait(LIMIT)  # neither gets ahead, however busy the machine
        return encode(batch)

    encoder.encode = in_step
    encode_texts(texts, encoder, FeatureStore(folder), batch_size=8)
    step.abort()
    counts.put(len(encoder.encoded))
    if meeting is not None:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("meeting", ["meeting", None], ids=["process group", "torchrun's environment"])
def test_two_ranks_share_the_work(fork, tmp_path, meeting):
    """One call per rank under torch.distributed, as in a run with two processes, or in processes that torchrun started."""
    texts, counts, step = sentences(400), fork.Queue(), fork.Barrier(2)
    meeting = None if meeting is None else tmp_path / meeting
    encode_texts(texts, HashEncoder(), FeatureStore(tmp_path / "alone"), batch_size=8)
    ranks = [
        fork.Process(target=_encode_as_rank, args=(tmp_path / "shared", texts, rank, 2, meeting, counts, step))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    join(*ranks)
    assert [process.exitcode for process in ranks] == [0, 0]
    shares = [counts.get(timeout=LIMIT) for _ in ranks]
    assert files(tmp_path / "shared") == files(tmp_path / "alone")
    # 13 shards, and where they meet a shard may be done by both
    assert sum(shares) <= 400 + 3 * 32
    assert min(shares) >= 100


@pytest.mark.parametrize(
    ("rank", "world"), [("2", "2"), ("-1", "2"), ("0", "0"), ("one", "2"), ("1", "1")], ids=lambda value: value
)
def test_ranks_that_cannot_be(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=f"RANK is '{rank}' and WORLD_SIZE '{world}'"):
        number_of_processes()


class TestRanks:
    def ranks(self, monkeypatch, rank, world):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)

    def test_own_shards_first_then_the_others_from_the_end(self, monkeypatch):
        shards, keys = [[[i]] for i in range(7)], [bytes(7) + bytes([i]) for i in range(7)]
        self.ranks(monkeypatch, 1, 3)
        assert features_module._shares(shards, keys) == [[[i]] for i in (1, 4, 6, 5, 3, 2, 0)]
        late = shards[1:3] + shards[4:]  # what a rank plans that starts when shards 0 and 3 are stored
        assert features_module._shares(late, keys) == [[[i]] for i in (1, 4, 6, 5, 2)]

    def test_resumed_by_another_number_of_ranks(self, monkeypatch, store, tmp_path):
        texts = sentences(300)
        encode_texts(texts, HashEncoder(), FeatureStore(tmp_path / "alone"))
        stopped = HashEncoder()
        stop, encode = iter(range(3)), stopped.encode
        stopped.encode = lambda batch: encode(batch) if next(stop, None) is not None else (_ for _ in ()).throw(OSError)
        self.ranks(monkeypatch, 2, 4)
        with pytest.raises(OSError):
            encode_texts(texts, stopped, store)
        assert shards(store.folder)
        self.ranks(monkeypatch, 1, 2)
        encode_texts(texts, HashEncoder(), store)
        assert files(store.folder) == files(tmp_path / "alone")


class TestDefaultFolder:
    def test_follows_xdg(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert default_folder() == tmp_path / "recbole_llm" / "features"
        assert FeatureStore().folder == default_folder()

    @pytest.mark.parametrize(
        ("platform", "expected"),
        [("linux", ".cache"), ("darwin", "Library/Caches"), ("win32", "AppData/Local")],
    )
    def test_by_platform(self, monkeypatch, tmp_path, platform, expected):
        for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr("recbole_llm.content.cache_folder.sys.platform", platform)
        assert default_folder() == tmp_path / expected / "recbole_llm" / "features"
