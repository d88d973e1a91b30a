"""Train a language model to rank (R2Rank, r2r.py) or to answer requests (ReRec, rerec.py) by reasoning.

    python train.py                                       the toy shop and a tiny model, on a laptop
    python train.py --method rerec                        the same for ReRec
    python train.py --model Qwen2.5-1.5B --data beauty    one GPU
    python train.py --resume runs/beauty-Qwen2.5-1.5B     go on after a crash, as if nothing had happened
    torchrun --nproc-per-node 8 train.py --model Qwen2.5-1.5B --data beauty        GPUs share every step

The stages, all in `stages`:
    1. cold start   supervised, on traces that reason and answer; loss on the response alone
    2. warm-up      R2Rank: the score head alone, on rationales of the model as it is
    3. RL           a batch -> the method's `train_step` -> log, state
    4. evaluation   on held-out lists: after 1, after 2 (head only), after 3

A run directory holds config.json (flags, versions), metrics.jsonl (a line a step), state.pt (until it has
finished), checkpoint/ (a Hugging Face folder, with score_head.safetensors), eval.json, result.json and
rationales.json (of the first test lists, before and after RL).

Deviations and choices:
  1. AdamW (0.9, 0.95) without weight decay, gradient norm clipped at 1, 5% linear warm-up; in the cold start
     and in ReRec's RL the rate then falls linearly to a tenth, in R2Rank's RL it is constant.
  2. Several processes share a step without DistributedDataParallel, whose reducer expects one backward pass a
     step: each adds up the gradients of its share, divided by the counts of the whole step, and then all sum.
  3. What is random follows from (seed, step), or from torch's generators, whose states are saved: a resumed
     run gives the same numbers. With another number of processes it samples anew.
"""

import copy
import importlib.metadata
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # flags first: --help and wrong ones need not wait for torch
    if os.environ.get("RANK", "0") != "0":  # of several processes the first prints
        sys.stdout = open(os.devnull, "w")
        os.environ["TQDM_DISABLE"] = "1"
    from extras.flags import parse_train_flags, run_main
    ARGS = run_main(lambda: parse_train_flags(description=__doc__.split("\n\nDeviations")[0]))

import torch
from tqdm import tqdm

import eval as evaluation
import policy
import r2r
import rerec
from data import InputError

SHOWN = 10  # test lists, or requests, whose rationales are kept for eval.py --explain


# --- run directory --------------------------------------------------------------------------------------

def choose_directory(args):
    """--out or --resume, or the first free runs/DATA-MODEL, -2, -3, ...; not made yet. Raises InputError."""
    if args.out:
        out = Path(args.out)
        if not args.resume and out.exists() and any(out.iterdir()):
            raise InputError(f"--out {out}: it exists and is not empty; choose another, or delete it")
        return out
    name = f"{Path(args.data).name.replace(':', '-')}-{Path(args.model).name}"
    name += "-rerec" if args.method == "rerec" else ""
    taken = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in itertools.count(1))
    return next(path for path in taken if not path.exists())

class Run:
    """A run directory at work: its log, and its state, from which a killed run goes on."""

    def __init__(self, args, fingerprint):
        from extras import parallel
        self.parallel = parallel
        self.args, self.fingerprint = args, fingerprint
        self.out = parallel.gather([choose_directory(args)])[0]  # rank 0's choice is everybody's
        self.model = self.tokenizer = self.head = self.queue = self.state = self.log_file = None
        self.results, self.texts, self.started, self.failures = {}, {}, time.perf_counter(), 0
        if args.resume:
            self.state = read_state(self.out)
            if self.state["fingerprint"] != fingerprint:
                raise InputError(f"--resume {self.out}: the lists, requests or texts are not those that the "
                                 f"run began with; put them back, or start a new run")
            self.results, self.texts = self.state["results"], self.state["texts"]

    def begin(self, dataset):
        """Make the directory, now that flags, data and model are right; or open the rest of the state."""
        model, state = self.model, self.state
        count = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        size = model.dtype.itemsize
        # beside its weight each has a gradient, two moments and, if they are not float32, a master
        memory = count * size + trained * (12 if size == 4 else 16)
        after = f", after {state['stage']} step {state['step']}" if state else ""
        print(f"run directory: {self.out}{after}")
        print(f"{dataset.name}: {len(dataset.items)} items, {len(dataset.sequences)} users")
        print(f"{self.args.model}: {count / 1e6:.1f}M parameters, {trained / 1e6:.1f}M to train, "
              f"{model.dtype} on {model.device}: {memory / 1e9:.1f} GB beside activations")
        if state and self.head:
            self.head.load_state_dict(state["head"])
        elif state:
            self.queue.load_state_dict(state["queue"])
        elif self.parallel.rank() == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
            config = {"flags": vars(self.args), "versions": versions, "seed": self.args.seed,
                      "device": str(model.device), "dtype": str(model.dtype)}
            (self.out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
            # what it takes to open a state, beside its weights
            model.config.save_pretrained(self.out / "checkpoint")
            self.tokenizer.save_pretrained(self.out / "checkpoint")

    def tidy(self):
        """A run that failed before its first state leaves no directory behind."""
        begun = any((self.out / name).exists() for name in ("state.pt", "result.json", "traces.jsonl"))
        if self.parallel.rank() == 0 and not begun:
            shutil.rmtree(self.out, ignore_errors=True)

    def weights(self):
        """What is trained: all weights, or the adapters."""
        state = self.model.state_dict()
        return {k: v for k, v in state.items() if ".lora_" in k} if self.args.lora else state

    def reached(self, stage):
        """Whether the state that was opened is of this stage."""
        return bool(self.state) and self.state["stage"] == stage

    def seconds(self):
        return time.perf_counter() - self.started + (self.state["seconds"] if self.state else 0.0)

    def steps(self, stage, total, optimizer, falls):
        """The steps of a stage that are left, with a progress bar. Opens the state if it is of this stage."""
        first = 0
        if self.reached(stage):
            first = self.state["step"]
            optimizer.load_state_dict(self.state["optimizer"])
            every = self.state["random"]  # one a process
            saved = every[min(self.parallel.rank(), len(every) - 1)]
            torch.set_rng_state(saved["cpu"])
            if "cuda" in saved and torch.cuda.is_available():
                torch.cuda.set_rng_state(saved["cuda"])
        bar = tqdm(range(first + 1, total + 1), desc=stage, unit="step", initial=first, total=total)
        for step in bar:
            optimizer.schedule = min(1.0, step / total / 0.05) * (1 - 0.9 * step / total if falls else 1.0)
            yield step, bar
            if step % self.args.save_every == 0 or step == total:
                self.save(stage, step, optimizer)

    def save(self, stage, step, optimizer):
        """Write state.pt beside the old one, then rename it: whenever the run is killed, one is whole."""
        random_state = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random_state["cuda"] = torch.cuda.get_rng_state()
        every = self.parallel.gather([random_state])
        if self.parallel.rank() == 0:
            torch.save({
                "stage": stage, "step": step, "weights": self.weights(), "optimizer": optimizer.state_dict(),
                "head": self.head and self.head.state_dict(), "queue": self.queue and self.queue.state_dict(),
                "random": every, "results": self.results, "texts": self.texts,
                "fingerprint": self.fingerprint, "seconds": self.seconds(),
                "log_bytes": self.log_file.tell() if self.log_file else 0,
            }, self.out / "state.tmp")
            (self.out / "state.tmp").replace(self.out / "state.pt")

    def log(self, stage, step, metrics, bar=None, every=1):
        """A line of metrics.jsonl; a step's main numbers on the bar and, `every` so many steps, as a line."""
        finite = math.isfinite(metrics.get("grad_norm", 0.0))
        self.failures = 0 if finite else self.failures + 1
        if self.failures == 3:  # none of them changed a weight
            raise InputError("three steps in a row had a loss or gradient that is not finite; lower the "
                             "learning rates, or try --dtype float32")
        if self.parallel.rank():
            return
        if self.log_file is None:
            self.log_file = open(self.out / "metrics.jsonl", "a")
            self.log_file.truncate(self.state["log_bytes"] if self.state else 0)
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in metrics.items()}
        self.log_file.write(json.dumps({"stage": stage, "step": step, **rounded}) + "\n")
        self.log_file.flush()
        names = ("loss", "utility", "accuracy", "relevant_lookups", "format_rate", "entropy", "length",
                 "seconds")
        shown = {k: f"{metrics[k]:.3g}" for k in names if metrics.get(k) is not None}
        if bar is not None:
            bar.set_postfix(shown)
        if step == 1 or step % every == 0:
            tqdm.write(f"{stage} {step:4d}  " + "  ".join(f"{k} {v}" for k, v in shown.items()))

    def evaluate(self, test, name, head):
        """The test's results on every item, shared out among the processes, and what the model said."""
        items, device = self.parallel.my_share(test.items), self.model.device
        # sampled rationales are those that eval.py will sample
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.args.seed)
            found = test.measure(self.model, self.tokenizer, head, items, name)
        found = self.parallel.gather(found)
        self.results[name], self.texts[name] = map(list, zip(*found))

    def finish(self, adapters):
        """The checkpoint, an ordinary Hugging Face folder."""
        if adapters:
            adapters.merge_and_unload()  # nobody needs peft to open it; what is evaluated is what is saved
        if self.parallel.rank() == 0:
            folder = self.out / "checkpoint.tmp"
            shutil.rmtree(folder, ignore_errors=True)
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            if self.head:
                self.head.save(folder / "score_head.safetensors")
            for path in folder.iterdir():  # one by one: a state can be opened at any moment
                path.replace(self.out / "checkpoint" / path.name)
            folder.rmdir()

    def write_results(self, report):
        """eval.json, rationales.json and result.json; then the run has finished, and its state goes."""
        from extras.report import write_result
        if self.args.data == "toy" and self.head:  # there it is known what is worth looking up
            from extras.toy import relevant_lookups
            report["relevant_lookups"] = {name: relevant_lookups(sum(texts, []))
                                          for name, texts in self.texts.items()}
            print("relevant look-ups: " + ", ".join(f"{name} {share:.0%}" for name, share
                                                    in report["relevant_lookups"].items() if share))
        said = {name: texts[:SHOWN] for name, texts in self.texts.items()}
        (self.out / "rationales.json").write_text(json.dumps(said, indent=1) + "\n")
        (self.out / "eval.json").write_text(evaluation.dump(report))
        write_result(self.out, report, self.seconds())
        for name in ("state.pt", "reference.pt"):
            (self.out / name).unlink(missing_ok=True)
        print(f"{self.seconds():.0f} s in all; everything is in {self.out}")

def read_state(out):
    """The state of a run that has not finished. Raises InputError."""
    path = out / "state.pt"
    if not path.exists():
        raise InputError(f"{out}: there is no state.pt: the run has finished, or not come to its first state")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has many ways to say that a file is broken
        raise InputError(f"{path}: cannot be read ({(str(error).splitlines() or [''])[0]})") from None


# --- stages ---------------------------------------------------------------------------------------------

def cold_start(run, lessons):
    """Supervised steps: mean negative log-likelihood of the response tokens. lessons: see extras/tasks.py."""
    model, tokenizer, args = run.model, run.tokenizer, run.args
    end = policy.stop_ids(model, tokenizer)[0]
    optimizer = run.parallel.Optimizer([(model.parameters(), args.sft_lr)])
    model.train()
    for step, bar in run.steps("sft", args.sft_steps, optimizer, falls=True):
        rollout, started = policy.Rollout([], 1), time.perf_counter()
        for prompt, texts in run.parallel.my_share(lessons(step)):
            rollout.owner += [len(rollout.prefixes)] * len(texts)
            rollout.prefixes.append(prompt.prefix_ids)
            shared = len(prompt.suffix_ids) == 1  # several texts for the only suffix
            rollout.suffixes += prompt.suffix_ids * len(texts) if shared else prompt.suffix_ids
            rollout.responses += [tokenizer(t, add_special_tokens=False).input_ids + [end] for t in texts]
        tokens, total = optimizer.sum({"n": sum(map(len, rollout.responses))})["n"], 0.0
        for _, logprobs, *_ in policy.micro_batches(model, rollout, args.micro_batch):
            loss = -logprobs.sum() / tokens
            loss.backward()
            total += loss.item()
        metrics = optimizer.sum({"loss": total}) | {
            "grad_norm": optimizer.step(), "tokens": tokens, "seconds": time.perf_counter() - started}
        run.log("sft", step, metrics, bar, every=max(1, args.sft_steps // 5))
    optimizer.close()
    model.eval()

def warm_up(run, batch):
    """Fit the score head alone, on rationales of the model as it is. batch: step -> lists."""
    started = time.perf_counter()
    if run.parallel.rank() == 0:
        hidden, relevance = [], []
        for step in tqdm(range(run.args.warmup_steps), desc="warm-up", unit="step"):
            lists = batch(-1 - step)
            pairs = [(e.history, e.candidates) for e in lists]
            rollout = r2r.reason(run.model, run.tokenizer, pairs, run.args, run.args.group_size)
            hidden += [h.float() for h in rollout.by_list(rollout.hidden)]
            relevance += [torch.tensor(e.relevance, device=run.model.device) for e in lists]
        optimizer = torch.optim.AdamW(run.head.parameters(), lr=1e-3, weight_decay=0.0)
        value = fit_score_head(run.head, hidden, relevance, optimizer)
        print(f"warm-up of the score head on {len(hidden)} lists: "
              + (f"expected NDCG@10 {value:.3f} on those held out" if value else "none was held out"))
        metrics = {"utility": value, "lists": len(hidden), "seconds": time.perf_counter() - started}
        run.log("warmup", run.args.warmup_steps, metrics, every=10**9)
    run.parallel.broadcast(run.head)

def fit_score_head(head, hidden, relevance, optimizer, epochs=10):
    """Warm-up: maximise V over stored states, the head alone. hidden: (K, G, D) a list; relevance: (K,).

    A fresh head gives random credit, which teaches the model nonsense from its first step; one that knows few
    lists by heart is certain of the wrong things. So every fourth list is held out, and the epoch that ranks
    those best is kept. Returns its V on them; None where there are too few lists to hold any out.
    """
    held_out = list(range(3, len(hidden), 4))
    fitted = [n for n in range(len(hidden)) if n not in held_out]

    @torch.no_grad()
    def validate():
        judged = held_out or fitted
        values = [r2r.expected_ndcg(head(hidden[n]).T, relevance[n]).mean() for n in judged]
        return sum(values).item() / len(judged)

    best, state = validate(), copy.deepcopy(head.state_dict())
    for _ in range(epochs):
        for n in torch.tensor(fitted)[torch.randperm(len(fitted))].tolist():
            optimizer.zero_grad()
            r2r.score_loss(head(hidden[n]), relevance[n])[0].mean().backward()
            optimizer.step()
        now = validate()
        if now > best:
            best, state = now, copy.deepcopy(head.state_dict())
    optimizer.zero_grad()
    head.load_state_dict(state)
    return best if held_out else None

def freeze_reference(run):
    """The model as it is when RL begins, for --kl-coef. What is not trained is not copied."""
    frozen = {id(p): p for p in run.model.parameters() if not p.requires_grad}
    reference = copy.deepcopy(run.model, frozen).eval().requires_grad_(False)
    path = run.out / "reference.pt"
    if run.reached("rl"):
        weights = torch.load(path, map_location=run.model.device, weights_only=True)
        reference.load_state_dict(weights, strict=False)
    elif run.parallel.rank() == 0:
        torch.save(run.weights(), path)
    return reference


# --- main -----------------------------------------------------------------------------------------------

def build_model(args, method, run):
    """Give the run its model, as training begins or as the state has it. Returns peft's wrapper, or None."""
    from extras.flags import pick_device
    from extras.models import add_adapters, check_model, checkpoint_activations
    device, dtype = pick_device(args)
    torch.manual_seed(args.seed)  # all processes begin with the same weights
    if run.state and not args.lora:
        folder = str(run.out / "checkpoint")
        model, tokenizer = policy.load(folder, device, dtype, weights=run.state["weights"])
    else:
        texts, layers = method.texts() if args.model == "tiny" else [], 2 if method.task else 1
        model, tokenizer = policy.load(args.model, device, dtype, texts, args.seed, layers=layers)
        if args.model == "tiny" and method.task:
            from extras.toy import prepare_for_requests
            prepare_for_requests(model, tokenizer, method.test.dataset)
    adapters = add_adapters(model, args.lora) if args.lora else None
    if adapters and run.state:
        model.load_state_dict(run.state["weights"], strict=False)
    if (args.gradient_checkpointing or ("on" if device.startswith("cuda") else "off")) == "on":
        checkpoint_activations(model)
    check_model(model, tokenizer, args.model)
    run.model, run.tokenizer = model, tokenizer
    if method.task:
        run.queue = method.task.queue
    else:
        size = model.config.get_text_config().hidden_size
        run.head = r2r.ScoreHead(size, reasoning=not args.no_reasoning).to(device)
    if run.parallel.rank():  # ... and each samples in its own way
        torch.manual_seed(args.seed + run.parallel.rank())
    return adapters

def main(args):
    from extras.flags import load_data
    from extras.parallel import start_processes
    from extras.tasks import answering, ranking
    train_step = rerec.train_step if args.method == "rerec" else r2r.train_step
    start_processes(args)
    dataset = load_data(args)
    method = answering(args, dataset) if args.method == "rerec" else ranking(args, dataset)
    run = Run(args, method.hash)
    adapters = build_model(args, method, run)
    run.begin(dataset)
    try:
        stages(args, run, method, train_step, adapters)
    except KeyboardInterrupt:
        if (run.out / "state.pt").exists():
            print(f"\ninterrupted; go on with: python train.py --resume {run.out}")
        sys.exit(130)
    finally:
        run.tidy()

def stages(args, run, method, train_step, adapters):
    # 1. and 2. Cold start, and what it is worth: by its answers, and by a head fitted on the model as it is.
    if not run.reached("rl"):
        if args.sft_steps:
            cold_start(run, method.lessons(run))
        run.evaluate(method.test, "sft" if args.sft_steps else "zero-shot", None)
        if run.head and args.warmup_steps:
            warm_up(run, method.batch)
            run.evaluate(method.test, "head-only", run.head)

    # 3. Reinforcement learning.
    reference = freeze_reference(run) if args.kl_coef else None
    groups = [(run.model.parameters(), args.lr)]
    groups += [(run.head.parameters(), args.head_lr)] if run.head else []
    optimizer = run.parallel.Optimizer(groups)
    if not run.reached("rl"):
        run.save("rl", 0, optimizer)  # what came before is not done again
    run.model.train()
    same = method.batch(0) if args.overfit_one_batch else None
    for step, bar in run.steps("rl", args.steps, optimizer, falls=args.method == "rerec"):
        lists = run.parallel.my_share(same or method.batch(step))
        metrics = train_step(run.model, run.tokenizer, run.head or method.task, lists, optimizer, args,
                             reference)
        run.log("rl", step, metrics, bar, every=max(1, args.steps // 10))

    # 4. What has become of it.
    run.model.eval()
    run.finish(adapters)
    run.evaluate(method.test, "rl", run.head)
    if run.parallel.rank() == 0:
        run.write_results(method.test.report(run.results))

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    run_main(lambda: main(ARGS))
