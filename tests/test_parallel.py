"""Several processes: the numbers of one, whatever falls to each; none waits for ever. And the optimizer."""

import json
import math
import os
import random
import re
import shutil

import pytest
import torch

import policy
import train
from extras import models, parallel
from extras.parallel import Optimizer
from runs import METHODS, fork, main, metrics, same  # noqa: F401

MORE = ["--kl-coef", "0.1", "--ppo-epochs", "2", "--batch-lists", "3", "--group-size", "3"]

def main_stopped_after_rl_step_2(*flags):
    def save_and_stop(run, stage, step, optimizer, save=train.Run.save):
        save(run, stage, step, optimizer)
        if (stage, step) == ("rl", 2):
            os._exit(9)

    train.Run.save = save_and_stop
    main(*flags)

def main_with_fixed_responses(path, *flags):
    """A run whose responses follow from their prompts alone; keeps gradients and weights of each update."""
    updates = []

    def respond(model, tokenizer, prompts, num_samples, sampling):
        rollout = policy.Rollout(prompts, num_samples)
        for row, (owner, suffix) in enumerate(zip(rollout.owner, rollout.suffixes)):
            text = tokenizer.decode(rollout.prefixes[owner] + suffix)
            rng, lines = random.Random(f"{text} {row % num_samples}"), re.findall("^- (.+)", text, re.M)
            box = "\n\\boxed{%s}" if row % num_samples else "%s"  # of a group some are answers, some are not
            ids = tokenizer(rng.choice(lines) + box % rng.choice(lines)).input_ids
            rollout.responses[row] = ids[-rng.randint(sampling.max_new_tokens // 2, sampling.max_new_tokens):]
        _, rollout.hidden = policy.all_logprobs(model, rollout)
        return rollout

    def watched(optimizer, groups, original=Optimizer.__init__):
        original(optimizer, groups)
        optimizer.adamw.register_step_pre_hook(lambda *_: updates.append(
            [[m.grad.clone() for m in optimizer.masters if m.grad is not None]]))
        optimizer.adamw.register_step_post_hook(lambda *_: updates[-1].append(
            [m.detach().clone() for m in optimizer.masters]))

    policy.sample_rows, models.check_model, Optimizer.__init__ = respond, lambda *_: None, watched
    main(*flags)
    torch.save(updates, f"{path}.{parallel.rank()}")

@pytest.mark.parametrize("method, more", [
    ("r2rank", ""), ("r2rank", "--sft-steps 0 --warmup-steps 0 --batch-lists 1 --eval-lists 1"),
    ("rerec", ""), ("rerec", "--sft-steps 0 --kl-coef 0 --batch-lists 1")])
def test_two_processes_compute_what_one_does(fork, tmp_path, method, more):
    """Also where a step has fewer lists than there are processes."""
    for n in (1, 2):
        codes, printed = fork("test_parallel.main_with_fixed_responses", tmp_path / f"u{n}", *METHODS[method],
                              *MORE, *more.split(), "--out", tmp_path / f"r{n}", world=n)
        assert codes == [0] * n, printed
    for a, b in zip(*(metrics(tmp_path / f"r{n}") for n in (1, 2)), strict=True):
        assert a.pop("stage") == b.pop("stage")
        # a count: tokens at the very threshold may fall on either side
        assert a.pop("clipped", 0) == pytest.approx(b.pop("clipped", 0), abs=0.02)
        assert a.pop("utility", None) == pytest.approx(b.pop("utility", None), abs=1e-3)
        assert a == pytest.approx(b, abs=2e-4, rel=2e-3)
    found, again = (json.loads((tmp_path / f"r{n}/eval.json").read_text())["values"] for n in (1, 2))
    assert found == {name: pytest.approx(values) for name, values in again.items()}  # list by list
    one, two, other = (torch.load(tmp_path / name) for name in ("u1.0", "u2.0", "u2.1"))
    assert len(one) == len(two) == len(other) >= 3
    for (_, first), (_, second) in zip(two, other):  # the processes stay together, to the last bit
        assert all(torch.equal(a, b) for a, b in zip(first, second))
    # the first update, and the first of RL, before which differences of rounding have grown
    for n in {0, 0 if "--sft-steps 0" in more else 3}:
        a, b = (torch.cat([g.flatten() for g in run[n][0]]) for run in (one, two))
        assert (a - b).norm() / a.norm() < (1e-3 if n else 1e-5)
        for w, v in zip(one[n][1], two[n][1]):
            # the head's last bias shifts all scores alike: its gradient is rounding, which Adam makes a step
            assert n or w.shape == (1,) or torch.allclose(w, v, atol=2e-5, rtol=0)

@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_two_processes_goes_on(fork, tmp_path, method):
    """As if it had not been stopped; also in one process, which samples anew."""
    flags, out, alone = [*METHODS[method], *MORE], tmp_path / "r", tmp_path / "alone"
    assert fork("runs.main", *flags, "--out", tmp_path / "whole", world=2)[0] == [0, 0]
    stopped = fork("test_parallel.main_stopped_after_rl_step_2", *flags, "--out", out, world=2)
    assert stopped[0] == [9, 9], stopped
    shutil.copytree(out, alone)
    for folder, world in ((out, 2), (alone, 1)):
        codes, printed = fork("runs.main", "--resume", folder, world=world)
        assert codes == [0] * world, printed
    same(tmp_path / "whole", out)
    assert [r["step"] for r in metrics(alone)] == [r["step"] for r in metrics(out)]

@pytest.mark.parametrize("gone", [0, 1])
def test_a_process_that_dies_ends_the_other(fork, tmp_path, gone):
    flags = [*METHODS["r2rank"], "--sft-steps", "4000", "--out", tmp_path / "r"]
    codes, printed = fork("runs.main", *flags, world=2, ranks=[gone], pattern=tmp_path / "r/state.pt")
    assert codes[gone] == -9 and codes[1 - gone] > 0, printed  # below 0: it waited until it was killed

def test_each_group_steps_by_its_rate_and_its_share():
    """Under a constant gradient AdamW moves a weight by the rate; weights are not decayed. In bfloat16, too,
    where each step of 1e-5 alone would be rounded away."""
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = Optimizer([([a], 1e-4), ([b], 1e-5)])
    for optimizer.schedule, moved in ((0.5, 0.5), (1.0, 1.5)):
        for _ in range(1000):
            (a.sum() + b.sum()).backward()
            optimizer.step()
        torch.testing.assert_close(1 - a.detach(), torch.full((2,), moved * 1e-1), rtol=1e-3, atol=0)
        torch.testing.assert_close(1 - b.detach().float(), torch.full((2,), moved * 1e-2), rtol=0, atol=3e-3)

def test_the_norm_of_all_gradients_is_clipped_and_one_not_finite_changes_nothing():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = Optimizer([([a], 1e-3), ([b], 1e-3)])
    (a.sum() * math.nan + b.sum()).backward()
    assert not math.isfinite(optimizer.step()) and a.grad is b.grad is None and not (a.any() or b.any())
    (3 * a.sum() + b.sum()).backward()
    (3 * b.sum()).backward()  # gradients add up, in the master too
    assert optimizer.step() == pytest.approx((2 * 9 + 2 * 16) ** 0.5)
    moments = torch.cat([s["exp_avg"] for s in optimizer.adamw.state.values()])
    assert moments.norm().item() == pytest.approx(0.1, rel=1e-4)  # (1 - beta) times a gradient of norm 1
