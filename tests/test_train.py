"""train.py as a user runs it: what a run leaves, its variants, its flags, bad input, and the cold start."""

import json
import math
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import policy
import r2r
import rerec
import train
from data import InputError
from extras import tasks
from extras.flags import DEFAULTS, parse_eval_flags
from runs import BASE, METHODS, ROOT, SMALL, main, metrics, refusal, run_train, run_with_states, small  # noqa
from steps import plain_row

def test_a_run_leaves_its_files_and_another_does_not_overwrite_them(small, toy, capsys):
    assert "not empty" in refusal(capsys, *SMALL, "--out", small.folder)
    names = {"config.json", "metrics.jsonl", "eval.json", "result.json", "rationales.json", "checkpoint"}
    assert {p.name for p in small.folder.iterdir()} == names
    config, report, result = (json.loads((small.folder / f"{n}.json").read_text())
                              for n in ("config", "eval", "result"))
    method, (*_, last) = config["flags"]["method"], metrics(small.folder)
    assert config["flags"]["group_size"] == 2 and config["versions"]["torch"] == torch.__version__
    assert config["flags"]["lr"] == DEFAULTS["lr"][2 * (method == "rerec")]
    warmup = ["warmup"] * (method == "r2rank")
    assert [r["stage"] for r in metrics(small.folder)] == ["sft"] * 3 + warmup + ["rl"] * 3
    assert 0 <= last["utility" if method == "r2rank" else "accuracy"] <= 1 and last["clipped"] == 0
    assert 0 < last["length"] <= 12 and last["tokens"] > 0 and last["grad_norm"] >= 0
    # what tables are made of: the same numbers, and how long it took
    assert result["systems"] == report["systems"] and result["lists"] == report["lists"]
    assert set(result["seconds"]) == {"sft", *warmup, "rl", "all"}

@pytest.mark.parametrize("method, module, more", [
    ("r2rank", r2r, "--pl sample --credit list --score-gradient head --eval-samples 2"),
    ("rerec", rerec, "--query-kinds explicit,interest --personalized --no-curriculum")])
def test_one_batch_in_bfloat16(tmp_path, monkeypatch, method, module, more):
    """With flags that other tests leave alone. Each step sees the same lists, the second update has left the
    reference, the checkpoint has the type that was trained, and evaluated again it is as good."""
    seen, step = [], module.train_step

    def watched(model, tokenizer, third, lists, *rest):
        seen.append([[c.id for c in x.candidates] for x in lists])
        return step(model, tokenizer, third, lists, *rest)

    monkeypatch.setattr(module, "train_step", watched)
    run_train(*METHODS[method], "--out", tmp_path, "--dtype", "bfloat16", "--gradient-checkpointing",
              "--overfit-one-batch", "--history-length", "4", "--kl-coef", "0.1", "--ppo-epochs", "2",
              *more.split())
    assert method == "rerec" or all(r["kl"] > 0 for r in metrics(tmp_path) if r["stage"] == "rl")
    assert len(seen) == 3 and len(seen[0]) == 2 and seen[0] == seen[1] == seen[2]
    assert json.loads((tmp_path / "checkpoint/config.json").read_text())["dtype"] == "bfloat16"
    main("--run", tmp_path, "--dtype", "bfloat16", "--out", tmp_path / "again", parse=parse_eval_flags,
         run=train.evaluation.main)
    first, again = (json.loads((tmp_path / name).read_text()) for name in ("eval.json", "again"))
    assert first["values"]["rl"] == again["values"]["rl"]
    assert method == "r2rank" or set(first["systems"]["rl"]["by_kind"]) == {"explicit", "interest"}

def test_adapters_are_merged_at_the_end(tmp_path):
    """--lora: the base weights stay, resumed or not the run is the same, and nobody needs peft to open it."""
    pytest.importorskip("peft")
    _, states = run_with_states(tmp_path / "r", *SMALL, "--lora", "4", "--kl-coef", "0.1")
    assert json.loads((tmp_path / "r/config.json").read_text())["flags"]["lr"] == 10 * DEFAULTS["lr"][0]
    model, _, head = r2r.load_checkpoint(tmp_path / "r/checkpoint")
    assert head and not any("lora" in name for name, _ in model.named_parameters())
    for state in (states["sft", 2], states["rl", 2]):
        run_train("--resume", state)
        assert metrics(state) == metrics(tmp_path / "r")
        again, *_ = r2r.load_checkpoint(state / "checkpoint")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))

def test_loss_and_rates_of_a_run(tmp_path, monkeypatch):
    """Cold start: the loss is that of plain forward passes, and the rate falls; in RL it stays."""
    rates, wanted, original = [], [], policy.micro_batches

    def watched(model, rollout, size, *rest):
        if len(wanted) < 2:  # of the cold start
            rows = torch.cat([plain_row(model, rollout, n)[0] for n in range(len(rollout.owner))])
            wanted.append(-rows.mean().item())
        return original(model, rollout, size, *rest)

    monkeypatch.setattr(policy, "micro_batches", watched)
    hook = register_optimizer_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    run_train(*SMALL, "--out", tmp_path, "--sft-steps", "2", "--sft-lr", "1e-3", "--lr", "1e-4",
              "--warmup-steps", "0")
    hook.remove()
    assert [r["loss"] for r in metrics(tmp_path) if r["stage"] == "sft"] == pytest.approx(wanted, rel=1e-4)
    assert rates == pytest.approx([1e-3 * (1 - 0.9 / 2), 1e-3 * 0.1] + [1e-4] * 3)

def test_the_rate_rises_over_a_twentieth_of_the_steps():
    run = SimpleNamespace(args=SimpleNamespace(save_every=1000), reached=lambda _: False, save=print)
    optimizer = SimpleNamespace()
    rates = [optimizer.schedule for _ in train.Run.steps(run, "rl", 200, optimizer, False)]
    assert rates == pytest.approx([min(1, n / 10) for n in range(1, 201)])

def test_three_bad_steps_in_a_row_stop_a_run(tmp_path):
    run = train.Run(SimpleNamespace(out=str(tmp_path), resume=None), "")
    for norm in (math.nan, math.inf, 1.0, math.nan, math.nan):
        run.log("rl", 1, {"grad_norm": norm}, every=2)
    with pytest.raises(InputError, match="three steps"):
        run.log("rl", 1, {"grad_norm": math.nan}, every=2)

def test_right_answers_of_a_teacher_are_learnt_from(tmp_path, toy, monkeypatch):
    """One that guesses is right at times: of these traces 1 yes to 2 no are kept, also of their file."""
    said, rng, train_users = [], random.Random(0), {user for user, _ in toy.splits["train"]}

    def guess(model, tokenizer, prefix_ids, suffix_ids, num_samples, **settings):
        assert "#Initial reasoning" in tokenizer.decode(prefix_ids)
        said.append([rng.choice(("yes", "no")) for _ in suffix_ids])
        return [[tokenizer(f"#Self-check: fine. <answer>{word}</answer>").input_ids] for word in said[-1]]

    monkeypatch.setattr(policy, "sample", guess)
    monkeypatch.setattr(tasks, "PAIRS_ASKED", 60)
    flags = [*SMALL, "--warmup-steps", "1", "--teacher"]
    printed = run_train(*flags, "tiny", "--out", tmp_path / "r")
    records = [json.loads(line) for line in (tmp_path / "r/traces.jsonl").read_text().splitlines()]
    yes, no = (sum(pair[n] == word for pair in said) for n, word in enumerate(("yes", "no")))
    assert [sum(r["label"] == label for r in records) for label in (1, 0)] == [yes, no] and len(said) == 30
    for r in records:
        assert r["user"] in train_users
        assert r["label"] == (r["candidate"] in {x.item_id for x in toy.sequences[r["user"]]})
        assert r["trace"] == f"#Self-check: fine. <answer>{('no', 'yes')[r['label']]}</answer>"
    assert f"{3 * min(yes, no // 2)} of {yes + no} traces kept" in printed
    assert "on 2 lists: none was held out" in printed
    run_train(*flags, tmp_path / "r/traces.jsonl", "--out", tmp_path / "s")
    first, again = ([r["loss"] for r in metrics(tmp_path / out)[:3]] for out in "rs")
    assert first == again and len(said) == 30

@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help_answers_before_torch_is_imported(script):
    code = (f"import runpy, sys\nsys.argv = ['{script}', '--help']\ntry:\n    runpy.run_path('{script}', "
            f"run_name='__main__')\nfinally:\n    print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "--help" in done.stdout and done.stdout.endswith("False\n"), done.stderr

def test_the_two_commands_as_typed(tmp_path):
    evaluation = ["eval.py", "--run", "r", "--explain", "1"]
    for command in (["train.py", *METHODS["r2rank"], "--out", "r"], evaluation):
        done = subprocess.run([sys.executable, ROOT / command[0], *command[1:]], cwd=tmp_path,
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "r/result.json").exists() and "after|" in done.stdout

@pytest.mark.parametrize("flags, words", [
    ("--nosuch", "--nosuch"), ("--steps -1", "at least 0"), ("--temperature 0", "above 0"),
    ("--pl other", "exact"), ("--data none/such", "no such folder"), ("--split temporal", "--split"),
    ("--data recbench:movie", "--data-dir"), ("--model ./none", "no such folder"), ("--device x", "--device"),
    ("--num-candidates 500", "400 items"), ("--num-candidates 395", "lower --num-candidates"),
    ("--candidates none.jsonl", "none.jsonl"), ("--resume none", "config.json"),
    ("--no-reasoning --kl-coef 0.1", "drop one"), ("--tau 0.5", "belongs to --method rerec"),
    ("--method rerec --query-kinds x", "explicit"), ("--method rerec --group-size 1", "at least 2"),
    ("--method rerec --reward-weights x=1", "query_alignment"), ("--teacher ./none", "no such folder"),
    ("--sft-steps 0 --max-new-tokens 5000", "--max-new-tokens"), ("--num-candidates 2", "--teacher"),
])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, flags, words):
    assert words in refusal(capsys, *BASE, "--out", tmp_path / "r", *flags.split())
    assert not (tmp_path / "r").exists()
