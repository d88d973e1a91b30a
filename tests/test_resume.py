"""A run that is killed, interrupted or damaged goes on as if it had not been, or one line says why not."""

import contextlib
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data
from extras import queries, report
from extras.flags import parse_train_flags
from runs import METHODS, ROOT, SMALL, fork, refusal, run_train, same, small_run  # noqa: F401

MORE = {"r2rank": ["--pl", "sample", "--kl-coef", "0.1", "--eval-samples", "2"],
        "rerec": ["--kl-coef", "0.1", "--group-size", "3", "--dtype", "bfloat16"]}
KILLS = int(os.environ.get("R2RANK_KILLS", 2))  # of each kind; 20 are tried by hand

def moment(rng, kind, out, seconds):
    """When to kill a run: at any time, or when a file that is not there yet begins to be written."""
    if kind == "at any time":
        return {"seconds": rng.uniform(0.05, 0.8) * seconds}
    names = ("state.tmp", "reference.pt", "checkpoint.tmp", "eval.json")
    return {"pattern": out / rng.choice([n for n in names if not (out / n).exists()])}

@pytest.mark.parametrize("method, kind", [("r2rank", "while saving"), ("rerec", "at any time")])
def test_a_killed_run_goes_on_as_if_it_had_not_been(fork, tmp_path, method, kind):
    flags, begun = [*METHODS[method], *MORE[method]], time.time()
    codes, printed = fork("runs.main", *flags, "--out", tmp_path / "whole")
    assert codes == [0], printed
    rng, seconds, kills = random.Random(f"{method} {kind}"), time.time() - begun, 0
    for chain in range(5 * KILLS):  # a chain of kills ends when the run gets through
        out, codes = tmp_path / f"r{chain}", [-9]
        while codes == [-9]:
            given = ["--resume", out]
            if not (out / "state.pt").exists():
                shutil.rmtree(out, ignore_errors=True)
                given = [*flags, "--out", out]
            when = {"ranks": [0]} | moment(rng, kind, out, seconds) if kills < KILLS else {}
            codes, printed = fork("runs.main", *given, **when)
            kills += codes == [-9]
        assert codes == [0], printed
        same(tmp_path / "whole", out)
        if kills >= KILLS:
            break
    assert kills, "no run could be killed"

@pytest.mark.parametrize("state", [("sft", 2), ("rl", 0), ("rl", 2)])
@pytest.mark.parametrize("method", METHODS)
def test_each_state_leads_to_the_same_end(tmp_path, tmp_path_factory, method, state):
    """Also where steps after it have been logged already."""
    run = small_run(method, tmp_path_factory)
    out = shutil.copytree(run.states[state], tmp_path / "r")
    with open(out / "metrics.jsonl", "a") as f:
        f.write('{"stage": "rl", "step": 4}\n{"sta')
    saved = torch.load(out / "state.pt", weights_only=True)
    torch.save(saved | {"seconds": saved["seconds"] + 5000}, out / "state.pt")
    assert re.search(r"\b5\d\d\d s in all", run_train("--resume", out))
    same(run.folder, out)

def test_a_run_stopped_between_two_changes_of_its_files_goes_on(tmp_path, tmp_path_factory):
    """At its end, when checkpoint and reports are written: before the first change, before the second, ..."""
    class Killed(Exception):
        pass

    run = small_run("r2rank", tmp_path_factory)
    for number in itertools.count():
        out, turn = shutil.copytree(run.states["rl", 3], tmp_path / f"r{number}"), itertools.count(-number)
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            for module, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree"), (Path, "unlink"),
                                 (report, "write_result")):
                def stopping(*args, original=getattr(module, name), **settings):
                    if next(turn) == 0:
                        raise Killed
                    return original(*args, **settings)

                patch.setattr(module, name, stopping)
            run_train("--resume", out)
        if (out / "state.pt").exists():
            run_train("--resume", out)
        same(run.folder, out)
        if next(turn) <= 0:  # it was not stopped any more
            break
    assert number > 2

def test_who_stops_a_run_reads_how_to_go_on(tmp_path):
    """By SIGTERM, as clusters do. From the command line the directory is the first free one."""
    command, out = [sys.executable, ROOT / "train.py", *SMALL, "--sft-steps", "4000"], "runs/toy-tiny-2"
    (tmp_path / "runs/toy-tiny").mkdir(parents=True)
    process = subprocess.Popen(command, cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / out / "state.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.terminate()
    printed, error = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in error
    assert f"python train.py --resume {out}\n" in printed

@pytest.fixture
def state(tmp_path, tmp_path_factory):
    def copy(method="r2rank"):
        return shutil.copytree(small_run(method, tmp_path_factory).states["rl", 2], tmp_path / "r")
    return copy

def test_flags_of_another_run_are_refused(state, capsys):
    out = state("rerec")
    assert "--seed 0 -> 1" in refusal(capsys, "--resume", out, "--seed", 1)
    for flag, value in (("--lr", 1), ("--reward-weights", "0,0"), ("--query-kinds", "explicit")):
        assert f"another run: {flag}" in refusal(capsys, "--resume", out, flag, value)
    recorded, again, changed = (vars(parse_train_flags(["--resume", str(out), *more])) for more in (
        [], METHODS["rerec"], ["--micro-batch", "7"]))
    assert recorded["reward_weights"] == {"query_alignment": 0.01, "preference_alignment": 0.0}
    assert again == recorded and changed == recorded | {"micro_batch": 7}

@pytest.mark.parametrize("method, change", [
    ("rerec", "training"), ("r2rank", "history"), ("r2rank", "title"), ("rerec", "words")])
def test_other_data_are_refused(state, capsys, monkeypatch, method, change):
    """The same users, but other purchases in training or before a test; another title or request."""
    shop, out, draw = data.load("toy"), state(method), queries.QueryBuilder.draw
    items, sequences = dict(shop.items), dict(shop.sequences)
    if change == "title":
        items = {i: replace(item, title=f"New {item.title}") for i, item in items.items()}
    elif change == "words":
        monkeypatch.setattr(queries.QueryBuilder, "draw", lambda *a, **k: [
            replace(q, text=f"{q.text}!") for q in draw(*a, **k)])
    else:
        users = {user for user, _ in shop.splits["train" if change == "training" else "test"]}
        sequences |= {u: [*sequences[u][:-1][::-1], sequences[u][-1]] for u in users}
    other = replace(shop, items=items, sequences=sequences)
    monkeypatch.setattr(data, "load", lambda *_: other)
    assert "not those that the run began with" in refusal(capsys, "--resume", out)

def test_a_damaged_state_is_named(state, capsys, tmp_path_factory):
    out = state()
    whole = (out / "state.pt").read_bytes()
    for damaged in (whole[:-1000], b"", b"not a state\n" * 100):
        (out / "state.pt").write_bytes(damaged)
        assert f"{out}/state.pt: cannot be read" in refusal(capsys, "--resume", out)
    (out / "state.pt").unlink()
    assert "no state.pt" in refusal(capsys, "--resume", out)
    assert "has finished" in refusal(capsys, "--resume", small_run("r2rank", tmp_path_factory).folder)
