"""A run that is killed, interrupted or damaged: what comes out is what would have come out, or an error that names the file."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import policy
import train
from data import InputError
from test_train import ROOT, metrics, run

FLAGS = ["--sft-steps", "6", "--steps", "6", "--batch-lists", "2", "--group-size", "2", "--eval-lists", "4", "--max-new-tokens", "12", "--save-every", "2",
         "--pl", "sample", "--kl-coef", "0.01", "--eval-samples", "2"]
REREC = ["--method", "rerec", "--sft-steps", "4", "--steps", "6", "--batch-lists", "4", "--group-size", "2", "--num-queries", "6", "--eval-lists", "6",
         "--max-new-tokens", "10", "--save-every", "2", "--kl-coef", "0.01", "--reward-weights", "0.01,0"]
KILLS = int(os.environ.get("R2RANK_KILLS", 5))  # 20 are tried by hand; each costs some seconds
# Imports once, then forks a child for every attempt and kills it after the seconds given, or when a path matching the pattern appears.
HARNESS = """
import glob, json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import train, eval as evaluation
for line in sys.stdin:
    flags, seconds, pattern = json.loads(line)
    pid = os.fork()
    if not pid:
        sys.argv = ["train.py", *flags]
        sys.stdout = open(os.devnull, "w")
        try:
            evaluation.run_main(train.main)
            os._exit(0)
        except SystemExit as error:
            os._exit(error.code if isinstance(error.code, int) else 1)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(3)
    deadline, ended, started = time.time() + seconds, None, time.time()
    while time.time() < deadline and not (pattern and glob.glob(pattern)):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            ended = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.003)
    if ended is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    print(json.dumps([ended, time.time() - started]), flush=True)
"""


@pytest.fixture(scope="module")
def harness():
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    process = subprocess.Popen([sys.executable, "-c", HARNESS, str(ROOT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"HF_HUB_OFFLINE": "1"})

    def attempt(flags, seconds=300, pattern=""):
        """-> (exit code, or None when it had to be killed; seconds)."""
        process.stdin.write(json.dumps([list(map(str, flags)), seconds, str(pattern)]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield attempt
    process.stdin.close()
    process.wait(timeout=30)


@pytest.fixture(scope="module")
def whole(harness, tmp_path_factory):
    """An uninterrupted run, and how long it took."""
    folder = tmp_path_factory.mktemp("whole") / "r"
    code, seconds = harness([*FLAGS, "--out", folder])
    assert code == 0
    return folder, seconds


def same(a, b):
    assert metrics(a) == metrics(b)
    one, two = (load_file(f / "checkpoint" / "model.safetensors") for f in (a, b))
    assert set(one) == set(two) and all(torch.equal(one[k], two[k]) for k in one)
    for name in ("score_head.safetensors", "curriculum.json"):
        assert (a / "checkpoint" / name).exists() == (b / "checkpoint" / name).exists()
        if (a / "checkpoint" / name).exists():
            assert (a / "checkpoint" / name).read_bytes() == (b / "checkpoint" / name).read_bytes()
    assert json.loads((a / "eval.json").read_text()) == json.loads((b / "eval.json").read_text())


@pytest.mark.parametrize("moments", ["any", "while saving", "any, ReRec"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(harness, whole, tmp_path, moments):
    folder, seconds = whole
    first = [*FLAGS]
    if "ReRec" in moments:
        first, folder = [*REREC], tmp_path / "whole"
        code, seconds = harness([*first, "--out", folder])
        assert code == 0
    rng, killed, chain = random.Random(moments), 0, 0
    while killed < KILLS:  # a chain of kills ends when the run gets through; then the next begins
        chain += 1
        assert chain <= 3 * KILLS
        out, code = tmp_path / f"r{chain}", None
        while code is None:
            begun = (out / "config.json").exists()
            flags = ["--resume", out] if begun else [*first, "--out", out]
            if "any" in moments:
                code, _ = harness(flags, 300 if killed >= KILLS else rng.uniform(0.05, 0.7) * seconds)
            else:
                patterns = ("states/*.tmp", "states/*.tmp/*.safetensors", "states/2-*", "checkpoint*", "reference*")
                code, _ = harness(flags, 300, "" if killed >= KILLS else out / rng.choice(patterns))
            killed += code is None
            assert code in (None, 0)
            if code is None and not (out / "config.json").exists():
                shutil.rmtree(out, ignore_errors=True)  # killed before the run had begun
        same(folder, out)
        assert not (out / "states").exists() and not list(out.rglob("*.tmp"))
        shutil.rmtree(out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_names_the_command(whole, tmp_path, number):
    out = tmp_path / "r"
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *FLAGS, "--save-every", "1000", "--sft-steps", "400", "--out", str(out)],
                               stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    deadline = time.time() + 120
    while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size > 500):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and f"python train.py --resume {out}" in printed
    (state,) = (out / "states").iterdir()
    steps = [r["step"] for r in metrics(out)]
    assert steps == list(range(1, len(steps) + 1)) and state.name == f"1-sft-{len(steps):06d}"


def unfinished(whole, tmp_path, harness, keep="1"):
    out = tmp_path / "r"
    code, _ = harness([*FLAGS, "--keep", keep, "--out", out], 300, out / "states/2-rl-000002/training.json")
    assert code is None
    return out


def test_what_resume_refuses_and_names(harness, whole, tmp_path):
    out = unfinished(whole, tmp_path, harness, "3")
    assert "--seed 0 -> 1" in run("train.py", "--resume", out, "--seed", 1, code=2).stderr
    assert "--lr" in run("train.py", "--resume", out, "--lr", 1, "--micro-batch", 7, code=2).stderr
    states = sorted((out / "states").iterdir())
    assert [s.name for s in states][-3:] == ["1-sft-000006", "2-rl-000000", "2-rl-000002"]  # killed before or after the oldest was deleted
    with pytest.raises(InputError, match="config.json"):
        train.resumed_flags(None, type("Args", (), {"resume": str(tmp_path)}))
    # a flipped bit, a cut file and a missing one; the state before it is still good
    for name, damage in (("model.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])), ("training.safetensors", lambda b: b[:-5]), ("training.json", None)):
        copy = shutil.copytree(out, tmp_path / f"copy-{name}")
        path = copy / "states" / states[-1].name / name
        path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
        message = run("train.py", "--resume", copy, code=2).stderr
        assert str(path) in message and "2-rl-000000" in message and message.count("\n") == 1
    shutil.rmtree(copy / "states" / states[-1].name)
    run("eval.py", "--run", copy, "--out", tmp_path / "eval.json")  # what has been learnt so far can be looked at
    assert "rl" in json.loads((tmp_path / "eval.json").read_text())["systems"]
    run("train.py", "--resume", copy, "--micro-batch", 80)
    same(whole[0], copy)
    assert not (copy / "states").exists()
    assert "nothing to resume" in run("train.py", "--resume", copy).stdout


def test_what_is_given_again_is_no_change_and_auto_stays_what_it_was(tmp_path, monkeypatch):
    """Lists that flags were parsed into; and the type of a run that was started where bfloat16 was the default."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--method", "rerec", "--reward-weights", "0,0.5", "--query-kinds", "explicit,implicit"])
    flags = vars(train.parse_flags())
    (tmp_path / "config.json").write_text(json.dumps({"flags": flags, "versions": {}, "dtype": "torch.bfloat16"}))
    for more in ([], ["--reward-weights", "0,0.5", "--query-kinds", "explicit,implicit"]):
        monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(tmp_path), *more])
        args = train.parse_flags()
        assert (args.reward_weights, args.query_kinds, args.dtype) == ([0, 0.5], ["explicit", "implicit"], "bfloat16")
    for more in (["--reward-weights", "0,0"], ["--query-kinds", "explicit"], ["--dtype", "float32"]):
        monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(tmp_path), *more])
        with pytest.raises(InputError, match=f"another run: {more[0]}"):
            train.parse_flags()


def test_a_vanished_or_read_only_run_directory_is_named(harness, whole, tmp_path):
    run_ = train.Run(tmp_path / "r", train.argparse.Namespace(save_every=1, keep=1))
    run_.model = run_.tokenizer = type("Saves", (torch.nn.Module,), {"save_pretrained": lambda self, folder, **kw: None})()
    run_.open_log()
    optimizer = train.Optimizer([{"params": [torch.nn.Parameter(torch.ones(2))], "lr": 1.0}])
    run_.save("rl", 1, optimizer)
    assert run_.newest_state().name == "2-rl-000001"
    shutil.rmtree(tmp_path / "r")
    with pytest.raises(InputError, match="2-rl-000002"):
        run_.save("rl", 2, optimizer)
    assert not (tmp_path / "r").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/r: cannot be written"):
        train.Run(tmp_path / "file" / "r", run_.args)


def test_a_full_disk_under_the_log_is_named(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    run_ = train.Run(tmp_path / "r", train.argparse.Namespace(save_every=1, keep=1))
    run_.file = open("/dev/full", "w")
    with pytest.raises(InputError, match="/dev/full.*No space left.*--resume"):
        run_.log("rl", 1, {"x": 1.0})


def test_a_damaged_checkpoint_is_named_wherever_it_is_opened(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "r")
    path = folder / "checkpoint" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    for flags in (["--run", folder], ["--model", folder / "checkpoint"]):
        message = run("eval.py", *flags, "--eval-lists", 2, cwd=tmp_path, code=2).stderr
        assert str(path) in message and "damaged" in message


def test_two_runs_in_one_directory_refuse_one_another(harness, tmp_path):
    args = train.argparse.Namespace(save_every=1, keep=1)
    first = train.Run(tmp_path / "r", args)
    with pytest.raises(InputError, match="another run"):
        train.Run(tmp_path / "r", args)
    first.lock.close()
    train.Run(tmp_path / "r", args).lock.close()


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    write = lambda text: lambda folder: (folder / "file").write_text(text)
    policy.save_directory(tmp_path / "c", write("first"))
    policy.verify_directory(tmp_path / "c")

    def full(folder):
        (folder / "file").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "file"))

    with pytest.raises(InputError, match="No space left.*c.tmp/file"):
        policy.save_directory(tmp_path / "c", full)
    policy.verify_directory(tmp_path / "c")
    assert (tmp_path / "c" / "file").read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["c"]
    policy.save_directory(tmp_path / "c", write("second"))
    assert (tmp_path / "c" / "file").read_text() == "second" and [p.name for p in tmp_path.iterdir()] == ["c"]
    with pytest.raises(InputError, match="cannot be saved"):
        policy.save_directory(tmp_path / "c" / "file" / "below", write("x"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_goes_on_where_it_was(dtype):
    def fresh():
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 8).to(dtype)
        return layer, train.Optimizer([{"params": list(layer.parameters()), "lr": 1e-2}])

    def step(layer, optimizer, n):
        (layer(torch.full((2, 8), float(n), dtype=dtype)).float()**2).sum().backward()
        optimizer.step()

    layer, optimizer = fresh()
    for n in range(3):
        step(layer, optimizer, n)
    other, resumed = fresh()
    other.load_state_dict(layer.state_dict())
    resumed.load({k: v.clone() for k, v in optimizer.tensors().items()})
    for n in range(3, 6):
        step(layer, optimizer, n)
        step(other, resumed, n)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters()))


# --- numbers and memory ----------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_changes_nothing():
    layer = torch.nn.Linear(4, 4)
    optimizer = train.Optimizer([{"params": list(layer.parameters()), "lr": 1.0}])
    before = [p.clone() for p in layer.parameters()]
    (layer(torch.ones(1, 4)).sum() * float("nan")).backward()
    assert not torch.isfinite(torch.tensor(optimizer.step()))
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters())) and all(p.grad is None for p in layer.parameters())


def test_three_bad_steps_in_a_row_stop_the_run(tmp_path):
    run_ = train.Run(tmp_path / "r", train.argparse.Namespace(save_every=1, keep=1))
    for finite in (False, False, True, False, False):
        run_.check_finite(finite, {"step": 1})
    with pytest.raises(InputError, match="bad-batch.json"):
        run_.check_finite(False, {"step": 7})
    assert json.loads((tmp_path / "r" / "bad-batch.json").read_text()) == {"step": 7}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_halves_once_then_says_what_to_lower(tmp_path, error):
    run_ = train.Run(tmp_path / "r", train.argparse.Namespace(save_every=1, keep=1, micro_batch=16, rollout_rows=320))
    tries = []

    def attempt(fail):
        tries.append((run_.args.micro_batch, run_.args.rollout_rows))
        if len(tries) <= fail:
            raise error
        return "done"

    assert train.with_room(run_, lambda: attempt(1)) == "done" and tries == [(16, 320), (8, 160)]
    tries.clear()
    with pytest.raises(InputError, match="Lower --micro-batch"):
        train.with_room(run_, lambda: attempt(9))
    with pytest.raises(RuntimeError, match="a real bug"):
        train.with_room(run_, lambda: (_ for _ in ()).throw(RuntimeError("a real bug")))


def test_an_update_that_ran_out_of_memory_half_way_counts_once(tmp_path):
    """Gradients of the failed attempt are forgotten: the step is the one of an attempt that succeeded at once."""
    def trained(fail):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 1)
        optimizer = train.Optimizer([{"params": list(layer.parameters()), "lr": 0.1}])
        failures = [fail]

        def update():
            optimizer.clear()
            layer(torch.ones(1, 4)).sum().backward()
            if failures.pop():
                failures.append(False)
                raise MemoryError
            layer(torch.full((1, 4), 2.0)).sum().backward()

        train.with_room(type("R", (), {"args": train.argparse.Namespace(micro_batch=2, rollout_rows=2)}), update)
        return layer.weight.grad.clone()

    assert torch.equal(trained(False), trained(True))
