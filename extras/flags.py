"""The command lines of train.py and eval.py: flags, their defaults, and errors in one line.

Nothing here imports torch, so that --help and wrong flags answer at once.
"""

import json
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from pathlib import Path

import data
from data import InputError

MAY_CHANGE = ("device", "micro_batch", "gradient_checkpointing", "save_every", "cache_dir", "resume", "out")
R2RANK_FLAGS = ("pl", "credit", "score_gradient", "head_lr", "token_weight", "warmup_steps", "no_reasoning",
                "eval_samples", "candidates", "negatives", "teacher")
REREC_FLAGS = ("query_kinds", "num_queries", "reward_weights", "raae_penalty", "min_std", "tau",
               "no_curriculum", "personalized")

def above_0(kind, zero=False):
    """An argparse type: a number above 0 (or not below)."""
    def number(text):
        if not (kind(text) > 0 or zero and kind(text) == 0):
            raise ArgumentTypeError(f"must be {'at least' if zero else 'above'} 0, not {text}")
        return kind(text)
    return number

COUNT, COUNT_OR_0, RATE, RATE_OR_0 = (above_0(kind, zero) for kind in (int, float) for zero in (False, True))
# Four defaults, type and help. R2Rank with tiny and with other models, then ReRec: tiny starts from nothing.
DEFAULTS = {
    "sft_steps": (600, 0, 550, 0, COUNT_OR_0, "of the cold start"),
    "sft_lr": (2e-3, 1e-5, 1.5e-3, 1e-5, RATE, "of the cold start"),
    "warmup_steps": (24, 4, None, None, COUNT_OR_0, "batches to fit the head on before RL"),
    "steps": (60, 200, 80, 200, COUNT_OR_0, "of RL"),
    "batch_lists": (4, 4, 16, 16, COUNT, "lists, or requests, a step of RL"),
    "group_size": (4, 4, 8, 5, COUNT, "rationales a candidate, or responses a request"),
    "lr": (2e-4, 6e-6, 1.5e-4, 5e-6, RATE, "of the model in RL"),
    "head_lr": (1e-3, 3e-5, None, None, RATE, "of the score head in RL"),
    "token_weight": (10.0, 1.0, None, None, RATE_OR_0, "of the token loss beside the score loss"),
    "kl_coef": (0.0, 0.0, 0.01, 0.01, RATE_OR_0, "of the KL to the model before RL"),
    "num_queries": (None, None, 400, 2000, COUNT, "training requests, which epochs go through"),
    "max_new_tokens": (48, 256, 28, 256, COUNT, "longest rationale or response"),
    "micro_batch": (80, 8, 80, 8, COUNT, "rows a pass; lower it when memory runs out"),
    "eval_lists": (200, 100, 200, 100, COUNT, "test lists or requests"),
    "eval_samples": (2, 1, None, None, COUNT, "rationales a score in evaluation; 1: a greedy one"),
}

def reward_weights(text):
    """An argparse type: {term: weight} of "term=w,...", or of the weights of the two alignments."""
    names, weights = ("query_alignment", "preference_alignment"), text.split(",")
    pairs = [w.split("=") for w in weights] if "=" in text else zip(names, weights, strict=True)
    return {name.strip(): float(weight) for name, weight in pairs}

def spelled(name):
    return f"--{name.replace('_', '-')}"

def add_common_flags(parser, by_method=("max_new_tokens", "micro_batch", "eval_lists", "eval_samples")):
    """The flags of both commands, in groups; by_method: those of DEFAULTS."""
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
    add = parser.add_argument_group("model and evaluation").add_argument
    add("--model", default="tiny", help="tiny, a folder, a hub id, or a name such as Qwen2.5-1.5B (tiny)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (auto)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="(auto: bfloat16 on cuda)")
    add("--no-reasoning", action="store_true", help="the control: the head reads the bare prompt")
    add("--temperature", type=RATE, default=1.0, help="of sampling and scoring alike (1)")
    add("--seed", type=int, default=0, help="of data, weights, sampling and order (0)")
    add = parser.add_argument_group("defaults of R2Rank: tiny, others; ReRec: tiny, others").add_argument
    for name in by_method:
        *values, kind, text = DEFAULTS[name]
        add(spelled(name), type=kind, metavar="N", help=f"{text} ({', '.join(map(str, values))})")

def fill_defaults(args):
    """Give every flag of DEFAULTS that the user left open its value."""
    column = 2 * (args.method == "rerec") + (args.model != "tiny")
    for name, values in DEFAULTS.items():
        if getattr(args, name, 0) is None:
            tenfold = name in ("lr", "sft_lr") and args.lora  # adapters learn at ten times the rate
            setattr(args, name, 10 * values[column] if tenfold else values[column])

def parse_again(parser, argv, folder, without=()):
    """(flags, those that are recorded in a run directory), which are the defaults. Raises InputError."""
    try:
        recorded = json.loads((Path(folder) / "config.json").read_text())["flags"]
        parser.set_defaults(**{name: value for name, value in recorded.items() if name not in without})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: no readable config.json of a run there ({error})") from None
    return parser.parse_args(argv), recorded

def parse_train_flags(argv=None, description=None):
    """The flags of train.py, checked as far as they can be without data and model. Raises InputError."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("r2rank", "rerec"), default="r2rank", help="(r2rank)")
    add_common_flags(parser, DEFAULTS)
    add = parser.add_argument_group("R2Rank").add_argument
    add("--pl", choices=("exact", "sample"), default="exact", help="V: exact, or by REINFORCE (exact)")
    add("--credit", choices=("item", "list", "none"), default="item", help="a rationale's advantage (item)")
    add("--score-gradient", choices=("all", "head"), default="all", help="what the score loss trains (all)")
    add("--teacher", metavar="MODEL|FILE", help="writes the cold start's traces; see extras/tasks.py")
    add = parser.add_argument_group("ReRec").add_argument
    add("--query-kinds", type=lambda text: text.split(","), help="explicit, implicit, misinformed, interest")
    add("--reward-weights", type=reward_weights, default={}, metavar="TERM=W,...",
        help="such as query_alignment=0.1, or W1,W2 of the two alignments")
    add("--raae-penalty", type=RATE_OR_0, default=0.3, help="what a wrong paragraph loses (0.3)")
    add("--min-std", type=RATE_OR_0, default=0.0, metavar="S", help="least deviation to divide by (0)")
    add("--tau", type=RATE_OR_0, default=0.1, help="later epochs drop easier requests (0.1)")
    add("--no-curriculum", action="store_true", help="every epoch holds all requests, shuffled")
    add("--personalized", action="store_true", help="show the user's history in the prompt")
    add = parser.add_argument_group("optimisation").add_argument
    add("--ppo-epochs", type=COUNT, default=1, metavar="N", help="updates on each rollout (1)")
    add("--gradient-checkpointing", nargs="?", const="on", choices=("on", "off"), help="(on a GPU: on)")
    add("--lora", type=COUNT, metavar="RANK", help="train adapters, not the weights (needs peft)")
    add("--overfit-one-batch", action="store_true", help="sanity run: each step sees the same lists")
    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", help="run directory (runs/DATA-MODEL, numbered when taken)")
    add("--resume", metavar="DIR", help="go on with the run in DIR, with the flags it has")
    add("--save-every", type=COUNT, default=50, metavar="N", help="steps between states (50)")
    args = parser.parse_args(argv)
    if args.resume:
        args, recorded = parse_again(parser, argv, args.resume)
        for name, value in recorded.items():
            now = getattr(args, name, value)
            if now != value and name not in MAY_CHANGE:
                raise InputError(f"--resume: that would be another run: {spelled(name)} {value} -> {now}")
        args.out = args.resume
        return args
    other = "r2rank" if args.method == "rerec" else "rerec"
    for name in REREC_FLAGS if args.method == "r2rank" else R2RANK_FLAGS:
        if getattr(args, name) != parser.get_default(name):
            raise InputError(f"{spelled(name)} belongs to --method {other}: it has no effect here")
    if args.teacher and args.sft_steps is None:
        args.sft_steps = 200
    fill_defaults(args)
    if args.method == "rerec" and args.group_size == 1:
        raise InputError("--group-size 1: an advantage compares responses to one request; give at least 2")
    if args.no_reasoning and args.kl_coef:
        raise InputError("--kl-coef acts on rationales, and --no-reasoning has none; drop one of the two")
    return args

def parse_eval_flags(argv=None, description=None):
    """The flags of eval.py, among them those of the run that is evaluated. Raises InputError."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    add_common_flags(parser)
    add = parser.add_argument_group("what to evaluate, and how to report it").add_argument
    add("--run", metavar="DIR", help="a run directory of train.py; its flags are the defaults here")
    add("--baselines", nargs="*", metavar="NAME", help="see extras/baselines.py (all, where none is named)")
    add("--save-candidates", metavar="FILE", help="write the lists, for --candidates or another system")
    add("--count-misses", action="store_true", help="--candidates without a relevant item count as 0")
    add("--save-predictions", metavar="FILE", help="TREC run of all systems, judgements in FILE.qrels")
    add("--open-ended", metavar="FILE", help="RecBench+'s own metrics of a JSONL of {id, response}")
    add("--swap-rationales", action="store_true", help="score each candidate by its neighbour's rationale")
    add("--explain", type=COUNT, metavar="N", help="print N lists with scores and rationales, no metrics")
    add("--recommend", nargs="+", metavar="USER", help="print the best items for users; all: test users")
    add("--top", type=COUNT, default=10, metavar="N", help="items to recommend (10)")
    add("--retrieve", type=COUNT, default=100, metavar="N", help="items that the model ranks for them (100)")
    add("--retriever", default="item-knn", metavar="NAME", help="baseline that retrieves these (item-knn)")
    add("--ask", metavar="TEXT", help="answer a request of yours (ReRec)")
    add("--out", metavar="FILE", help="report (eval.json, or eval-again.json in the run directory)")
    parser.set_defaults(model=None, method="r2rank")
    args = parser.parse_args(argv)
    if args.run and args.model:
        raise InputError("--run brings its own model: leave out --model, or --run")
    if args.run:
        args, _ = parse_again(parser, argv, args.run, ("device", "dtype", "out"))
    elif not args.model and (args.explain or args.recommend or args.baselines is args.open_ended is None):
        raise InputError("give --run DIR or --model NAME; or, without --explain, --baselines; see --help")
    for name in ("baselines", "candidates", "save_candidates", "save_predictions", "recommend"):  # of lists
        if args.method == "rerec" and getattr(args, name) is not None:
            raise InputError(f"{spelled(name)} is about lists, and this run answers requests")
    if args.ask and args.method != "rerec":
        raise InputError("--ask needs a --run of train.py --method rerec; for R2Rank see --recommend")
    if args.model:
        fill_defaults(args)
    for name in ("out", "save_candidates", "save_predictions"):
        path = getattr(args, name)
        if path and (Path(path).is_dir() or not Path(path).parent.is_dir()):
            raise InputError(f"{spelled(name)} {path}: give a file in a folder that exists")
    return args

def load_data(args):
    """The data set that the flags name. Raises InputError."""
    dataset = data.load(args.data, args.split, args.seed, args.negatives, args.cache_dir, args.core,
                        args.data_dir, args.history_length)
    given, most = args.candidates or getattr(args, "open_ended", None), len(dataset.items)
    if args.num_candidates < 2 or args.num_candidates > most and not given:
        raise InputError(f"--num-candidates: give at least 2; {dataset.name} has only {most} items")
    return dataset

def pick_device(args):
    """(device, dtype) of the flags. Raises InputError."""
    import torch
    device, on_mac = args.device, torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if on_mac else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # a name that is none, or no such device here
        raise InputError(f"--device {device}: not to be had here; use --device cpu") from None
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
        message = "out of memory: lower --micro-batch or --max-new-tokens, or add --gradient-checkpointing"
    print("error:", message, file=sys.stderr)
    sys.exit(2)
