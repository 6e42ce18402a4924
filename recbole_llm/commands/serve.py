"""``recbole-llm serve``: options, and a server with worker processes."""

import argparse
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from recbole_llm.export.manifest import read_manifest
from recbole_llm.serving.change_log import ChangeLogError
from recbole_llm.serving.connections import RESERVE
from recbole_llm.serving.load_and_swap import find_export
from recbole_llm.serving.open_log import open_change_log
from recbole_llm.serving.settings import LOOPBACK_HOSTS, Limits, Settings, is_loopback, proxies_of, read_keys, state_of

EXTRA = "the service needs FastAPI and uvicorn: pip install -e '.[serve]' in the checkout."
ACCEPTED_A_TURN = 16  # connections
OTHER_FILES = 200  # that a process opens beside its connections
STOP_SECONDS = 10
KEEP_ALIVE_SECONDS = 5

log = logging.getLogger("recbole_llm.serving")


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``recbole-llm serve``."""
    limits = Limits()
    parser.add_argument(
        "export", metavar="DIR", help="an export, a link to one, or a folder of exports (newest served)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; beyond this machine it needs a key")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes; each holds the export, with --map once for all"
    )
    parser.add_argument(
        "--state",
        default=None,
        metavar="DIR|URL",
        help="log of changes: a folder, or postgresql://...; default $RECBOLE_LLM_STATE, then DIR.state",
    )
    parser.add_argument(
        "--state-password-file",
        default=None,
        metavar="FILE",
        help="file with the password of --state's database, which the command line would show to everybody",
    )
    parser.add_argument(
        "--search",
        default="memory",
        metavar="WHERE",
        help="memory; postgres: pgvector in the database of --state; or the address of a Qdrant server",
    )
    parser.add_argument("--read-only", action="store_true", help="refuse changes")
    parser.add_argument("--watch", action="store_true", help="load an export that appears")
    parser.add_argument("--api-key-file", default=None, metavar="FILE", help="lines read:KEY or write:KEY")
    parser.add_argument("--no-auth", action="store_true", help="allow listening beyond this machine without a key")
    parser.add_argument("--metrics-auth", action="store_true", help="/metrics needs a key too")
    parser.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="host name to answer; * for any"
    )
    parser.add_argument("--cors-origin", action="append", default=[], metavar="URL", help="origin whose pages may call")
    parser.add_argument(
        "--trusted-proxy",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="address or network of a proxy in front, whose X-Forwarded-For names the client; may be repeated",
    )
    parser.add_argument(
        "--map",
        action="store_true",
        help="map the export's files instead of reading them: --workers share the pages, and a file that is overwritten "
        "changes answers, one that is cut off ends the process",
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare checksums when loading")
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="NAME",
        help="folder, hub name or module:function of the text encoder, where the export does not hold it; may be repeated",
    )
    texts.add_argument("--no-encoder", action="store_true", help="do not load the text encoder")
    parser.add_argument(
        "--image-encoder",
        action="append",
        default=[],
        metavar="NAME",
        help="folder, hub name, onnx:FILE or module:function of the encoder of pictures, which no export holds; may be repeated",
    )
    parser.add_argument("--no-access-log", action="store_true", help="write no line for each request")
    parser.add_argument("--queue", type=int, default=limits.queue, help="requests that may wait; more get 503 at once")
    parser.add_argument(
        "--rate",
        type=float,
        default=0.0,
        metavar="N",
        help="requests per second and key, or address without keys and with wrong ones; 0: any",
    )
    parser.add_argument(
        "--limit-concurrency", type=int, default=limits.connections, help="open connections; more may ask for /health"
    )
    parser.add_argument(
        "--limit-per-address",
        type=int,
        default=0,
        metavar="N",
        help="open connections of one address, but for trusted proxies; 0: half of --limit-concurrency",
    )


def settings_of(options: argparse.Namespace) -> Settings:
    """Read the settings off the command's options.

    Raises:
        ValueError: on options that do not go together, or an export that is not there.
    """
    find_export(options.export)
    for name in ("workers", "queue", "limit_concurrency"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; expected at least 1.")
    for name in ("rate", "limit_per_address"):
        if not getattr(options, name) >= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; expected at least 0.")
    keys = read_keys(options.api_key_file)
    if not is_loopback(options.host) and not keys and not options.no_auth:
        raise ValueError(
            f"--host {options.host} can be reached from other machines, and no key is set: give --api-key-file FILE "
            "(lines read:KEY and write:KEY), or --no-auth where something in front of it checks who asks."
        )
    state = state_of(options.state, options.state_password_file)
    if state is None and not options.read_only:
        folder = Path(options.export)
        state = str(
            folder.with_name(f"{folder.resolve().name if folder.name in ('', '.', '..') else folder.name}.state")
        )
    elif state is not None and "://" not in state:
        state = str(Path(state).resolve())
    if options.workers > 1 and state is None:
        raise ValueError("--workers needs a log that they share: give --state, or leave --read-only out.")
    if options.search == "postgres" and not (state or "").startswith(("postgresql://", "postgres://")):
        raise ValueError(
            "--search postgres needs --state postgresql://USER:PASSWORD@HOST/DATABASE, where the vectors go."
        )
    if options.search not in ("memory", "postgres") and not options.search.startswith(("http://", "https://")):
        raise ValueError(
            f"--search is {options.search!r}; expected memory, postgres, or the http:// address of Qdrant."
        )
    hosts = tuple(dict.fromkeys([*LOOPBACK_HOSTS, *options.allowed_host]))
    if not is_loopback(options.host):
        hosts = ("*",) if options.host in ("0.0.0.0", "::") and not options.allowed_host else (*hosts, options.host)
    return Settings(
        export=options.export,
        state=state,
        keys=keys,
        allowed_hosts=hosts,
        cors_origins=tuple(options.cors_origin),
        trusted_proxies=proxies_of(options.trusted_proxy),
        read_only=options.read_only,
        search=options.search,
        watch=options.watch,
        verify=not options.no_verify,
        mapped=options.map,
        encoder=not options.no_encoder,
        encoders=tuple(dict.fromkeys(options.encoder)),
        image_encoders=tuple(dict.fromkeys(options.image_encoder)),
        metrics_need_key=options.metrics_auth,
        access_log=not options.no_access_log,
        limits=Limits(
            queue=options.queue,
            requests_per_second=options.rate,
            connections=options.limit_concurrency,
            connections_per_address=options.limit_per_address,
        ),
    )


def _open_files_for(connections: int) -> int:
    """Let this process and its workers open as many files as the connections need; returns how many connections they allow."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + RESERVE + OTHER_FILES
    if hard == resource.RLIM_INFINITY or wanted <= hard:
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return connections
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    fits = hard - RESERVE - OTHER_FILES
    if fits < 1:
        raise ValueError(f"This process may open {hard} files (ulimit -n); --limit-concurrency needs {wanted}.")
    log.warning(
        "--limit-concurrency %d is cut to %d: this process may open %d files (ulimit -n)", connections, fits, hard
    )
    return fits


def run_serve(options: argparse.Namespace) -> int:
    """Run ``recbole-llm serve`` until it is stopped.

    Raises:
        ValueError: as :func:`settings_of`, or where the extra is not installed.
    """
    try:
        import uvicorn

        from recbole_llm.serving.app import SETTINGS_VARIABLE
        from recbole_llm.serving.protocol import MAX_HEAD_BYTES, ServeProtocol
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; {EXTRA}") from error
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.limit_concurrency = _open_files_for(options.limit_concurrency)
    settings = settings_of(options)
    manifest = read_manifest(find_export(settings.export))  # a mistake is one line, and no worker's traceback
    _check_log(settings)
    if (
        options.state is not None
        and _without_password(options.state) != options.state
        and urlsplit(options.state).password
    ):
        log.warning(
            "The password of --state can be read in the list of processes; --state-password-file and $RECBOLE_LLM_STATE hide it"
        )
    # one thread each: workers and batches are what uses the cores
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ[SETTINGS_VARIABLE] = settings.to_json()
    log.info(
        "recbole-llm serves %s on http://%s:%d (%s)",
        options.export,
        options.host,
        options.port,
        "read-only" if settings.read_only else f"changes in {_without_password(settings.state)}",
    )
    for line in (manifest.rows_known, *manifest.never_shown):
        log.info("%s", line)
    arguments: dict[str, Any] = {
        "app": "recbole_llm.serving.app:app_from_environment",
        "factory": True,
        "host": options.host,
        "port": options.port,
        "access_log": False,
        "log_level": "warning",
        "server_header": False,
        "http": ServeProtocol,
        "h11_max_incomplete_event_size": MAX_HEAD_BYTES,
        "proxy_headers": bool(settings.trusted_proxies),
        "forwarded_allow_ips": list(settings.trusted_proxies),
        "timeout_keep_alive": KEEP_ALIVE_SECONDS,
        "timeout_graceful_shutdown": STOP_SECONDS,
        "ws": "none",
    }
    if options.workers > 1:
        uvicorn.run(**arguments, workers=options.workers)
        return 0
    return _run_alone(uvicorn.Config(**arguments, workers=1))


def _run_alone(config: Any) -> int:
    """Run one process as ``uvicorn.run`` does, with several handles on the listening socket.

    uvloop takes one new connection from each handle in a turn of its loop: a hundred at once would keep the next one waiting
    for a hundred turns.
    """
    import uvicorn

    server = uvicorn.Server(config)
    listening = config.bind_socket()
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listening, *(listening.dup() for _ in range(ACCEPTED_A_TURN - 1))])
    return 0 if server.started else 3


def _check_log(settings: Settings) -> None:
    """Open the log once before any worker does: a mistake is one line, and the tables are made by one process."""
    try:
        open_change_log(settings.state).close()
    except ChangeLogError as error:
        raise ValueError(f"state {_without_password(settings.state)}: {error}") from error


def _without_password(state: str | None) -> str:
    if state is None:
        return "memory"
    head, at, tail = state.rpartition("@")
    return f"{head.split('://')[0]}://...@{tail}" if at and "://" in head else state
