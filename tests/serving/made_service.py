"""A service on the made export, in process; imported by the tests of its routes."""

import hashlib

import pytest
from made_export import WordEncoder

pytest.importorskip("fastapi", reason="extra 'serve'")
pytest.importorskip("orjson", reason="extra 'serve'")
pytest.importorskip("httpx", reason="extra 'test'")
from starlette.testclient import TestClient
from waiting import LIMIT

from recbole_llm.serving.settings import Key

READ, WRITE = "r" * 20, "w" * 20


def make_encoder(folder, manifest):
    return WordEncoder()


def key(scope, text):
    return Key(scope, hashlib.sha256(text.encode()).hexdigest())


class Client(TestClient):
    def ask(self, status=200, **body):
        answer = self.post("/v1/recommend", json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    @property
    def service(self):
        return self.app.state.service

    def wait_for_encoder(self):
        assert self.service.text.wait(LIMIT)
        return self


def is_problem(answer, status):
    body = answer.json()
    assert answer.status_code == status == body["status"], answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert body["title"] and body["detail"] and answer.headers["x-request-id"]
    return body["detail"]
