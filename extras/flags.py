"""The command lines of train.py and eval.py: flags, their defaults, and errors in one line.

Nothing here imports torch, so that --help and wrong flags answer at once.
"""

import argparse
import json
import sys
from pathlib import Path

import data
from data import InputError

# Defaults by method and model: R2Rank with tiny, and with other models; ReRec likewise. `tiny` starts from
# nothing, everything else from a pretrained checkpoint.
DEFAULTS = {
    "steps": (30, 200, 80, 200),
    "batch_lists": (4, 4, 16, 16),
    "group_size": (4, 4, 8, 5),
    "lr": (5e-5, 6e-6, 1.5e-4, 5e-6),
    "head_lr": (3e-4, 3e-5, None, None),
    "kl_coef": (0.0, 0.0, 0.01, 0.01),
    "warmup_steps": (2, 4, None, None),
    "sft_steps": (400, 0, 550, 0),
    "sft_lr": (1e-3, 1e-5, 1.5e-3, 1e-5),
    "num_queries": (None, None, 400, 2000),
    "max_new_tokens": (48, 256, 28, 256),
    "micro_batch": (80, 8, 80, 8),
    "eval_lists": (200, 100, 200, 100),
}
MAY_CHANGE = ("device", "micro_batch", "gradient_checkpointing", "save_every", "cache_dir")  # on --resume
R2RANK_FLAGS = ("pl", "credit", "score_gradient", "head_lr", "warmup_steps", "no_reasoning", "eval_samples",
                "candidates", "negatives", "teacher")
REREC_FLAGS = ("query_kinds", "num_queries", "reward_weights", "raae_penalty", "min_std", "tau",
               "no_curriculum", "personalized")

def positive(kind=int, zero=False):
    """An argparse type: a number above 0 (or not below)."""
    def parse(text):
        number = kind(text)
        if not (number > 0 or zero and number == 0):
            raise argparse.ArgumentTypeError(f"must be {'at least' if zero else 'above'} 0, not {text}")
        return number

    parse.__name__ = kind.__name__
    return parse

COUNT, COUNT_OR_0 = positive(), positive(zero=True)
RATE, RATE_OR_0 = positive(float), positive(float, zero=True)

def reward_weights(text):
    """An argparse type: "term=w,..." or the two numbers of the alignments."""
    try:
        if "=" not in text:
            first, second = map(float, text.split(","))
            return {"query_alignment": first, "preference_alignment": second}
        return {name.strip(): float(w) for name, w in (pair.split("=") for pair in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"give TERM=W,... or two numbers, not {text}") from None

def add_common_flags(parser):
    """The flags of both commands, in groups."""
    add = parser.add_argument_group("data").add_argument
    add("--data", default="toy", help="toy; beauty, toys, sports, games, instruments (Amazon 2014); "
        "amazon2023:CATEGORY; recbench:movie, recbench:book; or a folder with NAME.inter and NAME.item (toy)")
    add("--data-dir", metavar="DIR", help="folder of RecBench+'s files, for recbench:...")
    add("--split", choices=("temporal", "leave-one-out"), help="80/10/10 by time, or each user's last item")
    add("--num-candidates", type=COUNT, default=20, metavar="K", help="candidates a list (20)")
    add("--negatives", choices=data.NEGATIVES, default="uniform", help="how they are drawn (uniform)")
    add("--history-length", type=COUNT, default=10, metavar="N", help="interactions shown (10)")
    add("--core", type=COUNT, default=0, metavar="N", help="keep users and items with N interactions")
    add("--candidates", metavar="FILE", help="test lists: JSONL of user, history, candidates, relevance")
    add("--cache-dir", default=data.DEFAULT_CACHE, metavar="DIR", help=f"({data.DEFAULT_CACHE})")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="tiny", help="tiny, a folder, a hub id, or a name such as Qwen2.5-1.5B (tiny)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (auto)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of the weights; the optimizer keeps float32 copies (auto: bfloat16 on cuda, else float32)")
    add("--micro-batch", type=COUNT, metavar="ROWS", help="rows a pass; lower it when memory runs out")
    add("--no-reasoning", action="store_true", help="the control: the head reads the bare prompt")
    add("--max-new-tokens", type=COUNT, metavar="N", help="longest rationale or response")
    add("--temperature", type=RATE, default=1.0, help="of sampling and scoring alike (1)")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-lists", type=COUNT, metavar="N", help="test lists or requests")
    add("--eval-samples", type=COUNT, default=1, metavar="N",
        help="rationales a candidate whose scores are averaged; 1 means one greedy rationale (1)")
    add("--seed", type=int, default=0, help="of data, weights, sampling and order (0)")

def add_train_flags(parser):
    add = parser.add_argument_group("R2Rank").add_argument
    add("--pl", choices=("exact", "sample"), default="exact", help="V: exact, or by REINFORCE (exact)")
    add("--credit", choices=("item", "list", "none"), default="item",
        help="a rationale's advantage: its own worth, its column's return, or 0 (item)")
    add("--score-gradient", choices=("all", "head"), default="all",
        help="what the score loss trains: the model, too, or the head alone (all)")
    add("--head-lr", type=RATE, help="of the score head in RL")
    add("--warmup-steps", type=COUNT_OR_0, metavar="N", help="batches to fit the head on before RL")
    add("--teacher", metavar="MODEL|FILE", help="who writes the cold start's rationales: a model, or a JSONL "
        "of {user, history, candidate, label, trace} (a template)")
    add = parser.add_argument_group("ReRec").add_argument
    add("--query-kinds", type=lambda text: text.split(","), metavar="KIND,...",
        help="of explicit, implicit, misinformed, interest (all that the data can serve)")
    add("--num-queries", type=COUNT, metavar="N", help="training requests, which epochs go through")
    add("--reward-weights", type=reward_weights, default={}, metavar="TERM=W,...",
        help="such as query_alignment=0.1, or W1,W2 of the two alignments")
    add("--raae-penalty", type=RATE_OR_0, default=0.3, metavar="W",
        help="share of its reward that a wrong paragraph loses; 0: no RAAE (0.3)")
    add("--min-std", type=RATE_OR_0, default=0.0, metavar="S", help="least deviation to divide by (0)")
    add("--tau", type=RATE_OR_0, default=0.1, help="later epochs drop easier requests (0.1)")
    add("--no-curriculum", action="store_true", help="every epoch holds all requests, shuffled")
    add("--personalized", action="store_true", help="show the user's history in the prompt")
    add = parser.add_argument_group("optimisation").add_argument
    add("--sft-steps", type=COUNT_OR_0, metavar="N", help="of the cold start")
    add("--sft-lr", type=RATE, help="of the cold start")
    add("--steps", type=COUNT_OR_0, metavar="N", help="of RL")
    add("--batch-lists", type=COUNT, metavar="N", help="lists, or requests, a step of RL")
    add("--group-size", type=COUNT, metavar="G", help="rationales a candidate, or responses a request")
    add("--lr", type=RATE, help="of the model in RL")
    add("--kl-coef", type=RATE_OR_0, metavar="BETA", help="of the KL to the model before RL")
    add("--ppo-epochs", type=COUNT, default=1, metavar="N", help="updates on each rollout (1)")
    add("--gradient-checkpointing", nargs="?", const="on", choices=("on", "off"),
        help="recompute activations: less memory, more time (on a GPU: on)")
    add("--lora", type=COUNT, metavar="RANK", help="train adapters, not the weights (needs peft)")
    add("--overfit-one-batch", action="store_true", help="sanity run: each step sees the same lists")
    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", help="run directory (runs/DATA-MODEL, numbered when taken)")
    add("--resume", metavar="DIR", help="go on with the run in DIR, with the flags it has")
    add("--save-every", type=COUNT, default=50, metavar="N", help="steps between states (50)")

def add_eval_flags(parser):
    add = parser.add_argument_group("what to evaluate, and how to report it").add_argument
    add("--run", metavar="DIR", help="a run directory of train.py; its flags are the defaults here")
    add("--baselines", nargs="*", metavar="NAME",
        help="popularity, title-overlap, item-knn, lightgcn, sasrec (all, where none is named)")
    add("--save-candidates", metavar="FILE", help="write the lists, for --candidates or another system")
    add("--count-misses", action="store_true", help="--candidates without a relevant item count as 0")
    add("--save-predictions", metavar="FILE", help="TREC run of all systems, judgements in FILE.qrels")
    add("--open-ended", metavar="FILE", help="RecBench+'s own metrics of a JSONL of {id, response}")
    add("--explain", type=COUNT, metavar="N", help="print N lists with scores and rationales, no metrics")
    add("--out", metavar="FILE", help="report (eval.json, or eval-again.json in the run directory)")

def fill_defaults(args):
    """Give every flag of DEFAULTS that the user left open its value."""
    column = 2 * (args.method == "rerec") + (args.model != "tiny")
    for name, values in DEFAULTS.items():
        if getattr(args, name, 0) is None:
            setattr(args, name, values[column])

def defaults_table():
    lines = ["defaults by method and model   R2Rank: tiny    others    ReRec: tiny    others"]
    for name, values in DEFAULTS.items():
        cells = ["-" if v is None else f"{v:g}" for v in values]
        lines.append("  --{:<28} {:>8} {:>9} {:>14} {:>9}".format(name.replace("_", "-"), *cells))
    lines.append("with --teacher, --sft-steps is 200; with --lora the rates are ten times as high")
    return "\n".join(lines)

def recorded_flags(folder, flag):
    """The flags of a run directory. Raises InputError."""
    try:
        return json.loads((Path(folder) / "config.json").read_text())["flags"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{flag} {folder}: no readable config.json of a run there ({error})") from None

def parse_train_flags(argv=None, description=None):
    """The flags of train.py, checked as far as they can be without data and model. Raises InputError."""
    parser = argparse.ArgumentParser(description=description, epilog=defaults_table(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("r2rank", "rerec"), default="r2rank", help="(r2rank)")
    add_common_flags(parser)
    add_train_flags(parser)
    args = parser.parse_args(argv)
    if args.resume:
        recorded = recorded_flags(args.resume, "--resume")
        parser.set_defaults(**recorded)
        args = parser.parse_args(argv)
        changed = [f"--{name.replace('_', '-')} {value} -> {getattr(args, name, value)}"
                   for name, value in recorded.items()
                   if getattr(args, name, value) != value and name not in (*MAY_CHANGE, "resume", "out")]
        if changed:
            raise InputError(f"--resume {args.resume}: this would make it another run: {', '.join(changed)}. "
                             f"Leave these out, or start a new run")
        args.out = args.resume
        return args
    check_train_flags(parser, args)
    if args.teacher and args.sft_steps is None:
        args.sft_steps = 200
    given = args.lr, args.sft_lr
    fill_defaults(args)
    if args.lora:  # adapters learn at ten times the rate
        args.lr, args.sft_lr = given[0] or 10 * args.lr, given[1] or 10 * args.sft_lr
    return args

def check_train_flags(parser, args):
    """Refuse flags that the method would ignore, and contradictions. Raises InputError."""
    other = "r2rank" if args.method == "rerec" else "rerec"
    for name in REREC_FLAGS if args.method == "r2rank" else R2RANK_FLAGS:
        if getattr(args, name) != parser.get_default(name):
            raise InputError(f"--{name.replace('_', '-')} belongs to --method {other}: it has no effect here")
    if args.method == "rerec" and args.group_size == 1:
        raise InputError("--group-size 1: an advantage compares responses to one request; give at least 2")
    if args.no_reasoning and args.kl_coef:
        raise InputError("--kl-coef acts on rationales, and --no-reasoning has none; drop one of the two")

def parse_eval_flags(argv=None, description=None):
    """The flags of eval.py, among them those of the run that is evaluated. Raises InputError."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser)
    add_eval_flags(parser)
    parser.set_defaults(model=None, method="r2rank")
    args = parser.parse_args(argv)
    if args.run and args.model:
        raise InputError("--run brings its own model: leave out --model, or --run")
    if args.run:
        recorded = recorded_flags(args.run, "--run")
        parser.set_defaults(**{k: v for k, v in recorded.items() if k not in ("device", "dtype", "out")})
        args = parser.parse_args(argv)
    elif not args.model and args.baselines is None and not args.open_ended:
        raise InputError("give --run DIR, --model NAME or --baselines; see --help")
    lists_alone = ("baselines", "candidates", "save_candidates", "save_predictions")
    for name in lists_alone if args.method == "rerec" else ():
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} is about lists, and this run answers requests")
    if args.explain and not (args.run or args.model):
        raise InputError("--explain looks at a language model: add --run or --model")
    if args.model:
        fill_defaults(args)
    for name in ("out", "save_candidates", "save_predictions"):
        path = getattr(args, name)
        if path and (Path(path).is_dir() or not Path(path).parent.is_dir()):
            raise InputError(f"--{name.replace('_', '-')} {path}: give a file in a folder that exists")
    return args


# --- what both do with them -----------------------------------------------------------------------------

def load_data(args):
    """The data set that the flags name. Raises InputError."""
    if args.num_candidates < 2:
        raise InputError("--num-candidates: a list to rank needs at least 2")
    dataset = data.load(args.data, args.split, args.seed, args.negatives, args.cache_dir, args.core,
                        args.data_dir, args.history_length)
    lists_are_given = args.candidates or getattr(args, "open_ended", None)
    if args.num_candidates > len(dataset.items) and not lists_are_given:
        raise InputError(f"--num-candidates {args.num_candidates}: {dataset.name} has only "
                         f"{len(dataset.items)} items")
    return dataset

def pick_device(args):
    """(device, dtype) of the flags. Raises InputError."""
    import torch
    device = args.device
    if device == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else mps
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a name that is none, or no such device here
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device}: not to be had here ({reason}); use --device cpu") from None
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device.startswith("cuda") else "float32"
    return device, getattr(torch, dtype)

def run_main(main):
    """Run a command: what the user got wrong is one line on stderr and exit code 2. Returns main's result."""
    try:
        return main()
    except (InputError, OSError) as error:  # a full disk, a folder that is gone: the error names the file
        message = " ".join(str(error).splitlines())
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):  # torch's own, on GPU and CPU
            raise
        message = ("out of memory: lower --micro-batch, then --max-new-tokens or --history-length; or add "
                   "--gradient-checkpointing or --lora 16")
    print("error:", message, file=sys.stderr)
    sys.exit(2)
