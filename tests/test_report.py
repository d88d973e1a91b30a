"""Tables of runs: against numbers computed by hand, and those of results/README.md against their files."""

import json
import re
from pathlib import Path

import pytest

from data import InputError
from eval import intervals
from extras import report
from runs import ROOT

TEXT = (ROOT / "results/README.md").read_text()
TABLES = re.findall(r"```bash\n(python extras/report\.py [^\n]*)\n```\n\n```\n(.*?)```", TEXT, re.S)

def interval(mean):
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}

def fake(final, seed=0, lists="L", values=(), **systems):
    """A result of R2Rank. values: NDCG@10 of rl, list by list; systems: name -> NDCG@10, or values."""
    metrics = {"rl": final, "random": 0.25, "sft": 0.4, **systems}
    return {"flags": {"method": "r2rank"}, "seed": seed, "data": "shop", "num_lists": 4, "lists": lists,
            "systems": {name: {m: interval(x) for m in ("ndcg@10", "hr@1", "hr@10", "mrr")}
                        for name, x in metrics.items()},
            "users": [0, 0, 1, 2], "values": {"rl": list(values or [final] * 4)},
            "curve": {"rl": {"step": [1, 2], "utility": [0.1, final]}}}

def save(folder, name, result):
    (folder / f"{name}.json").write_text(json.dumps(result))
    return str(folder / f"{name}.json")

def cells(block):  # {row: {column: text}}
    return {name: texts for name, (_, texts) in report.summarise(block).items()}

def test_seeds_of_a_name_are_one_row(tmp_path):
    runs = [save(tmp_path, f"plain-seed{n}", fake(x, n, f"L{n}")) for n, x in ((2, 0.7), (0, 0.5), (1, 0.6))]
    (block,) = report.read_blocks([*runs, save(tmp_path, "other", fake(0.9, 0, "L0"))])
    rows = cells(block)
    assert list(rows) == ["plain", "other", "random"]
    expected = {"seeds": "3", "ndcg@10": "0.600", "dev.": "0.100", "hr@1": "0.600", "before": "0.400"}
    assert expected.items() <= rows["plain"].items()
    assert rows["other"]["dev."] == "" and rows["other"]["- plain"] == "+0.400 [+0.400, +0.400]"
    assert rows["random"]["seeds"] == "3"  # the lists of seed 0, which two runs share, count once

def test_the_paired_difference_is_that_of_the_means_over_seeds_on_the_same_lists(tmp_path):
    runs = [save(tmp_path, name, fake(0.5, seed, lists, values)) for name, seed, lists, values in (
        ("a-seed0", 0, "L", [0.5, 0.2, 0.9, 0.1]), ("a-seed1", 1, "L", [0.3, 0.4, 0.7, 0.3]),
        ("b-seed0", 0, "L", [0.6, 0.6, 0.2, 0.2]), ("b-seed5", 5, "elsewhere", [9.0] * 4))]
    (block,) = report.read_blocks(runs)
    users = [("L", 0), ("L", 0), ("L", 1), ("L", 2)]
    differences = [0.6 - 0.4, 0.6 - 0.3, 0.2 - 0.8, 0.2 - 0.2]
    assert report.paired(block["b"], block["a"]) == pytest.approx(intervals({"": differences}, users)[""])
    assert "-0.025 [" in cells(block)["b"]["- a"] and cells(block)["a"]["- a"] == ""
    assert "not all rows have the same lists" in report.table(block)

def test_requests_are_reported_by_accuracy_and_by_kind_in_a_table_of_their_own(tmp_path):
    result = fake(0.5)
    result["flags"]["method"] = "rerec"
    kinds = {"explicit": {"accuracy": interval(0.9)}, "implicit": {"accuracy": interval(0.2)}}
    result["systems"] = {name: {"accuracy": interval(x), "by_kind": kinds}
                         for name, x in (("head-only", 0.1), ("sft", 0.2), ("rl", 0.5))}
    save(tmp_path, "result", result)
    block, other = report.read_blocks([tmp_path, save(tmp_path, "lists", fake(0.5))])
    expected = {"accuracy": "0.500", "explicit": "0.900", "implicit": "0.200", "before": "0.100"}
    assert expected.items() <= cells(block)[tmp_path.name].items()  # the directory's name
    assert list(other) == ["lists"]

def test_what_is_no_result_or_stands_twice_is_named(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}: no result.json of a finished run"):
        report.read_blocks([tmp_path])
    run = save(tmp_path, "a-seed0", fake(0.5))
    with pytest.raises(InputError, match="another run of this name has this seed"):
        report.read_blocks([run, run])

def test_a_result_holds_short_curves_and_no_path_of_the_machine(tmp_path):
    flags = {"method": "r2rank", "data": "/home/me/shop", "out": "/home/x", "cache_dir": "/home", "lr": 0.1}
    (tmp_path / "config.json").write_text(json.dumps({"flags": flags, "seed": 0}))
    rows = [{"stage": "rl", "step": n, "utility": n, "kl": None, "seconds": 2.0} for n in range(1, 251)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluated = fake(0.5) | {"differences": {}}
    del evaluated["flags"]
    report.write_result(tmp_path, evaluated, seconds=600)
    text, result = (tmp_path / "result.json").read_text(), report.read_blocks([tmp_path])[0][tmp_path.name][0]
    assert "/home" not in text and result["flags"] == {"method": "r2rank", "data": "shop", "lr": 0.1}
    curve = result["curve"]["rl"]
    assert curve["utility"][:2] == [2.0, 5.0] and curve["step"][:2] == [3, 6] and "kl" not in curve
    assert curve["utility"][-1] == 250 and len(curve["step"]) == 84  # the last window has one step
    assert result["seconds"] == {"rl": 500.0, "all": 600}

def test_a_figure_shows_the_rows_and_changes_only_with_the_runs(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [save(tmp_path, "some name", fake(0.5)), save(tmp_path, "b", fake(0.7) | {"data": "other"})]
    for out in ("one.svg", "two.svg"):
        report.main([*runs, "--figure", f"{tmp_path}/{out}"])
    text = (tmp_path / "one.svg").read_text()
    assert all(words in text for words in ("some name", "random", "0.500", "0.700", "NDCG@10, in training"))
    assert (tmp_path / "two.svg").read_text() == text

@pytest.mark.parametrize("command, table", TABLES, ids=[command.split()[2] for command, _ in TABLES])
def test_a_table_is_what_its_command_prints(command, table, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    files = [str(path) for pattern in command.split()[2:] for path in sorted(Path(".").glob(pattern))]
    report.main(files)
    printed = [line.rstrip() for line in capsys.readouterr().out.strip().splitlines()]
    assert printed == [line.rstrip() for line in table.strip().splitlines()]

def test_no_stored_result_names_a_place_of_the_machine_that_made_it():
    assert len(TABLES) >= 2
    for path in (ROOT / "results").rglob("*.json"):
        assert not re.search(r'"/(home|root|mnt|tmp|work)/', path.read_text()), path
