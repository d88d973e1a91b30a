"""A table, and a figure, of finished runs: means over seeds, on the same test lists.

    python extras/report.py runs/toy-seed0 results/toy/*.json [--figure toy.svg]

Each is a run directory, or a copy of its result.json. NAME-seed0, NAME-seed1, … are one row NAME. Runs with
the same data and number of test lists stand in one table.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from statistics import fmean as mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds only what is in its folder

from data import InputError
from eval import intervals
from extras.flags import run_main

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: for all eyes
CURVES = {"utility": "expected NDCG@10", "accuracy": "accuracy", "relevant_lookups": "relevant look-ups"}
BEFORE = ("head-only", "sft", "zero-shot")  # the model before RL: the first of them that a run has

def write_result(folder, report, seconds):
    """RUN/result.json, all that tables and figures need of a run: no path of the machine is in it.
    report: what eval.json holds. A curve's points are means over at most 100 windows of steps."""
    config, stages, curve = json.loads((folder / "config.json").read_text()), {}, {}
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        stages.setdefault(row.pop("stage"), []).append(row)
    for stage, rows in stages.items():
        size = -(-len(rows) // 100)
        windows = [rows[n:n + size] for n in range(0, len(rows), size)]
        curve[stage] = {name: [float(f"{mean(row[name] for row in w):.6g}") for w in windows]
                        for name, value in rows[0].items() if name != "step" and value is not None}
        curve[stage]["step"] = [w[-1]["step"] for w in windows]
    flags = {k: Path(v).name if isinstance(v, str) else v for k, v in config["flags"].items()
             if k not in ("out", "resume", "cache_dir", "data_dir", "save_every")}
    result = config | report | {
        "flags": flags, "curve": curve,
        "values": {k: [round(x, 4) for x in v] for k, v in report["values"].items() if k != "random"},
        "seconds": {k: sum(r["seconds"] for r in rows) for k, rows in stages.items()} | {"all": seconds}}
    lines = ",".join(f"\n {json.dumps(k)}: {json.dumps(v)}" for k, v in result.items())
    (folder / "result.json").write_text("{" + lines + "\n}\n")

def metric_of(run):
    return "accuracy" if run["flags"]["method"] == "rerec" else "ndcg@10"

def read_blocks(paths):
    """Run directories or copies of result.json -> [{name: [results]}], a table each. Raises InputError."""
    blocks = {}
    for path in paths:
        file = Path(path) / "result.json" if Path(path).is_dir() else Path(path)
        try:
            r = json.loads(file.read_text())
            key = r["data"], metric_of(r), r["num_lists"]
            r["systems"]["rl"][metric_of(r)], r["seed"], r["lists"], r["users"], r["values"]["rl"], r["curve"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: no result.json of a finished run of train.py ({error!r})") from None
        name = file.resolve().parent.name if file.name == "result.json" else file.stem
        runs = blocks.setdefault(key, {}).setdefault(re.sub(r"-seed\d+$", "", name), [])
        if any(r["seed"] == other["seed"] for other in runs):
            raise InputError(f"{path}: another run of this name has this seed; leave one out, or rename it")
        runs.append(r)
    return list(blocks.values())

def paired(runs, first, system="rl"):
    """Interval of `system` of runs minus rl of the runs `first`; None where they have no lists in common."""
    # Means over seeds, list by list; then users are drawn anew. So it says nothing about other seeds.
    differences, users = [], []
    for lists, owners in {r["lists"]: r["users"] for r in first}.items():
        a, b = ([r["values"][name] for r in group if r["lists"] == lists and name in r["values"]]
                for group, name in ((runs, system), (first, "rl")))
        if a:
            differences += [mean(x) - mean(y) for x, y in zip(zip(*a), zip(*b))]
            users += [(lists, user) for user in owners]
    return intervals({"": differences}, users)[""] if differences else None

def summarise(block):
    """{name: (values of the main metric over seeds, {column: text})} of the runs, then of the baselines."""
    first_name, first = next(iter(block.items()))
    runs, metric = sum(block.values(), []), metric_of(first[0])
    groups, rows = {name: (group, "rl") for name, group in block.items()}, {}
    for name in dict.fromkeys(s for r in runs for s in r["systems"] if s not in ("rl", *BEFORE)):
        # A baseline does not depend on the run: it counts once for each set of lists.
        groups[name] = list({r["lists"]: r for r in runs if name in r["systems"]}.values()), name
    for name, (group, system) in groups.items():
        systems = [r["systems"][system] for r in group]
        values = [s[metric]["mean"] for s in systems]
        gap = paired(group, first, system) if group is not first else None
        texts = {"seeds": str(len(values)), metric: f"{mean(values):.3f}",
                 "dev.": f"{stdev(values):.3f}" if len(values) > 1 else "",
                 f"- {first_name}": "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**gap) if gap else ""}
        kinds = [k for k in systems[0].get("by_kind", ()) if all(k in s["by_kind"] for s in systems)]
        for column in kinds or ("hr@1", "hr@10", "mrr"):
            found = [s["by_kind"][column][metric] if kinds else s[column] for s in systems]
            texts[column] = f"{mean(x['mean'] for x in found):.3f}"
        if system == "rl":
            for before in [s for s in BEFORE if all(s in r["systems"] for r in group)][:1]:
                texts["before"] = f"{mean(r['systems'][before][metric]['mean'] for r in group):.3f}"
            for column in ("entropy", "format_rate", "relevant_lookups"):  # at the end of training
                ends = [r["curve"]["rl"][column][-1] for r in group if r["curve"].get("rl", {}).get(column)]
                texts[column] = f"{mean(ends):.2f}" if ends else ""
        rows[name] = values, texts
    return rows

def table(block):
    """The printable table of a block; columns that no row fills are left out."""
    run, rows = next(iter(block.values()))[0], {name: texts for name, (_, texts) in summarise(block).items()}
    columns = dict.fromkeys(c for row in rows.values() for c in row if any(r.get(c) for r in rows.values()))
    cells = [["", *columns], *([name, *(texts.get(c, "") for c in columns)] for name, texts in rows.items())]
    width = [max(map(len, column)) for column in zip(*cells)]
    lines = [f"{run['data']}, {run['num_lists']} test lists; means over seeds"]
    for name, *row in cells:
        lines.append("  ".join([name.ljust(width[0]), *map(str.rjust, row, width[1:])]).rstrip())
    if len({frozenset(r["lists"] for r in group) for group in block.values()}) > 1:
        lines.append("note: not all rows have the same lists; the paired difference takes those of both")
    return "\n".join(lines)

def plot(blocks, out):
    """A row of panels a block: the training curves, and the main metric on the test lists."""
    try:
        import matplotlib.figure
    except ImportError:
        raise InputError("--figure needs matplotlib: pip install matplotlib") from None
    matplotlib.rcParams.update({"svg.hashsalt": "report", "svg.fonttype": "none"})  # a file of the runs alone
    figure = matplotlib.figure.Figure((12, 3.6 * len(blocks)), layout="constrained")
    for block, part in zip(blocks, figure.subfigures(len(blocks), 1, squeeze=False).flat):
        first, colours = next(iter(block.values()))[0], dict(zip(block, len(block) * COLOURS))
        metric = metric_of(first)
        columns = [c for c in CURVES if any(c in r["curve"].get("rl", {}) for g in block.values() for r in g)]
        *panels, right = part.subplots(1, len(columns) + 1, squeeze=False).flat
        for panel, column in zip(panels, columns):
            for name, group in block.items():
                curves = [r["curve"]["rl"] for r in group if column in r["curve"].get("rl", {})]
                y = [mean(seeds) for seeds in zip(*(curve[column] for curve in curves))]
                panel.plot(curves[0]["step"][:len(y)] if y else [], y, color=colours[name])
            panel.set(title=f"{CURVES[column]}, in training", xlabel="step; colours as on the right")
        for name, (values, _) in summarise(block).items():
            label = f"{name} {mean(values):.3f}"
            right.barh(label, mean(values), color=colours.get(name, "0.8"))
            right.plot(values, [label] * len(values), "k.")
        right.set(title=f"{metric} on the test lists", xlabel="dots: seeds; grey: baselines")
        right.invert_yaxis()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)

def main(arguments=None):
    parser = argparse.ArgumentParser(description="Tables and a figure of finished runs.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="run directories, or copies of result.json")
    parser.add_argument("--figure", type=Path, metavar="OUT", help="draw a figure: .svg, .png, .pdf")
    args = parser.parse_args(arguments)
    blocks = read_blocks(args.files)
    print("\n\n".join(map(table, blocks)), flush=True)
    if args.figure:
        plot(blocks, args.figure)

if __name__ == "__main__":
    run_main(main)
