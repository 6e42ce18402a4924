"""``recbole-llm encode``: what it says for items, users and vectors from a file, and where there is nothing to do."""

import numpy as np
import pytest

pytest.importorskip("recbole")

from recbole_llm import cli


@pytest.fixture
def encode(toy_path, tiny_encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def go(*more, dataset="toy"):
        given = [f"--data_path={toy_path}", f"--feature_cache_dir={tmp_path / 'features'}"]
        if "--encoder=" not in more:
            given.append(f"--encoder={tiny_encoder}")
        code = cli.main(["encode", "--dataset", dataset, *given, "--gpu_id=", "--show_progress=False", *more])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return go


@pytest.mark.filterwarnings("ignore")
def test_items_and_users(encode):
    assert encode()[:2] == (0, "items: 43 of 44 have a text vector of 32 dimensions\n")
    code, out, _ = encode("--user_tower=history+text", "--encoder_dim=8")
    assert code == 0 and out.splitlines() == [
        "items: 43 of 44 have a text vector of 8 dimensions",
        "users: 60 of 60 have a text vector of 8 dimensions",
    ]


@pytest.mark.filterwarnings("ignore")
def test_vectors_from_a_file_are_counted(encode, tmp_path):
    np.save(tmp_path / "mine.npy", np.eye(6, dtype=np.float32))
    (tmp_path / "mine.ids.txt").write_text("".join(f"i{n}\n" for n in range(6)))
    code, out, _ = encode(f"--item_features_file={tmp_path / 'mine.npy'}")
    assert (code, out) == (0, "items: 6 of 44 have a text vector of 6 dimensions\n")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("more", "dataset", "message"),
    [
        (["--encoder="], "toy", "nothing to encode"),
        ([], "nowhere", "no nowhere.inter in"),
        (["--item_text_fields=plot"], "toy", "plot"),
        (["--encoder_overflow=drop"], "toy", "encoder_overflow must be one of truncate"),
        (["--encoder=another"], "toy", "--encoder is given twice"),
        (["--encoder_dim=64"], "toy", "encoder_dim must be between 1 and 32"),
    ],
)
def test_mistakes_are_one_line(encode, more, dataset, message):
    code, out, err = encode(*more, dataset=dataset)
    assert code == 2 and out == ""
    assert message in err and "Traceback" not in err
