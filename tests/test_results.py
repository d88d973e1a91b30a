"""result.json, tables over seeds, figures, and test-time reasoning: against hand-computed values and independent re-scoring."""

import json
import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import eval as evaluation
import policy
import r2r
import train
from data import InputError
from eval import list_metrics

MACHINE = {"processor": "a CPU", "cores": 2, "threads": 1, "processes": 1, "gpu": None}


def interval(mean):
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


def fake(final, seed=0, baseline=0.3, lists=None, **flags):
    """A result of R2Rank; `lists` names its test lists."""
    system = lambda x: {m: interval(x) for m in ("ndcg@10", "hr@1", "hr@10", "mrr")}
    return {"flags": {"method": "r2rank", "num_candidates": 20, "credit": "item", "lr": 0.1, "no_reasoning": False, "seed": seed, **flags}, "seed": seed,
            "machine": MACHINE, "seconds": {"rl": 5.0, "all": 10.0 + seed}, "data": "shop", "num_lists": 50, "lists": lists or f"lists {seed}",
            "systems": {"random": system(baseline), "sft": system(0.4), "rl": system(final)}, "differences": {"rl - sft": {"ndcg@10": interval(final - 0.4)}},
            "curve": {"rl": {"step": list(range(1, 41)), "utility": [final * n / 40 for n in range(1, 41)]}}}


def test_runs_that_differ_in_the_seed_alone_are_one_row():
    results = [fake(0.7, 2, 0.2), fake(0.5, 0, 0.3), fake(0.6, 1, 0.1), fake(0.9, 0, 0.3, credit="list")]
    (block,) = evaluation.summarise_results(results)
    assert {label: [r["seed"] for r in runs] for label, runs in block["runs"].items()} == {"credit item": [0, 1, 2], "credit list": [0]}
    row = block["rows"]["credit item"]
    assert row["ndcg@10"]["values"] == [0.5, 0.6, 0.7] and row["ndcg@10"]["mean"] == pytest.approx(0.6)
    assert row["ndcg@10"]["sd"] == pytest.approx(0.1)  # ((0.1² + 0 + 0.1²) / 2)^½
    assert (row["ndcg@10"]["low"], row["ndcg@10"]["high"]) == (0.5, 0.7)
    assert row["gain"]["mean"] == pytest.approx(0.2) and row["before"]["mean"] == pytest.approx(0.4) and row["seconds"]["mean"] == 11
    alone = block["rows"]["credit list"]["ndcg@10"]  # one seed: its own interval over lists
    assert "sd" not in alone and (alone["low"], alone["high"]) == (pytest.approx(0.8), pytest.approx(1.0))
    assert block["rows"]["random"]["ndcg@10"]["values"] == [0.2, 0.3, 0.1]  # seed 0's lists, which two runs share, count once
    table = evaluation.result_table(block)
    assert "0.600 ± 0.100 [0.500, 0.700]" in table and "0.900         [0.800, 1.000]" in table and "4 run(s) on a CPU, 2 core(s)" in table


def test_labels_hold_what_tells_configurations_apart():
    label = lambda *results: list(evaluation.configurations(list(results))[0])
    assert label(fake(0.5), fake(0.5, 1)) == ["R2Rank"]
    assert label(fake(0.5), fake(0.5, no_reasoning=True)) == ["R2Rank", "no-reasoning"]
    assert label(fake(0.5), fake(0.5, lr=1), fake(0.5, lr=1, credit="list")) == ["lr 0.1", "R2Rank", "credit list"]  # most have lr 1 and credit item
    assert label(fake(0.5), fake(0.5, 1, new_switch=False), fake(0.5, 2, new_switch=True)) == ["R2Rank", "new-switch"]  # an older run did not know it
    together, notes = evaluation.configurations([fake(0.5), fake(0.5, lr=1, no_reasoning=True)])
    assert list(together) == ["R2Rank", "no-reasoning"] and notes == ["with no-reasoning lr changed, too"]
    with pytest.raises(InputError, match="same seed"):
        label(fake(0.5), fake(0.6))


def test_configurations_and_baselines_are_compared_on_the_same_lists():
    """Means of the seeds, list by list, where the lists are the same; bootstrap over users. A list that only one side has counts nowhere."""
    values = lambda **systems: {"values": systems, "users": [0, 0, 1, 2]}
    own, users = [[0.5, 0.2, 0.9, 0.1], [0.3, 0.4, 0.7, 0.3]], [("L", 0), ("L", 0), ("L", 1), ("L", 2)]
    other, sasrec = [0.6, 0.6, 0.2, 0.2], [0.0, 0.1, 0.2, 0.3]
    results = [fake(0.5, n, lists="L") | values(rl=v, **({"sasrec": sasrec} if n else {})) for n, v in enumerate(own)]
    results[1]["systems"]["sasrec"] = results[1]["systems"]["random"]
    results += [fake(0.5, 0, lists="L", credit="list") | values(rl=other), fake(0.5, 2, credit="list") | values(rl=[9.0] * 4)]
    (block,) = evaluation.summarise_results([r | {"label": "list" if r["flags"]["credit"] == "list" else "r2rank"} for r in results[::-1]])
    assert block["first"] == list(block["runs"])[0] == "r2rank"
    mean = [0.4, 0.3, 0.8, 0.2]
    assert block["rows"]["list"]["against"] == pytest.approx(evaluation.interval([o - m for o, m in zip(other, mean)], users))
    assert block["rows"]["sasrec"]["against"] == pytest.approx(evaluation.interval([o - m for o, m in zip(sasrec, mean)], users))
    assert "against" not in block["rows"]["r2rank"] and "against" not in block["rows"]["random"]
    assert "-0.025 [" in evaluation.result_table(block) and "- r2rank, paired" in evaluation.result_table(block)


def test_copies_are_labelled_by_their_names(tmp_path):
    for name, flags in (("plain-seed0", {"credit": "list"}), ("plain-seed1", {"credit": "list"}), ("other", {})):
        (tmp_path / f"{name}.json").write_text(json.dumps(fake(0.5, int(name[-1]) if name[-1].isdigit() else 0, **flags)))
    results = [evaluation.read_result(p) for p in sorted(tmp_path.iterdir())]
    assert list(evaluation.configurations(results)[0]) == ["credit item", "plain"]
    with pytest.raises(InputError, match="plain"):
        evaluation.configurations(results[1:] + [fake(0.5, credit="item") | {"label": "plain"}])


def test_only_runs_on_like_lists_stand_in_one_table():
    blocks = evaluation.summarise_results([fake(0.5), fake(0.5, num_candidates=50), fake(0.6, 1)])
    assert [list(b["runs"]) for b in blocks] == [["R2Rank"], ["R2Rank"]] and len(blocks[0]["runs"]["R2Rank"]) == 2
    (block,) = evaluation.summarise_results([fake(0.5), fake(0.5, lr=1, lists="others")])
    assert any("different lists" in note for note in block["notes"])


@pytest.fixture
def folder(tmp_path):
    """A run directory as train.py leaves it, with 250 RL steps."""
    flags = {"method": "r2rank", "model": "/home/me/models/Qwen", "data": "shop", "out": "/home/me/runs/r", "cache_dir": "/home/me", "lr": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps({"flags": flags, "versions": {"torch": "2"}, "seed": 3, "device": "cpu", "dtype": "torch.float32"}))
    rows = [{"stage": "sft", "step": n, "loss": 1.0, "seconds": 0.5} for n in (1, 2)] + [
        {"stage": "rl", "step": n, "utility": n / 250, "grad_norm": 1.0, "seconds": 2.0} for n in range(1, 251)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    report = {"data": "shop", "num_lists": 2, "lists": "x", "systems": {"rl": {"ndcg@10": interval(1 / 3)}}, "slices": {"history": {}},
              "differences": {"rl - sft": {"ndcg@10": interval(0.1), "mrr": interval(0.2)}}}
    (tmp_path / "eval.json").write_text(json.dumps(report))
    return tmp_path


def test_a_run_directory_becomes_a_result(folder):
    evaluation.write_result(folder, seconds=600.0, processes=2)
    text = (folder / "result.json").read_text()
    result = evaluation.read_result(folder)
    assert result == evaluation.read_result(shutil.copy(folder / "result.json", folder / "copy.json")) == json.loads(text)
    assert "/home" not in text and result["flags"] == {"method": "r2rank", "model": "Qwen", "data": "shop", "lr": 1e-5}
    assert result["seed"] == 3 and result["versions"] == {"torch": "2"} and result["machine"]["processes"] == 2 and result["machine"]["processor"]
    assert result["seconds"] == {"sft": 1.0, "rl": 500.0, "all": 600.0}
    curve = result["curve"]["rl"]  # windows of 3 steps; the last holds step 250 alone
    assert curve["step"] == [*range(3, 250, 3), 250] and set(curve) == {"step", "utility", "seconds"}
    assert curve["utility"][0] == pytest.approx(2 / 250) and curve["utility"][-1] == 1.0
    assert result["systems"]["rl"]["ndcg@10"]["mean"] == 0.333333 and result["differences"] == {"rl - sft": {"ndcg@10": interval(0.1)}}
    report = json.loads((folder / "eval.json").read_text())
    report["systems"]["sasrec"] = {"ndcg@10": interval(0.5)}
    (folder / "eval.json").write_text(json.dumps(report))
    evaluation.write_result(folder)
    renewed = evaluation.read_result(folder)
    assert set(renewed.pop("systems")) == {"rl", "sasrec"} and renewed == {k: v for k, v in result.items() if k != "systems"}


def test_what_stays_in_a_report_is_on_the_same_lists(folder, toy):
    evaluation.write_result(folder, 1.0)
    examples, system = toy.examples("test", 3), {"ndcg@10": interval(0.5)}
    values = {m: [0.12344, 1.0, 0.0] for m in evaluation.METRICS}
    write = lambda lists, names, **more: evaluation.write_eval(folder / "eval.json", "toy", lists, dict.fromkeys(names, system),
                                                               {name: {m: v[:len(lists)] for m, v in values.items()} for name in names}, True, True, **more)
    write(examples, ["random", "sft", "rl"], test_time={"rationales": [1]})
    write(examples, ["random", "rl"], test_time={"length": [2]})
    result = json.loads((folder / "result.json").read_text())
    assert list(result["systems"]) == ["random", "sft", "rl"] and result["test_time"] == {"rationales": [1], "length": [2]}
    assert result["values"] == {"sft": [0.1234, 1.0, 0.0], "rl": [0.1234, 1.0, 0.0]} and len(result["users"]) == 3
    assert set(result["differences"]) == {"sft - random", "rl - random", "rl - sft"} and list(result["differences"]["rl - sft"]) == ["ndcg@10"]
    write(examples[:2], ["rl"])
    result = json.loads((folder / "result.json").read_text())
    assert list(result["systems"]) == ["rl"] and "test_time" not in result and result["num_lists"] == 2 and result["differences"] == {}
    assert result["seconds"]["all"] == 1.0


def test_seconds_of_a_resumed_run_add_up(tmp_path):
    def part(seconds, state=None):
        """A run directory opened, and worked in for `seconds`."""
        part = train.Run(tmp_path / "r", train.argparse.Namespace(save_every=1, keep=2))
        part.model = part.tokenizer = type("Saves", (torch.nn.Module,), {"save_pretrained": lambda self, folder, **kw: None})()
        if state:
            part.open_state(state)
        part.open_log()
        part.started -= seconds
        return part

    optimizer = train.Optimizer([{"params": [torch.nn.Parameter(torch.ones(2))], "lr": 1.0}])
    for n, (spent, total) in enumerate([(100, 100), (10, 110), (1, 111)], start=1):
        current = part(spent, current.newest_state() if n > 1 else None)
        assert total <= current.seconds() < total + 5
        current.save("rl", n, optimizer)
        current.started -= 1000  # work after the last state is lost, and done again
        current.lock.close()


# --- figures -----------------------------------------------------------------------------------------------------------------


def write_fakes(folder):
    for n, result in enumerate([fake(0.5), fake(0.6, 1), fake(0.7, credit="list")]):
        if n < 2:
            row = lambda value: {"value": value, "ndcg@10": interval(0.5), "tokens": 100.0 * value, "seconds": 0.1}
            result["test_time"] = {"rationales": [row(1), row(4)], "greedy": [row(1)], "length": [row(8)]}
        (folder / f"{n}.json").write_text(json.dumps(result))
    return [folder / f"{n}.json" for n in range(3)]


def test_a_figure_of_two_configurations(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    evaluation.evaluate_results(write_fakes(tmp_path), tmp_path / "results.svg")
    text = (tmp_path / "results.svg").read_text()
    shown = {"".join(e.itertext()).strip() for e in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")}
    assert {"credit item", "credit list", "random", "0.550", "0.700"} <= shown and len(text) < 100_000
    assert any("4 averaged" in s for s in shown) and any("8 tokens" in s for s in shown)
    printed = capsys.readouterr().out
    assert "results.svg" in printed and "4 averaged            0.500" in printed and "0.550 ± 0.071" in printed
    evaluation.evaluate_results(write_fakes(tmp_path), tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == text  # no date, no random ids: a figure in a repository changes when its runs do


def test_without_matplotlib_there_is_still_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        evaluation.evaluate_results(write_fakes(tmp_path), tmp_path / "results.svg")
    assert "credit list" in capsys.readouterr().out and not (tmp_path / "results.svg").exists()


def test_what_is_no_result_is_named(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    for path in (tmp_path, tmp_path / "x.json", tmp_path / "none.json"):
        with pytest.raises(InputError, match=f"--plot {path}.*finished"):
            evaluation.read_result(path)
    with pytest.raises(InputError, match="ends in .svg"):
        evaluation.evaluate_results([tmp_path], tmp_path / "figure.txt")


# --- test-time reasoning -------------------------------------------------------------------------------------------------------


def test_averages_over_groups_of_rationales():
    scores = torch.tensor([[3.0, 0.0, 0.0, 9.0, 7.0], [1.0, 1.0, 4.0, 0.0, 7.0]])  # two items, five rationales
    first, second = list_metrics([1, 0], [1, 0])["ndcg@10"], list_metrics([0, 1], [1, 0])["ndcg@10"]
    assert evaluation.group_ndcg(scores[:, :4], [1, 0], 1) == pytest.approx((first + second + second + first) / 4)
    assert evaluation.group_ndcg(scores, [1, 0], 2) == pytest.approx((first + first) / 2)  # (1.5, 1), (4.5, 2); the fifth is left over
    assert evaluation.group_ndcg(scores[:, :3], [1, 0], 3) == second  # (1, 2)


def test_test_time_rows_are_those_of_independent_scoring(model, tokenizer, score_head, toy):
    model.eval()
    examples, sampling = toy.examples("test", 3), policy.Sampling(8, max_rows=320)
    found = evaluation.test_time(model, tokenizer, score_head, examples, sampling, 40, [1, 2, 4], [2, 8], seed=5)
    lists = [(e.history, e.candidates) for e in examples]
    mean = lambda scores: sum(list_metrics(s, e.relevance)["ndcg@10"] for s, e in zip(scores, examples)) / 3

    torch.manual_seed(5)
    averaged = [s for s, _ in r2r.score_lists(model, tokenizer, score_head, lists, sampling, 4, 40)]
    torch.manual_seed(5)
    rollout = r2r.scored_rollout(model, tokenizer, score_head, lists, sampling, 4, 40)
    single = rollout.lists(rollout.scores)
    rows = {r["value"]: r for r in found["rationales"]}
    assert rows[4]["ndcg@10"]["mean"] == pytest.approx(mean(averaged))
    assert rows[1]["ndcg@10"]["mean"] == pytest.approx(sum(mean([s[:, g] for s in single]) for g in range(4)) / 4)
    assert len({r["ndcg@10"]["mean"] for r in rows.values()}) > 1
    tokens = sum(map(len, rollout.responses)) / 3
    assert [rows[n]["tokens"] for n in (1, 2, 4)] == pytest.approx([tokens / 4, tokens / 2, tokens]) and all(r["seconds"] > 0 for r in rows.values())
    greedy = mean([s for s, _ in r2r.score_lists(model, tokenizer, score_head, lists, sampling, 1, 40)])
    assert found["greedy"][0]["ndcg@10"]["mean"] == found["length"][1]["ndcg@10"]["mean"] == pytest.approx(greedy)
    assert [r["value"] for r in found["length"]] == [2, 8] and found["length"][0]["tokens"] <= 40 < found["length"][1]["tokens"]


@pytest.mark.parametrize("flags, words", [
    (["--plot", "r", "--run", "r"], "drop --run"), (["--plot", "r", "--seed", "3"], "drop --seed"), (["--plot", "nowhere"], "--plot nowhere"),
    (["--test-time", "1,2", "--baselines", "random"], "--run"), (["--test-time", "0,2"], "above 0"), (["--test-lengths", "x"], "--test-lengths"),
    (["--test-time", "2", "--model", "tiny", "--no-reasoning"], "without reasoning"),
    (["--baselines", "facts-linear"], "add --facts"),
])
def test_contradictions_are_refused(capsys, monkeypatch, flags, words):
    monkeypatch.setattr(sys, "argv", ["eval.py", *flags])
    with pytest.raises(SystemExit) as error:
        evaluation.run_main(evaluation.main)
    assert error.value.code == 2 and words in capsys.readouterr().err


# --- what the documents say ------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(p for p in (ROOT / "results").iterdir() if p.is_dir())


def stored(folder):
    return evaluation.summarise_results([evaluation.read_result(p) for p in sorted((ROOT / "results" / folder).glob("*.json"))])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_written_tables_are_those_of_the_stored_results(folder):
    text = (ROOT / "results" / "README.md").read_text()
    for block in stored(folder.name):
        assert evaluation.result_table(block) in text


def test_the_readme_has_no_number_that_no_result_holds():
    """Its tables line by line; what else it says with three decimals stands in a table of the stored results."""
    systems = lambda *parts: json.loads((ROOT / "results").joinpath(*parts).read_text())
    tables = [evaluation.result_table(block) for folder in FOLDERS for block in stored(folder)]
    tables += [evaluation.table(systems("toy", "r2rank-seed0.json")["systems"]), evaluation.query_table(systems("toy-rerec", "rerec-seed0.json")["systems"])]
    tables += [evaluation.table(systems("baselines-beauty.json")["systems"], ("ndcg@10", "hr@1", "hr@5", "hr@10", "mrr", "rank")),
               evaluation.table(systems("baselines-beauty-full.json")["full"], ("ndcg@10", "hr@1", "hr@5", "hr@10", "hr@20", "mrr", "rank"))]
    gain = systems("toy", "r2rank-seed0.json")["differences"]["rl - sft"]["ndcg@10"], systems("toy-rerec", "rerec-seed0.json")["differences"]["rl - sft"]["accuracy"]
    tables += ["rl - sft, paired: {mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**g) for g in gain]
    lines = {line.strip() for table in tables for line in table.splitlines()}
    numbers = {x.lstrip("+-") for line in lines for x in re.findall(r"[+-]?\d+\.\d{3}\b", line)}
    values = [v for folder in FOLDERS for block in stored(folder) for row in block["rows"].values() for c in row.values() for v in c.get("values", ())]
    numbers |= {f"{v:.3f}" for v in values}
    readme = (ROOT / "README.md").read_text()
    for n, block in enumerate(readme.split("```")):
        for line in block.splitlines():
            found = re.findall(r"(?<![\d.])\d+\.\d{3}\b", line)
            if n % 2 and len(found) > 2:
                assert any(line.strip().startswith(known) or known == line.strip() for known in lines if known), line
            else:
                assert set(found) <= numbers, line
