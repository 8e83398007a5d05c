"""Hub names: cached files need no network, and unavailable ones are refused after one request."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading

import pytest

from modality_integration.app import hub
from modality_integration.app.errors import InputError

NAME, COMMIT = "owner/tiny-llava", "0123456789abcdef0123456789abcdef01234567"
FIND = """
import sys
from modality_integration.app import hub
from modality_integration.app.errors import InputError
try:
    print(hub.find("model", *sys.argv[1:]))
except InputError as error:
    print(error)
"""
LOAD = """
import json, sys, torch
from modality_integration.app import loading
from modality_integration.app.errors import InputError
said = []
for arguments in json.loads(sys.argv[1]):
    try:
        said.append(loading.load(device=torch.device("cpu"), **arguments).notes)
    except InputError as error:
        said.append(str(error))
print(json.dumps(said))
"""


class Listener:
    """A local port that counts connections and answers each with `answer`, or never.

    huggingface_hub also fetches a list before the first request of a day.
    """

    def __init__(self, answer=None):
        self.connections, self.answer, self.kept = 0, answer, []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:  # closed
                return
            self.connections += 1
            self.kept.append(connection)
            if self.answer is not None:
                connection.recv(65536)
                connection.sendall(self.answer)
                connection.close()

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.socket.close()
        for connection in self.kept:
            connection.close()


def answer(status, **headers):
    lines = [f"HTTP/1.1 {status} x", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items()), "Content-Length: 0"]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode()


def run(code, home, *arguments, **environment):
    # Only variables of an ordinary shell: others make huggingface_hub send more requests.
    kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if key in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**kept, "HOME": str(home), "HF_HOME": str(home), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def home(folders, tmp_path):
    """A hub home with the tiny model in its cache, as left by a download."""
    model = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    shutil.copytree(folders / "model", model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    return tmp_path


@pytest.mark.parametrize("variable", ["HF_ENDPOINT", "HTTP_PROXY"])
def test_where_nothing_listens_a_name_is_refused_at_once(tmp_path, variable):
    environment = {"HF_ENDPOINT": "http://hub.invalid", variable: closed_port()}
    said = run(FIND, tmp_path, NAME, **environment)
    assert said.startswith(
        f"model: {NAME} is not a local folder, the hub's cache ({tmp_path}/hub) does not contain it, and http"
    )
    assert "cannot be reached (Connection refused); offline, pass the folder where it was saved" in said


@pytest.mark.parametrize("variable", ["HF_ENDPOINT", "HTTP_PROXY"])
def test_where_nobody_answers_it_is_asked_once(tmp_path, variable):
    with Listener() as silent:
        environment = {"HF_ENDPOINT": "http://hub.invalid", variable: silent.url, "HF_HUB_ETAG_TIMEOUT": "1"}
        said = run(FIND, tmp_path, NAME, **environment)
        assert (
            "cannot be reached (no answer within 1 seconds; to wait longer, set HF_HUB_ETAG_TIMEOUT in seconds)" in said
        )
        assert 1 <= silent.connections <= 2


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (
            answer(200, X_Repo_Commit=COMMIT, ETag='"1"'),
            f"Source(name='{NAME}', folder=None, revision='v1', note=None)",
        ),
        (answer(404, X_Error_Code="EntryNotFound"), f"Source(name='{NAME}', folder=None, revision='v1', note=None)"),
        (answer(404, X_Error_Code="RepoNotFound"), "not a local folder, and the hub has no model of that name"),
        (answer(401, X_Error_Code="GatedRepo"), "is gated; accept its terms on the hub, then run `hf auth login`"),
        (answer(404, X_Error_Code="RevisionNotFound"), f"revision: {NAME} has no branch, tag or commit 'v1'"),
        (answer(503), "cannot be reached (it answered with status 503)"),
    ],
    ids=["found", "no config.json", "no model", "gated", "no revision", "unavailable"],
)
def test_what_the_hub_answers_decides_and_it_is_asked_once(tmp_path, reply, said):
    with Listener(reply) as listener:
        assert said in run(FIND, tmp_path, NAME, "v1", HF_ENDPOINT=listener.url)
        assert 1 <= listener.connections <= 2


@pytest.mark.parametrize("offline", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_by_choice_asks_nobody(tmp_path, offline):
    with Listener() as listener:
        said = run(FIND, tmp_path, NAME, HF_ENDPOINT=listener.url, **{offline: "1"})
        assert "cannot be reached (HF_HUB_OFFLINE is set)" in said
        assert listener.connections == 0


def test_what_is_cached_is_loaded_without_the_hub_and_a_commit_without_asking(folders, home, tmp_path):
    bare = shutil.copytree(folders / "model", tmp_path / "bare")
    (bare / "processor_config.json").unlink()
    with Listener() as silent:
        wanted = [
            {"name": NAME, "revision": COMMIT},
            {"name": str(bare), "processor": NAME, "revision": COMMIT},
            {"name": NAME, "processor": NAME, "revision": COMMIT},
        ]
        notes = json.loads(run(LOAD, home, json.dumps(wanted), HF_ENDPOINT=silent.url))
        assert notes == [[], [f"using the processor of {NAME}"], [f"using the processor of {NAME}"]]
        assert silent.connections == 0
    wanted = [
        {"name": NAME},
        {"name": str(folders / "model"), "processor": NAME},
        {"name": NAME, "revision": "v2"},
    ]
    cached, processor, other = json.loads(run(LOAD, home, json.dumps(wanted), HF_ENDPOINT=closed_port()))
    assert cached == [f"{NAME} was read from the hub's cache (commit {COMMIT[:8]}): Connection refused"]
    assert processor == [f"using the processor of {NAME}", *cached]
    assert "does not contain it at revision v2" in other


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./gone", "./gone does not exist"),
        ("a/b/c", "a/b/c does not exist"),
        ("a model", "'a model' is neither a local folder nor a valid hub name"),
        ("owner/a..b", "nor a valid hub name"),
    ],
)
def test_what_is_neither_a_folder_nor_a_name_is_refused_without_asking(monkeypatch, name, said):
    monkeypatch.setattr(hub, "_why_unreachable", lambda *a: pytest.fail("the hub was asked"))
    with pytest.raises(InputError, match=said):
        hub.find("model", name)
