"""Somebody who is not among the users is answered by a profile as a known user with that profile and no history is."""

import glob
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_export import F, WordEncoder, make_contents

import recbole_llm
from recbole_llm import cli
from recbole_llm.content.text import default_template
from recbole_llm.export.errors import ExportError
from recbole_llm.export.in_memory import export_in_memory
from recbole_llm.export.manifest import PICTURE_SCHEMA, PROFILE_SCHEMA, ItemText
from recbole_llm.export.profile_map import ProfileMap
from recbole_llm.export.reader import load_export
from recbole_llm.export.writer import write_artifact
from recbole_llm.profiles import recommend_profile, recommend_profiles
from recbole_llm.recommend import recommend_users
from recbole_llm.retrieval.recommender import Recommender, Request
from recbole_llm.serving.profiles import text_of_profile

FIELDS = ("age", "job")
SPEC = ItemText(FIELDS, default_template(FIELDS))
PEOPLE = [{"age": str(20 + u), "job": ("sea love", "war crime", "space")[u % 3]} for u in range(12)]


def made_map(seed=0, hidden=5):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    if not hidden:
        return ProfileMap(6, normal(F), normal(F, 4))
    return ProfileMap(6, normal(F), normal(hidden, 4), normal(F, F), normal(F, hidden), normal(hidden))


def made_contents(hidden=5, **changes):
    """The made export, whose users' parts are the map's of their profiles; user 0 has no history."""
    profile_map = made_map(hidden=hidden)
    texts = [f"Age: {person['age']}. Job: {person['job']}" for person in PEOPLE]
    vectors = WordEncoder().encode(texts)[0]
    contents = make_contents(user_part=True, profile_map=profile_map, profile_text=SPEC, **changes)
    part = np.stack([profile_map.apply(vector, 10) for vector in vectors])
    sizes = np.diff(contents.history_offsets)
    offsets = np.concatenate([[0, 0], np.cumsum(sizes[1:])])
    own = slice(sizes[0], None)
    return replace(
        contents, user_part=part, history_offsets=offsets, history_items=contents.history_items[own],
        history_weight=contents.history_weight[own],
    )  # fmt: skip


@pytest.mark.parametrize("hidden", [0, 5])
def test_the_map_is_the_towers(hidden):
    torch = pytest.importorskip("torch")
    profile_map = made_map(3, hidden)
    vector = np.random.default_rng(1).standard_normal(F).astype(np.float32)
    z = torch.from_numpy(vector - profile_map.center).double()
    if hidden:
        z = z @ torch.from_numpy(profile_map.transform).double() @ torch.from_numpy(profile_map.hidden).double()
        z = torch.nn.functional.gelu(z + torch.from_numpy(profile_map.hidden_bias).double())
    expected = np.concatenate([np.zeros(6), (z @ torch.from_numpy(profile_map.weight).double()).numpy(), np.zeros(2)])
    np.testing.assert_allclose(profile_map.apply(vector, 12), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scoring", ["dot", "cosine"])
def test_a_profile_is_answered_as_the_known_user_with_it(tmp_path, scoring):
    write_artifact(tmp_path / "export", made_contents(scoring=scoring))
    export = load_export(tmp_path / "export")
    recommender = Recommender(export)
    vector = WordEncoder().encode(["Age: 20. Job: sea love"])[0][0]
    known = recommender.recommend(Request(user="u0", k=40, explain=2))
    asked = recommender.recommend(Request(profile_vector=vector, k=40, explain=2))
    assert known.items == asked.items and len(known.items) == 40
    assert asked.source == "profile" and known.source == "history"
    other = recommender.recommend(Request(profile_vector=-vector, k=40))
    assert [item.id for item in other.items] != [item.id for item in known.items]


def test_only_exports_with_profiles_need_a_new_reader(tmp_path):
    with_map = write_artifact(tmp_path / "with", made_contents())
    without = write_artifact(tmp_path / "without", make_contents())
    assert with_map.min_reader == PROFILE_SCHEMA and without.min_reader < PICTURE_SCHEMA
    assert "profile_text" not in json.loads((tmp_path / "without" / "manifest.json").read_text())
    assert load_export(tmp_path / "with").manifest.profile_text == SPEC
    assert load_export(tmp_path / "without").profile_map is None


def test_a_map_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not among the 10"):
        write_artifact(tmp_path / "a", replace(made_contents(), profile_map=replace(made_map(), first=7)))
    with pytest.raises(ValueError, match="profile_text and profile_map"):
        write_artifact(tmp_path / "b", replace(made_contents(), profile_text=None))
    short = replace(made_map(), center=made_map().center[1:], transform=made_map().transform[1:])
    with pytest.raises(ExportError, match="the encoder gives another number"):
        write_artifact(tmp_path / "c", replace(made_contents(), profile_map=short))
    with pytest.raises(ValueError, match="hidden is float32"):
        replace(made_map(), transform=None, center=np.zeros(3, np.float32))


def test_the_service_answers_profiles(start, tmp_path):
    write_artifact(tmp_path / "people", made_contents())
    client = start(tmp_path / "people")
    known = client.ask(user="u0", k=7)
    for profile in ({"age": 20, "job": "sea love"}, {"job": " sea love", "age": "20"}, "Age: 20. Job: sea love"):
        asked = client.ask(profile=profile, k=7)
        assert asked["source"] == "profile"
        assert asked["items"] == known["items"]
    ruled = client.ask(profile={"job": "space"}, k=7, caps={"kind": 1}, exclude=[known["items"][0]["id"]])
    assert 0 < len(ruled["items"]) <= 4 and known["items"][0]["id"] not in [item["id"] for item in ruled["items"]]
    assert (
        "unknown column 'gender'; the text of a user is made of age, job."
        in client.ask(422, profile={"gender": "F"})["detail"]
    )
    assert "profile is empty" in client.ask(422, profile={"age": " "})["detail"]
    assert "user.profile" in client.ask(422, profile="a", user="u0")["detail"]
    batch = client.post(
        "/v1/recommend/batch",
        json={"requests": [{"profile": {"gender": "F"}}, {"user": "u0", "k": 7}, {"profile": PEOPLE[0], "k": 7}]},
    ).json()["results"]
    assert batch[0]["error"]["status"] == 422 and batch[1]["items"] == batch[2]["items"] == known["items"]


def test_what_is_missing_of_a_profile_is_empty():
    manifest = export_in_memory(made_contents()).manifest
    age = text_of_profile(manifest, {"age": 24})
    for profile in (
        {"age": 24.0, "job": None}, {"age": np.float32(24), "job": float("nan")}, {"age": np.int64(24), "job": " "},
    ):  # fmt: skip
        assert text_of_profile(manifest, profile) == age
    with pytest.raises(ValueError, match="profile is empty"):
        text_of_profile(manifest, {"age": float("nan"), "job": None})


def test_a_model_without_texts_of_users_refuses_profiles(start):
    client = start()
    told = client.ask(422, profile="likes the sea")["detail"]
    assert "no map for what is written about a user" in told and "user_tower: history+text" in told
    with pytest.raises(ValueError, match="user_tower: history"):
        recommend_profile(export_in_memory(make_contents()), "likes the sea")
    with pytest.raises(ValueError, match="single profile"):
        recommend_profiles(export_in_memory(made_contents()), PEOPLE[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hidden", [None, 12])
def test_a_trained_model_knows_a_stranger_by_the_profile_of_a_user(run_config, paths, tmp_path, capsys, hidden):
    pytest.importorskip("recbole")
    from recbole.quick_start import run_recbole

    from recbole_llm.checkpoints import load_trained
    from recbole_llm.export.export_model import contents_of

    settings = {
        "blocks": "learned",
        "user_tower": ["history", "text"],
        "adapter_hidden_size": hidden,
        "feature_transform": "whiten",
    }
    run_recbole("LLMTwoTower", "toy", config_dict={**run_config, **settings})
    (checkpoint,) = glob.glob(run_config["checkpoint_dir"] + "/*-[0-9][0-9].pth")
    model, dataset = load_trained(checkpoint, **paths)
    contents = contents_of(model, dataset)
    at = contents.user_ids.index("u5")
    first, last = contents.history_offsets[at : at + 2]
    offsets = contents.history_offsets.copy()
    offsets[at + 1 :] -= last - first
    lists = {
        name: None if (values := getattr(contents, name)) is None else np.delete(values, np.arange(first, last))
        for name in ("history_items", "history_weight", "history_rank")
    }
    write_artifact(tmp_path / "export", replace(contents, history_offsets=offsets, card="", **lists))
    _, *rows = (Path(run_config["data_path"]) / "toy" / "toy.user").read_text().splitlines()
    bio = dict(row.split("\t") for row in rows)["u5"]
    loaded = recbole_llm.load(tmp_path / "export", encoder=run_config["encoder"])
    known = list(recommend_users(loaded.export, ["u5"], k=48))
    frame = loaded.recommend(profiles=[{"bio": bio}, f"Bio: {bio}", "likes hay and a cow"], k=48)
    for name in ("profile 1", "profile 2"):
        asked = frame[frame.user == name]
        scores = dict(zip(asked.item, asked.score, strict=True))
        assert len(asked) == len(known)
        for row in known:
            assert scores[row.item] == pytest.approx(row.score, abs=2e-4)
    assert frame[frame.user == "profile 3"].item.tolist() != frame[frame.user == "profile 1"].item.tolist()
    capsys.readouterr()
    opened = ["recommend", str(tmp_path / "export"), "--encoder", run_config["encoder"]]
    assert cli.main([*opened, "--profile", f"bio={bio}", "--k", "3"]) == 0
    printed = capsys.readouterr().out
    assert all(row.title[:20] in printed for row in frame[frame.user == "profile 1"].head(3).itertuples())
    assert cli.main([*opened, "--profile", "bio=a", "age=3"]) != 0
    assert "unknown column 'age'" in capsys.readouterr().err
