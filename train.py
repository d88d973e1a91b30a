"""Train a language model to rank by reasoning: R2Rank (r2r.py), from cold start to table.

    python train.py                                                     the toy shop and a tiny model, on a laptop
    python train.py --model Qwen2.5-1.5B --data beauty                  one GPU; bfloat16 weights, float32 optimiser
    python train.py --model tiny --no-reasoning                         the control: no rationale, the head reads the prompt

Stages, in the order of the file:
    1. cold start   supervised on traces that reason and answer, 1 yes : 2 no, loss on the response alone (`--sft-steps`)
    2. warm-up      the score head alone, on hidden states of rationales that the model samples (`--warmup-steps`)
    3. RL           rollout -> scores -> credit -> update (`--steps`)
    4. evaluation   on held-out lists, before and after RL
A run directory holds config.json (flags, versions), metrics.jsonl (an object a step), checkpoint/ (a Hugging Face directory and
score_head.safetensors) and eval.json.

Deviation: the optimiser is AdamW (0.9, 0.95) with a constant rate after 5% linear warm-up, without weight decay on any parameter.
"""

import argparse
import copy
import importlib.metadata
import json
import platform
import random
import shutil
import time
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import eval as evaluation
import policy
import r2r
from data import InputError


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    positive = evaluation.positive
    evaluation.add_common_flags(parser)
    g = parser.add_argument_group("R2Rank")
    g.add_argument("--pl", choices=("exact", "sample"), default="exact", help="expected NDCG over Plackett-Luce rankings: exact, or REINFORCE (exact)")
    g.add_argument("--permutations", type=positive(), default=32, metavar="M", help="rankings drawn a column with --pl sample (32)")
    g.add_argument("--credit", choices=("item", "list"), default="item", help="advantage of a rationale: its own marginal worth, or its column's return (item)")
    g.add_argument("--group-size", type=positive(), default=4, metavar="G", help="rationales a candidate (4)")
    g.add_argument("--clip", type=positive(float), default=0.2, metavar="EPS", help="PPO's clip range; it acts from the second update on a rollout on (0.2)")
    g.add_argument("--ppo-epochs", type=positive(), default=1, metavar="N", help="updates on each rollout (1: on-policy)")
    g.add_argument("--kl-coef", type=positive(float, zero=True), default=0.0, metavar="BETA", help="weight of the KL to the model before RL; above 0 keeps a frozen copy (0)")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--steps", type=positive(zero=True), metavar="N", help="RL steps (tiny: 30, else 200)")
    g.add_argument("--batch-lists", type=positive(), default=4, metavar="N", help="lists an RL step (4)")
    g.add_argument("--lr", type=positive(float), help="of the language model in RL (tiny: 5e-5, else 6e-6)")
    g.add_argument("--head-lr", type=positive(float), help="of the score head in RL (tiny: 3e-4, else 3e-5)")
    g.add_argument("--warmup-steps", type=positive(zero=True), metavar="N", help="batches rolled out to fit the score head alone (tiny: 2, else 4)")
    g.add_argument("--sft-steps", type=positive(zero=True), metavar="N", help="cold-start steps (tiny: 400; with --teacher: 200; else 0)")
    g.add_argument("--sft-lists", type=positive(), default=4, metavar="N", help="lists a cold-start step, with up to 9 traces each (4)")
    g.add_argument("--sft-lr", type=positive(float), help="of the cold start (tiny: 1e-3, else 1e-5)")
    g.add_argument("--teacher", metavar="MODEL|FILE", help="who writes the cold start's traces: `template`, a model like --model, or a JSONL "
                   "of {history, candidate, label, trace} (tiny: template)")
    g.add_argument("--teacher-traces", type=positive(), default=1000, metavar="N", help="(user, item) pairs a teacher model is asked about (1000)")
    g.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations in the backward pass: less memory, slower")
    g.add_argument("--overfit-one-batch", action="store_true", help="sanity run: every RL step sees the same lists; their NDCG must go to 1")
    g = parser.add_argument_group("output")
    g.add_argument("--out", metavar="DIR", help="run directory (runs/DATA-MODEL, numbered when taken)")
    g.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    g.add_argument("--save-every", type=positive(), default=50, metavar="N", help="RL steps between checkpoints (50)")
    return parser.parse_args()


class Optimizer:
    """AdamW whose state, and for bfloat16 weights a copy of them, is float32.

    An update of 1e-6 is below the resolution of a bfloat16 weight and would be lost. Gradients, too, add up in float32: each is
    moved to its master as soon as its backward pass has written it.
    """

    def __init__(self, groups):
        self.pairs, self.handles = [], []
        for group in groups:
            masters = []
            for p in group["params"]:
                if p.dtype == torch.float32:
                    masters.append(p)
                    continue
                master = p.detach().float().requires_grad_()
                masters.append(master)
                self.pairs.append((p, master))
                self.handles.append(p.register_post_accumulate_grad_hook(self._move_gradient(master)))
            group["params"] = masters
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        self.base_rates = [g["lr"] for g in self.adamw.param_groups]

    @staticmethod
    def _move_gradient(master):
        def move(p):
            master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
            p.grad = None
        return move

    def step(self, rate=1.0, max_norm=1.0):
        """Clip, step with the learning rates times `rate`, clear the gradients. Returns the gradient norm before clipping."""
        parameters = [p for g in self.adamw.param_groups for p in g["params"]]
        norm = clip_grad_norm_(parameters, max_norm).item()
        for group, base in zip(self.adamw.param_groups, self.base_rates):
            group["lr"] = base * rate
        self.adamw.step()
        self.adamw.zero_grad()
        with torch.no_grad():
            for p, master in self.pairs:
                p.copy_(master)
        return norm

    def close(self):
        for handle in self.handles:
            handle.remove()


class Log:
    """metrics.jsonl, and one short line in the terminal every few steps."""

    def __init__(self, path):
        self.file = open(path, "w")

    def __call__(self, stage, step, values, line=None):
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        self.file.write(json.dumps({"stage": stage, "step": step, **rounded}) + "\n")
        self.file.flush()
        if line:
            tqdm.write(line)


def endless(dataset, split, seed):
    """The targets of a split, epoch after epoch, each in its own order."""
    epoch = 0
    while True:
        yield from dataset.targets(split, f"{seed}/{epoch}")
        epoch += 1


# --- 1. cold start -------------------------------------------------------------------------------------------------------


def template_lessons(dataset, args, rng):
    """Endless (history, candidates, responses): of each list, up to 3 candidates that the template teacher likes and twice as
    many that it does not."""
    for target in endless(dataset, "train", f"sft/{args.seed}"):
        example = dataset.example(target, args.num_candidates, args.history_length, args.seed)
        traces = [(c, *r2r.template_trace(example.history, c, not args.no_reasoning)) for c in example.candidates]
        liked, disliked = [t for t in traces if t[2]], [t for t in traces if not t[2]]
        if n := min(3, len(liked), len(disliked) // 2):
            chosen = rng.sample(liked, n) + rng.sample(disliked, 2 * n)
            yield example.history, [c for c, _, _ in chosen], [text for _, text, _ in chosen]


def ask_teacher(dataset, args, device, dtype, path):
    """Ask a model about (user, item) pairs, half of them positive; write the traces whose answer equals the label to a JSONL."""
    teacher, tokenizer = policy.load(args.teacher, device, dtype, dataset.texts(), args.seed)
    sampling = policy.Sampling(512, args.temperature, False, not args.no_share_prefix, args.rollout_rows)
    kept = 0
    with open(path, "w") as f, tqdm(total=args.teacher_traces, desc="teacher", unit="pair") as bar:
        for target in dataset.targets("train", f"teacher/{args.seed}")[:(args.teacher_traces + 1) // 2]:
            example = dataset.example(target, args.num_candidates, args.history_length, args.seed)
            where = example.relevance.index(1.0)
            pair = [example.candidates[where], example.candidates[where - 1]]
            prompt = r2r.build_prompt(tokenizer, example.history, pair, question=r2r.QUESTION_TO_TEACHER)
            for item, label, (ids,) in zip(pair, (1, 0), policy.sample(teacher, tokenizer, prompt.prefix_ids, prompt.suffix_ids, 1,
                                                                     **vars(sampling))):
                trace = tokenizer.decode(ids, skip_special_tokens=True).strip()
                if r2r.parse_answer(trace) == bool(label):
                    kept += 1
                    f.write(json.dumps({"user": example.user, "history": [x.id for x in example.history], "candidate": item.id,
                                        "label": label, "trace": trace}) + "\n")
            bar.update(2)
            bar.set_postfix(kept=kept)
    return path


def recorded_lessons(dataset, path, rng, reasoning=True):
    """Endless lessons from a JSONL of traces: those whose answer equals the label, 1 yes : 2 no. Raises InputError."""
    by_answer = {True: [], False: []}
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--teacher {path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            history, candidate = [dataset.items[i] for i in record["history"]], dataset.items[record["candidate"]]
            label, trace = bool(record["label"]), record["trace"]
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} line {number}: expected an object with history (item ids of the catalogue), candidate, label "
                             f"and trace; {type(error).__name__}: {error}") from None
        if r2r.parse_answer(trace) == label:
            response = trace if reasoning else f"<answer>{'yes' if label else 'no'}</answer>"
            by_answer[label].append((history, [candidate], [response]))
    yes, no = by_answer[True], by_answer[False]
    pairs = min(len(yes), len(no) // 2)
    if not pairs:
        raise InputError(f"{path}: {len(yes)} correct yes and {len(no)} correct no traces; the cold start needs 1 yes to 2 no")
    lessons = rng.sample(yes, pairs) + rng.sample(no, 2 * pairs)
    print(f"cold start: {len(lessons)} of {len(lines)} traces kept (answer equals label, 1 yes : 2 no)")

    def forever():
        while True:
            yield from rng.sample(lessons, len(lessons))
    return forever()


def cold_start(model, tokenizer, lessons, args, log):
    """Supervised steps on lessons: mean negative log-likelihood of the response tokens."""
    end = policy.stop_ids(model, tokenizer)[0]
    optimizer = Optimizer([{"params": list(model.parameters()), "lr": args.sft_lr}])
    bar = tqdm(range(1, args.sft_steps + 1), desc="cold start", unit="step")
    for step in bar:
        started = time.perf_counter()
        prefixes, owner, suffixes, responses = [], [], [], []
        for _ in range(args.sft_lists):
            history, candidates, texts = next(lessons)
            prompt = r2r.build_prompt(tokenizer, history, candidates, not args.no_reasoning)
            owner += [len(prefixes)] * len(texts)
            prefixes.append(prompt.prefix_ids)
            suffixes += prompt.suffix_ids
            responses += [tokenizer(t, add_special_tokens=False).input_ids + [end] for t in texts]
        tokens, total = sum(map(len, responses)), 0.0
        for prefix, local, part in policy.micro_batches(model, prefixes, owner, suffixes, responses, args.micro_batch,
                                                        not args.no_share_prefix):
            logprobs, _, _ = policy.row_logprobs(prefix, local, [suffixes[n] for n in part], [responses[n] for n in part])
            loss = -logprobs.sum() / tokens
            loss.backward()
            total += loss.item()
        done = step / args.sft_steps
        norm = optimizer.step(rate=min(1.0, done / 0.05) * (1 - 0.9 * done))
        seconds = time.perf_counter() - started
        bar.set_postfix(loss=f"{total:.3f}")
        log("sft", step, {"loss": total, "grad_norm": norm, "tokens": tokens, "seconds": seconds},
            f"cold start {step:4d}/{args.sft_steps}  loss {total:.3f}  {tokens / seconds:.0f} tok/s"
            if step % max(1, args.sft_steps // 5) == 0 else None)
    optimizer.close()


# --- 2. and 3. reinforcement learning ------------------------------------------------------------------------------------


def draw_batch(dataset, targets, tokenizer, args):
    examples = [dataset.example(next(targets), args.num_candidates, args.history_length, args.seed) for _ in range(args.batch_lists)]
    prompts = [r2r.build_prompt(tokenizer, e.history, e.candidates, not args.no_reasoning) for e in examples]
    return prompts, [torch.tensor(e.relevance) for e in examples]


def roll_out(model, tokenizer, score_head, batch, args, reference=None):
    """Sampled and scored rationales for a batch of lists."""
    rollout = r2r.generate(model, tokenizer, *batch, args.group_size, evaluation.sampling_of(args), not args.no_reasoning)
    sampled = time.perf_counter()
    return r2r.score(model, score_head, rollout, args.temperature, args.micro_batch, not args.no_share_prefix, reference), sampled


def warm_up(model, tokenizer, score_head, dataset, targets, args, log):
    hidden, relevance = [], []
    bar = tqdm(range(1, args.warmup_steps + 1), desc="warm-up", unit="step")
    for _ in bar:
        rollout, _ = roll_out(model, tokenizer, score_head, draw_batch(dataset, targets, tokenizer, args), args)
        hidden += rollout.lists(rollout.hidden.float())
        relevance += rollout.relevance
    if hidden:
        optimizer = torch.optim.AdamW(score_head.parameters(), lr=1e-3, weight_decay=0.0)
        utility = r2r.fit_score_head(score_head, hidden, relevance, optimizer)
        log("warmup", args.warmup_steps, {"utility": utility, "lists": len(hidden)},
            f"warm-up of the score head on {len(hidden)} lists: expected NDCG@10 {utility:.3f} on those held out")


def train_rl(model, tokenizer, score_head, dataset, targets, args, log, save):
    reference = copy.deepcopy(model).requires_grad_(False) if args.kl_coef else None
    optimizer = Optimizer([{"params": list(model.parameters()), "lr": args.lr},
                           {"params": list(score_head.parameters()), "lr": args.head_lr}])
    generator = torch.Generator().manual_seed(args.seed)
    batch = draw_batch(dataset, targets, tokenizer, args) if args.overfit_one_batch else None
    model.train()
    bar = tqdm(range(1, args.steps + 1), desc="RL", unit="step")
    for step in bar:
        started = time.perf_counter()
        rollout, sampled = roll_out(model, tokenizer, score_head, batch or draw_batch(dataset, targets, tokenizer, args), args, reference)
        scored = time.perf_counter()
        losses = {"token_loss": 0.0, "kl": 0.0, "clipped": 0.0, "grad_norm": 0.0}  # if no list has a signal
        for epoch in range(args.ppo_epochs):
            if epoch:  # the scores have moved; the old log-probabilities stay those of the policy that sampled
                old = rollout.logprobs
                r2r.score(model, score_head, rollout, args.temperature, args.micro_batch, not args.no_share_prefix)
                rollout.logprobs = old
            signal = r2r.signal(rollout, credit=args.credit, permutations=args.permutations if args.pl == "sample" else 0,
                                generator=generator)
            utility = signal.utility if epoch == 0 else utility
            if signal.alive or args.kl_coef:
                losses = r2r.backward(model, score_head, rollout, signal, args.clip, args.kl_coef, args.temperature, args.micro_batch,
                                      not args.no_share_prefix)
                losses["grad_norm"] = optimizer.step(rate=min(1.0, step / max(1, 0.05 * args.steps)))
        lengths = [len(r) for r in rollout.responses]
        tokens = sum(lengths)
        texts = tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
        ended = [t is not None for t in map(r2r.parse_answer, texts)]
        now = time.perf_counter()
        values = {"utility": utility, **losses, "length": tokens / len(lengths), "format_rate": sum(ended) / len(ended),
                  "truncated": sum(n >= args.max_new_tokens for n in lengths) / len(lengths),
                  "entropy": -(rollout.logprobs.sum() / max(1, tokens)).item(), "dead_lists": len(rollout.prompts) - len(signal.alive),
                  "score_std": rollout.scores.std().item(), "seconds_sample": sampled - started, "seconds_score": scored - sampled,
                  "seconds_update": now - scored, "seconds": now - started}
        bar.set_postfix(ndcg=f"{utility:.3f}", len=f"{values['length']:.0f}", s=f"{values['seconds']:.1f}")
        log("rl", step, values, f"RL {step:4d}/{args.steps}  NDCG@10 {utility:.3f}  length {values['length']:.0f}  format "
            f"{values['format_rate']:.2f}  {tokens / (sampled - started):.0f} tok/s sampled  {values['seconds']:.1f} s"
            if step % max(1, args.steps // 10) == 0 or step == 1 else None)
        if step % args.save_every == 0 and step < args.steps:
            save()
    model.eval()
    optimizer.close()


# --- the run -----------------------------------------------------------------------------------------------------------------


def fill_defaults(args, model):
    """Defaults that depend on the model: `tiny` starts from nothing, everything else from a pretrained checkpoint."""
    tiny = args.model == "tiny"
    evaluation.fill_model_defaults(args, model)
    args.teacher = args.teacher or ("template" if tiny or args.sft_steps else None)
    for name, small, large in (("steps", 30, 200), ("lr", 5e-5, 6e-6), ("head_lr", 3e-4, 3e-5),
                               ("warmup_steps", 2, 4), ("sft_steps", 400, 200 if args.teacher else 0), ("sft_lr", 1e-3, 1e-5)):
        if getattr(args, name) is None:
            setattr(args, name, small if tiny else large)


def choose_run_directory(args, dataset):
    """--out, or the first free runs/DATA-MODEL, -2, -3, …; nothing is made or deleted yet. Raises InputError."""
    if args.out:
        out = Path(args.out)
        if out.exists() and any(out.iterdir()):
            if not args.overwrite:
                raise InputError(f"--out {out}: it exists and is not empty; choose another, or add --overwrite")
            if not (out / "config.json").exists():
                raise InputError(f"--out {out}: it does not look like a run directory, so --overwrite will not delete it")
    else:
        base = Path("runs") / f"{dataset.name}-{Path(args.model).name}"
        out = next(p for n in range(1, 10**6) if not (p := base if n == 1 else base.with_name(f"{base.name}-{n}")).exists())
    return out


def save_checkpoint(folder, model, tokenizer, score_head):
    """An ordinary Hugging Face directory with the score head beside the weights, complete or not there at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    score_head.save(temporary / "score_head.safetensors")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def main():
    args = parse_flags()
    started = time.perf_counter()
    if args.no_reasoning and args.kl_coef:
        raise InputError("--kl-coef acts on rationale tokens, and with --no-reasoning there are none; drop one of the two")
    if args.overwrite and not args.out:
        raise InputError("--overwrite needs --out DIR; without --out a new directory is made")
    dataset, device, dtype = evaluation.check_common_flags(args)
    for split in ("train", "test"):  # an empty split, or too small a catalogue, is an error before the model is loaded
        dataset.examples(split, 1, args.num_candidates, args.history_length, args.seed)
    if args.teacher and args.teacher != "template" and not Path(args.teacher).is_file():
        policy.resolve(args.teacher)
    out = choose_run_directory(args, dataset)
    print(f"run directory: {out}")
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    texts = dataset.texts()
    if args.model == "tiny":  # its tokenizer also sees what prompts and traces are made of
        example = dataset.example(dataset.targets("train")[0], args.num_candidates, args.history_length, args.seed)
        texts += [r2r.SYSTEM, r2r.QUESTION, r2r.QUESTION_WITHOUT_REASONING, "The user's history, oldest first:\n- ", "\nCandidate: "] * 3
        texts += [r2r.template_trace(example.history, c)[0] for c in dataset.items.values()]
    model, tokenizer = policy.load(args.model, device, dtype, texts, args.seed)
    fill_defaults(args, model)
    if args.overwrite:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    if args.gradient_checkpointing:
        policy.checkpoint_activations(model)
    score_head = r2r.ScoreHead(model.config.get_text_config().hidden_size, reasoning=not args.no_reasoning).to(device)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")}
    (out / "config.json").write_text(json.dumps({"flags": vars(args), "versions": {"python": platform.python_version(), **versions},
                                                 "seed": args.seed, "device": device, "dtype": str(dtype)}, indent=1) + "\n")
    log = Log(out / "metrics.jsonl")
    print(f"{dataset.name}: {len(dataset.items)} items, {len(dataset.sequences)} users, "
          f"{' / '.join(str(len(dataset.splits[s])) for s in ('train', 'validation', 'test'))} examples in train / validation / test\n"
          f"{args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {dtype} on {device}")

    examples = evaluation.test_lists(dataset, args, args.eval_lists)
    scores = {"random": evaluation.random_scores(examples, args.seed),
              "popularity": evaluation.popularity_scores(examples, dataset.popularity())}

    def score_test(name, head):
        results = evaluation.model_scores(model, tokenizer, head, examples, evaluation.sampling_of(args), args.eval_samples,
                                          args.micro_batch, not args.no_reasoning, f"eval {name}")
        scores[name] = [s for s, _ in results]

    if args.sft_steps:
        if args.teacher == "template":
            lessons = template_lessons(dataset, args, rng)
        else:
            path = args.teacher if Path(args.teacher).is_file() else ask_teacher(dataset, args, device, dtype, out / "traces.jsonl")
            lessons = recorded_lessons(dataset, path, rng, not args.no_reasoning)
        model.train()
        cold_start(model, tokenizer, lessons, args, log)
        model.eval()
    before = "sft" if args.sft_steps else "zero-shot"
    score_test(before, None)

    targets = endless(dataset, "train", args.seed)
    warm_up(model, tokenizer, score_head, dataset, targets, args, log)
    checkpoint = out / "checkpoint"
    train_rl(model, tokenizer, score_head, dataset, targets, args, log,
             lambda: save_checkpoint(checkpoint, model, tokenizer, score_head))
    save_checkpoint(checkpoint, model, tokenizer, score_head)
    score_test("rl", score_head)

    results = {name: evaluation.evaluate(s, examples) for name, s in scores.items()}
    systems = evaluation.write_eval(out / "eval.json", dataset.name, examples, {name: r[0] for name, r in results.items()})
    gain = evaluation.difference(results["rl"][1]["ndcg@10"], results[before][1]["ndcg@10"], [e.user for e in examples])
    print(f"\n{len(examples)} held-out lists of {args.num_candidates} candidates\n{evaluation.table(systems)}\n"
          f"rl - {before}, paired: {gain} NDCG@10\n{time.perf_counter() - started:.0f} s in all; everything is in {out}")


if __name__ == "__main__":
    evaluation.run_main(main)
