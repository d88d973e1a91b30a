"""Small runs of train.py, for the tests: in this process, or forked, several at once and killed at will.

Run as a script, this file imports torch once and then forks, so that a process costs no seconds. Each line of
its input is a job: a function of a test module, its arguments, in how many processes, and which are killed.
"""

import contextlib
import functools
import importlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest

import policy
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

def start(job, rank):
    """Fork one process of a job: module.function(*arguments), as train.py would run it. Returns its id."""
    if pid := os.fork():
        return pid
    if job.world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job.world),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job.port))
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{job.log}/{rank}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    code = 3
    try:
        module, name = job.function.split(".")
        run_main(lambda: getattr(importlib.import_module(module), name)(*job.arguments))
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

def watch(job, pids):
    """Their exit codes. Those in job.ranks are killed after job.seconds, or once job.pattern is there."""
    codes, begun = {}, time.time()
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        over, chosen = time.time() - begun, []
        if over > job.seconds or job.pattern and os.path.exists(job.pattern):
            chosen = [pids[rank] for rank in job.ranks]
        if over > 300:  # a safety net
            chosen = pids
        for pid in set(chosen) - set(codes):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return [codes[pid] for pid in pids]

@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """fork(function, *arguments, ...): exit codes of `world` processes, and what they wrote."""
    log = tmp_path_factory.mktemp("log")
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, env=os.environ | settings)
    assert process.stdout.readline() == "ready\n"

    def run(function, *arguments, world=1, ranks=(), seconds=300, pattern=""):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        job = {"function": function, "arguments": list(map(str, arguments)), "world": world, "port": port,
               "ranks": list(ranks), "seconds": seconds, "pattern": str(pattern), "log": str(log)}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        codes = json.loads(process.stdout.readline())
        return codes, [[(log / f"{n}.{name}").read_text() for name in ("out", "err")] for n in range(world)]

    yield run
    process.communicate(timeout=300)

if __name__ == "__main__":
    importlib.import_module("runs").SHOP(0)  # the processes find it made, and transformers imported
    policy.load("tiny", texts=["a b"])
    print("ready", flush=True)
    for line in sys.stdin:
        given = SimpleNamespace(**json.loads(line))
        print(json.dumps(watch(given, [start(given, rank) for rank in range(given.world)])), flush=True)
