"""Train a language model to rank by reasoning (R2Rank, r2r.py) or to answer requests by it (ReRec, rerec.py), to the table.

    python train.py                                                     the toy shop and a tiny model, on a laptop
    python train.py --method rerec                                      the same for ReRec
    python train.py --model Qwen2.5-1.5B --data beauty                  one GPU; bfloat16 weights, float32 optimiser
    python train.py --model tiny --no-reasoning                         the control: no rationale, the head reads the prompt
    torchrun --nproc-per-node 8 train.py --model Qwen2.5-1.5B --data beauty         eight GPUs, each with a part of every step
    torchrun --nproc-per-node 8 train.py --parallel fsdp --model Qwen2.5-7B --data beauty       and with a part of the optimiser

Stages, in the order of the file:
    1. cold start   supervised on traces that reason and answer, 1 yes : 2 no, loss on the response alone (`--sft-steps`)
    2. warm-up      the score head alone, on hidden states of rationales that the model samples (`--warmup-steps`)
    3. RL           rollout -> scores -> credit -> update (`--steps`)
    4. evaluation   on held-out lists, before and after RL
ReRec has no score head and no warm-up; its stages stand in one function, `train_rerec`, at the end of the file.
A run directory holds config.json (flags, versions), metrics.jsonl (an object a step), checkpoint/ (a Hugging Face directory and
score_head.safetensors), eval.json and, once it has finished, result.json; until then also states/, from which

    python train.py --resume runs/beauty-Qwen2.5-1.5B                   goes on as if nothing had happened

Deviations:
  1. The optimiser is AdamW (0.9, 0.95) with 5% linear warm-up, without weight decay on any parameter. After the warm-up the
     rate is constant in R2Rank's RL, and falls linearly to a tenth in the cold start and in ReRec's RL.
  2. Several processes share a step without DistributedDataParallel: an update has many backward passes, in pieces (SharedPrefix
     in policy.py) and not equally many on each process, which its reducer does not fit. Each process adds up the gradients of
     its own lists, divided by the counts of the whole step; one sum over the processes, before clipping, makes them those
     of the whole step. A process without a list adds nothing, and the others do not wait for it.
  3. With --parallel fsdp the model is one unit of FSDP2, whose whole weights are gathered after each step and stay: passes that are
     not equally many on each process (see 2), and a token at a time, leave no room for communication in them. FSDP2's own reduction of
     gradients is not used, which needs a backward pass of every process, and cannot forget what an attempt left that ran out of memory:
     they add up as in 2, and a step gives each process its part of the sums. So float32 weights and Adam's moments are sharded;
     the weights that compute and the sums of gradients are whole on each process.
"""

import argparse
import contextlib
import copy
import functools
import gc
import importlib.metadata
import itertools
import json
import math
import os
import platform
import random
import shutil
import signal as signals
import sys
import time
import weakref
from datetime import timedelta
from operator import attrgetter
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import eval as evaluation
import data
import policy
import r2r
import rerec
import rewards
from data import InputError


def two_weights(text):
    """An argparse type: two numbers with a comma between them, not negative."""
    with contextlib.suppress(ValueError):
        weights = [float(w) for w in text.split(",")]
        if len(weights) == 2 and all(0 <= w < math.inf for w in weights):
            return weights
    raise argparse.ArgumentTypeError(f"give two numbers, not negative, such as 0.01,0.01, not {text}")


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    positive = evaluation.positive
    parser.add_argument("--method", choices=("r2rank", "rerec"), default="r2rank", help="rank lists for users, or answer requests (r2rank)")
    evaluation.add_common_flags(parser)
    g = parser.add_argument_group("R2Rank")
    g.add_argument("--pl", choices=("exact", "sample"), default="exact", help="expected NDCG over Plackett-Luce rankings: exact, or REINFORCE (exact)")
    g.add_argument("--permutations", type=positive(), default=32, metavar="M", help="rankings drawn a column with --pl sample (32)")
    g.add_argument("--credit", choices=("item", "list"), default="item", help="advantage of a rationale: its own marginal worth, or its column's return (item)")
    g = parser.add_argument_group("ReRec (--method rerec)")
    g.add_argument("--query-kinds", type=lambda text: text.split(","), metavar="KIND,…", help=f"of {', '.join(data.KINDS)} (all that the data can serve)")
    g.add_argument("--max-conditions", type=positive(), metavar="N", help="conditions a request at most (tiny: 2, else 3)")
    g.add_argument("--num-queries", type=positive(), metavar="N", help="training requests, which the epochs go through (tiny: 400, else 2000)")
    g.add_argument("--reward-weights", type=two_weights, metavar="W1,W2", help="of query alignment and preference alignment (0.01,0.01)")
    g.add_argument("--raae-penalty", type=positive(float, zero=True), metavar="W", help="taken off a wrong paragraph's reward, as a share of it (0.3)")
    g.add_argument("--no-raae", action="store_true", help="all tokens of a response have its reward")
    g.add_argument("--min-std", type=positive(float, zero=True), default=0.0, metavar="S", help="smallest standard deviation that a group's advantages are divided by, "
                   "such as 0.2: without a right answer small rewards then stay small (0, as published)")
    g.add_argument("--tau", type=positive(float, zero=True), help="the next epoch drops requests easier than that (0.1)")
    g.add_argument("--no-curriculum", action="store_true", help="every epoch holds all requests, shuffled")
    g.add_argument("--personalized", action="store_true", help="show the user's history in the prompt")
    g.add_argument("--list-length", type=positive(), metavar="K", help="items to answer with; the reward is their NDCG@K (1)")
    g = parser.add_argument_group("policy optimisation")
    g.add_argument("--group-size", type=positive(), metavar="G", help="rationales a candidate (4), or responses a request (tiny: 8, else 5)")
    g.add_argument("--clip", type=positive(float), default=0.2, metavar="EPS", help="PPO's clip range; it acts from the second update on a rollout on (0.2)")
    g.add_argument("--ppo-epochs", type=positive(), default=1, metavar="N", help="updates on each rollout (1: on-policy)")
    g.add_argument("--kl-coef", type=positive(float, zero=True), metavar="BETA", help="weight of the KL to the model before RL; above 0 keeps a frozen copy (R2Rank: 0, ReRec: 0.01)")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--steps", type=positive(zero=True), metavar="N", help="RL steps (tiny: 30 or, ReRec, 80; else 200)")
    g.add_argument("--batch-lists", type=positive(), metavar="N", help="lists (4) or requests (16) an RL step")
    g.add_argument("--lr", type=positive(float), help="of the language model in RL (tiny: 5e-5 or, ReRec, 1.5e-4; else 6e-6 or 5e-6)")
    g.add_argument("--head-lr", type=positive(float), help="of the score head in RL (tiny: 3e-4, else 3e-5)")
    g.add_argument("--warmup-steps", type=positive(zero=True), metavar="N", help="batches rolled out to fit the score head alone (tiny: 2, else 4)")
    g.add_argument("--warmup-lr", type=positive(float), help="of that fit (1e-3; tiny with --facts: 1e-4)")
    g.add_argument("--sft-steps", type=positive(zero=True), metavar="N", help="cold-start steps (tiny: 400 or, ReRec, 550; with --teacher: 200; else 0)")
    g.add_argument("--sft-lists", type=positive(), metavar="N", help="lists a cold-start step, with up to 9 traces each (4), or requests, with 3 (8)")
    g.add_argument("--sft-lr", type=positive(float), help="of the cold start (tiny: 1e-3 or, ReRec, 1.5e-3; else 1e-5)")
    g.add_argument("--teacher", metavar="MODEL|FILE", help="who writes the cold start's traces: `template`, `tally` (with --facts: adds up "
                   "their weights of evidence), a model like --model, or a JSONL of {history, candidate, label, trace} (tiny: template)")
    g.add_argument("--teacher-traces", type=positive(), default=1000, metavar="N", help="(user, item) pairs a teacher model is asked about (1000)")
    switch = argparse.BooleanOptionalAction
    g.add_argument("--gradient-checkpointing", action=switch, help="recompute activations in the backward pass: less memory, the more the longer rows are (135M, "
                   "48 tokens: 0.2 GB less, as fast) (off; on a GPU: where needed)")
    g.add_argument("--offload-optimizer", action=switch, help="keep float32 weights and Adam's moments in the host's memory (off; on a GPU: where needed)")
    g.add_argument("--lora", type=positive(), metavar="RANK", help="train adapters of that rank on the decoder's linear layers, not the weights (needs peft)")
    g.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="several processes (torchrun) share the work of a step, or (fsdp) also the "
                   "float32 weights and Adam's moments, for models whose training state does not fit one GPU (ddp)")
    g.add_argument("--overfit-one-batch", action="store_true", help="sanity run: every RL step sees the same lists; their NDCG must go to 1")
    g = parser.add_argument_group("output")
    g.add_argument("--out", metavar="DIR", help="run directory (runs/DATA-MODEL, numbered when taken)")
    g.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    g.add_argument("--resume", metavar="DIR", help="go on with the run in DIR, with the flags it has")
    g.add_argument("--save-every", type=positive(), default=50, metavar="N", help="steps between saved states (50)")
    g.add_argument("--keep", type=positive(), default=1, metavar="N", help="saved states to keep (1)")
    g.add_argument("--dry-run", type=positive(float), nargs="?", const=True, metavar="GB", help="print what memory the run would need, and leave; "
                   "with GB, on a GPU of that size, which need not be here")
    args = parser.parse_args()
    if args.resume:
        return resumed_flags(parser, args)
    check_method_flags(parser, args)
    return args


MAY_CHANGE = ("device", "micro_batch", "rollout_rows", "gradient_checkpointing", "offload_optimizer", "parallel", "save_every", "keep", "cache_dir",
              "mirror")  # on --resume; the rest has a meaning


def resumed_flags(parser, args):
    """The flags of the run in args.resume. Raises InputError where the command line asks for something else."""
    try:
        config = json.loads((Path(args.resume) / "config.json").read_text())
        recorded = config["flags"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--resume {args.resume}: there is no readable config.json of a run ({error})") from None
    given = vars(args)
    parser.set_defaults(**{k: v for k, v in recorded.items() if k in given})
    args = parser.parse_args()
    if recorded.get("facts") and args.facts == "auto":  # given again without a value
        args.facts = recorded["facts"]
    if args.dtype == "auto":  # as it was, whatever is to be had here
        args.dtype = recorded["dtype"] = config.get("dtype", "auto").removeprefix("torch.")
    changed = {k: (v, getattr(args, k)) for k, v in recorded.items()
               if k not in ("out", "resume", "overwrite", "dry_run") and k in given and getattr(args, k) != v}
    refused = [f"--{k.replace('_', '-')} {old} -> {new}" for k, (old, new) in changed.items() if k not in MAY_CHANGE]
    if refused:
        raise InputError(f"--resume {args.resume}: this would make it another run: {', '.join(refused)}. Leave these out, or start a new run")
    for name, (old, new) in changed.items():
        print(f"resumed with --{name.replace('_', '-')} {new} instead of {old}")
    for name, old in config["versions"].items():
        now = platform.python_version() if name == "python" else importlib.metadata.version(name)
        if now != old:
            print(f"note: the run was started with {name} {old}, this is {now}: results may differ in the last digits")
    if args.overwrite:
        raise InputError("--overwrite would delete what --resume goes on with; drop one of the two")
    args.out = args.resume
    return args


R2RANK_FLAGS = ("pl", "permutations", "credit", "head_lr", "warmup_steps", "warmup_lr", "no_reasoning", "eval_samples", "candidates", "save_candidates", "negatives",
                "facts", "smooth_facts")
TEMPLATES = ("template", "tally")  # built-in teachers
REREC_FLAGS = ("query_kinds", "max_conditions", "num_queries", "reward_weights", "raae_penalty", "no_raae", "min_std", "tau", "no_curriculum",
               "personalized", "list_length")


def check_method_flags(parser, args):
    """Refuse flags that the method would ignore, and ReRec's contradictions; fill what does not depend on the model."""
    for name in REREC_FLAGS if args.method == "r2rank" else R2RANK_FLAGS:
        if getattr(args, name) != parser.get_default(name):
            other = "rerec" if args.method == "r2rank" else "r2rank"
            raise InputError(f"--{name.replace('_', '-')} belongs to --method {other}; with --method {args.method} it has no effect, so drop it")
    rerec_run = args.method == "rerec"
    args.kl_coef = (0.01 if rerec_run else 0.0) if args.kl_coef is None else args.kl_coef
    stated = args.model == "tiny" and args.facts  # a list costs little then: many lists, with few rationales each
    args.batch_lists = args.batch_lists or (16 if rerec_run else 8 if stated else 4)
    args.sft_lists = args.sft_lists or (8 if rerec_run else 4)
    if not rerec_run:
        args.group_size = args.group_size or (2 if stated else 4)
        if args.teacher == "tally" and not args.facts:
            raise InputError("--teacher tally adds up what --facts tells: add --facts, or take --teacher template")
        return
    if args.group_size == 1:
        raise InputError("--group-size 1: an advantage compares a response with others to the same request; give at least 2")
    for off, name in (("no_raae", "raae_penalty"), ("no_curriculum", "tau")):
        if getattr(args, off) and getattr(args, name) is not None:
            raise InputError(f"--{off.replace('_', '-')} switches off what --{name.replace('_', '-')} sets; drop one of the two")
    if args.teacher not in (None, "template"):
        raise InputError("--teacher: the cold start of --method rerec has traces of the built-in template alone; for a teacher of another "
                         "kind start from a model that it has taught (--model DIR --sft-steps 0)")
    args.reward_weights = args.reward_weights or [0.01, 0.01]
    args.raae_penalty = 0.0 if args.no_raae else 0.3 if args.raae_penalty is None else args.raae_penalty
    args.tau = 0.1 if args.tau is None else args.tau
    args.list_length = args.list_length or 1
    if args.list_length > args.num_candidates:
        raise InputError(f"--list-length {args.list_length}: there are only {args.num_candidates} candidates to answer with")


# --- several processes ---------------------------------------------------------------------------------------------------
# Every process draws the same batches from the same seeds, and works on its part of each. Without torchrun there is one process,
# of rank 0, and these functions do nothing. What waits for other processes stands in train.py, and in eval.py where it shares its lists.

TIMEOUT = timedelta(minutes=30)  # for which a process waits for the others: more than a slow rollout or a download takes
BUCKET = 2**24  # gradients summed at once: 64 MB in float32


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def processes():
    """Meet the processes that torchrun started, if it did. Rank 0 alone prints and shows progress; the others, only errors of their own."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ:
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        with reaching_others():
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=TIMEOUT)
    if rank():
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)  # eval.py's bars, too
    try:
        yield
    except (InputError, OSError):
        if rank():
            time.sleep(2)  # an error that all meet is told once: rank 0 ends first, and then torchrun ends the others
        raise
    if world() > 1:
        dist.destroy_process_group()


@contextlib.contextmanager
def reaching_others():
    """Around every call that waits for other processes: InputError where one of them has ended."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise InputError(f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} cannot reach the others: one has ended (its own message "
                         f"says why), or did nothing for {TIMEOUT.seconds // 60} minutes ({reason})") from None


def part(items):
    """This process's share of a list: neighbours, as many as the others have or one less, perhaps none."""
    return items[len(items) * rank() // world():len(items) * (rank() + 1) // world()]


def gather(items):
    """The lists of all processes joined in the order of ranks, which undoes `part`; so all processes wait for one another."""
    if world() == 1:
        return items
    parts = [None] * world()
    with reaching_others():
        dist.all_gather_object(parts, items)
    return [x for p in parts for x in p]


def all_sum(values):
    """{name: number}, each summed over the processes."""
    if world() == 1:
        return values
    parts = gather([values])
    return {name: sum(p[name] for p in parts) for name in values}


def rank_0_first(function):
    """function(), by rank 0 before the others, who then find what it downloaded or computed in the cache."""
    if rank():
        gather([])
    result = function()
    if not rank():
        gather([])
    return result


def share_weights(*modules):
    """All processes get rank 0's weights; a method without a score head passes None for it."""
    if world() == 1:
        return
    for module in modules:
        for tensor in module.state_dict().values() if module else ():
            with reaching_others():
                dist.broadcast(tensor, 0)


def sum_gradients(parameters):
    """Sum each parameter's gradient over the processes, a bucket at a time; a shard gets its part of the sum. What has none on any
    process keeps none."""
    if world() == 1:
        return
    mine = [p.grad is not None for p in parameters]
    anywhere = [any(flags) for flags in zip(*gather([mine]))]
    buckets, room = [], 0
    for p in (p for p, some in zip(parameters, anywhere) if some):
        if isinstance(p, DTensor):
            summand = unsummed(torch.zeros(p.shape, device=p.device), p) if p.grad is None else p.grad
            with reaching_others():
                p.grad = summand.redistribute(placements=p.placements)
            continue
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
        if p.numel() > room:
            buckets.append([])
            room = max(BUCKET, p.numel())
        buckets[-1].append(p.grad)
        room -= p.numel()
    for bucket in buckets:
        flat = torch.cat([g.flatten() for g in bucket]) if len(bucket) > 1 else bucket[0]
        with reaching_others():
            dist.all_reduce(flat)
        if len(bucket) > 1:
            for gradient, total in zip(bucket, flat.split([g.numel() for g in bucket])):
                gradient.copy_(total.view_as(gradient))


def shard(model):
    """Cut the model's float32 weights into a shard for each process, `p.shard` for each parameter p, and give all the whole weights in the
    model's dtype to compute with (deviation 3). Returns those by name: asked for its own state_dict, the model would drop them.

    A unit for each layer would spare nothing where all is gathered at once, and its hooks in every pass make a small model's decoding a
    third slower.
    """
    dtype, names = model.dtype, list(model.state_dict())
    for p in model.parameters():
        p.data = p.data.float()
    with reaching_others():
        fully_shard(model, mesh=init_device_mesh(model.device.type, (world(),)), reshard_after_forward=False,
                    mp_policy=MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=False))
        shards = list(model.parameters())
        model.unshard()
    for p, part_of_p in zip(model.parameters(), shards):
        p.shard = part_of_p
    return {name: attrgetter(name)(model).detach() for name in names}


def unsummed(gradient, p):
    """One process's whole gradient as what `p.grad` may be until sum_gradients, where p is a shard."""
    return DTensor.from_local(gradient.contiguous(), p.device_mesh, [Partial()]) if isinstance(p, DTensor) else gradient


def own(tensor):
    """This process's part of a sharded tensor, or its own summand of one that is still to be summed; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    """All parts of a tensor that may be sharded, to all processes, who wait for one another."""
    with reaching_others():
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(p, tensor):
    """A whole tensor, sharded as p is, if it is."""
    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) and tensor.shape == p.shape else tensor


def clip_gradients(parameters, max_norm):
    """clip_grad_norm_ where some parameters are shards: the norm is that of all parts of all of them. Returns it."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    shards, others = ([own(g) for g in gradients if isinstance(g, DTensor) == kind] for kind in (True, False))
    if not shards:
        return clip_grad_norm_(parameters, max_norm).item()
    norm = math.sqrt(get_total_norm(others).item()**2 + sum(gather([get_total_norm(shards).item()**2])))
    for g in shards + others:
        g.mul_(min(1.0, max_norm / (norm + 1e-6)))
    return norm


def own_gpu(device):
    """`device`, and a GPU of this machine for each process on it. Raises InputError where there are too few."""
    if world() > 1 and device != "cpu":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device != "cuda":
            raise InputError(f"--device {device}: several processes run on `cuda`, each on a GPU of its own, or on `cpu`")
        if local >= gpus:
            raise InputError(f"more processes than GPUs on this machine: start torchrun with --nproc-per-node {gpus}, or add --device cpu")
        torch.cuda.set_device(local)  # from here on `cuda` means this one
    return device


def launcher():
    """How a run like this one is started: what stands before train.py."""
    return "python" if world() == 1 else f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', world())}"


class Optimizer:
    """AdamW whose state, and for bfloat16 weights a copy of them, is float32. Frozen parameters are left out.

    An update of 1e-6 is below the resolution of a bfloat16 weight and would be lost. Gradients, too, add up in float32: each is
    moved to its master as soon as its backward pass has written it. With `offload` masters (of float32 weights, too) and state are in
    the host's memory: on the device stay the weights and the sums of gradients, which travel one at a time in `step`. The masters of
    a sharded model are its shards.
    """

    def __init__(self, groups, offload=False):
        self.pairs, self.sums, self.handles, self.offload = [], [], [], offload  # sums: the tensors whose `grad` adds up
        for group in groups:
            masters = []
            for p in filter(lambda p: p.requires_grad, group["params"]):
                master, sharded = p, hasattr(p, "shard")
                if sharded:
                    master = p.shard
                    master.detach().copy_(master.detach().to(p.dtype))  # from p, as without shards: not from an earlier optimizer's master
                elif offload or p.dtype != torch.float32:
                    master = p.detach().to("cpu" if offload else p.device, torch.float32).requires_grad_()
                if master is not p:
                    self.pairs.append((p, master))
                masters.append(master)
                # bfloat16 can have no float32 gradient: without a master here, something of its shape has it, without memory of its own
                blank = torch.zeros((), device=p.device).expand(p.shape).requires_grad_
                self.sums.append(master if sharded else p if p.dtype == torch.float32 else blank() if offload else master)
                if self.sums[-1] is not p:
                    self.handles.append(p.register_post_accumulate_grad_hook(self._move_gradient(self.sums[-1])))
            group["params"] = masters
        # foreach, the default on a GPU, would hold 4 bytes a parameter more during a step
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
        self.base_rates = [g["lr"] for g in self.adamw.param_groups]

    @staticmethod
    def _move_gradient(total):
        def move(p):
            if total.grad is None:
                total.grad = unsummed(p.grad.float(), total)
            else:
                own(total.grad).add_(p.grad)
            p.grad = None
        return move

    def step(self, rate=1.0, max_norm=1.0):
        """Clip, step with the learning rates times `rate`, clear the gradients. Returns the gradient norm before clipping.

        Gradients that are not finite are thrown away: the weights stay as they are.
        """
        sum_gradients(self.sums)
        norm = clip_gradients(self.sums, max_norm)
        if not math.isfinite(norm):
            self.clear()
            return norm
        for group, base in zip(self.adamw.param_groups, self.base_rates):
            group["lr"] = base * rate
        if self.offload:  # AdamW passes over what has no gradient, so the host holds one at a time
            for total, (p, master) in zip(self.sums, self.pairs):
                if total.grad is not None:
                    master.grad, total.grad = total.grad.to("cpu"), None
                    self.adamw.step()
                    master.grad = None
        else:
            self.adamw.step()
        self.clear()
        with torch.no_grad():
            for p, master in self.pairs:
                p.copy_(whole(master.to(p.dtype)))
        return norm

    def tensors(self):
        """Everything that a resumed optimizer needs: {name: tensor}, whole, on rank 0; but all processes call it."""
        state, tensors = self.adamw.state_dict()["state"], {}
        parts = ({f"adamw.{n}.{k}": v for n, values in state.items() for k, v in values.items()}
                 | {f"master.{n}": master.detach() for n, master in enumerate(self.masters())})
        for name, tensor in parts.items():
            tensor = whole(tensor)
            if not rank():
                tensors[name] = tensor.cpu()  # one at a time: all of them may not fit a GPU
        return tensors

    def masters(self):
        """Those that are more exact than their weights; the others can be had from these."""
        return [master for p, master in self.pairs if p.dtype != torch.float32]

    def load(self, tensors):
        state, masters, parameters = {}, self.masters(), [p for g in self.adamw.param_groups for p in g["params"]]
        for name, tensor in tensors.items():
            kind, n, *key = name.split(".")
            if kind == "adamw":
                state.setdefault(int(n), {})[key[0]] = like(parameters[int(n)], tensor)
            elif kind == "master":
                with torch.no_grad():
                    masters[int(n)].copy_(like(masters[int(n)], tensor))
        self.adamw.load_state_dict({"state": state, "param_groups": self.adamw.state_dict()["param_groups"]})

    def clear(self):
        """Forget all gradients, also those of an attempt that failed half way."""
        for p in itertools.chain(self.sums, *self.pairs):
            p.grad = None

    def close(self):
        for handle in self.handles:
            handle.remove()


class Run:
    """The run directory while a run works in it: its lock, its log, its states, and what a signal does.

    A state, `states/1-sft-000400` or `states/2-rl-000050`, is a checkpoint with training.safetensors (optimizer, random states) and
    training.json (how much of each stream was drawn, how long the log was, earlier results) beside it. Whatever came after the
    last state is computed again, and the log is cut back to it: the same numbers come out. Of several processes rank 0 writes,
    for all; resumed with another number of processes, each has random states of its own again, but not all those that were saved.
    """

    STAGES = {"sft": 1, "rl": 2}
    PATIENCE = 3  # steps in a row that may fail to be finite

    def __init__(self, folder, args):
        self.folder, self.args = folder, args
        self.model = self.tokenizer = self.score_head = self.weights = None  # weights: of a sharded model, whole
        self.streams, self.generators, self.results, self.curriculum = {}, {}, {}, None
        self.stage, self.step, self.tensors, self.record = None, 0, {}, {}
        self.in_step = self.stopping = False
        self.failures, self.started = 0, time.perf_counter()
        if rank():
            return
        try:
            (folder / "states").mkdir(parents=True, exist_ok=True)
            self.lock = open(folder / ".lock", "w")
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error})") from None
        with contextlib.suppress(ImportError):  # Windows has no fcntl
            import fcntl
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{folder}: another run is at work in this directory; choose another --out") from None

    def seconds(self):
        """Wall-clock seconds of the run up to now, over the parts that resumed it; not those of steps that had to be done again."""
        return self.record.get("seconds", 0.0) + time.perf_counter() - self.started

    def clear(self):
        if rank():
            return
        for path in self.folder.iterdir():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (self.folder / "states").mkdir()

    def newest_state(self):
        """The folder of the last state, or None."""
        return next(reversed(evaluation.complete_states(self.folder)), None)

    def open_state(self, state):
        """Read a state's record. Raises InputError naming the damaged file."""
        try:
            policy.verify_directory(state)
            self.record = json.loads((state / "training.json").read_text())
            self.tensors = load_file(state / "training.safetensors")
        except (InputError, OSError, ValueError, SafetensorError) as error:
            others = [s.name for s in evaluation.complete_states(self.folder) if s != state]
            raise InputError(f"{error}. Delete {state} to resume from "
                             f"{others[-1] if others else 'the beginning (no other state was kept; see --keep)'}") from None
        self.stage, self.step, self.results = self.record["stage"], self.record["step"], self.record["results"]
        if (before := self.record.get("processes", 1)) != world():
            print(f"note: the run had {before} process{'es' * (before > 1)} and has {world()} now: what it samples will differ from here on")

    def open_log(self):
        if rank():
            return
        path = self.folder / "metrics.jsonl"
        self.file = open(path, "r+" if self.record and path.exists() else "w")
        self.file.truncate(self.record.get("log_bytes", 0))
        self.file.seek(0, os.SEEK_END)

    def log(self, stage, step, values, line=None):
        """A line of metrics.jsonl and, sometimes, one in the terminal."""
        if rank():
            return
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        try:
            self.file.write(json.dumps({"stage": stage, "step": step, **rounded}) + "\n")
            self.file.flush()
        except OSError as error:
            raise InputError(f"{self.file.name}: cannot be written ({error}). The last saved state is untouched; once there is room again: "
                             f"{launcher()} train.py --resume {self.folder}") from None
        if line:
            tqdm.write(line)

    def stream(self, name, iterator):
        """The iterator, counted; where a state was opened, without what had been drawn from it."""
        self.streams[name] = counted = Counted(iterator)
        for _ in range(self.record.get("drawn", {}).get(name, 0)):
            next(counted)
        return counted

    def steps(self, stage, total, optimizer, label):
        """A progress bar over the steps of a stage that are left. Restores the optimizer and the random states where a state was opened."""
        first = 0
        if self.stage == stage:
            first = self.step
            optimizer.load({k: v for k, v in self.tensors.items() if k.startswith(("adamw.", "master."))})
            setters = {"torch": torch.set_rng_state, **{name: g.set_state for name, g in self.generators.items()}}
            if torch.cuda.is_available():
                setters["cuda"] = torch.cuda.set_rng_state
            for name, set_state in setters.items():
                if (key := random_key(name, rank())) in self.tensors:  # not, where the run had fewer processes or no GPU before
                    set_state(self.tensors[key])
            self.tensors = {}
        bar = tqdm(range(first + 1, total + 1), desc=label, unit="step", initial=first, total=total)
        self.in_step = True
        for step in bar:
            yield step, bar
            stopping = any(gather([self.stopping]))  # one process was asked to: all stop after the same step
            if step % self.args.save_every == 0 or step == total or stopping:
                self.save(stage, step, optimizer)
            if stopping:
                gather([])  # until rank 0 has saved
                raise KeyboardInterrupt
        self.in_step = False
        if any(gather([self.stopping])):  # asked to while the last step was being saved
            raise KeyboardInterrupt

    def save(self, stage, step, optimizer):
        random_states = {"torch": torch.get_rng_state(), **{name: g.get_state() for name, g in self.generators.items()}}
        if torch.cuda.is_available():
            random_states["cuda"] = torch.cuda.get_rng_state()
        random_states, tensors = gather([random_states]), optimizer.tensors()
        if rank():
            return
        self.file.flush()
        os.fsync(self.file.fileno())
        record = {"stage": stage, "step": step, "log_bytes": self.file.tell(), "results": self.results,
                  "drawn": {name: s.drawn for name, s in self.streams.items()}, "processes": world(), "seconds": self.seconds()}
        tensors |= {random_key(name, n): state for n, states in enumerate(random_states) for name, state in states.items()}

        def write(folder):
            self.write_checkpoint(folder)
            save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "training.safetensors")
            (folder / "training.json").write_text(json.dumps(record))

        policy.save_directory(self.folder / "states" / f"{self.STAGES[stage]}-{stage}-{step:06d}", write)
        for old in evaluation.complete_states(self.folder)[:-self.args.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def write_checkpoint(self, folder):
        """An ordinary Hugging Face directory with the score head, or the curriculum's state, beside the weights."""
        policy.save_model(self.model, folder, self.weights)
        self.tokenizer.save_pretrained(folder)
        if self.score_head is not None:
            self.score_head.save(folder / "score_head.safetensors")
        if self.curriculum is not None:
            (folder / "curriculum.json").write_text(json.dumps(self.curriculum.state_dict()) + "\n")

    def finish(self):
        policy.merge_adapters(self.model)  # nobody needs peft to open the checkpoint; what is evaluated is what is saved
        if rank() == 0:
            policy.save_directory(self.folder / "checkpoint", self.write_checkpoint)

    def check_finite(self, finite, batch):
        """Counts steps without a finite gradient; the third in a row stops the run and leaves its batch for inspection."""
        self.failures = 0 if finite else self.failures + 1
        if not finite:
            tqdm.write("a loss, reward or gradient was not finite: this step changes nothing")
        if self.failures == self.PATIENCE:
            path, batches = self.folder / "bad-batch.json", gather([batch])
            if rank() == 0:
                path.write_text(json.dumps(batch if world() == 1 else batches) + "\n")
            raise InputError(f"{self.PATIENCE} steps in a row had a loss, reward or gradient that was not finite; their last batch is in {path}. "
                             f"Lower the learning rates, or try --dtype float32")

    def on_signal(self, number, frame):
        if not self.in_step or self.stopping and world() == 1:
            raise KeyboardInterrupt
        if not self.stopping:  # torchrun hands signals on, so one may come twice; it kills who takes too long
            tqdm.write("finishing this step, then saving" + "; once more to leave at once" * (world() == 1))
        self.stopping = True

    @contextlib.contextmanager
    def interruptible(self):
        """SIGINT and SIGTERM end the step, save and leave with the command that goes on; elsewhere they leave at once."""
        before = {s: signals.signal(s, self.on_signal) for s in (signals.SIGINT, signals.SIGTERM)}
        try:
            yield
        except KeyboardInterrupt:
            for number in before:
                signals.signal(number, signals.SIG_IGN)  # it is leaving
            print(f"\ninterrupted; go on with: {launcher()} train.py --resume {self.folder}")
            sys.exit(130)
        finally:
            for number, handler in before.items():
                signals.signal(number, handler)


def random_key(name, process):
    """The name of a random state among a state's tensors; process: the rank that it belongs to."""
    return f"random.{name}" + f".{process}" * (process > 0)


class Counted:
    """An iterator that knows how much of it was drawn."""

    def __init__(self, iterator):
        self.iterator, self.drawn = iterator, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.drawn += 1
        return next(self.iterator)


def with_room(run, attempt):
    """attempt(), once more with half the --micro-batch and --rollout-rows where memory ran out. Raises InputError when that fails, too.

    If one of several processes runs out, all try again: so attempt() itself must not wait for others.
    """
    result, failure = tried(attempt)
    if not any(gather([failure])):
        return result
    del result
    args = run.args
    args.micro_batch, args.rollout_rows = max(1, args.micro_batch // 2), max(1, args.rollout_rows // 2)
    tqdm.write(f"out of memory: going on with --micro-batch {args.micro_batch} --rollout-rows {args.rollout_rows}")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    result, failure = tried(attempt)
    if failures := [f for f in gather([failure]) if f]:
        raise InputError(f"out of memory again ({failures[0]}). Lower --micro-batch and --rollout-rows, then --max-new-tokens or "
                         f"--history-length; or add --gradient-checkpointing or --offload-optimizer")
    return result


def tried(attempt):
    """(attempt(), ""), or (None, the reason) where memory ran out; the exception, which would keep the attempt's tensors, is gone."""
    try:
        return attempt(), ""
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return None, str(error).splitlines()[0] if str(error) else type(error).__name__


def out_of_memory(error):
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "not enough memory" in str(error) or "can't allocate memory" in str(error)


def endless(dataset, split, seed):
    """The targets of a split, epoch after epoch, each in its own order."""
    epoch = 0
    while True:
        yield from dataset.targets(split, f"{seed}/{epoch}")
        epoch += 1


# --- 1. cold start -------------------------------------------------------------------------------------------------------


def template_lessons(dataset, args, rng):
    """Endless (history, candidates, responses): of each list, up to 3 candidates that the built-in teacher likes and twice as
    many that it does not."""
    fruitless = 0
    scorecard = data.fit_scorecard(dataset, num_candidates=args.num_candidates, history_length=args.history_length) if args.teacher == "tally" else None
    for target in endless(dataset, "train", f"sft/{args.seed}"):
        if fruitless == 1000:
            needs = "facts that carry evidence" if scorecard else "attributes, such as a brand, that items share"
            raise InputError(f"{dataset.name}: the {args.teacher} teacher tells no candidates apart (it needs {needs}); give --teacher a model "
                             f"or a file of traces, or start without a cold start: --sft-steps 0")
        fruitless += 1
        example = dataset.example(target, args.num_candidates, args.history_length, args.seed)
        traces = [(c, *(r2r.tally_trace(c, scorecard, not args.no_reasoning) if scorecard else
                        r2r.template_trace(example.history, c, not args.no_reasoning))) for c in example.candidates]
        liked, disliked = [t for t in traces if t[2]], [t for t in traces if not t[2]]
        if n := min(3, len(liked), len(disliked) // 2):
            fruitless = 0
            chosen = rng.sample(liked, n) + rng.sample(disliked, 2 * n)
            yield example.history, [c for c, _, _ in chosen], [text for _, text, _ in chosen]


def ask_teacher(dataset, args, device, dtype, path):
    """Ask a model about (user, item) pairs, half of them positive; write the traces whose answer equals the label to a JSONL."""
    teacher, tokenizer = policy.load(args.teacher, device, dtype, dataset.texts(), args.seed)
    sampling = policy.Sampling(512, args.temperature, False, not args.no_share_prefix, args.rollout_rows)
    lines, targets = [], part(dataset.targets("train", f"teacher/{args.seed}")[:(args.teacher_traces + 1) // 2])
    with tqdm(total=2 * len(targets), desc="teacher", unit="pair") as bar:
        for target in targets:
            example = dataset.example(target, args.num_candidates, args.history_length, args.seed)
            where = example.relevance.index(1.0)
            pair = [example.candidates[where], example.candidates[where - 1]]
            prompt = r2r.build_prompt(tokenizer, example.history, pair, question=r2r.QUESTION_TO_TEACHER)
            for item, label, (ids,) in zip(pair, (1, 0), policy.sample(teacher, tokenizer, prompt.prefix_ids, prompt.suffix_ids, 1,
                                                                     **vars(sampling))):
                trace = tokenizer.decode(ids, skip_special_tokens=True).strip()
                if r2r.parse_answer(trace) == bool(label):
                    lines.append(json.dumps({"user": example.user, "history": [x.id for x in example.history], "candidate": item.id,
                                             "label": label, "trace": trace}) + "\n")
            bar.update(2)
            bar.set_postfix(kept=len(lines))
    lines = gather(lines)
    if rank() == 0:
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text("".join(lines))
        unfinished.replace(path)
    gather([])  # until it is there
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
            if dataset.facts:  # from which the user's own interactions are left out
                candidate, = dataset.facts.beside(record["user"], history, [candidate])
            label, trace = bool(record["label"]), record["trace"]
            right = r2r.parse_answer(trace) == label
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} line {number}: expected an object with history (item ids of the catalogue), candidate, label "
                             f"and trace; {type(error).__name__}: {error}") from None
        if right:
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


def cold_start(run, lessons, args):
    """Supervised steps: mean negative log-likelihood of the response tokens. lessons: each step's [(policy.Prompt, texts)], a text
    for each of the prompt's suffixes, or several for its only one."""
    model, tokenizer = run.model, run.tokenizer
    end = policy.stop_ids(model, tokenizer)[0]
    optimizer = Optimizer([{"params": list(model.parameters()), "lr": args.sft_lr}], args.offload_optimizer)
    model.train()
    for step, bar in run.steps("sft", args.sft_steps, optimizer, "cold start"):
        started = time.perf_counter()
        prefixes, owner, suffixes, responses = [], [], [], []
        for prompt, texts in part(next(lessons)):
            owner += [len(prefixes)] * len(texts)
            prefixes.append(prompt.prefix_ids)
            suffixes += prompt.suffix_ids if len(prompt.suffix_ids) == len(texts) else prompt.suffix_ids * len(texts)
            responses += [tokenizer(t, add_special_tokens=False).input_ids + [end] for t in texts]
        tokens = sum(gather([len(r) for r in responses]))

        def update():
            optimizer.clear()
            total = 0.0
            for prefix, local, part in policy.micro_batches(model, prefixes, owner, suffixes, responses, args.micro_batch,
                                                            not args.no_share_prefix):
                logprobs, _, _ = policy.row_logprobs(prefix, local, [suffixes[n] for n in part], [responses[n] for n in part])
                loss = -logprobs.sum() / tokens
                loss.backward()
                total += loss.item()
            return total

        total = sum(gather([with_room(run, update)]))
        done = step / args.sft_steps
        norm = optimizer.step(rate=min(1.0, done / 0.05) * (1 - 0.9 * done))
        run.check_finite(math.isfinite(norm), {"stage": "sft", "step": step, "responses": tokenizer.batch_decode(responses)})
        seconds = time.perf_counter() - started
        bar.set_postfix(loss=f"{total:.3f}")
        run.log("sft", step, {"loss": total, "grad_norm": norm, "tokens": tokens, "seconds": seconds},
                f"cold start {step:4d}/{args.sft_steps}  loss {total:.3f}  {tokens / seconds:.0f} tok/s"
                if step % max(1, args.sft_steps // 5) == 0 else None)
    optimizer.close()
    model.eval()


def list_lessons(tokenizer, lessons, args):
    """The lessons of each step, as prompts."""
    while True:
        step = [next(lessons) for _ in range(args.sft_lists)]
        yield [(r2r.build_prompt(tokenizer, history, candidates, not args.no_reasoning), texts) for history, candidates, texts in step]


# --- 2. and 3. reinforcement learning ------------------------------------------------------------------------------------


def draw_batch(dataset, targets, tokenizer, args):
    """This process's part of the step's lists: prompts and relevance."""
    examples = [dataset.example(next(targets), args.num_candidates, args.history_length, args.seed) for _ in range(args.batch_lists)]
    examples = part(examples)
    prompts = [r2r.build_prompt(tokenizer, e.history, e.candidates, not args.no_reasoning) for e in examples]
    return prompts, [torch.tensor(e.relevance) for e in examples]


def roll_out(model, tokenizer, score_head, batch, args, reference=None):
    """Sampled and scored rationales for a batch of lists."""
    rollout = r2r.generate(model, tokenizer, *batch, args.group_size, evaluation.sampling_of(args), not args.no_reasoning)
    sampled = time.perf_counter()
    scored_by = model if args.ppo_epochs > 1 or args.no_reasoning else None  # one update takes what it needs from its own pass
    return r2r.score(scored_by, score_head, rollout, args.temperature, args.micro_batch, not args.no_share_prefix, reference), sampled


def warm_up(run, dataset, targets, args):
    hidden, relevance, started = [], [], time.perf_counter()
    for _ in tqdm(range(args.warmup_steps), desc="warm-up", unit="step"):
        batch = draw_batch(dataset, targets, run.tokenizer, args)
        rollout, _ = with_room(run, lambda: roll_out(run.model, run.tokenizer, run.score_head, batch, args))
        hidden += gather([h.cpu() for h in rollout.lists(rollout.hidden.float())])
        relevance += gather(rollout.relevance)
    if hidden:
        optimizer = torch.optim.AdamW(run.score_head.parameters(), lr=args.warmup_lr, weight_decay=0.0)
        hidden = [h.to(run.model.device) for h in hidden]
        utility = r2r.fit_score_head(run.score_head, hidden, relevance, optimizer) if rank() == 0 else 0.0
        share_weights(run.score_head)
        run.log("warmup", args.warmup_steps, {"utility": utility, "lists": len(hidden), "seconds": time.perf_counter() - started},
                f"warm-up of the score head on {len(hidden)} lists: expected NDCG@10 {utility:.3f} on those held out")


def train_rl(run, dataset, targets, args):
    model, tokenizer, score_head = run.model, run.tokenizer, run.score_head
    reference = frozen_reference(run, args) if args.kl_coef else None
    optimizer = Optimizer([{"params": list(model.parameters()), "lr": args.lr},
                           {"params": list(score_head.parameters()), "lr": args.head_lr}], args.offload_optimizer)
    generator = run.generators["permutations"] = torch.Generator().manual_seed(args.seed + rank())
    if run.stage != "rl":
        run.save("rl", 0, optimizer)  # the cold start and the warm-up are not done again
    one_batch = draw_batch(dataset, endless(dataset, "train", args.seed), tokenizer, args) if args.overfit_one_batch else None
    model.train()
    for step, bar in run.steps("rl", args.steps, optimizer, "RL"):
        started = time.perf_counter()
        batch = one_batch or draw_batch(dataset, targets, tokenizer, args)
        rollout, sampled = with_room(run, lambda: roll_out(model, tokenizer, score_head, batch, args, reference))
        scored = time.perf_counter()
        lengths = gather([len(r) for r in rollout.responses])
        tokens = sum(lengths)
        losses = {"token_loss": 0.0, "kl": 0.0, "clipped": 0.0, "entropy": 0.0, "grad_norm": 0.0}  # if no list has a signal
        for epoch in range(args.ppo_epochs):
            if epoch:  # the scores have moved; the old log-probabilities stay those of the policy that sampled
                old = rollout.logprobs
                r2r.score(model, score_head, rollout, args.temperature, args.micro_batch, not args.no_share_prefix)
                rollout.logprobs = old
            signal = r2r.signal(rollout, credit=args.credit, permutations=args.permutations if args.pl == "sample" else 0,
                                generator=generator, num_lists=args.batch_lists)
            whole = all_sum({"utility": signal.utility, "alive": len(signal.alive)})
            utility = whole["utility"] if epoch == 0 else utility

            def update():
                optimizer.clear()
                if args.ppo_epochs == 1:
                    rollout.logprobs = None
                return r2r.backward(model, score_head, rollout, signal, args.clip, args.kl_coef, args.temperature, args.micro_batch,
                                    not args.no_share_prefix, tokens)

            if not math.isfinite(whole["utility"]):
                losses["grad_norm"] = math.nan
            elif whole["alive"] or args.kl_coef:
                losses = all_sum(with_room(run, update))
                losses["entropy"] /= max(1, losses.pop("updated"))
                losses["grad_norm"] = optimizer.step(rate=min(1.0, step / max(1, 0.05 * args.steps)))
        texts = tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
        run.check_finite(math.isfinite(losses["grad_norm"]), {"stage": "rl", "step": step, "responses": texts, "scores": rollout.scores.tolist()})
        ended = gather([t is not None for t in map(r2r.parse_answer, texts)])
        scores = torch.tensor(gather(rollout.scores.tolist()))
        now = time.perf_counter()
        values = {"utility": utility, **losses, "length": tokens / len(lengths), "format_rate": sum(ended) / len(ended),
                  "truncated": sum(n >= args.max_new_tokens for n in lengths) / len(lengths),
                  "dead_lists": args.batch_lists - whole["alive"],
                  "score_std": scores.std().item(), "seconds_sample": sampled - started, "seconds_score": scored - sampled,
                  "seconds_update": now - scored, "seconds": now - started}
        bar.set_postfix(ndcg=f"{utility:.3f}", len=f"{values['length']:.0f}", s=f"{values['seconds']:.1f}")
        run.log("rl", step, values, f"RL {step:4d}/{args.steps}  NDCG@10 {utility:.3f}  length {values['length']:.0f}  format "
                f"{values['format_rate']:.2f}  {tokens / (sampled - started):.0f} tok/s sampled  {values['seconds']:.1f} s"
                if step % max(1, args.steps // 10) == 0 or step == 1 else None)
    model.eval()
    optimizer.close()


def frozen_reference(run, args):
    """The model as it is when RL begins; kept in the run directory, for a resumed run to find. Beneath adapters (`--lora`) nothing is
    trained: there the reference has adapters of its own, and the rest in common with the model."""
    folder = run.folder / "reference"
    if args.lora:
        model = copy.deepcopy(run.model, {id(p): p for p in run.model.parameters() if not p.requires_grad}).eval()  # takes these as copied
        if run.stage == "rl":
            policy.load_adapters(model, folder)
        elif rank() == 0:
            policy.save_directory(folder, functools.partial(policy.save_adapters, model))
        return model.requires_grad_(False)
    if run.stage != "rl" and rank() == 0:
        policy.save_directory(folder, run.write_checkpoint)
    gather([])  # until it is there; a sharded model cannot be copied in memory
    return policy.load(str(folder), run.model.device, run.model.dtype)[0].requires_grad_(False)


def tiny_texts_r2rank(dataset, args):
    """What the tokenizer of `tiny` is trained on: the catalogue, and what prompts and traces are made of."""
    example = dataset.example(dataset.targets("train")[0], args.num_candidates, args.history_length, args.seed)
    texts = [r2r.SYSTEM, r2r.QUESTION, r2r.QUESTION_WITHOUT_REASONING, "The user's history, oldest first:\n- ", "\nCandidate: "] * 3
    return dataset.texts() + texts + [r2r.template_trace(example.history, c)[0] for c in dataset.items.values()]


def train_r2rank(run, dataset, args, device, dtype, rng):
    examples = evaluation.test_lists(dataset, args, args.eval_lists)
    scores = {"random": evaluation.random_scores(examples, args.seed),
              "popularity": evaluation.popularity_scores(examples, dataset.popularity())}
    before = "sft" if args.sft_steps else "zero-shot"

    def score_test(name, head):
        results = evaluation.model_scores(run.model, run.tokenizer, head, part(examples), evaluation.sampling_of(args), args.eval_samples,
                                          args.micro_batch, not args.no_reasoning, f"eval {name}")
        run.results[name] = gather([s.tolist() for s, _ in results])

    targets = run.stream("targets", endless(dataset, "train", args.seed))
    if run.stage != "rl":
        if args.sft_steps:
            if args.teacher in TEMPLATES:
                lessons = template_lessons(dataset, args, rng)
            else:
                path = Path(args.teacher) if Path(args.teacher).is_file() else run.folder / "traces.jsonl"
                if not path.exists():
                    ask_teacher(dataset, args, device, dtype, path)
                lessons = recorded_lessons(dataset, path, rng, not args.no_reasoning)
            cold_start(run, run.stream("lessons", list_lessons(run.tokenizer, lessons, args)), args)
        score_test(before, None)
        warm_up(run, dataset, targets, args)
    train_rl(run, dataset, targets, args)
    run.finish()
    score_test("rl", run.score_head)
    if rank():
        return

    results = {name: evaluation.evaluate(s, examples) for name, s in (scores | run.results).items()}
    values = {name: r[1] for name, r in results.items()}
    systems = evaluation.write_eval(run.folder / "eval.json", dataset.name, examples, {name: r[0] for name, r in results.items()}, values)
    gain = evaluation.difference(values["rl"]["ndcg@10"], values[before]["ndcg@10"], [e.user for e in examples])
    print(f"\n{len(examples)} held-out lists of {len(examples[0].candidates)} candidates\n{evaluation.table(systems)}\n"
          f"rl - {before}, paired: {gain} NDCG@10")


# --- ReRec -------------------------------------------------------------------------------------------------------------------


def tiny_texts_rerec(dataset, source, args, rng):
    """What the tokenizer of `tiny` is trained on: the catalogue, requests and traces."""
    drawn = source.draw("train", 400)
    texts = [q.text for q in drawn] + [rerec.template_trace(q, rng, args.list_length) for q in drawn]
    return dataset.texts() + texts + [rerec.system_message(args.list_length), rerec.DRILL, "My history, oldest first:\n- Request: \nCandidates:\n- "] * 3


def query_lessons(tokenizer, source, args, rng):
    """Each step's lessons: `--sft-lists` requests with three traces each; for `tiny`, half as many drills of its look-ups too."""
    for step in itertools.count(1):
        queries = source.draw("train", args.sft_lists, start=step * 10**6)  # other requests than those of RL
        lessons = [(q, [rerec.template_trace(q, rng, args.list_length) for _ in range(3)]) for q in queries]
        for q in source.draw("train", args.sft_lists // 2, start=step * 10**6 + 1) if args.model == "tiny" else ():
            drills = [rerec.template_drill(q, rng) for _ in range(2)]
            lessons.append((drills[0][0], [text for _, text in drills]))
        yield [(rerec.build_prompt(tokenizer, q, args.personalized, args.list_length), texts) for q, texts in lessons]


def train_queries(run, queue, queries, graph, embeddings, args):
    """GRPO with ReRec's rewards and advantages on the queue's batches. queries: id -> Query."""
    model, tokenizer = run.model, run.tokenizer
    reference = frozen_reference(run, args) if args.kl_coef else None
    optimizer = Optimizer([{"params": list(model.parameters()), "lr": args.lr}], args.offload_optimizer)
    fixed = queue.next_batch() if args.overfit_one_batch else None
    run.curriculum, share = queue, not args.no_share_prefix
    if run.stage == "rl":
        queue.load_state_dict(json.loads((run.newest_state() / "curriculum.json").read_text()))
    else:
        run.save("rl", 0, optimizer)  # the cold start is not done again
    model.train()
    for step, bar in run.steps("rl", args.steps, optimizer, "RL"):
        started = time.perf_counter()
        batch = fixed or queue.next_batch()
        rollout = with_room(run, lambda: rerec.generate(model, tokenizer, [queries[i] for i in part(batch)], args.group_size,
                                                        evaluation.sampling_of(args), args.personalized, args.list_length))
        sampled = time.perf_counter()
        rerec.judge(tokenizer, rollout, graph, embeddings, args.reward_weights, args.raae_penalty, args.list_length, args.min_std)
        # One update a rollout takes the old log-probabilities from its own forward pass.
        with_room(run, lambda: rerec.score(model if args.ppo_epochs > 1 else None, rollout, args.temperature, args.micro_batch, share, reference))
        scored = time.perf_counter()
        judged, G = gather(rollout.judged), args.group_size
        for n, i in enumerate(batch):
            queue.record(i, [float(j.correct) for j in judged[n * G:(n + 1) * G]])

        lengths = gather([len(r) for r in rollout.responses])
        counts = all_sum(rerec.count_tokens(rollout, args.kl_coef))

        def update():
            optimizer.clear()
            if args.ppo_epochs == 1:
                rollout.logprobs = None
            return rerec.backward(model, rollout, args.clip, args.kl_coef, args.temperature, args.micro_batch, share, counts)

        for _ in range(args.ppo_epochs):
            losses = all_sum(with_room(run, update))
            losses["grad_norm"] = 0.0
            if losses["dead_groups"] < len(batch) or args.kl_coef:
                done = step / args.steps  # the rate falls to a tenth: epochs end with what is hardest, and so with noise
                losses["grad_norm"] = optimizer.step(rate=min(1.0, done / 0.05) * (1 - 0.9 * done))
        run.check_finite(math.isfinite(losses["grad_norm"]), {"stage": "rl", "step": step, "queries": batch, "rewards": [j.reward for j in judged],
                                                              "responses": tokenizer.batch_decode(rollout.responses)})
        mean = lambda name: sum(float(getattr(j, name)) for j in judged) / len(judged)
        now = time.perf_counter()
        values = {"reward": mean("reward"), "accuracy": mean("correct"), "ndcg": mean("ndcg"), "format_rate": mean("boxed"),
                  "query_alignment": mean("query_alignment"), "preference_alignment": mean("preference_alignment"), **losses,
                  "length": sum(lengths) / len(lengths), "truncated": sum(n >= args.max_new_tokens for n in lengths) / len(lengths),
                  "queries": len(batch), **queue.statistics(),
                  "seconds_sample": sampled - started, "seconds_score": scored - sampled, "seconds_update": now - scored,
                  "seconds": now - started}
        bar.set_postfix(acc=f"{values['accuracy']:.3f}", len=f"{values['length']:.0f}", s=f"{values['seconds']:.1f}")
        run.log("rl", step, values, f"RL {step:4d}/{args.steps}  accuracy {values['accuracy']:.3f}  reward {values['reward']:+.3f}  length "
                f"{values['length']:.0f}  epoch {queue.epoch}, pool {values['pool']}  {sum(lengths) / (sampled - started):.0f} tok/s sampled  "
                f"{values['seconds']:.1f} s" if step % max(1, args.steps // 10) == 0 or step == 1 else None)
    model.eval()
    optimizer.close()


def train_rerec(run, dataset, source, args, rng):
    """Cold start, GRPO, evaluation before and after, by kind of request."""
    queries, tests = source.draw("train", args.num_queries), source.draw("test", args.eval_lists)
    graph = rewards.attribute_graph(source.graph_items())
    cache = args.cache_dir or data.DEFAULT_CACHE
    embeddings = rank_0_first(lambda: rewards.item_embeddings(dataset, cache)) if args.reward_weights[1] else {}
    rows = {"random": rerec.random_metrics(tests, args.list_length, args.seed)}
    before = "sft" if args.sft_steps else "zero-shot"

    def score_test(name):
        answers = evaluation.query_answers(run.model, run.tokenizer, part(tests), evaluation.sampling_of(args), args.personalized, args.list_length,
                                           f"eval {name}")
        run.results[name] = gather([metrics for _, metrics in answers])

    if run.stage != "rl":
        if args.sft_steps:
            cold_start(run, run.stream("lessons", query_lessons(run.tokenizer, source, args, rng)), args)
        score_test(before)
    queue = rerec.CurriculumQueue([q.id for q in queries], args.batch_lists, args.tau, not args.no_curriculum, args.seed)
    train_queries(run, queue, {q.id: q for q in queries}, graph, embeddings, args)
    run.finish()
    score_test("rl")
    if rank():
        return
    rows |= run.results
    systems = {name: evaluation.summarise_queries(tests, r) for name, r in rows.items()}
    values = evaluation.by_metric(rows)
    systems = evaluation.write_eval(run.folder / "eval.json", dataset.name, tests, systems, values)
    gain = evaluation.difference(values["rl"]["accuracy"], values[before]["accuracy"], [q.user or q.id for q in tests])
    print(f"\n{len(tests)} held-out requests, {args.num_candidates} candidates each\n{evaluation.query_table(systems)}\n"
          f"rl - {before}, paired: {gain} accuracy")


# --- memory ------------------------------------------------------------------------------------------------------------------
# What a run will need, before anything is loaded. A step's passes run on the meta device, where tensors have shapes and no memory, by the
# functions that the run itself calls: with prompts as long as the longest of the data, and responses that never end by themselves.

GB = 2**30
CUDA_ITSELF = 0.7 * GB  # context, kernels, workspaces; assumed, not measured
LIBRARIES = 0.06 * GB  # what they take besides once they are at work
GAPS = 0.1  # what an allocator holds beyond what is alive, as a share of the passes; on a GPU assumed, not measured


class Alive(TorchDispatchMode):
    """Adds up the bytes of the tensors made inside it that are alive: `now`, and at the `peak`."""

    def __init__(self, *modules):
        super().__init__()
        self.now = self.peak = 0
        self.known = {x.untyped_storage()._cdata for m in modules for x in itertools.chain(m.parameters(), m.buffers())}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 0  # a mask is asked whether it hides nothing
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, key, size):
        self.known.discard(key)
        self.now -= size


class FusedAttention(torch.autograd.Function):
    """The tensors of a kernel that never holds all weights of attention; left to itself, the meta device takes one that does."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        out = torch.empty_like(query)  # (N, H, T, d)
        mask = None if mask is None else mask.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32), mask)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None


@contextlib.contextmanager
def on_meta(*modules):
    """Gives an Alive, for passes of modules on the meta device."""
    attention = lambda query, key, value, mask=None, *args, attn_mask=None, **kwargs: FusedAttention.apply(query, key, value, mask if attn_mask is None else attn_mask)
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention), Alive(*filter(None, modules)) as alive:
        yield alive


def blank_rows(lists, candidates, samples, lengths):
    """(prefixes, owner, suffixes, responses) of lists x candidates x samples rows. lengths: tokens of prefix, suffix, response."""
    prefix, suffix, response = lengths
    each = [[c] * suffix for c in range(candidates) for _ in range(samples)]
    return [[0] * prefix] * lists, [n for n in range(lists) for _ in each], each * lists, [[0] * response] * (lists * len(each))


@functools.cache
@torch.no_grad()
def sampling_memory(model, shape, lengths, max_rows):
    """Bytes of a `generate` call on the first of blank_rows(*shape, lengths): (keys and values, what else there is at the peak)."""
    prefixes, owner, suffixes, _ = blank_rows(*shape, lengths)
    with on_meta(model.eval()) as alive:
        ids, mask, cache = policy._prefill(model, prefixes, owner[:max_rows], suffixes[:max_rows], policy.Sampling(lengths[2]))
        kept = alive.now
        _, (hidden,) = policy._continue(model, ids, mask, cache, None)
        probabilities = model.get_output_embeddings()(hidden).float().softmax(-1)
        cumulative = probabilities[:64].cumsum(-1, dtype=torch.float64)  # noqa: F841
    return kept, alive.peak - kept


@functools.cache
def update_memory(model, score_head, shape, lengths, micro_batch, checkpointing):
    """Bytes of an update on blank_rows(*shape, lengths): (activations of the prefixes, of a micro-batch, what else there is at the peak)."""
    kept, (prefixes, owner, suffixes, responses) = None, blank_rows(*shape, lengths)
    policy.checkpoint_activations(model.train(), checkpointing)
    with on_meta(model, score_head) as alive:
        for prefix, local, part in policy.micro_batches(model, prefixes, owner, suffixes, responses, micro_batch):
            before = alive.now
            logprobs, _, hidden = policy.row_logprobs(prefix, local, [suffixes[n] for n in part], [responses[n] for n in part])
            kept = kept or (before, alive.now - before)
            (logprobs.sum() + (score_head(hidden) if score_head else hidden).sum()).backward()
    return *kept, alive.peak - sum(kept)


def memory_parts(model, score_head, prompt, args, device, here):
    """[(what, "device" or "host", bytes, phases in which it is there)]; on a CPU all is the device's.
    prompt: tokens of prefix and suffix; here: bytes that Python has now.

    The cold start is left out: it has fewer rows than RL, and shorter ones.
    """
    lengths = (*prompt, 0 if args.no_reasoning else args.max_new_tokens)
    G = 1 if args.no_reasoning else args.group_size
    K = 1 if args.method == "rerec" else args.num_candidates
    lists, tests = -(-args.batch_lists // world()), -(-args.eval_lists // world())
    of = lambda parameters: (sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters))
    trained = [p for p in itertools.chain(model.parameters(), score_head.parameters() if score_head else ()) if p.requires_grad]
    (total, weights), (count, _) = of(list(model.parameters())), of(trained)
    shards = world() if args.parallel == "fsdp" else 1
    copied, _ = of([p for p in trained if p.dtype != torch.float32 or args.offload_optimizer and device != "cpu" or shards > 1])
    state = "host" if args.offload_optimizer else "device"
    training = ("sampling", "update", "saving a state")
    parts = [("Python, its libraries, the data", "host", here, (*training, "evaluation", "loading")),
             (f"weights: {total / 1e6:.1f}M", "device", weights, (*training, "evaluation")),
             ("frozen reference", "device", of([p for p in model.parameters() if p.requires_grad or not args.lora])[1] if args.kl_coef else 0, training),
             (f"gradients: {count / 1e6:.1f}M, float32", "device", 4 * count, ("update",)),
             ("float32 copies of weights", state, 4 * copied // shards, training), ("AdamW's two moments", state, 8 * count // shards, training)]
    if device != "cpu":
        parts += [("weights, before they are moved", "host", weights, ("loading",)),
                  ("what is saved", "host", weights + (0 if state == "host" else 4 * copied + 8 * count), ("saving a state",))]
    gaps = lambda sizes: sizes[-1] + GAPS * sum(sizes)
    alike = min(lists, max(1, args.micro_batch // (K * G)))  # lists that share a pass, as in policy.micro_batches
    shape = (alike, min(K, -(-2 * args.micro_batch // G)), G)  # a third micro-batch of a list adds nothing to the second
    sizes = update_memory(model, score_head, shape, lengths, args.micro_batch, bool(args.gradient_checkpointing))
    parts += [(f"update: activations of {alike} prefix{'es' * (alike > 1)} of {lengths[0]} tokens", "device", sizes[0], ("update",)),
              (f"update: activations of {min(args.micro_batch, alike * K * G)} rows of {sum(lengths[1:])} tokens", "device", sizes[1], ("update",)),
              ("update: logits, gradients on their way, allocator's gaps", "device", gaps(sizes), ("update",))]
    samples = 1 if args.method == "rerec" else args.eval_samples
    tested = (min(tests, max(1, args.rollout_rows // (K * samples))), K, samples)
    for phase, shape in () if args.no_reasoning else (("sampling", (lists, K, G)), ("evaluation", tested)):
        sizes = sampling_memory(model, shape, lengths, args.rollout_rows)
        parts += [(f"{phase}: keys and values of {min(math.prod(shape), args.rollout_rows)} rows of {sum(lengths)} tokens", "device", sizes[0], (phase,)),
                  (f"{phase}: a pass, allocator's gaps", "device", gaps(sizes), (phase,))]
    return parts if device != "cpu" else [(what, "device", size, there) for what, _, size, there in parts]


def longest_prompt(tokenizer, dataset, source, args):
    """Tokens of the longest prefix and of the longest suffix in RL's first 200 lists or requests."""
    count = min(200, max(1, args.steps) * args.batch_lists)
    if source:
        prompts = [rerec.build_prompt(tokenizer, q, args.personalized, args.list_length) for q in source.draw("train", min(count, args.num_queries))]
    else:
        examples = (dataset.example(t, args.num_candidates, args.history_length, args.seed)
                    for t in itertools.islice(endless(dataset, "train", args.seed), count))
        prompts = [r2r.build_prompt(tokenizer, e.history, e.candidates, not args.no_reasoning) for e in examples]
    return max(len(p.prefix_ids) for p in prompts), max(len(s) for p in prompts for s in p.suffix_ids)


def peaks(parts):
    """{"device" or "host": (bytes at most, in which phase)}."""
    phases = list(dict.fromkeys(phase for *_, there in parts for phase in there))
    return {where: max((sum(size for _, at, size, there in parts if at == where and phase in there), phase) for phase in phases)
            for where in dict.fromkeys(at for _, at, _, _ in parts)}


def room_on(device):
    """Bytes that are free on a GPU now, or that this machine has; None where nobody knows."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if device == "cpu" and hasattr(os, "sysconf") else None


def fit_memory(args, dataset, source, device, dtype):
    """Print the estimate with --dry-run; on a GPU turn on, of what saves memory and the user left open, as little as is needed."""
    settings = argparse.Namespace(**vars(args) | {"gradient_checkpointing": None, "no_share_prefix": False})
    model, tokenizer = build_model(settings, dataset, source, "cpu" if args.model == "tiny" else "meta", dtype, random.Random(args.seed))
    here = LIBRARIES + (int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if Path("/proc/self/statm").exists() else GB // 2)
    model.to("meta").tie_weights()
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))  # gradients are counted apart
    score_head = None if source else r2r.ScoreHead(model.config.get_text_config().hidden_size).to("meta")
    fill_defaults(settings, model, device)
    prompt = longest_prompt(tokenizer, dataset, source, settings)
    room = args.dry_run * GB - CUDA_ITSELF if args.dry_run not in (None, True) else room_on(device)

    def estimate(changes):
        parts = memory_parts(model, score_head, prompt, argparse.Namespace(**vars(settings) | changes), device, here)
        return parts, peaks(parts)["device"]

    chosen = {name: getattr(args, name) for name in ("gradient_checkpointing", "offload_optimizer")}
    undecided = [name for name, on in chosen.items() if on is None and device.startswith("cuda") and (args.parallel, name) != ("fsdp", "offload_optimizer")]
    for n, on in ((n, on) for n in range(len(undecided) + 1) for on in itertools.combinations(undecided, n)):
        chosen |= {name: name in on for name in undecided}
        parts, (peak, phase) = estimate(chosen)
        if room is None or peak <= room:
            break
    vars(args).update(chosen)
    if args.dry_run:
        print_memory(parts)
    flag = lambda name, value: f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
    on = " ".join(flag(name, True) for name in undecided if chosen[name])
    if room is not None and peak <= room and (on or args.dry_run):
        print(f"memory: {peak / GB:.1f} GB of {room / GB:.1f} GB by estimate" + f", with {on}, turned on for that" * bool(on))
    if room is None or peak <= room:
        return
    more, least = dict(chosen), peak  # what the user may do
    while least > room and more.get("micro_batch") != 1 and more.get("rollout_rows") != 1:
        if phase == "update" and not more["gradient_checkpointing"]:
            more["gradient_checkpointing"] = True
        else:
            name = "micro_batch" if phase == "update" else "rollout_rows"
            more[name] = max(1, more.get(name, getattr(settings, name)) // 4)
        _, (least, phase) = estimate(more)
    advice = " ".join(flag(name, value) for name, value in more.items() if value)
    print(f"memory: {peak / GB:.1f} GB by estimate, more than the {room / GB:.1f} GB here" + f", even with {on}" * bool(on)
          + (f"; with {advice} it would be {least / GB:.1f} GB" if least <= room else "; take a smaller model, adapters (--lora 16), or shorter texts "
             "(--max-new-tokens, --history-length)"))


def print_memory(parts):
    """The estimate as a table: parts, then what is there together in each phase."""
    places = ("device", "host") if any(place == "host" for _, place, _, _ in parts) else ("device",)
    print(f"{'memory in GB (2^30 bytes)':<62}" + "".join(f"{place:>8}" for place in places) + "  while")
    line = lambda what, sizes, there: print(f"{what:<62}" + "".join(f"{sizes[p] / GB:8.2f}" if p in sizes else " " * 8 for p in places) + f"  {there}")
    for what, place, size, there in parts:
        if size:
            line(what, {place: size}, ", ".join(there) if len(there) < 4 else "always")
    for phase in dict.fromkeys(phase for *_, there in parts for phase in there):
        line("together", {p: sum(size for _, place, size, there in parts if place == p and phase in there) for p in places}, phase)


# --- the run -----------------------------------------------------------------------------------------------------------------


def build_model(args, dataset, source, device, dtype, rng, state=None):
    """(model, tokenizer) as training begins or, from a state, goes on. On the device `meta` it has no weights."""
    tiny = args.model == "tiny"
    texts = (tiny_texts_rerec(dataset, source, args, rng) if source else tiny_texts_r2rank(dataset, args)) if tiny else []
    model, tokenizer = policy.load(str(state or args.model), device, dtype, texts, args.seed)
    if tiny and source and not state:
        policy.favour_copying(model)
        policy.add_words(model, tokenizer, dict.fromkeys(f" {rewards.shown_title(x)}" for x in dataset.items.values()))
    if tiny and args.facts and not state:
        policy.add_words(model, tokenizer, [f" [{name} {n}]" for name in dataset.facts.names for n in range(10)])
    if args.lora and not state:
        policy.add_adapters(model, args.lora)
    if args.gradient_checkpointing:
        policy.checkpoint_activations(model)
    return model, tokenizer


def fill_defaults(args, model, device):
    """Defaults that depend on the model: `tiny` starts from nothing, everything else from a pretrained checkpoint."""
    tiny, given = args.model == "tiny", args.max_new_tokens
    evaluation.fill_model_defaults(args, model, device)
    args.teacher = args.teacher or ("template" if tiny or args.sft_steps else None)
    if args.method == "rerec":
        # The toy's words and titles are a token each: four claims about an item, and a box.
        args.max_new_tokens = given or (24 + 4 * args.list_length if args.data == "toy" and tiny else args.max_new_tokens)
        own = (("steps", 80, 200), ("lr", 1.5e-4, 5e-6), ("sft_steps", 550, 200 if args.teacher else 0), ("sft_lr", 1.5e-3, 1e-5),
               ("group_size", 8, 5), ("num_queries", 400, 2000))
    else:
        # With facts a tiny model sees real data. There a fast head becomes certain (its scores run away), and certain lists teach nothing.
        own = (("steps", 30, 200), ("lr", 5e-5, 6e-6), ("head_lr", 3e-4, 3e-5), ("warmup_steps", 2, 4), ("warmup_lr", 1e-3, 1e-3),
               ("sft_steps", 400, 200 if args.teacher else 0), ("sft_lr", 1e-3, 1e-5)) if not args.facts else (
               ("steps", 100, 200), ("lr", 1e-4, 6e-6), ("head_lr", 1e-4, 3e-5), ("warmup_steps", 10, 4), ("warmup_lr", 1e-4, 1e-3),
               ("sft_steps", 200, 200 if args.teacher else 0), ("sft_lr", 1e-3, 1e-5))
    for name, small, large in own:
        if getattr(args, name) is None:  # adapters learn at ten times the rate
            setattr(args, name, small if tiny else large * (10 if args.lora and name in ("lr", "sft_lr") else 1))


def is_run(folder):
    with contextlib.suppress(OSError, ValueError, TypeError):
        return "flags" in json.loads((folder / "config.json").read_text())
    return False


def choose_run_directory(args, dataset):
    """--out, or the first free runs/DATA-MODEL, -2, -3, …; nothing is made or deleted yet. Raises InputError."""
    if args.out:
        out = Path(args.out)
        if out.exists() and any(out.iterdir()):
            if not args.overwrite:
                raise InputError(f"--out {out}: it exists and is not empty; choose another, or add --overwrite")
            if not is_run(out):  # a model has a config.json, too
                raise InputError(f"--out {out}: it does not look like a run directory, so --overwrite will not delete it")
    else:
        base = Path("runs") / f"{dataset.name}-{Path(args.model).name}{'-rerec' if args.method == 'rerec' else ''}"
        out = next(p for n in range(1, 10**6) if not (p := base if n == 1 else base.with_name(f"{base.name}-{n}")).exists())
    return out


@processes()
def main():
    args = rank_0_first(parse_flags)
    started = time.perf_counter()
    if args.no_reasoning and args.kl_coef:
        raise InputError("--kl-coef acts on rationale tokens, and with --no-reasoning there are none; drop one of the two")
    if args.parallel == "fsdp" and (args.lora or args.offload_optimizer):
        raise InputError("--parallel fsdp shards the float32 weights that --offload-optimizer would move and --lora does not have; drop one of the two")
    if args.overwrite and not args.out:
        raise InputError("--overwrite needs --out DIR; without --out a new directory is made")
    dataset, device, dtype = rank_0_first(lambda: evaluation.check_common_flags(args))
    if args.dry_run not in (None, True):  # a card that need not be here
        device, dtype = "cuda", evaluation.pick_dtype(args.dtype, "cuda")
    else:
        device = own_gpu(device)
    args.save_candidates = None if rank() else args.save_candidates
    source = None
    if dataset.bench and args.method != "rerec":
        raise InputError(f"--data {args.data}: these are requests, for --method rerec")
    if args.method == "rerec":
        if dataset.bench and args.max_conditions and not args.resume:
            raise InputError("--max-conditions is about requests built from a catalogue; RecBench+'s have their own: leave it out")
        args.max_conditions = args.max_conditions or (2 if args.model == "tiny" else 3)
        source = data.query_source(dataset, args.query_kinds, args.max_conditions, args.num_candidates, args.history_length, args.seed)
    for split in ("train", "test"):  # an empty split, too small a catalogue, or a kind that finds no request is an error before any model
        if source:
            source.draw(split, len(source.kinds))
        else:
            dataset.examples(split, 1, args.num_candidates, args.history_length, args.seed)
    if args.teacher and args.teacher not in TEMPLATES and not Path(args.teacher).is_file():
        policy.resolve(args.teacher)
    if args.dry_run or device.startswith("cuda") and not args.resume:
        fit_memory(args, dataset, source, device, dtype)
        if args.dry_run:
            return
    for name in ("gradient_checkpointing", "offload_optimizer"):  # on all processes, where one of them needs it
        setattr(args, name, any(gather([bool(getattr(args, name))])))
    out = Path(args.resume) if args.resume else gather([choose_run_directory(args, dataset)] if rank() == 0 else [])[0]
    if args.resume and not (out / "states").exists():
        return print(f"{out}: this run has finished; nothing to resume")
    run = Run(out, args) if args.resume else None
    state = run.newest_state() if run else None
    if state:
        run.open_state(state)
    print(f"run directory: {out}" + (f", resumed after {run.stage} step {run.step}" if state else ""))
    torch.manual_seed(args.seed + rank())  # the processes sample each in its own way; what all must draw alike comes from rng
    rng = random.Random(args.seed)

    model, tokenizer = build_model(args, dataset, source, device, dtype, rng, state)
    run = run or Run(out, args)  # made only now that the model is there
    run.model, run.tokenizer, run.started = model, tokenizer, started
    fill_defaults(args, run.model, device)
    if not source:
        head = r2r.ScoreHead(run.model.config.get_text_config().hidden_size, reasoning=not args.no_reasoning)
        run.score_head = (r2r.ScoreHead.load(state / "score_head.safetensors") if state else head).to(device)
    share_weights(run.model, run.score_head)
    if args.parallel == "fsdp" and world() > 1:  # one process has all there is
        run.weights = shard(run.model)
    if not state and rank() == 0:
        if not args.resume:
            run.clear()
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")}
        config = {"flags": vars(args), "versions": {"python": platform.python_version(), **versions}, "seed": args.seed, "device": device,
                  "dtype": str(dtype)}
        temporary = out / "config.json.tmp"
        temporary.write_text(json.dumps(config, indent=1) + "\n")
        temporary.replace(out / "config.json")
    run.open_log()
    if args.batch_lists < world():
        print(f"note: --batch-lists {args.batch_lists} leaves some of {world()} processes without work in RL")
    print(f"{dataset.name}: {len(dataset.items)} items, {len(dataset.sequences)} users, "
          f"{' / '.join(str(len(dataset.splits[s])) for s in ('train', 'validation', 'test'))} examples in train / validation / test\n"
          f"{args.model}: {sum(p.numel() for p in run.model.parameters()) / 1e6:.1f}M parameters, {dtype} on {device}"
          + (f"; trained: adapters of rank {args.lora}, {sum(p.numel() for p in run.model.parameters() if p.requires_grad) / 1e6:.2f}M" if args.lora else ""))
    with run.interruptible():
        if source:
            train_rerec(run, dataset, source, args, rng)
        else:
            train_r2rank(run, dataset, args, device, dtype, rng)
    if rank():
        return
    evaluation.write_result(out, run.seconds(), world())
    (out / "states").rename(out / "states.old")  # at once: a run without states has finished
    shutil.rmtree(out / "states.old", ignore_errors=True)
    print(f"{time.perf_counter() - started:.0f} s in all; everything is in {out}")


if __name__ == "__main__":
    evaluation.run_main(main)
