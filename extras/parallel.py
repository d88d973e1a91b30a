"""Several processes under torchrun: all draw the same batch, each does its share, the optimizer adds up."""

import math
import os
from datetime import timedelta

import torch
import torch.distributed as dist

def start_processes(args):
    """Meet the processes that torchrun started, if it did."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(minutes=30))
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # from here on `cuda` means this one

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def my_share(items):
    """This process's share of a list: neighbours, as many as the others have or one less, perhaps none."""
    n, world = rank(), dist.get_world_size() if dist.is_initialized() else 1
    return items[len(items) * n // world:len(items) * (n + 1) // world]

def gather(items):
    """The lists of all processes, joined in the order of ranks, which undoes `my_share`."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return sum(lists, [])

def broadcast(module):
    """All processes get rank 0's parameters."""
    for p in module.parameters() if dist.is_initialized() else ():
        dist.broadcast(p.data, 0)

class Optimizer:
    """AdamW on float32 weights, summed over processes. groups: [(parameters, rate)].

    An update of 1e-6 is below the resolution of a bfloat16 weight and would be lost. So such weights have a
    float32 master, where gradients add up, too: each is moved there once its backward pass has written it.
    """

    gather = staticmethod(gather)

    def __init__(self, groups):
        chosen = [(p, rate) for parameters, rate in groups for p in parameters if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p, _ in chosen]
        self.master_of = {p: m for (p, _), m in zip(chosen, self.masters) if p is not m}
        self.hooks = [p.register_post_accumulate_grad_hook(self._move_gradient) for p in self.master_of]
        rows = [{"params": [m], "lr": rate, "rate": rate} for m, (_, rate) in zip(self.masters, chosen)]
        self.adamw = torch.optim.AdamW(rows, betas=(0.9, 0.95), weight_decay=0.0)
        self.schedule = 1.0  # share of the rates

    def _move_gradient(self, p):
        master = self.master_of[p]
        master.grad = p.grad.float() if master.grad is None else master.grad + p.grad
        p.grad = None

    def sum(self, numbers):
        """{name: number}, each summed over the processes."""
        every = gather([numbers])
        return {name: sum(one[name] for one in every) for name in numbers}

    @torch.no_grad()
    def step(self):
        """Sum, clip, step (if all is finite), clear. Returns the gradient's norm before clipping."""
        if dist.is_initialized() and any(gather([any(m.grad is not None for m in self.masters)])):
            for m in self.masters:
                m.grad = torch.zeros_like(m) if m.grad is None else m.grad.contiguous()
                dist.all_reduce(m.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0).item()
        if math.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = group["rate"] * self.schedule
            self.adamw.step()
            for p, m in self.master_of.items():
                p.copy_(m)
        self.adamw.zero_grad()
        return norm

    def state_dict(self):
        return {"adamw": self.adamw.state_dict(), "masters": list(self.master_of.values())}

    @torch.no_grad()
    def load_state_dict(self, state):
        self.adamw.load_state_dict(state["adamw"])
        for m, saved in zip(self.master_of.values(), state["masters"]):
            m.copy_(saved)

    def close(self):
        for hook in self.hooks:
            hook.remove()
