"""One RL step of R2Rank, timed: with the shared prefix, without it, and by TRL's GRPOTrainer.

    python tests/bench.py --model DIR --data beauty --arms shared,plain,trl --repeats 3 --out bench.json
    python tests/bench.py gpu --model DIR --data beauty --minutes 8      all there is to do on a GPU: gpu.py

All arms do the same work: the prompts of one list, G rationales of exactly --new-tokens tokens for each
candidate, token-level clipped loss, AdamW. They take turns in one process, so that a busy machine is busy for
all; the first turn, of `shared` alone, warms up; the others have one turn. "of peak": FLOPs that the passes
need (an update as three forward passes; no padding) a second, over those of a large matrix product.
"""

import argparse
import copy
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import data
import policy
import r2r
from extras.parallel import Optimizer

def reset_peak(device):
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")

def peak_memory(device):
    """GB at most since reset_peak: of the device, or (CPU) of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM")), 0.0)

def rate(amount, work):
    """Amount a second of work(), which gives a number: reading it waits for the device."""
    rates = []
    for _ in range(8):
        started = time.perf_counter()
        work().item()
        rates.append(amount / (time.perf_counter() - started))
    return statistics.median(rates)

def matmul_peak(device, dtype):
    """FLOP/s of a large square matrix product."""
    n = 8192 if device.startswith("cuda") else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return rate(2 * n**3, lambda: (a @ b).sum())

def forward_flops(model, lengths, predicted):
    """FLOPs of a forward pass. lengths: [(tokens, tokens before them)]; predicted: positions with logits."""
    config = model.config.get_text_config()
    tables = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    body = sum(p.numel() for p in model.parameters() if p.dim() > 1) - sum(w.numel() for w in tables.values())
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    tokens = sum(n for n, _ in lengths)
    pairs = sum(n * past + n * (n + 1) / 2 for n, past in lengths)
    output = model.get_output_embeddings().weight.numel()
    return 2 * body * tokens + 4 * width * config.num_hidden_layers * pairs + 2 * output * predicted

def needed(model, prompt, args, share):
    """(FLOPs of the rollout, of the update) that an arm's passes need."""
    prefix, G, T = len(prompt.prefix_ids), args.group_size, args.new_tokens
    suffixes = [len(s) for s in prompt.suffix_ids]
    rows = [n for n in suffixes for _ in range(G)]
    start = [(prefix, 0)] + [(n, prefix) for n in suffixes] if share else [(prefix + n, 0) for n in rows]
    rollout = start + [(T, prefix + n) for n in rows]
    update = [(prefix, 0)] + [(n + T, prefix) for n in rows] if share else [(prefix + n + T, 0) for n in rows]
    predicted = len(rows) * T
    return forward_flops(model, rollout, predicted), 3 * forward_flops(model, update, predicted)

def our_step(s, args, share):
    """(seconds of the rollout, of all) of r2r.train_step."""
    policy.SHARE_PREFIX = share
    metrics = r2r.train_step(s["model"], s["tokenizer"], s["head"], [s["example"]], s["optimizer"], args)
    policy.SHARE_PREFIX = True
    assert metrics["length"] == args.new_tokens
    return metrics["seconds_sample"], metrics["seconds"]

def trl_step(s, args):
    """The same by TRL's GRPOTrainer (TRL 1.16): our prompts' ids, the same weights and AdamW."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    shared = {id(p): p for p in s["model"].parameters()}
    model, adamw, prompt = copy.deepcopy(s["model"], shared), s["optimizer"].adamw, s["prompt"]
    rows, clock = len(prompt.suffix_ids) * args.group_size, {}

    class Trainer(GRPOTrainer):
        def _tokenize_prompts(self, prompts):  # a prompt is a candidate's number
            return [prompt.prefix_ids + prompt.suffix_ids[int(p)] for p in prompts], None, {}

        def _generate_single_turn(self, *rest, **named):
            out = super()._generate_single_turn(*rest, **named)
            clock["sampled"] = time.perf_counter()
            return out

    class Clock(TrainerCallback):
        def on_step_begin(self, *rest, **named):
            clock["started"] = time.perf_counter()

        def on_step_end(self, *rest, **named):
            clock["ended"] = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, max_steps=1, per_device_train_batch_size=args.micro_batch, loss_type="dapo", beta=0.0,
            gradient_accumulation_steps=rows // args.micro_batch, num_generations=args.group_size,
            max_completion_length=args.new_tokens, temperature=1.0, top_p=1.0, top_k=0, num_iterations=1,
            max_grad_norm=1.0, bf16=False, fp16=False, gradient_checkpointing=False, shuffle_dataset=False,
            generation_kwargs={"eos_token_id": s["never"]}, use_cpu=args.device == "cpu", report_to=[],
            save_strategy="no", logging_strategy="no", epsilon=0.2)
        trainer = Trainer(
            model=model, args=config, processing_class=copy.deepcopy(s["tokenizer"]), callbacks=[Clock()],
            reward_funcs=lambda completions, **_: [float(n % 2) for n in range(len(completions))],
            train_dataset=Dataset.from_dict({"prompt": [str(n) for n in range(len(prompt.suffix_ids))]}),
            optimizers=(adamw, torch.optim.lr_scheduler.LambdaLR(adamw, lambda _: 1.0)))
        trainer.eos_token_ids = s["never"]
        trainer.train()
    adamw.zero_grad()
    return clock["sampled"] - clock["started"], clock["ended"] - clock["started"]

def prepare(args, count=1):
    """What a step needs: model, tokenizer, head, optimizer, and `count` lists with long histories."""
    dataset = data.load(args.data)
    texts = dataset.texts() + [r2r.SYSTEM, r2r.QUESTION]
    model, tokenizer = policy.load(args.model, args.device, getattr(torch, args.dtype), texts)
    long = (t for t in dataset.targets("train") if t[1] >= args.history_length)
    examples = [dataset.example(target, args.num_candidates, args.history_length)
                for target in itertools.islice(long, count)]
    prompts = [r2r.build_prompt(tokenizer, e.history, e.candidates) for e in examples]
    head = r2r.ScoreHead(model.config.get_text_config().hidden_size).to(args.device)
    never = [len(tokenizer) + 10**6]  # no token ends a response: all arms sample as many
    policy.stop_ids = lambda model, tokenizer: never
    return {"model": model, "tokenizer": tokenizer, "head": head, "example": examples[0], "never": never,
            "prompt": prompts[0], "prompts": prompts,
            "optimizer": Optimizer([(model.parameters(), 1e-6), (head.parameters(), 1e-6)])}

def measure(args, s):
    """{"peak_flops", "arms": {arm: {"rollout", "update", "step": [seconds], "memory_gb", "of_peak"}}}."""
    model = s["model"].train()
    report = {"peak_flops": [], "prefix": len(s["prompt"].prefix_ids), "arms": {},
              "suffix": max(map(len, s["prompt"].suffix_ids))}
    for turn in range(args.repeats + 1):
        report["peak_flops"].append(matmul_peak(args.device, getattr(torch, args.dtype)))
        for arm in args.arms.split(","):
            if arm != "shared" and turn != 1:  # these take minutes
                continue
            reset_peak(args.device)
            rollout, step = trl_step(s, args) if arm == "trl" else our_step(s, args, arm == "shared")
            if turn:
                row = report["arms"].setdefault(arm, defaultdict(list))
                for name, value in (("rollout", rollout), ("update", step - rollout), ("step", step),
                                    ("memory_gb", peak_memory(args.device))):
                    row[name].append(value)
                print(f"{arm:8} rollout {rollout:7.2f} s  update {step - rollout:7.2f} s", flush=True)
    for arm, row in report["arms"].items():
        flops = needed(model, s["prompt"], args, arm == "shared")
        peak = statistics.median(report["peak_flops"])
        row["of_peak"] = {name: f / statistics.median(row[name]) / peak
                          for name, f in zip(("rollout", "update"), flops)}
    return report

def complete(args):
    """Give the flags of a step what r2r.train_step reads beside them."""
    vars(args).update(no_reasoning=False, max_new_tokens=args.new_tokens, temperature=1.0, kl_coef=0.0,
                      ppo_epochs=1, pl="exact", credit="item", score_gradient="all", token_weight=1.0)
    return args

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"model": "tiny", "data": "toy", "device": "cpu", "dtype": "float32",
                          "arms": "shared,plain", "repeats": 3, "num-candidates": 20,
                          "history-length": 10, "group-size": 4, "new-tokens": 48, "micro-batch": 4}.items():
        parser.add_argument(f"--{name}", default=default, type=type(default))
    parser.add_argument("--out", type=Path)
    args = complete(parser.parse_args())
    report = measure(args, prepare(args))
    print(f"matmul peak {statistics.median(report['peak_flops']) / 1e9:.0f} GFLOP/s, prefix "
          f"{report['prefix']} tokens, suffix {report['suffix']}")
    print(f"{'':8} {'rollout':>8} {'update':>8} {'step':>8} {'of peak':>14} {'GB':>6}")
    for arm, row in report["arms"].items():
        rollout, update, step = (statistics.median(row[name]) for name in ("rollout", "update", "step"))
        print(f"{arm:8} {rollout:8.2f} {update:8.2f} {step:8.2f} {row['of_peak']['rollout']:6.0%} "
              f"{row['of_peak']['update']:6.0%} {max(row['memory_gb']):7.2f}"
              + (f"  {step / statistics.median(report['arms']['shared']['step']):.2f} times the shared"
                 if arm != "shared" else ""))
    if args.out:
        flags = {k: Path(v).name if isinstance(v, str) else v for k, v in vars(args).items() if k != "out"}
        args.out.write_text(json.dumps({"flags": flags} | report, indent=1) + "\n")

if __name__ == "__main__":
    if sys.argv[1:2] == ["gpu"]:
        import gpu
        gpu.main(sys.argv[2:])
    else:
        main()
