"""Small runs of train.py, for the tests: in this process, or forked, several at once and killed at will."""

import contextlib
import functools
import importlib
import io
import json
import multiprocessing.forkserver
import os
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from extras import toy
from extras.flags import parse_train_flags, run_main

ROOT = Path(__file__).parent.parent
BASE = ["--sft-steps", "3", "--steps", "3", "--batch-lists", "2", "--group-size", "2", "--eval-lists", "4",
        "--num-candidates", "6", "--max-new-tokens", "12", "--save-every", "2"]
SMALL = [*BASE, "--warmup-steps", "2"]
METHODS = {"r2rank": [*SMALL, "--eval-samples", "1"],
           # without LightGCN, which takes seconds
           "rerec": [*BASE, "--method", "rerec", "--num-queries", "6", "--reward-weights", "0.01,0"]}
SHOP = functools.cache(toy.shop)  # half a second each time

def main(*flags, parse=parse_train_flags, run=train.main):
    """train.py, or another command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "shop", SHOP)
        run(parse([str(f) for f in flags]))

def run_train(*flags, command=main):
    """Returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        command(*flags)
    return out.getvalue()

def run_with_states(out, *flags):
    """The same; returns what it printed, and copies of the directory at each of its states."""
    states = {}

    def save_aside(run, stage, step, optimizer, save=train.Run.save):
        save(run, stage, step, optimizer)
        states[stage, step] = shutil.copytree(out, out.with_name(f"{out.name}-{stage}-{step}"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Run, "save", save_aside)
        return run_train(*flags, "--out", out), states

RUNS = {}  # the small run of each method, made once

def small_run(method, factory):
    if method not in RUNS:
        folder = factory.mktemp(method) / "r"
        printed, states = run_with_states(folder, *METHODS[method])
        RUNS[method] = SimpleNamespace(folder=folder, printed=printed, states=states)
    return RUNS[method]

@pytest.fixture(params=METHODS)
def small(request, tmp_path_factory):
    return small_run(request.param, tmp_path_factory)

def metrics(folder):
    """The rows of metrics.jsonl, without the times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]

def same(a, b):
    """Both runs left the same, to the last bit; only times may differ."""
    assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()} and metrics(a) == metrics(b)
    for path in [a / "eval.json", a / "rationales.json", *(a / "checkpoint").iterdir()]:
        if path.name != "tokenizer_config.json":  # transformers notes there where it came from
            assert path.read_bytes() == (b / path.relative_to(a)).read_bytes(), path

def refusal(capsys, *flags, command=main):
    """The one error line of a command that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: command(*flags))
    assert ended.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    return line

def child(function, arguments, log, rank, **variables):
    """In a process of its own: module.function(*arguments), as train.py would run it."""
    os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}/{rank}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    module, name = function.split(".")
    run_main(lambda: getattr(importlib.import_module(module), name)(*arguments))

@pytest.fixture(scope="session")
def fork(tmp_path_factory):
    """fork(function, *arguments, ...): exit codes of `world` processes, and what they wrote.

    Those of `ranks` are killed after `seconds`, or once the file `pattern` is there. They are forked from a
    server that has imported prepared.py, so a process costs no seconds.
    """
    log, context = tmp_path_factory.mktemp("log"), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["prepared"])
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1",
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()
    first = context.Process(target=os.getpid)
    first.start()
    first.join()  # now the server is ready

    def run(function, *arguments, world=1, ranks=(), seconds=300, pattern=""):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            meeting = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(s.getsockname()[1])}
        processes = [context.Process(target=child, args=(function, arguments, log, rank), kwargs=meeting)
                     for rank in range(world)]
        begun = time.time()
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            over = time.time() - begun
            if over > seconds or pattern and os.path.exists(pattern):
                for rank in ranks:
                    processes[rank].kill()
            if over > 300:  # a safety net
                for process in processes:
                    process.kill()
            time.sleep(0.002)
        wrote = [[(log / f"{n}.{name}").read_text() for name in ("out", "err")] for n in range(world)]
        return [process.exitcode for process in processes], wrote

    return run
