"""A user's history and the attributes that filters can ask for: objects and routes."""

import numpy as np
from made_export import make_contents

from recbole_llm.export.in_memory import export_in_memory
from recbole_llm.retrieval.filters import AttributeIndex
from recbole_llm.retrieval.item_catalog import Catalog
from recbole_llm.retrieval.users import Users


def made(**changes):
    export = export_in_memory(make_contents(**changes))
    return export, Users(export, Catalog(export))


def test_a_user_of_that_id_and_the_history_as_it_is_kept():
    export, users = made()
    row = int(np.argmax(np.diff(export.history_offsets)))
    held = export.history_items[slice(*export.history_offsets[row : row + 2])].tolist()
    state = users.find(f"u{row}", 1000)
    assert state.interactions == len(held) > 1 and not state.ordered
    assert state.items == tuple((f"i{item}", f"Title {item}") for item in held)
    assert users.find(f"u{row}", 1).items == state.items[:1]
    assert users.find(f"u{row}", 0).items == ()
    assert users.find("nobody", 5) is None


def test_the_newest_come_first_where_the_order_is_known():
    contents = make_contents()
    n = len(contents.history_items)
    rank = np.random.default_rng(1).permutation(n).astype(np.float32)
    export, users = made(history_rank=rank, history_decay=2.0)
    row = int(np.argmax(np.diff(export.history_offsets)))
    span = slice(*export.history_offsets[row : row + 2])
    order = np.argsort(rank[span])
    assert [item for item, _ in users.find(f"u{row}", 50).items] == [f"i{i}" for i in export.history_items[span][order]]


def test_leading_zeros_that_a_spreadsheet_dropped():
    ids = ["000505", "0017", "17", "0018", "00018", "x"] + [f"u{i}" for i in range(6)]
    _, users = made(user_ids=ids)
    assert users.find("505", 1).id == "000505"
    assert users.find("0000505", 1).id == "000505"
    assert users.find("17", 1).id == "17" and users.find("0017", 1).id == "0017"  # exact ones first
    assert users.find("18", 1) is None  # two could be meant
    assert users.find("0x", 1).id == "x"


def test_the_summary_of_attributes():
    rows = [
        {"genre": ["a", "b"], "year": 3.0, "kind": "x"},
        {"genre": ["b"], "kind": "y"},
        {"year": -1.5, "kind": "y"},
        {},
    ]
    index = AttributeIndex({"genre": "tokens", "year": "number", "kind": "token", "none": "number"}, rows)
    assert index.summary(10) == {
        "genre": {"kind": "tokens", "values": [("b", 2), ("a", 1)]},
        "year": {"kind": "number", "least": -1.5, "largest": 3.0},
        "kind": {"kind": "token", "values": [("y", 2), ("x", 1)]},
        "none": {"kind": "number", "least": None, "largest": None},
    }
    assert index.summary(1)["genre"]["values"] == [("b", 2)]


def test_the_routes(client):
    answer = client.get("/v1/users", params={"id": "u3", "limit": 2}).json()
    (user,) = answer["users"]
    assert user["id"] == "u3" and len(user["items"]) == min(2, user["interactions"])
    assert answer["model"] == client.service.export_id
    assert client.get("/v1/users", params={"id": "nobody"}).json()["users"] == []
    assert client.get("/v1/users", params={"id": "u3", "limit": 1001}).status_code == 422
    assert client.get("/v1/users").status_code == 422
    attributes = client.get("/v1/attributes").json()["attributes"]
    assert attributes["year"] == {"kind": "number", "least": 1980.0, "largest": 2019.0}
    assert sum(n for _, n in attributes["kind"]["values"]) == 40
