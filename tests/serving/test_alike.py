"""Explanations name the modality in which two items are alike, where there are several."""

from dataclasses import replace

import numpy as np
import pytest
from made_export import make_contents

from recbole_llm.export.in_memory import export_in_memory
from recbole_llm.loaded import LoadedModel
from recbole_llm.retrieval.alike import alike
from recbole_llm.retrieval.recommender import Recommender
from recbole_llm.retrieval.request import Request


@pytest.fixture
def made():
    """An export with two modalities of which some items lack one, and the same with texts alone."""
    contents = make_contents()
    rng = np.random.default_rng(0)
    content = {}
    for at, name in enumerate(("text", "image")):
        table = rng.standard_normal((len(contents.item_ids), 5)).astype(np.float32)
        table /= np.linalg.norm(table, axis=1, keepdims=True)
        table[at::3] = 0.0
        content[name] = table
    both = export_in_memory(replace(contents, content=content))
    return both, export_in_memory(replace(contents, content={"text": content["text"]}))


def test_reasons_hold_the_cosine_of_each_modality_that_both_have(made):
    both, alone = made
    row_of = {item: row for row, item in enumerate(both.item_ids)}
    request = Request(user=both.user_ids[0], k=5, explain=4)
    (answer, plain), checked = (Recommender(export).recommend(request) for export in (both, alone)), set()
    assert [item.id for item in answer.items] == [item.id for item in plain.items]
    for item, same in zip(answer.items, plain.items, strict=True):
        assert [r.contribution for r in item.reasons] == [r.contribution for r in same.reasons]
        assert all(not reason.alike for reason in same.reasons), "one modality needs no name"
        for reason in item.reasons:
            rows = row_of[item.id], row_of[reason.id]
            expected = {
                name: pytest.approx(float(np.dot(*table[list(rows)].astype(float))), abs=1e-4)
                for name, table in both.content.items()
                if table[list(rows)].any(1).all()
            }
            assert dict(reason.alike) == expected
            checked.add(tuple(sorted(expected)))
    assert len(checked) > 1


def test_answers_over_http_hold_them_too(made):
    pytest.importorskip("orjson", reason="extra 'serve'")
    from recbole_llm.serving.responses import recommendation_content

    for export in made:
        answer = Recommender(export).recommend(Request(user=export.user_ids[0], k=5, explain=4))
        for item, told in zip(answer.items, recommendation_content(answer)["items"], strict=True):
            assert [reason.get("alike", {}) for reason in told["reasons"]] == [dict(r.alike) for r in item.reasons]
            assert all("alike" not in reason for reason in told["reasons"]) or len(export.content) > 1


def test_an_explanation_in_a_program_has_a_column_of_each(made):
    both, alone = made
    user, item = both.user_ids[0], both.item_ids[2]
    table, plain = (LoadedModel(export).explain(item, user=user) for export in (both, alone))
    assert list(plain.columns) == ["item", "title", "contribution"]
    assert list(table.columns)[3:] == ["alike_text", "alike_image"]
    assert table[list(plain.columns)].equals(plain)
    row_of = {each: row for row, each in enumerate(both.item_ids)}
    for name in ("text", "image"):
        tables = both.content[name].astype(float)
        for other, value in zip(table.item[:-2], table[f"alike_{name}"][:-2], strict=True):
            pair = tables[[row_of[item], row_of[other]]]
            if pair.any(1).all():
                assert value == pytest.approx(float(pair[0] @ pair[1]), abs=1e-4)
            else:
                assert np.isnan(value)
        assert table[f"alike_{name}"][-2:].isna().all()


def test_items_added_since_have_no_content(made):
    content = made[0].content
    assert alike(content, len(content["text"]), [0, 1]) == [{}, {}]
    assert alike(content, 2, [len(content["text"]) + 3]) == [{}]
