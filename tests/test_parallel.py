"""Several processes: the numbers of one, whatever falls to each; none waits for ever; what stops one stops all."""

import collections
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import eval as evaluation
import policy
import train
from data import InputError
from test_resume import same
from test_train import ROOT, metrics

R2RANK = ["--sft-steps", "3", "--sft-lists", "3", "--steps", "3", "--batch-lists", "3", "--group-size", "2", "--num-candidates", "6", "--eval-lists", "3",
          "--max-new-tokens", "12", "--save-every", "2", "--kl-coef", "0.1", "--ppo-epochs", "2", "--warmup-steps", "1"]
REREC = ["--method", "rerec", "--sft-steps", "2", "--sft-lists", "3", "--steps", "4", "--batch-lists", "4", "--num-queries", "5", "--group-size", "3",
         "--num-candidates", "8", "--eval-lists", "3", "--max-new-tokens", "24", "--save-every", "2", "--kl-coef", "0.1", "--reward-weights", "0.01,0"]
# Imports once, then forks N children for every line: what torchrun does, without its seconds, and without its ending those that are
# left when one has failed. The line may name ranks to signal once a path matching a pattern is there.
HARNESS = """
import functools, glob, json, os, sys, time, traceback
sys.path[:0] = sys.argv[1:]
import data, policy, train, test_parallel, eval as evaluation
data.toy = functools.cache(data.toy)  # the children find what was imported and made here
train.data.load("toy"), policy.load("tiny", texts=["a b"])
for line in sys.stdin:
    world, port, log, function, arguments, ranks, number, pattern, seconds = json.loads(line)
    pids = {}
    for rank in range(world):
        if pid := os.fork():
            pids[pid] = rank
            continue
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{log}/{rank}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
        try:
            evaluation.run_main(lambda: getattr(test_parallel, function)(*arguments))
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 3
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    codes, started, ended, asked = [None] * world, time.time(), [0.0] * world, not ranks
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            ended[pids[pid]] = time.time()
            codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
        elif not asked and any(os.path.getsize(path) for path in glob.glob(pattern)):  # begun, not just opened
            for pid in (p for p, rank in pids.items() if rank in ranks):
                os.kill(pid, number)
            asked = True
        elif time.time() - started > seconds:
            for pid in pids:
                os.kill(pid, 9)
            started = time.time()
        else:
            time.sleep(0.01)
    print(json.dumps([codes, max(ended) - min(ended)]), flush=True)
"""


@pytest.fixture(scope="module")
def launch():
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    process = subprocess.Popen([sys.executable, "-c", HARNESS, str(ROOT), str(ROOT / "tests")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})

    def launched(log, function, *arguments, world=2, ranks=(), number=0, pattern="", seconds=120, code=0):
        """Run test_parallel.function(*arguments) in `world` processes: [stdout, stderr] of each, and the seconds between first and last end."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        log.mkdir(exist_ok=True)
        process.stdin.write(json.dumps([world, port, str(log), function, list(map(str, arguments)), list(ranks), number, str(pattern), seconds]) + "\n")
        process.stdin.flush()
        codes, apart = json.loads(process.stdout.readline())
        printed = [[(log / f"{n}.{name}").read_text() for name in ("out", "err")] for n in range(world)]
        assert codes == (code if isinstance(code, list) else [code] * world), printed
        return printed, apart

    yield launched
    process.stdin.close()
    process.wait(timeout=30)


# --- what the processes run ------------------------------------------------------------------------------------------------


def main(*flags):
    sys.argv = ["train.py", *flags]
    train.main()


def evaluate(*flags):
    sys.argv = ["eval.py", *flags]
    evaluation.main()


def main_with_fixed_responses(folder, *flags):
    """A run whose responses depend on their prompts alone, and the gradients and weights of its first update in RL."""
    def respond(model, tokenizer, prefixes, owner, suffixes, sampling):
        seen, responses = collections.Counter(), []
        for o, suffix in zip(owner, suffixes):
            text = tokenizer.decode(prefixes[o] + suffix)
            rng = random.Random(f"{text} {seen[text]}")
            seen[text] += 1
            lines = re.findall("^- (.+)", text, re.M)
            ids = tokenizer(f"{rng.choice(lines)}\n\\boxed{{{rng.choice(lines)}}}").input_ids
            responses.append(ids[-rng.randint(sampling.max_new_tokens // 2, sampling.max_new_tokens):])
        return responses, policy.all_logprobs(model, prefixes, owner, suffixes, responses)[2]

    def step(self, rate=1.0, max_norm=1.0):
        train.sum_gradients(parameters := [p for g in self.adamw.param_groups for p in g["params"]])
        kept = [None if p.grad is None else train.whole(p.grad).clone() for p in parameters]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "sum_gradients", lambda parameters: None)  # done already
            norm = original(self, rate, max_norm)
        updates.append((kept, [train.whole(p.detach()).clone() for p in parameters]))
        return norm

    updates, original = [], train.Optimizer.step
    policy.sample_rows, train.Optimizer.step = respond, step
    main(*flags)
    torch.save(updates, f"{folder}.{os.environ['RANK']}")


def sum_of_some_gradients(path):
    """Four parameters: a gradient on both processes, on one, on the other, on none; in one bucket and in several."""
    with train.processes():
        rank, sums = train.rank(), []
        for train.BUCKET in (2**24, 7):
            parameters = [torch.nn.Parameter(torch.zeros(n, 2)) for n in (1, 2, 30, 4, 1)]
            for p, ranks in zip(parameters, ((0, 1), (0,), (0, 1), (), (1,))):
                p.grad = torch.full((2, len(p)), 1.0 + rank).T if rank in ranks else None
            train.sum_gradients(parameters)
            sums.append([None if p.grad is None else p.grad.unique().tolist() for p in parameters])
        lists = [train.gather(train.part(list(range(n)))) for n in range(6)]
        Path(f"{path}.{rank}").write_text(json.dumps([sums, lists, train.all_sum({"n": rank + 1.0})]))


def sharded_steps(path):
    """Two steps of a model whose shards two processes have, and of the same model, whole, where rank 0 does all the work."""
    def model_and_optimizer(sharded, dtype, tied, checkpointing):
        torch.manual_seed(0)
        size = {"vocab_size": 301, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=None, eos_token_id=1))
        for p in model.parameters():
            p.data = p.data.to(dtype)
        if checkpointing:
            for module in model.modules():
                module._can_checkpoint_with_cache = True  # as policy.load does
            policy.checkpoint_activations(model)
        head = torch.nn.Linear(64, 3)  # stays whole
        weights = train.shard(model) if sharded else model.state_dict()
        optimizer = train.Optimizer([{"params": list(model.parameters()), "lr": 1e-3}, {"params": list(head.parameters()), "lr": 1e-3}])
        return model.train(), head, optimizer, weights

    def work(model, head, seed):
        rng = random.Random(seed)
        ids = lambda n: [rng.randrange(2, 301) for _ in range(n)]
        prefixes, owner = [ids(9), ids(12)], [0, 0, 0, 1, 1]
        suffixes, responses = [ids(3) for _ in owner], [ids(4 + n) for n in range(len(owner))]
        for prefix, local, part in policy.micro_batches(model, prefixes, owner, suffixes, responses, 2):
            logprobs, _, hidden = policy.row_logprobs(prefix, local, [suffixes[n] for n in part], [responses[n] for n in part])
            (head(hidden.float()).square().mean() - logprobs.sum() / 30).backward()

    with train.processes():
        found = []
        for case in ((torch.float32, True, False), (torch.float32, False, True), (torch.bfloat16, True, True), (torch.bfloat16, False, False)):
            results = []
            for sharded in (False, True):
                model, head, optimizer, weights = model_and_optimizer(sharded, *case)
                steps, mine = [], [train.rank()] if sharded else [0, 1] if train.rank() == 0 else []
                for seeds in ((10, 11), (20, 21), (30,)):  # in the last step one process has nothing to do
                    if sharded and train.rank() == 1:
                        work(model, head, 0)  # an attempt that memory did not suffice for
                        optimizer.clear()
                    for seed in (seeds[n] for n in mine if n < len(seeds)):
                        work(model, head, seed)
                    steps.append((optimizer.step(0.5, max_norm=1.0), {k: v.clone() for k, v in weights.items()}))
                kept = [*optimizer.adamw.state.values(), {n: p for n, (_, p) in enumerate(optimizer.pairs)}]
                size = sum(train.own(t).nbytes for tensors in kept for t in tensors.values() if t.dim())
                tensors = optimizer.tensors()
                results.append((steps, tensors, size, sum(p.numel() for p in model.parameters()), sum(p.numel() for p in head.parameters())))
                twin = model_and_optimizer(sharded, *case)[2]
                twin.load(train.gather([tensors])[0])  # each process has read the whole file
                again = twin.tensors()
                assert tensors.keys() == again.keys() and all(torch.equal(tensors[k], again[k]) for k in tensors)
            found.append((case[0], results))
    torch.save(found, f"{path}.{os.environ['RANK']}")


def out_of_memory(path, failing, kind):
    """One process runs out of memory, once or twice, or has another error."""
    with train.processes():
        run, tries = type("R", (), {"args": train.argparse.Namespace(micro_batch=16, rollout_rows=320)}), []

        def attempt():
            tries.append(run.args.micro_batch)
            if train.rank() == 1 and len(tries) <= int(failing):
                raise {"memory": MemoryError(), "bug": RuntimeError("a real bug"), "input": InputError("a bad line")}[kind]
            return len(tries)

        assert train.with_room(run, attempt) == 2 and tries == [16, 8]


# --- the numbers of one process ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[*R2RANK, "--sft-steps", "0", "--warmup-steps", "0"],
                                   [*R2RANK, "--batch-lists", "1", "--no-reasoning", "--kl-coef", "0", "--eval-lists", "1"], REREC, [*REREC, "--ppo-epochs", "2", "--kl-coef", "0"],
                                   [*R2RANK, "--sft-steps", "0", "--warmup-steps", "0", "--parallel", "fsdp"], [*REREC, "--parallel", "fsdp"]],
                         ids=["r2rank, no cold start", "r2rank, one list, no reasoning", "rerec", "rerec, no KL", "r2rank, fsdp", "rerec, fsdp"])
def test_two_processes_compute_what_one_does(launch, tmp_path, flags):
    for n in (1, 2):
        launch(tmp_path / f"log{n}", "main_with_fixed_responses", tmp_path / f"updates{n}", *flags, "--out", tmp_path / f"r{n}", world=n)
    one, two = (metrics(tmp_path / f"r{n}") for n in (1, 2))
    assert len(one) == len(two) and [r["stage"] for r in one].count("rl") >= 3
    for a, b in zip(one, two):
        assert a.pop("stage") == b.pop("stage")
        assert a.pop("clipped", 0) == pytest.approx(b.pop("clipped", 0), abs=0.02)  # a count: tokens at the very threshold may fall on either side
        assert a == pytest.approx(b, abs=2e-4, rel=2e-3)
    one, two = (json.loads((tmp_path / f"r{n}" / "eval.json").read_text()) for n in (1, 2))
    assert list(one["systems"]) == list(two["systems"]) and one["lists"] == two["lists"]
    for name in one["systems"]:
        assert one["systems"][name]["ndcg@10"]["mean"] == pytest.approx(two["systems"][name]["ndcg@10"]["mean"], abs=1e-3)
    one, two, third = (torch.load(tmp_path / f"updates{n}.{process}") for n, process in ((1, 0), (2, 0), (2, 1)))
    assert len(one) == len(two) == len(third) > 4
    cold_start = int(flags[len(flags) - flags[::-1].index("--sft-steps")])
    assert all(torch.equal(x, y) for (_, a), (_, b) in zip(two, third) for x, y in zip(a, b))  # the processes stay together to the last bit
    for n in (0, cold_start):  # the first update of all; and the first of RL, before which differences in rounding have grown
        (gradients, weights), (others, moved) = one[n], two[n]
        assert [g is None for g in gradients] == [g is None for g in others]
        a, b = (torch.cat([g.flatten() for g in part if g is not None]) for part in (gradients, others))
        assert (a - b).norm() / a.norm() < (1e-3 if n else 1e-5)
        if n == 0:
            # The head's last bias shifts all scores alike: its gradient is 0 but for rounding, which Adam blows up to a step.
            kept = [i for i, w in enumerate(weights) if w.shape != (1,)]
            assert len(kept) >= len(weights) - 1
            torch.testing.assert_close([weights[i] for i in kept], [moved[i] for i in kept], atol=2e-5, rtol=0)
    out = launch(tmp_path / "again", "main", *flags, "--out", tmp_path / "r2", code=[2, 2])[0]
    assert "--overwrite" in out[0][1] and out[0][1].count("\n") == 1


def test_sums_parts_and_empty_lists(launch, tmp_path):
    launch(tmp_path, "sum_of_some_gradients", tmp_path / "found")
    for process in (0, 1):
        sums, lists, total = json.loads((tmp_path / f"found.{process}").read_text())
        assert sums == [[[3.0], [1.0], [3.0], None, [2.0]]] * 2
        assert lists == [list(range(n)) for n in range(6)] and total == {"n": 3.0}


def test_a_sharded_step_is_that_of_one_process(launch, tmp_path):
    launch(tmp_path, "sharded_steps", tmp_path / "found")
    ranks = [torch.load(tmp_path / f"found.{n}", weights_only=False) for n in (0, 1)]
    for (dtype, (plain, sharded)), (_, (_, other)) in zip(*ranks):
        exact = dtype == torch.float32
        for (norm, weights), (norm_2, weights_2), (norm_3, weights_3) in zip(plain[0], sharded[0], other[0]):
            assert norm_2 == norm_3 and weights.keys() == weights_2.keys() and all(torch.equal(weights_2[k], weights_3[k]) for k in weights)
            assert norm_2 == pytest.approx(norm, rel=1e-5 if exact else 1e-2)
            torch.testing.assert_close(weights_2, weights, atol=2e-6 if exact else 2e-3, rtol=0 if exact else 2**-7)
        assert plain[1].keys() == sharded[1].keys() and not other[1]  # rank 0 alone has what is saved, under the same names
        assert all(a.shape == sharded[1][k].shape and a.dtype == sharded[1][k].dtype for k, a in plain[1].items())
        for size in (sharded[2], other[2]):  # two moments and the float32 weights of half the model; two moments of the whole head
            assert size == pytest.approx(12 * sharded[3] / 2 + 8 * sharded[4], rel=0.01)
        assert plain[2] == (8 if exact else 12) * plain[3] + 8 * plain[4]


def test_a_sharded_run_leaves_the_files_of_one_that_is_not(launch, tmp_path):
    for parallel in ("ddp", "fsdp"):
        launch(tmp_path / "log", "main_with_fixed_responses", tmp_path / parallel, *REREC, "--dtype", "bfloat16", "--parallel", parallel, "--out", tmp_path / f"r-{parallel}")
    one, two = (torch.load(tmp_path / f"{parallel}.1") for parallel in ("ddp", "fsdp"))
    assert all(torch.equal(a, b) for a, b in zip(one[0][0], two[0][0]))  # the same sums of gradients
    torch.testing.assert_close(one[0][1], two[0][1], atol=1e-7, rtol=1e-6)
    one, two = (tmp_path / f"r-{parallel}" / "checkpoint" for parallel in ("ddp", "fsdp"))
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    one, two = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert {t.dtype for t in two.values()} == {torch.bfloat16}
    torch.testing.assert_close(two, one, atol=1e-3, rtol=2**-7)


# --- interrupted -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[*R2RANK, "--pl", "sample", "--eval-samples", "2"], REREC, [*REREC, "--parallel", "fsdp", "--dtype", "bfloat16"]],
                         ids=["r2rank", "rerec", "rerec, fsdp"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(launch, tmp_path, flags):
    launch(tmp_path / "log", "main", *flags, "--out", tmp_path / "whole")
    out = tmp_path / "r"
    launch(tmp_path / "log", "main", *flags, "--out", out, ranks=(0, 1), number=signal.SIGKILL, pattern=out / "states/2-rl-000002/training.json", code=[-9, -9])
    assert (out / "states/2-rl-000002").exists()
    subprocess.run(["cp", "-r", out, tmp_path / "copy"], check=True)
    printed, _ = launch(tmp_path / "log", "main", "--resume", out)
    assert "note:" not in printed[0][0] and printed[1] == ["", ""]  # the second process is silent
    same(tmp_path / "whole", out)
    if "rerec" in flags:
        other = ["--parallel", "ddp"] * ("fsdp" in flags)
        printed, _ = launch(tmp_path / "log", "main", "--resume", tmp_path / "copy", *other, world=1)
        assert "the run had 2 processes and has 1 now" in printed[0][0] and ("with --parallel ddp instead of fsdp" in printed[0][0]) == bool(other)
        assert len(metrics(tmp_path / "copy")) == len(metrics(out)) and (tmp_path / "copy" / "eval.json").exists()


def test_a_signal_to_one_process_stops_all_after_the_same_step(launch, tmp_path):
    out = tmp_path / "r"
    printed, _ = launch(tmp_path, "main", *R2RANK, "--sft-steps", 400, "--save-every", 1000, "--out", out, ranks=(1,), number=signal.SIGTERM,
                        pattern=out / "metrics.jsonl", code=[130, 130])
    assert f"torchrun --nproc-per-node 2 train.py --resume {out}" in printed[0][0] and printed[1] == ["", ""]
    (state,) = (out / "states").iterdir()
    assert state.name == f"1-sft-{len(metrics(out)):06d}"


def test_torchrun_hands_its_signal_on(tmp_path):
    """The real thing: torchrun, two processes, SIGTERM to torchrun alone."""
    out = tmp_path / "r"
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "train.py"), *REREC,
                                "--sft-steps", "400", "--save-every", "1000", "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    deadline = time.time() + 200
    while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size):
        assert time.time() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.terminate()
    printed, errors = process.communicate(timeout=90)
    assert process.returncode and f"torchrun --nproc-per-node 2 train.py --resume {out}" in printed, errors
    (state,) = (out / "states").iterdir()
    assert state.name == f"1-sft-{len(metrics(out)):06d}"


@pytest.mark.parametrize("flags", [R2RANK, REREC], ids=["r2rank", "rerec"])
def test_processes_share_an_evaluation(launch, tmp_path, flags):
    """Each list is scored once, and has the score that one process gives it; rank 0 alone writes and prints."""
    out = tmp_path / "r"
    launch(tmp_path, "main", *flags, "--steps", 1, "--out", out, world=1)
    reports = {}
    for world, lists in ((1, 5), (2, 5), (3, 2)):  # of 2 lists on three processes one has none
        printed, _ = launch(tmp_path, "evaluate", "--run", out, "--eval-lists", lists, "--out", tmp_path / "e.json", world=world)
        reports[world] = json.loads((tmp_path / "e.json").read_text())
        assert "written to" in printed[0][0] and all(p == ["", ""] for p in printed[1:])
        (tmp_path / "e.json").unlink()
    assert reports[2]["values"]["rl"] == pytest.approx(reports[1]["values"]["rl"], abs=1e-9) and reports[2]["systems"].keys() == reports[1]["systems"].keys()
    assert reports[3]["values"]["rl"] == pytest.approx(reports[1]["values"]["rl"][:2], abs=1e-9)
    assert reports[2]["lists"] == reports[1]["lists"]


def test_torchrun_takes_the_documented_commands():
    """Its own parser abbreviates options, also those that stand behind the script."""
    from torch.distributed.run import get_args_parser
    commands = re.findall(r"^torchrun (.*?)(?: +#.*)?$", (ROOT / "README.md").read_text(), re.M)
    assert any("eval.py" in c for c in commands)
    for command in commands:
        args = get_args_parser().parse_args(command.split())
        script = next(n for n, word in enumerate(command.split()) if word.endswith(".py"))
        assert args.training_script == command.split()[script] and args.training_script_args == command.split()[script + 1:]


# --- what stops one stops all ---------------------------------------------------------------------------------------------------


def test_a_process_that_dies_ends_the_others(launch, tmp_path):
    for gone, parallel in ((0, "ddp"), (1, "ddp"), (1, "fsdp")):
        out = tmp_path / f"r{gone}-{parallel}"
        printed, apart = launch(tmp_path, "main", *R2RANK, "--sft-steps", 400, "--parallel", parallel, "--out", out, ranks=(gone,), number=signal.SIGKILL,
                                pattern=out / "metrics.jsonl", code=[-9 if n == gone else 2 for n in (0, 1)])
        error = printed[1 - gone][1].splitlines()[-1]
        assert f"error: process {1 - gone} of 2 cannot reach the others" in error and apart < 20


@pytest.mark.parametrize("failing, kind, codes, words", [
    (1, "memory", [0, 0], "going on with --micro-batch 8"), (2, "memory", [2, 2], "Lower --micro-batch"),
    (1, "input", [2, 2], "a bad line"), (1, "bug", [2, 3], "a real bug")])
def test_an_error_on_one_process_does_not_leave_the_others_waiting(launch, tmp_path, failing, kind, codes, words):
    printed, apart = launch(tmp_path, "out_of_memory", tmp_path, failing, kind, code=codes, seconds=60)
    assert words in "".join(printed[0] + printed[1]) and apart < 20
    assert ("cannot reach the others" in printed[0][1]) == (kind != "memory")


def test_devices_that_processes_cannot_share(monkeypatch):
    assert train.own_gpu("mps") == "mps"
    monkeypatch.setattr(train, "world", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train.own_gpu("cpu") == "cpu"
    for device, words in (("mps", "of its own"), ("cuda:1", "of its own"), ("cuda", "--nproc-per-node")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(InputError, match=words):
            train.own_gpu(device)
