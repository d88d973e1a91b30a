"""Evaluation: metrics and intervals against brute force, files against reports, runs against themselves."""

import itertools
import json
import math
import random
import shutil
from collections import Counter
from dataclasses import replace

import pytest

import data
import eval as evaluation
import policy
import r2r
from data import Example, Item
from eval import METRICS, QUERY_METRICS, intervals, list_metrics
from extras import explain
from extras.flags import parse_eval_flags
from extras.recommend import retrieve
from rewards import ndcg_at_k, reciprocal_rank
from runs import METHODS, main, refusal, run_train, small, small_run  # noqa: F401

def brute_force(scores, relevance):
    """Metrics averaged over every order that sorts the scores."""
    orders = [p for p in itertools.permutations(range(len(scores)))
              if all(scores[a] >= scores[b] for a, b in zip(p, p[1:]))]
    total = Counter()
    for p in orders:
        ranked = [relevance[i] for i in p]
        for k in (1, 5, 10, 20):
            total[f"ndcg@{k}"] += ndcg_at_k(ranked, k)
            total[f"hr@{k}"] += any(y > 0 for y in ranked[:k])
        total["mrr"] += reciprocal_rank(ranked)
        total["rank"] += 1 / reciprocal_rank(ranked)
    return {m: v / len(orders) for m, v in total.items()}

@pytest.mark.parametrize("seed", range(20))
def test_ties_count_as_the_mean_over_all_their_orders(seed):
    rng = random.Random(seed)
    k = rng.randint(2, 7)
    scores = [rng.choice((0.0, 0.5, 1.0, -2.0)) for _ in range(k)]
    relevance = [rng.choice((0, 0, 1, 2, 0.5)) for _ in range(k - 1)] + [1]
    found = list_metrics(scores, relevance)
    assert set(found) == set(METRICS) and found == pytest.approx(brute_force(scores, relevance), abs=1e-12)

def test_what_is_no_score_and_what_is_no_hit():
    with pytest.raises(ValueError, match="not a number"):
        list_metrics([0.1, math.nan], [1, 0])
    assert list_metrics([math.inf, -math.inf], [1, 0])["mrr"] == 1.0
    found = list_metrics([0.3, 0.2, 0.1], [0, 0, 0])
    assert found.pop("rank") == 4 and set(found.values()) == {0.0}

def test_the_bootstrap_against_a_plain_one():
    """Users with different numbers of lists: draw users, average over all their lists."""
    rng = random.Random(1)
    lists = [[rng.gauss(u % 3, 1) for _ in range(rng.randint(1, 5))] for u in range(30)]
    users, values = zip(*((u, v) for u, vs in enumerate(lists) for v in vs))
    drawn = [rng.choices(lists, k=30) for _ in range(4000)]
    means = sorted(sum(map(sum, d)) / sum(map(len, d)) for d in drawn)
    found = intervals({"": values}, users)[""]
    assert (found["low"], found["high"]) == pytest.approx((means[100], means[3900]), abs=0.06)

def test_differences_are_paired():
    """A system that is 0.25 better on each list is so without doubt, however much lists differ."""
    worse = [0.1 * n for n in range(10)]
    better = [x + 0.25 for x in worse]
    assert evaluation.difference(better, worse) == "+0.250 [+0.250, +0.250]"
    found = evaluation.paired_differences({"a": {"m": worse}, "b": {"m": better}}, range(10), ["m"])
    assert found == {"b - a": {"m": pytest.approx({"mean": 0.25, "low": 0.25, "high": 0.25})}}

def rescore(run, qrels):
    """NDCG@10 of a TREC run, from the files alone: {system: ndcg}."""
    judged, runs = {}, {}
    for query, _, item, relevance in map(str.split, qrels.read_text().splitlines()):
        judged.setdefault(query, {})[item] = float(relevance)
    for query, _, item, rank, score, system in map(str.split, run.read_text().splitlines()):
        rows = runs.setdefault(system, {}).setdefault(query, [])
        assert int(rank) == len(rows) + 1 and (not rows or float(score) <= rows[-1][1])
        rows.append((judged[query][item], float(score)))
    return {system: sum(ndcg_at_k([y for y, _ in rows], 10) for rows in queries.values()) / len(judged)
            for system, queries in runs.items()}

def test_names_never_meet_in_trec_files(tmp_path):
    examples = [Example("u 1", [], [Item(i, i) for i in ("a b", "a_b", "a%20b", "é")], [1, 0, 0, 0])]
    explain.save_predictions(tmp_path / "r", examples, {"my system": [[4, 3, 2, 1]]})
    lines = (tmp_path / "r").read_text().splitlines()
    assert lines[0] == "1/u%201 Q0 a%20b 1 4.0 my%20system" and len({line.split()[2] for line in lines}) == 4
    assert rescore(tmp_path / "r", tmp_path / "r.qrels") == {"my%20system": 1.0}

def command(*flags):
    main(*flags, parse=parse_eval_flags, run=evaluation.main)

def evaluate(*flags):
    """eval.py in this process; returns what it printed."""
    return run_train(*flags, command=command)

def read(path):
    return json.loads(path.read_text())

def check_form(report, systems, metrics, printed):
    """The form of eval.json that the README describes, and the table that was printed of it."""
    assert list(report["systems"]) == list(report["values"]) == systems
    values, metric = report["values"], metrics[0]
    assert {len(v) for v in values.values()} == {report["num_lists"]} == {len(report["users"])}
    for name, found in report["systems"].items():
        assert all(found[m]["low"] <= found[m]["mean"] <= found[m]["high"] for m in metrics)
        assert found[metric]["mean"] == pytest.approx(sum(values[name]) / report["num_lists"])
        assert name in printed and f"{found[metric]['mean']:.3f}" in printed
    assert len(report["differences"]) == math.comb(len(systems), 2)

def test_baselines_are_the_same_on_the_same_lists(tmp_path):
    """Lists written, read again and scored again by other means give the same numbers."""
    names, lists = ["title-overlap", "item-knn"], tmp_path / "lists.jsonl"
    flags = ["--baselines", *names, "--save-candidates", lists, "--save-predictions", tmp_path / "trec"]
    printed = evaluate(*flags, "--eval-lists", 60, "--num-candidates", 10, "--out", tmp_path / "a.json")
    report = read(tmp_path / "a.json")
    check_form(report, ["random", "popularity", *names], ["ndcg@10", *METRICS], printed)
    assert report["data"] == "toy" and report["num_lists"] == 60
    scored = rescore(tmp_path / "trec", tmp_path / "trec.qrels")
    for name in names:  # `trec` has ties in one order, the report in all
        assert scored[name] == pytest.approx(report["systems"][name]["ndcg@10"]["mean"], abs=0.03)
    evaluate("--baselines", *names, "--candidates", lists, "--out", tmp_path / "b.json")
    assert read(tmp_path / "b.json") == report

def test_a_retriever_s_misses_count_as_0_and_new_items_are_noted(tmp_path, toy, monkeypatch):
    examples = toy.examples("test", 4, 5)
    missed = [replace(e, relevance=[0.0] * 5) if n % 2 else e for n, e in enumerate(examples)]
    data.save_lists(tmp_path / "lists", missed)
    flags = ["--baselines", "popularity", "--candidates", tmp_path / "lists"]
    evaluate(*flags, "--count-misses", "--out", tmp_path / "e.json")
    assert read(tmp_path / "e.json")["values"]["popularity"][1::2] == [0, 0]
    monkeypatch.setattr(data.Dataset, "popularity", lambda self: Counter())
    assert "in 4 of 4 lists" in evaluate(*flags, "--count-misses", "--out", tmp_path / "e.json")
    with pytest.raises(data.InputError, match="line 2"):
        evaluate(*flags)

def test_a_run_evaluated_again_gives_its_numbers(small, tmp_path):
    folder = shutil.copytree(small.folder, tmp_path / "r")
    evaluate("--run", folder)
    first, again = read(folder / "eval.json"), read(folder / "eval-again.json")
    assert first == read(small.folder / "eval.json")  # left alone
    if "accuracy" in first["systems"]["rl"]:
        systems, metrics, guesses = ["random", "sft", "rl"], QUERY_METRICS, first["systems"]["random"]
        for of in (guesses["by_kind"].values(), guesses["by_conditions"].values()):  # add up to the whole
            assert sum(s["num_queries"] for s in of) == guesses["num_queries"] == 4
            total = sum(s["num_queries"] * s["accuracy"]["mean"] for s in of)
            assert total / 4 == pytest.approx(guesses["accuracy"]["mean"])
    else:
        systems, metrics = ["random", "popularity", "sft", "head-only", "rl"], ["ndcg@10", *METRICS]
    check_form(first, systems, metrics, small.printed)
    assert all(again[key] == first[key] for key in ("data", "num_lists", "lists", "users"))
    assert again["systems"] == {s: first["systems"][s] for s in systems if s not in ("sft", "head-only")}

@pytest.mark.parametrize("state, system", [(("sft", 3), "sft"), (("rl", 0), "sft"), (("rl", 3), "rl")])
def test_a_run_that_has_not_finished(small, tmp_path, state, system):
    """It is reported under the name of its stage, with the numbers that the run found at that stage."""
    printed = evaluate("--run", small.states[state], "--out", tmp_path / "e.json")
    assert "not finished" in printed and f"{state[0]} step {state[1]}" in printed
    report = read(tmp_path / "e.json")
    assert list(report["systems"])[-1] == system
    assert report["systems"][system] == read(small.folder / "eval.json")["systems"][system]

def test_explain_scores_no_more_than_it_shows(small, monkeypatch):
    scored, original = [], policy.sample_rows
    monkeypatch.setattr(policy, "sample_rows", lambda *rest: (scored.extend(rest[2]), original(*rest))[1])
    printed = evaluate("--run", small.folder, "--explain", 2)
    assert len(scored) == 2 and printed.count("=== ") == 2
    assert sum(line.startswith(" *") for line in printed.splitlines()) >= 2  # what is right is marked
    said = (read(small.folder / "rationales.json")["sft"][0][0].split() or ["(no"])[0]
    assert f"before| {said}" in printed.replace("before |", "before|")  # beside that of now

def test_models_outside_a_run(tmp_path, tmp_path_factory):
    """A checkpoint is its run's `rl`, also where it does not reason; without a head it is untrained."""
    run_train(*METHODS["r2rank"], "--no-reasoning", "--out", tmp_path / "bare")
    for folder in (small_run("r2rank", tmp_path_factory).folder, tmp_path / "bare"):
        flags = ["--eval-lists", 4, "--num-candidates", 6, "--max-new-tokens", 12]
        evaluate("--model", folder / "checkpoint", *flags, "--out", tmp_path / "e.json")
        report, first = read(tmp_path / "e.json"), read(folder / "eval.json")
        assert report["values"]["rl"] == pytest.approx(first["values"]["rl"])
    (folder / "checkpoint" / "score_head.safetensors").unlink()
    evaluate("--model", folder / "checkpoint", *flags, "--out", tmp_path / "e.json")
    assert list(read(tmp_path / "e.json")["systems"]) == ["random", "popularity", "zero-shot"]

def test_recommendations_leave_out_what_the_user_has(tmp_path_factory, toy, capsys):
    """They are those of r2r.recommend on what a baseline retrieves; --ask finds by words."""
    folders = {method: small_run(method, tmp_path_factory).folder for method in METHODS}
    flags, users = ["--run", folders["r2rank"], "--retrieve", 30, "--top", 3], ["u420", "u421"]
    printed = evaluate(*flags, "--recommend", *users).split("=== user ")[1:]
    model = r2r.load_checkpoint(folders["r2rank"] / "checkpoint")
    for user, ids, text in zip(users, retrieve(toy, users, "item-knn", 30), printed, strict=True):
        assert text.startswith(user) and len(ids) == 30
        assert not {x.item_id for x in toy.sequences[user]} & set(ids)
        found = r2r.recommend(*model, toy, user, ids, 3, max_new_tokens=12)
        places = [text.index(f"{r.score:+8.3f}  {r.item.title}") for r in found]
        assert places == sorted(places) and len(places) == 3
    assert "u999" in refusal(capsys, *flags, "--recommend", "u999", command=command)
    assert "400 items" in refusal(capsys, *flags, "--recommend", "u421", "--retrieve", 500, command=command)
    assert "--method rerec" in refusal(capsys, *flags, "--ask", "soap", command=command)
    assert [x.id for x in toy.history("u420", 11, 99)] == [x.item_id for x in toy.sequences["u420"]]
    candidates = evaluate("--run", folders["rerec"], "--ask", "a mint soap").splitlines()[0].split("; ")
    assert all("mint" in title or "soap" in title for title in candidates) and len(candidates) == 6

@pytest.mark.parametrize("flags, words", [
    ("", "--run DIR"), ("--run nowhere", "config.json"), ("--run r --model tiny", "leave out"),
    ("--baselines nosuch", "title-overlap"), ("--baselines popularity --explain 2", "--explain"),
    ("--baselines --open-ended x", "recbench"), ("--core 5 --baselines", "toy"),
    ("--baselines --out nowhere/x.json", "--out nowhere/x.json"), ("--model ./none", "no such folder")])
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(capsys, *flags.split(), command=command) and not list(tmp_path.iterdir())

def test_a_damaged_checkpoint_and_what_is_for_lists_alone_are_refused(tmp_path, tmp_path_factory, capsys):
    for flag in ("--save-candidates", "--save-predictions", "--baselines", "--candidates"):
        flags = "--run", small_run("rerec", tmp_path_factory).folder, flag, "popularity"
        assert flag in refusal(capsys, *flags, command=command)
    folder = shutil.copytree(small_run("r2rank", tmp_path_factory).folder, tmp_path / "r")
    for name in ("score_head.safetensors", "model.safetensors"):
        (folder / "checkpoint" / name).write_bytes(b"0" * 99)
        assert "checkpoint" in refusal(capsys, "--run", folder, command=command)
