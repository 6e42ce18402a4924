"""How a service is set up: limits, keys, places. Plain data that passes to worker processes as JSON."""

import hashlib
import hmac
import ipaddress
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

SCOPES = ("read", "write")
KEYS_VARIABLE = "RECBOLE_LLM_API_KEYS"
MIN_KEY_CHARACTERS = 16
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """Bounds of what one request, and all together, may cost; those of fields are in ``schemas.py``.

    Attributes:
        body_bytes: of a request.
        batch_body_bytes: of a batch request.
        body_seconds: until a body must have arrived.
        queue: most requests being scored or waiting for it.
        encode_queue: most texts waiting to be encoded.
        max_batch: most requests scored together.
        request_seconds: until a read must be answered.
        write_seconds: until a change must be encoded.
        requests_per_second: per key, or per address without keys; 0 for no bound.
        burst: requests that may come at once.
    """

    body_bytes: int = 1 << 20
    batch_body_bytes: int = 8 << 20
    body_seconds: float = 10.0
    queue: int = 256
    encode_queue: int = 64
    max_batch: int = 64
    request_seconds: float = 2.0
    write_seconds: float = 60.0
    requests_per_second: float = 0.0
    burst: int = 100


@dataclass(frozen=True)
class Key:
    """An API key, known by its hash: ``read``, or ``write``, which includes reading."""

    scope: str
    sha256: str


@dataclass(frozen=True)
class Settings:
    """Everything ``serve`` was told.

    Attributes:
        export: an export, a link to one, or a folder of exports of which the newest is served.
        state: folder or ``postgresql://`` address of the log of changes; ``None``: forgotten with the process.
        keys: accepted keys; empty: none needed.
        allowed_hosts: names in the Host header that are answered; ``*`` for any.
        cors_origins: origins whose pages may call.
        read_only: refuse changes.
        search: where items are searched: ``memory``, ``postgres`` (pgvector in the database of ``state``), or the address of
            a Qdrant server.
        watch: load an export that appears.
        verify: compare checksums when loading.
        encoder: whether texts can be encoded.
        encoders: folders or names on the hub that exports without an encoder of their own may load.
        metrics_need_key: whether /metrics needs a key.
        access_log: one JSON line a request.
        poll_seconds: how often changes by other processes are looked for.
        limits: bounds.
    """

    export: str
    state: str | None = None
    keys: tuple[Key, ...] = ()
    allowed_hosts: tuple[str, ...] = LOOPBACK_HOSTS
    cors_origins: tuple[str, ...] = ()
    read_only: bool = False
    search: str = "memory"
    watch: bool = False
    verify: bool = True
    encoder: bool = True
    encoders: tuple[str, ...] = ()
    metrics_need_key: bool = False
    access_log: bool = False
    poll_seconds: float = 0.2
    limits: Limits = field(default_factory=Limits)

    def to_json(self) -> str:
        """As text for a worker's environment; keys are hashes."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Settings":
        """The reverse of :meth:`to_json`."""
        raw = json.loads(text)
        raw["keys"] = tuple(Key(**key) for key in raw["keys"])
        raw["limits"] = Limits(**raw["limits"])
        for name in ("allowed_hosts", "cors_origins", "encoders"):
            raw[name] = tuple(raw[name])
        return Settings(**raw)

    def scope_of(self, key: str) -> str | None:
        """The scope of a presented key, ``None`` if it is wrong; takes the same time for every wrong key."""
        presented = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
        found = None
        for known in self.keys:
            if hmac.compare_digest(presented, known.sha256):
                found = known.scope
        return found


def read_keys(file: str | None) -> tuple[Key, ...]:
    """Keys of a file, or of the environment variable ``RECBOLE_LLM_API_KEYS``: ``scope:key`` a line.

    Raises:
        ValueError: on a line of another form, or a key that is too short to be secret.
    """
    if file is not None:
        source, text = f"api-key-file {file!r}", Path(file).read_text(encoding="utf-8")
    else:
        source, text = KEYS_VARIABLE, os.environ.get(KEYS_VARIABLE, "")
    keys = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        scope, colon, key = line.strip().partition(":")
        if not colon or scope not in SCOPES or len(key) < MIN_KEY_CHARACTERS:
            raise ValueError(
                f"{source}, line {number}: expected read:KEY or write:KEY with a key of at least "
                f"{MIN_KEY_CHARACTERS} characters, such as one from 'openssl rand -hex 24'."
            )
        keys.append(Key(scope, hashlib.sha256(key.encode()).hexdigest()))
    if file is not None and not keys:
        raise ValueError(f"{source} holds no key.")
    return tuple(keys)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
