"""Every command that a command proposes with "next:" runs as it is printed, the service included."""

import json
import os
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from ports import free_port
from toy_data import write_dataset
from waiting import LIMIT, wait_until

pytest.importorskip("recbole")
pytest.importorskip("pyarrow", reason="the extra 'import'")
pytest.importorskip("matplotlib", reason="the extra 'report'")
pytest.importorskip("uvicorn", reason="the extra 'serve'")
pytest.importorskip("fastapi", reason="the extra 'serve'")
pytest.importorskip("orjson", reason="the extra 'serve'")

from recbole_llm import cli

QUICK = "gpu_id: ''\nepochs: 2\nembedding_size: 8\n"


def proposed(out):
    """The proposals of an output, each a list of commands."""
    lines = [line.removeprefix("next: ") for line in out.splitlines() if line.startswith("next: ")]
    assert lines
    return [[shlex.split(command) for command in line.split(" && ")] for line in lines]


@pytest.fixture
def run(capfd):
    """Runs a command as it was printed; gives what it proposes."""

    def begin(command):
        assert command[0] == "recbole-llm"
        assert cli.main(command[1:]) == 0, capfd.readouterr().err
        return capfd.readouterr().out

    return begin


@pytest.fixture
def served():
    """Starts a ``serve`` command as it was printed, on a port that is free; ends it."""
    running = []

    def begin(command):
        assert command[:2] == ["recbole-llm", "serve"]
        port = free_port()
        line = [sys.executable, "-m", "recbole_llm", *command[1:], "--port", str(port)]
        path = os.pathsep.join([os.getcwd(), *sys.path])
        running.append(subprocess.Popen(line, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE))
        return f"http://127.0.0.1:{port}"

    yield begin
    for process in running:
        process.terminate()
        process.communicate(timeout=LIMIT)


def found(url, text):
    """The answer to a text, once the service gives one."""

    def ask():
        body = json.dumps({"text": text, "k": 3}).encode()
        request = urllib.request.Request(f"{url}/v1/recommend", body, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=LIMIT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            told = error.read().decode()
            assert error.code == 503 and "--encoder" not in told, told  # still loading
        except urllib.error.URLError:
            pass  # not yet listening
        return None

    return wait_until(ask, "the service answers a text")


@pytest.fixture
def shop(tmp_path, monkeypatch, tiny_encoder):
    """Tables of a shop in the working directory, and the YAML lines that make a run quick."""
    monkeypatch.chdir(tmp_path)
    folder = write_dataset(tmp_path / "made")
    for name, columns in (("inter", "customer,item,rating,time"), ("item", "item,title,year")):
        header, *rows = (folder / "toy" / f"toy.{name}").read_text().splitlines()
        assert header.count("\t") == columns.count(",")
        Path(f"{name}.csv").write_text("\n".join([columns, *(row.replace("\t", ",") for row in rows)]) + "\n")
    return f"{QUICK}encoder: {tiny_encoder}\nfeature_cache_dir: {tmp_path / 'my features'}\n"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_from_the_import_to_the_service(shop, run, served):
    ((training,),) = proposed(run(["recbole-llm", "import", "inter.csv", "--items", "item.csv", "--dataset", "toy"]))
    settings = Path(training[training.index("--config-files") + 1])
    settings.write_text(settings.read_text() + shop)
    Path("export").mkdir()  # there is one already, which must stay
    (report,), (recommend,), (export, serve) = proposed(run(training))
    assert [each[1] for each in (report, recommend, export, serve)] == ["report", "recommend", "export", "serve"]
    assert export[export.index("--output") + 1] == serve[2] == "export-2" and "--bundle-encoder" in export
    run(report)
    assert "Of 100 held-out ratings" in Path("report.html").read_text()
    assert len(run(recommend).splitlines()) == 12
    assert [[serve]] == proposed(run(export))
    answer = found(served(serve), "rocket to the moon")
    assert answer["source"] == "text" and len(answer["items"]) == 3
    # once more on all rows, and its proposals
    (recommend,), (export, serve) = proposed(run(["recbole-llm", "fit", "saved", *given_again(export)]))
    assert serve == ["recbole-llm", "serve", "export-3"]
    run(recommend)
    run(export)


def given_again(command):
    return [each for each in command if each.startswith(("--data-path=", "--encoder=", "--feature-cache-dir="))]


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_that_is_a_function_is_named_where_the_export_is_served(shop, run, served, monkeypatch, tmp_path):
    Path("spelling.py").write_text(
        "import numpy as np\n"
        "def encode(texts):\n"
        "    return np.array([[text.count(c) for c in 'aehilmnorst'] for text in texts], np.float32)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    options = ["--data-path=made", "--encoder=spelling:encode", "--gpu_id=", "--epochs=2", "--embedding-size=8"]
    out = run(["recbole-llm", "run", "--dataset", "toy", *options, f"--feature-cache-dir={tmp_path / 'features'}"])
    export, serve = proposed(out)[-1]
    assert "--bundle-encoder" not in export and serve[2:] == ["export", "--encoder", "spelling:encode"]
    assert [[serve]] == proposed(run(export))
    assert found(served(serve), "rocket")["source"] == "text"


@pytest.mark.filterwarnings("ignore")
def test_vectors_from_a_file_need_no_encoder(shop, run):
    import numpy as np

    np.save("vectors.npy", np.random.default_rng(0).normal(size=(48, 6)).astype("float32"))
    Path("vectors.ids.txt").write_text("".join(f"i{n}\n" for n in range(48)))
    options = ["--data-path=made", "--item-features-file=vectors.npy", "--gpu_id=", "--epochs=2", "--embedding-size=8"]
    export, serve = proposed(run(["recbole-llm", "run", "--dataset", "toy", *options]))[-1]
    assert "--bundle-encoder" not in export and serve == ["recbole-llm", "serve", "export"]
    assert [[serve]] == proposed(run(export))


@pytest.mark.filterwarnings("ignore")
def test_a_split(shop, run):
    ((training,),) = proposed(run(["recbole-llm", "split", "toy", "--data-path", "made", "--output", "toy-cold"]))
    settings = Path(training[training.index("--config-files") + 1])
    settings.write_text(settings.read_text() + shop)
    assert "Of 100 held-out" in run(training)
