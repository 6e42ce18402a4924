"""How a service is set up: limits, keys, places. Plain data that passes to worker processes as JSON."""

import hashlib
import hmac
import ipaddress
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

SCOPES = ("read", "write")
KEYS_VARIABLE = "RECBOLE_LLM_API_KEYS"
STATE_VARIABLE = "RECBOLE_LLM_STATE"
MIN_KEY_CHARACTERS = 16
# every key that a README of this project ever showed: known to everybody
PUBLIC_KEYS = frozenset({"at-least-16-characters"})
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """Bounds of what one request, and all together, may cost; those of fields are in ``schemas.py``.

    Attributes:
        body_bytes: of a request.
        batch_body_bytes: of a batch request.
        body_seconds: until a body must have arrived.
        bodies_bytes: of all large bodies together, and of what they are parsed to.
        queue: most requests being scored or waiting for it.
        writes: most changes under way.
        encode_queue: most texts waiting to be encoded.
        image_bytes: of a picture.
        image_queue: most pictures waiting to be decoded and encoded.
        max_batch: most requests scored together.
        request_seconds: until a read must be answered.
        batch_seconds: until a batch of reads must be answered.
        write_seconds: until a change must be encoded.
        requests_per_second: per key, or per address without keys; 0 for no bound.
        burst: requests that may come at once.
        connections: most open ones; more may ask for /health only.
        connections_per_address: most of one peer; 0 for half of ``connections``.
        head_seconds: until the head of a request must have arrived.
        answer_seconds: until a client must have taken an answer.
        answers_bytes: of all answers together that clients have not taken yet.
    """

    body_bytes: int = 1 << 20
    batch_body_bytes: int = 8 << 20
    body_seconds: float = 10.0
    bodies_bytes: int = 96 << 20
    queue: int = 256
    writes: int = 64
    encode_queue: int = 64
    image_bytes: int = 5 << 20
    image_queue: int = 16
    max_batch: int = 64
    request_seconds: float = 2.0
    batch_seconds: float = 8.0
    write_seconds: float = 60.0
    requests_per_second: float = 0.0
    burst: int = 100
    connections: int = 1000
    connections_per_address: int = 0
    head_seconds: float = 10.0
    answer_seconds: float = 30.0
    answers_bytes: int = 64 << 20


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
        trusted_proxies: addresses and networks whose X-Forwarded-For is believed; empty: nobody's.
        read_only: refuse changes.
        search: where items are searched: ``memory``, ``postgres`` (pgvector in the database of ``state``), or the address of
            a Qdrant server.
        watch: load an export that appears.
        verify: compare checksums when loading.
        mapped: map the export's files instead of reading them into memory.
        encoder: whether texts can be encoded.
        encoders: folders or names on the hub that exports without an encoder of their own may load.
        image_encoders: encoders of pictures that exports may load; none is in an export.
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
    trusted_proxies: tuple[str, ...] = ()
    read_only: bool = False
    search: str = "memory"
    watch: bool = False
    verify: bool = True
    mapped: bool = False
    encoder: bool = True
    encoders: tuple[str, ...] = ()
    image_encoders: tuple[str, ...] = ()
    metrics_need_key: bool = False
    access_log: bool = False
    poll_seconds: float = 0.2
    limits: Limits = field(default_factory=Limits)

    def to_json(self) -> str:
        """Write the settings as text for a worker's environment; keys are hashes."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Settings":
        """Reverse :meth:`to_json`."""
        raw = json.loads(text)
        raw["keys"] = tuple(Key(**key) for key in raw["keys"])
        raw["limits"] = Limits(**raw["limits"])
        for name in ("allowed_hosts", "cors_origins", "encoders", "image_encoders", "trusted_proxies"):
            raw[name] = tuple(raw[name])
        return Settings(**raw)

    @property
    def item_bytes(self) -> int:
        """Most bytes of a request that adds or changes one item: with a picture as base64, where pictures are taken."""
        return self.limits.body_bytes + (self.limits.image_bytes * 4 // 3 + 4 if self.image_encoders else 0)

    def scope_of(self, key: bytes) -> str | None:
        """Return the scope of a presented key, ``None`` if it is wrong, in the same time for every wrong key.

        Args:
            key: the header's bytes. Keys are stored as UTF-8; a browser sends the characters up to ``ÿ`` as Latin-1.
        """
        spellings = [key] if key.isascii() else [key, key.decode("latin-1").encode()]
        presented = [hashlib.sha256(one).hexdigest() for one in spellings]
        found = None
        for known in self.keys:
            for one in presented:
                if hmac.compare_digest(one, known.sha256):
                    found = known.scope
        return found


def read_keys(file: str | None) -> tuple[Key, ...]:
    """Read keys from a file, or from the environment variable ``RECBOLE_LLM_API_KEYS``: ``scope:key`` a line.

    Raises:
        ValueError: on a line of another form, a key that is too short to be secret, or one that a README shows.
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
        if key in PUBLIC_KEYS:
            raise ValueError(
                f"{source}, line {number}: {key!r} is the example of the README, which everybody knows. Make a key of your "
                "own, such as with 'openssl rand -hex 24'."
            )
        keys.append(Key(scope, hashlib.sha256(key.encode()).hexdigest()))
    if file is not None and not keys:
        raise ValueError(f"{source} holds no key.")
    return tuple(keys)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the address.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("0.0.0.0")
        (True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def proxies_of(addresses: Sequence[str]) -> tuple[str, ...]:
    """Check the addresses of ``--trusted-proxy``.

    Raises:
        ValueError: on what is neither an address nor a network.
    """
    for address in addresses:
        try:
            ipaddress.ip_network(address)
        except ValueError as error:
            raise ValueError(
                f"--trusted-proxy is {address!r} ({error}); expected an address such as 10.0.0.2, or a network such as "
                "10.0.0.0/24."
            ) from None
    return tuple(dict.fromkeys(addresses))


def state_of(given: str | None, password_file: str | None) -> str | None:
    """Return the place of the log of changes, with the password from where it is kept.

    Args:
        given: of ``--state``; ``None`` for the environment variable ``RECBOLE_LLM_STATE``, if it is set.
        password_file: a file that holds the database's password and nothing else.

    Raises:
        ValueError: if the file is empty, or the state is no database without a password.
    """
    state = given or os.environ.get(STATE_VARIABLE) or None
    if password_file is None:
        return state
    parts = urlsplit(state or "")
    if parts.scheme not in ("postgresql", "postgres") or parts.password is not None:
        raise ValueError(
            f"--state-password-file {password_file!r} needs a state postgresql://USER@HOST/DATABASE without a password."
        )
    password = Path(password_file).read_text(encoding="utf-8").rstrip("\r\n")
    if not password:
        raise ValueError(f"--state-password-file {password_file!r} is empty.")
    user, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))
