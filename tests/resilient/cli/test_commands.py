"""`resilient ls | inspect | verify`: what they say, as text and as JSON, and the exit status that goes with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from resilient import cli
from resilient.cli import address, main
from storage.errors import StoreUnavailable
from storage.local import LocalStore
from storage.memory import MemoryStore
from tests.resilient.checkpoint.runs import commit_run
from tests.resilient.checkpoint.saved import VALUES, some_state, tensor, trained


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("pristine")
    commit_run(LocalStore(root), writers=2)
    return root


@pytest.fixture
def root(tmp_path, pristine):
    """A run of its own, whose path has an @ as some do."""
    return shutil.copytree(pristine, tmp_path / "me@host" / "run@7")


@pytest.fixture
def url(root):
    return f"{root}@newest"


@pytest.fixture
def answer(capsys):
    """Runs a command: (exit status, stdout, stderr), stdout parsed where --json was asked for."""

    def run(*argv):
        try:
            status = main(argv)
        except SystemExit as left:
            status = left.code
        out, err = capsys.readouterr()
        return status, json.loads(out) if "--json" in argv and out else out, err

    return run


def flip(path, at=20):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_ls_lists_what_is_committed(answer, root):
    status, text, _ = answer("ls", str(root))
    assert status == cli.GOOD
    lines = text.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "10", "20", "30", "3"]
    assert "loss=0.1" in lines[1]
    assert lines[-1].startswith("3 steps, newest 30")


def test_ls_answers_in_json(answer, root):
    status, body, _ = answer("ls", str(root), "--json")
    assert status == cli.GOOD
    assert body["damaged_log_entries"] == []
    step = body["steps"][1]
    state = some_state(20)
    assert step["step"] == 20
    assert step["tensors"] == len(state)
    assert step["raw_bytes"] == sum(item.bits.nbytes for item in state)
    assert step["ratio"] == round(step["raw_bytes"] / step["stored_bytes"], 4) > 1
    assert step["metrics"] == {"loss": 0.05}
    assert step["world_size"] == 2
    assert step["layout"] == {"shard": 2}
    assert step["problem"] is None
    assert set(step) == {
        "step", "generation", "wall_ns", "tier", "tensors", "raw_bytes", "stored_bytes", "ratio", "world_size",
        "layout", "metrics", "manifest", "problem",
    }  # fmt: skip


def test_ls_of_metrics_that_are_no_numbers_is_still_json(answer, tmp_path):
    commit_run(LocalStore(tmp_path / "nan"), (1,), state=lambda step: [], metrics=lambda step: {"loss": float("nan")})
    status, body, _ = answer("ls", str(tmp_path / "nan"), "--json")
    assert status == cli.GOOD
    assert body["steps"][0]["metrics"] == {"loss": "nan"}
    assert body["steps"][0]["ratio"] is None


def test_ls_goes_on_after_a_damaged_manifest(answer, root):
    _, body, _ = answer("ls", str(root), "--json")
    flip(root / body["steps"][1]["manifest"])
    status, body, _ = answer("ls", str(root), "--json")
    assert status == cli.BAD
    assert [bool(step["problem"]) for step in body["steps"]] == [False, True, False]
    status, text, _ = answer("ls", str(root))
    assert status == cli.BAD
    assert "DAMAGED" in text
    assert "1 damaged" in text.splitlines()[-1]


@pytest.mark.parametrize("command", ["ls", "inspect", "verify"])
def test_nothing_there_is_bad_news_and_leaves_nothing_behind(answer, tmp_path, command):
    status, out, err = answer(command, str(tmp_path / "none"))
    assert (status, out) == (cli.BAD, "")
    assert err.startswith("resilient: NoCheckpoint: ")
    assert list(tmp_path.iterdir()) == []
    _, _, err = answer(command, str(tmp_path / "none"), "--json")
    assert json.loads(err)["error"] == "NoCheckpoint"


def test_a_step_that_is_not_there_names_those_that_are_near(answer, root):
    status, _, err = answer("inspect", f"{root}@21")
    assert status == cli.BAD
    assert "step 21 is not committed" in err
    assert "10, 20, 30" in err


def test_a_path_that_ends_like_a_step_is_explained(answer, root):
    status, _, err = answer("verify", str(root))
    assert status == cli.BAD
    assert f"write it as {root}@newest" in err


def test_inspect_shows_the_tree(answer, url):
    status, text, _ = answer("inspect", url)
    assert status == cli.GOOD
    lines = text.splitlines()
    assert lines[0].startswith("step 30  generation 1")
    model = next(line for line in lines if line.startswith("model/"))
    assert "kB" in model
    weight = next(line for line in lines if line.startswith("  weight"))
    assert weight.split()[1:3] == ["float32", "96×65"]
    assert any(line.startswith("  scalar") and " scalar " in line for line in lines)
    assert any(line.startswith("rng") and '"ränk 1"' in line for line in lines)
    assert lines[-1].startswith(f"{len(some_state(0))} tensors, {len(VALUES)} values")


def test_inspect_answers_in_json(answer, root):
    status, body, _ = answer("inspect", f"{root}@10", "--json")
    assert status == cli.GOOD
    state = {item.info.name: item for item in some_state(10)}
    assert [item["name"] for item in body["tensors"]] == sorted(state)
    for item in body["tensors"]:
        info = state[item["name"]].info
        assert (item["dtype"], tuple(item["shape"]), item["raw_bytes"]) == (info.dtype, info.shape, info.nbytes)
    by_name = {item["name"]: item for item in body["tensors"]}
    assert by_name["model/zero"]["codecs"] == ["fill"]
    assert by_name["model/weight"]["ratio"] > 1.1
    assert by_name["model/weight"]["chunks"] == 2
    assert {(item["name"], item["rank"]): item["encoded"].encode() for item in body["values"]} == VALUES
    assert body["torch"] == "2.13.0"


def test_inspect_takes_a_pattern(answer, url):
    status, body, _ = answer("inspect", url, "--json", "--pattern", "model/*")
    assert status == cli.GOOD
    assert {item["name"].split("/")[0] for item in body["tensors"]} == {"model"}
    assert body["values"] == []
    _, text, _ = answer("inspect", url, "--pattern", "every/u*")
    assert text.splitlines()[-1].startswith(f"4 of {len(some_state(0))} tensors, 0 values")


def test_inspect_of_a_damaged_index_is_bad_news(answer, root):
    index = next(root.glob("data/*/*30/*/n00001.index"))
    flip(index)
    status, out, err = answer("inspect", f"{root}@30")
    assert (status, out) == (cli.BAD, "")
    assert err.startswith("resilient: CheckpointDamaged: ")
    assert str(index) in err
    assert answer("inspect", f"{root}@20")[0] == cli.GOOD


def test_names_cannot_command_the_terminal(answer, tmp_path):
    state = [tensor("evil\x1b[2J[red]/w", "float32", trained(np.random.default_rng(0), (4, 4)))]
    values = {("v\x07", None): '"\x9b2J"'.encode()}
    commit_run(LocalStore(tmp_path / "evil"), (1,), state=lambda step: state, values=values)
    status, text, _ = answer("inspect", str(tmp_path / "evil"))
    assert status == cli.GOOD
    assert not any(char in text for char in "\x1b\x07\x9b")
    assert "evil\\x1b[2J[red]/" in text


@pytest.mark.parametrize("options", [(), ("--deep",), ("--all",), ("--all", "--deep", "--threads", "1")])
def test_verify_of_a_whole_checkpoint_is_good(answer, url, options):
    status, text, _ = answer("verify", url, *options)
    assert status == cli.GOOD
    lines = text.splitlines()
    assert [line.split()[1] for line in lines] == (["10", "20", "30"] if "--all" in options else ["30"])
    assert all(line.endswith("valid") for line in lines)


def test_verify_finds_a_flipped_bit_only_when_it_reads(answer, root):
    part = next(root.glob("data/*/*20/*/n00000.00000"))
    flip(part, 5000)
    assert answer("verify", f"{root}@20")[0] == cli.GOOD
    status, body, _ = answer("verify", f"{root}@20", "--deep", "--json")
    assert status == cli.BAD
    assert body["verdict"] == body["steps"][0]["verdict"] == "invalid"
    (finding,) = body["steps"][0]["findings"]
    assert finding["where"] == str(part)
    assert "hashes to" in finding["what"]
    status, text, _ = answer("verify", f"{root}@newest", "--all", "--deep")
    assert status == cli.BAD
    assert [line.split()[-1] for line in text.splitlines() if line.startswith("step")] == ["valid", "damaged", "valid"]
    assert answer("verify", f"{root}@30", "--deep", "--json")[1]["verdict"] == "valid"


def test_a_damaged_log_entry_is_bad_news_for_ls_and_verify(answer, root):
    flip(root / "log" / f"{3:020d}", 60)
    status, body, _ = answer("ls", str(root), "--json")
    assert status == cli.BAD
    assert body["damaged_log_entries"] == [3]
    assert [step["step"] for step in body["steps"]] == [10, 30]
    assert "log entry 3 is damaged" in answer("ls", str(root))[1]
    status, text, _ = answer("verify", f"{root}@newest")
    assert status == cli.BAD
    assert "log entry 3 is damaged" in text


def test_a_store_that_does_not_answer_is_unknown(answer, root, monkeypatch):
    class Silent(MemoryStore):
        def get(self, key, *, max_bytes=None):
            raise StoreUnavailable("timed out", where=key)

    monkeypatch.setattr(address, "open_store", lambda url, options: Silent("silent"))
    for command in ("ls", "inspect", "verify"):
        status, out, err = answer(command, str(root))
        assert (status, out) == (cli.UNKNOWN, "")
        assert "StoreUnavailable" in err


@pytest.mark.parametrize(
    "argv", [(), ("nonsense",), ("ls",), ("ls", "x", "--pattern", "y"), ("verify", "x", "--threads", "two")]
)
def test_wrong_usage_is_2_and_says_what_to_do(answer, argv):
    status, out, err = answer(*argv)
    assert (status, out) == (cli.USAGE, "")
    assert "--help" in err


def test_a_wrong_store_option_is_wrong_usage(answer, url):
    status, _, err = answer("ls", url, "--storage-option", "hunter2")
    assert status == cli.USAGE
    assert "hunter2" not in err


def test_store_options_reach_the_store(answer, monkeypatch):
    given = []
    monkeypatch.setattr(address, "open_store", lambda url, options: given.append((url, options)) or MemoryStore("x"))
    answer("inspect", "s3://bucket/run@5", "--storage-option", "key=k", "--storage-option", "anon:=false")
    assert given == [("s3://bucket/run", {"key": "k", "anon": False})]


def test_a_defect_is_one_line_unless_the_traceback_is_asked_for(answer, url, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(address, "open_store", broken)
    status, _, err = answer("ls", url)
    assert status == cli.UNKNOWN
    assert len(err.splitlines()) == 1
    assert "ZeroDivisionError: oops" in err
    monkeypatch.setenv("RESILIENT_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["ls", url])


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_teaches_by_example(answer, command):
    status, text, _ = answer(command, "--help")
    assert status == 0
    assert f"resilient {command} " in text
    assert "--json" in text


def test_as_a_process_it_starts_without_torch_and_survives_a_closed_pipe(url):
    environment = {**os.environ, "COLUMNS": "80"}
    code = (
        "import sys; from resilient.cli import main\n"
        f"status = main(['inspect', {url!r}]); assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run(
        f"{sys.executable} -c \"$CODE\" | head -1", shell=True, env={**environment, "CODE": code}, timeout=60,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("step 30")
    assert done.stderr == ""
