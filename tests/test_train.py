"""The command lines, as a user runs them: results, files, flags, and what they say to bad input."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import eval as evaluation
import r2r
import train
from data import InputError
from rewards import ndcg_at_k

ROOT = Path(__file__).parent.parent
SMALL = ["--sft-steps", "3", "--steps", "2", "--batch-lists", "2", "--group-size", "2", "--eval-lists", "4", "--max-new-tokens", "12"]


def run(script, *flags, cwd=ROOT, code=0):
    out = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], cwd=cwd, capture_output=True, text=True, timeout=300,
                         env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert out.returncode == code, out.stdout + out.stderr
    return out


def metrics(folder, drop_times=True):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not (drop_times and k.startswith("seconds"))} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "r"
    return folder, run("train.py", *SMALL, "--out", folder).stdout


def test_run_directory(finished):
    folder, printed = finished
    config = json.loads((folder / "config.json").read_text())
    assert config["flags"]["group_size"] == 2 and config["flags"]["lr"] == 5e-5 and config["seed"] == 0 and config["versions"]["torch"]
    rows = metrics(folder, drop_times=False)
    assert [r["stage"] for r in rows] == ["sft"] * 3 + ["warmup"] + ["rl"] * 2
    assert all(0 <= r["utility"] <= 1 and r["seconds"] > 0 and r["clipped"] == 0 for r in rows if r["stage"] == "rl")
    report = json.loads((folder / "eval.json").read_text())
    assert report["data"] == "toy" and report["num_lists"] == 4 and list(report["systems"]) == ["random", "popularity", "sft", "rl"]
    for system in report["systems"].values():
        assert set(system) == {f"{m}@{k}" for m in ("ndcg", "hr") for k in (1, 5, 10, 20)} | {"mrr", "rank"}
        assert all(v["low"] <= v["mean"] <= v["high"] for v in system.values())
    for name in report["systems"]:
        assert name in printed


def test_checkpoint_is_an_ordinary_directory(finished, toy):
    folder = finished[0] / "checkpoint"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    head = r2r.ScoreHead.load(folder / "score_head.safetensors")
    e = toy.examples("test", 1)[0]
    ranked = r2r.rank(model.eval(), tokenizer, head, e.history, e.candidates, max_new_tokens=12)
    assert {r.item.id for r in ranked} == {c.id for c in e.candidates}


def test_eval_of_a_run_gives_the_run_s_numbers(finished):
    folder, _ = finished
    before = json.loads((folder / "eval.json").read_text())
    out = run("eval.py", "--run", folder, "--explain", 2).stdout
    after = json.loads((folder / "eval.json").read_text())
    assert {k: after[k] for k in before} == before  # sft is kept, the others computed again
    assert out.count("=== list") == 2 and out.count("history, oldest first") == 2
    assert len([line for line in out.splitlines() if line.startswith(" *")]) == 2  # the positive of each list is marked


def test_a_run_leaves_a_result_that_eval_renews(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "r")
    result, report = (json.loads((folder / f"{name}.json").read_text()) for name in ("result", "eval"))
    assert result["systems"] == evaluation.rounded(report["systems"]) and result["lists"] == report["lists"]
    assert set(result["seconds"]) == {"sft", "warmup", "rl", "all"} and sum(v for k, v in result["seconds"].items() if k != "all") < result["seconds"]["all"]
    gain = result["differences"]["rl - sft"]["ndcg@10"]["mean"]
    assert gain == pytest.approx(report["systems"]["rl"]["ndcg@10"]["mean"] - report["systems"]["sft"]["ndcg@10"]["mean"], abs=1e-5)
    assert str(finished[0].parent) not in (folder / "result.json").read_text()
    printed = run("eval.py", "--run", folder, "--baselines", "title-overlap", "--test-time", "1,2", "--test-lengths", "4").stdout
    renewed = json.loads((folder / "result.json").read_text())
    assert list(renewed["systems"]) == ["random", "popularity", "sft", "rl", "title-overlap"] and renewed["curve"] == result["curve"]
    assert [r["value"] for r in renewed["test_time"]["rationales"]] == [1, 2] and "at most 4 tokens" in printed
    assert renewed["test_time"]["greedy"][0]["ndcg@10"] == renewed["systems"]["rl"]["ndcg@10"]
    run("eval.py", "--run", folder, "--max-new-tokens", 4)  # not what the run's flags say: its result stays
    assert json.loads((folder / "result.json").read_text()) == renewed


def test_eval_of_an_untrained_model(finished, tmp_path):
    bare = shutil.copytree(finished[0] / "checkpoint", tmp_path / "model")
    (bare / "score_head.safetensors").unlink()
    run("eval.py", "--model", bare, "--data", "toy", "--eval-lists", 3, "--max-new-tokens", 8, cwd=tmp_path)
    report = json.loads((tmp_path / "eval.json").read_text())
    assert list(report["systems"]) == ["random", "popularity", "zero-shot"] and report["num_lists"] == 3


def test_same_seed_same_run_and_sharing_changes_nothing(finished, tmp_path):
    run("train.py", *SMALL, "--out", tmp_path / "again")
    assert metrics(tmp_path / "again") == metrics(finished[0])
    run("train.py", *SMALL, "--out", tmp_path / "unshared", "--no-share-prefix", "--micro-batch", 7)
    for a, b in zip(metrics(tmp_path / "unshared"), metrics(finished[0])):
        assert a["stage"] == b["stage"] and a.get("loss") == pytest.approx(b.get("loss"), abs=1e-4)
        assert a.get("utility") == pytest.approx(b.get("utility"), abs=1e-3)


@pytest.mark.parametrize("flags", [
    ["--pl", "sample", "--permutations", "4", "--credit", "list", "--kl-coef", "0.1", "--ppo-epochs", "2", "--eval-samples", "2"],
    ["--no-reasoning", "--temperature", "0.8"],
    ["--dtype", "bfloat16", "--gradient-checkpointing", "--overfit-one-batch", "--num-candidates", "5", "--history-length", "4"],
])
def test_variants_run_whole(tmp_path, flags):
    run("train.py", *SMALL, "--out", tmp_path / "r", *flags)
    rows = [r for r in metrics(tmp_path / "r") if r["stage"] == "rl"]
    assert len(rows) == 2
    if "--no-reasoning" in flags:
        assert all(r["length"] == 0 for r in rows) and not r2r.ScoreHead.load(tmp_path / "r/checkpoint/score_head.safetensors").reasoning
    if "--kl-coef" in flags:
        assert rows[-1]["kl"] > 0
    if "--overfit-one-batch" in flags:
        assert json.loads((tmp_path / "r/checkpoint/config.json").read_text())["dtype"] == "bfloat16"


def test_teacher_traces_from_a_file(tmp_path, toy):
    """Wrong traces are dropped, the rest balanced 1 : 2; a broken line is named."""
    lines = []
    for n, e in enumerate(toy.examples("train", 12)):
        label = int(n % 3 == 0)
        item = e.candidates[e.relevance.index(1.0)] if label else next(c for c, y in zip(e.candidates, e.relevance) if not y)
        answer = "yes" if label != (n == 11) else "no"  # the last one is wrong
        lines.append(json.dumps({"history": [h.id for h in e.history], "candidate": item.id, "label": label,
                                 "trace": f"#Final conclusion: so. <answer>{answer}</answer>"}))
    path = tmp_path / "traces.jsonl"
    path.write_text("\n".join(lines))
    out = run("train.py", *SMALL, "--out", tmp_path / "r", "--teacher", path).stdout
    assert "cold start: 9 of 12 traces kept" in out
    for broken in (lines[1].replace('"candidate"', '"item"'), json.dumps(json.loads(lines[1]) | {"trace": None})):
        path.write_text(lines[0] + "\n" + broken)
        with pytest.raises(InputError, match=f"{path} line 2"):
            next(train.recorded_lessons(toy, path, random.Random(0)))


def test_a_teacher_s_right_answers_are_kept(tmp_path, toy, model, tokenizer, monkeypatch):
    """A teacher that always says yes is right about the positives alone; a question in three parts is what it is asked."""
    asked = []

    def say_yes(model, tokenizer, prefix_ids, suffix_ids, num_samples, **settings):
        asked.append(tokenizer.decode(prefix_ids))
        return [[tokenizer("#Self-check: fine. <answer>yes</answer>").input_ids + [tokenizer.eos_token_id]] for _ in suffix_ids]

    monkeypatch.setattr(train.policy, "load", lambda *a: (model, tokenizer))
    monkeypatch.setattr(train.policy, "sample", say_yes)
    monkeypatch.setattr(sys, "argv", ["train.py", "--teacher", "someone", "--teacher-traces", "10"])
    args = train.parse_flags()
    records = [json.loads(line) for line in train.ask_teacher(toy, args, "cpu", torch.float32, tmp_path / "t.jsonl").read_text().splitlines()]
    assert len(records) == 5 and len(asked) == 5 and all("#Initial reasoning" in a for a in asked)
    for r in records:
        assert r["label"] == 1 and r["trace"] == "#Self-check: fine. <answer>yes</answer>"
        assert r["candidate"] in {x.item_id for x in toy.sequences[r["user"]]} and r["user"] in {u for u, _ in toy.splits["train"]}


@pytest.mark.parametrize("flags, words", [
    (["--nosuch"], "--nosuch"),
    (["--data", "none/such"], "no such folder"),
    (["--model", "./none"], "no such folder"),
    (["--model", "nosuchfamily-7b"], "hub id"),
    (["--num-candidates", "500"], "has only 400 items"),
    (["--num-candidates", "1"], "at least 2"),
    (["--num-candidates", "395"], "lower --num-candidates"),
    (["--steps", "-1"], "at least 0"),
    (["--temperature", "0"], "above 0"),
    (["--pl", "other"], "exact"),
    (["--split", "temporal"], "--split"),
    (["--teacher", "./none"], "no such folder"),
    (["--no-reasoning", "--kl-coef", "0.1"], "drop one"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, flags, words):
    error = run("train.py", "--out", tmp_path / "r", *flags, code=2).stderr
    assert words in error and "Traceback" not in error
    assert "rror" in error.strip().splitlines()[-1]
    assert not (tmp_path / "r").exists()


def test_eval_of_a_run_that_has_not_finished(finished, tmp_path):
    """The newest whole state counts, not one that was being written; a head that no step has touched yet says nothing."""
    folder = shutil.copytree(finished[0], tmp_path / "r")
    (folder / "eval.json").unlink()
    (folder / "states" / "2-rl-000001.tmp").mkdir(parents=True)
    shutil.copy(folder / "checkpoint" / "config.json", folder / "states" / "2-rl-000001.tmp")
    for state, system in (("1-sft-000003", "zero-shot"), ("2-rl-000000", "rl")):
        shutil.copytree(folder / "checkpoint", folder / "states" / state)
        shutil.rmtree(folder / "checkpoint", ignore_errors=True) if state[0] == "2" else (folder / "checkpoint").rename(tmp_path / "kept")
        run("eval.py", "--run", folder)
        assert list(json.loads((folder / "eval.json").read_text())["systems"])[-1] == system
        if state[0] == "1":
            (tmp_path / "kept").rename(folder / "checkpoint")


def test_eval_s_bad_input(tmp_path):
    assert "config.json" in run("eval.py", "--run", tmp_path, code=2).stderr
    assert "no checkpoint" in (tmp_path / "config.json").write_text("{}") * "" + run("eval.py", "--run", tmp_path, code=2).stderr


def test_an_existing_run_is_not_overwritten(finished):
    folder, _ = finished
    assert "--overwrite" in run("train.py", *SMALL, "--out", folder, code=2).stderr
    model = folder / "checkpoint"
    assert "does not look like a run" in run("train.py", *SMALL, "--out", model, "--overwrite", code=2).stderr  # it has a config.json, too
    assert (folder / "eval.json").exists() and (model / "config.json").exists()


def test_bfloat16_weights_learn_by_steps_below_their_resolution():
    """1000 steps of 1e-5 move a weight of 1.0 by 1e-2; each alone would be rounded away."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = train.Optimizer([{"params": [weight], "lr": 1e-5}])
    for _ in range(1000):
        weight.sum().backward()
        weight.sum().backward()  # accumulated, in float32
        optimizer.step()
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight.float(), torch.full((4,), 0.99), atol=3e-3, rtol=0)


def test_optimizer_steps_by_its_share_of_the_rate():
    """AdamW's first step moves a weight by the rate, whatever the gradient; weights are not decayed."""
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = train.Optimizer([{"params": [a], "lr": 1e-2}, {"params": [b], "lr": 1e-3}])
    for rate, moved in ((0.5, 0.5), (1.0, 1.5)):  # a constant gradient: each step moves by the rate of its own
        (a.sum() + b.sum()).backward()
        optimizer.step(rate)
        torch.testing.assert_close(1 - a.detach(), torch.full((2,), moved * 1e-2), rtol=1e-3, atol=0)
        torch.testing.assert_close(1 - b.detach(), torch.full((2,), moved * 1e-3), rtol=1e-3, atol=0)


def test_rates_and_the_loss_of_the_cold_start(tmp_path, toy, model, monkeypatch):
    """Cold start: mean negative log-likelihood over the step's tokens; the rate rises over a twentieth of the steps and falls to a tenth.
    RL: it rises over a twentieth, and stays."""
    rates, wants, original = [], [], train.Optimizer.step
    monkeypatch.setattr(train.Optimizer, "step", lambda self, rate=1.0, max_norm=1.0: (rates.append(rate), original(self, rate, max_norm))[1])
    first, rows = train.policy.micro_batches, train.policy.row_logprobs

    def seen(model, prefixes, owner, suffixes, responses, *rest):
        if len(wants) < 40:  # of the cold start
            total = 0.0
            for n, response in enumerate(responses):
                start = prefixes[owner[n]] + suffixes[n]
                logprobs = model(torch.tensor([start + response])).logits[0, len(start) - 1:-1].log_softmax(-1)
                total -= logprobs.gather(1, torch.tensor(response)[:, None]).sum().item()
            wants.append(total / sum(map(len, responses)))
        return first(model, prefixes, owner, suffixes, responses, *rest)

    monkeypatch.setattr(train.policy, "micro_batches", seen)
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "r"), "--sft-steps", "40", "--sft-lists", "1", "--steps", "40", "--batch-lists", "1",
                                      "--num-candidates", "4", "--group-size", "2", "--max-new-tokens", "3", "--eval-lists", "1", "--micro-batch", "2",
                                      "--ppo-epochs", "1", "--warmup-steps", "4", "--kl-coef", "0.1"])
    train.main()
    assert rates[:40] == pytest.approx([min(1.0, n / 2) * (1 - 0.9 * n / 40) for n in range(1, 41)])
    assert rates[40:] == pytest.approx([0.5] + [1.0] * 39)
    losses = [r["loss"] for r in metrics(tmp_path / "r") if r["stage"] == "sft"]
    assert losses == pytest.approx(wants, rel=1e-3)


def test_optimizer_clips_the_whole_norm():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = train.Optimizer([{"params": [a], "lr": 1e-3}, {"params": [b], "lr": 1e-3}])
    (3 * a.sum() + 4 * b.sum()).backward()
    assert optimizer.step() == pytest.approx((2 * 9 + 2 * 16) ** 0.5)
    assert a.grad is None and b.grad is None


# --- evaluation ---


def test_intervals_cover_and_shrink():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for n in range(200):
        values = torch.rand(50, generator=generator).tolist()
        i = evaluation.interval(values, samples=500, seed=n)
        covered += i["low"] <= 0.5 <= i["high"]
    assert 0.90 <= covered / 200 <= 0.99
    wide, narrow = (evaluation.interval([0.0, 1.0] * n) for n in (10, 1000))
    assert wide["high"] - wide["low"] > 5 * (narrow["high"] - narrow["low"])


def test_evaluate_ranks_by_score_and_breaks_ties_fairly(toy):
    examples = toy.examples("test", 100, 20)
    ndcg = lambda scores: evaluation.evaluate(scores, examples)[0]["ndcg@10"]["mean"]
    assert ndcg([e.relevance for e in examples]) == 1.0
    assert ndcg([[-y for y in e.relevance] for e in examples]) == 0.0
    assert 0.15 < ndcg([[0.0] * 20] * 100) < 0.31  # all tied: a random ranking, wherever the positive stands
    values = evaluation.list_metrics([0.1, 0.9, 0.5], [0, 0, 1])
    assert values["ndcg@5"] == pytest.approx(ndcg_at_k([0, 1, 0], 5)) and values["mrr"] == 0.5 and values["hr@5"] == 1.0


def test_difference_is_paired():
    a = [0.1 * n for n in range(10)]
    assert evaluation.difference([x + 0.25 for x in a], a) == "+0.250 [+0.250, +0.250]"


def test_own_data_as_in_the_readme(tmp_path):
    """The README's example, pasted: a folder that trains; without attributes the template teacher says that it has nothing to say."""
    import re
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[0]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    run("train.py", *SMALL, "--data", "shop", "--num-candidates", 10, "--out", tmp_path / "r", cwd=tmp_path)
    assert json.loads((tmp_path / "r" / "eval.json").read_text())["data"] == "shop"
    lines = [line.split("\t")[:2] for line in (tmp_path / "shop" / "shop.item").read_text().splitlines()]
    (tmp_path / "shop" / "shop.item").write_text("".join("\t".join(line) + "\n" for line in lines))
    assert "--teacher" in run("train.py", *SMALL, "--data", "shop", "--out", tmp_path / "s", cwd=tmp_path, code=2).stderr
