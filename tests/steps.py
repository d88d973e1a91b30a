"""What tests of training steps share: recorded gradients, repeated rollouts, the token loss as written."""

from types import SimpleNamespace

import torch

import policy
from extras.flags import parse_train_flags

def settings(method="r2rank", **changes):
    """The flags of train.py, small, with changes."""
    changes = {"micro_batch": 5, "max_new_tokens": 9, "group_size": 3, "kl_coef": 0.0,
               "token_weight": None if method == "rerec" else 2.0} | changes
    return SimpleNamespace(**vars(parse_train_flags(["--method", method])) | changes)

class Recorder:
    """In train.Optimizer's place: keeps gradients, goes `rate` times each downhill."""

    def __init__(self, *modules, rate=0.0):
        self.parameters = [p for m in modules for p in m.parameters()]
        self.rate, self.gradients = rate, []

    def gather(self, items):
        return items

    sum = gather  # there is one process

    @torch.no_grad()
    def step(self):
        every = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.gradients.append(torch.cat([g.flatten() for g in every]))
        for p, gradient in zip(self.parameters, every):
            p -= self.rate * gradient
            p.grad = None
        return self.gradients[-1].norm().item()

def replay(monkeypatch, rollout):
    """From now on sampling gives the responses of this rollout again, in whatever order its prompts come."""
    responses = {}
    for owner, suffix, response in zip(rollout.owner, rollout.suffixes, rollout.responses):
        responses.setdefault((tuple(rollout.prefixes[owner]), tuple(suffix)), []).append(response)

    def sample_rows(model, tokenizer, prompts, num_samples, sampling):
        found = [r for p in prompts for s in p.suffix_ids for r in responses[tuple(p.prefix_ids), tuple(s)]]
        again = policy.Rollout(prompts, num_samples, found)
        again.hidden = policy.all_logprobs(model, again)[1]
        return again

    monkeypatch.setattr(policy, "sample_rows", sample_rows)

def pad_logprobs(monkeypatch):
    """From now on log-probabilities are computed beyond each response's end, too."""
    def padded(model, rollout, *rest, original=policy.all_logprobs):
        logprobs, hidden = original(model, rollout, *rest)
        logprobs = torch.nn.functional.pad(logprobs, (0, 3))
        for row, response in zip(logprobs, rollout.responses):
            row[len(response):] = 7.0
        return logprobs, hidden

    monkeypatch.setattr(policy, "all_logprobs", padded)

def close(found, wanted):
    return (found - wanted).norm() <= 5e-5 * wanted.norm()

def plain_row(model, rollout, n, temperature=1.0):
    """Row n alone, without cache and padding, by the model's own logits.
    Returns its response's log-probabilities (T,), its last state (D,), each token's entropy (T,)."""
    response, start = rollout.responses[n], rollout.prefixes[rollout.owner[n]] + rollout.suffixes[n]
    out = model(torch.tensor([start + response]), output_hidden_states=True)
    logprobs = (out.logits[0, len(start) - 1:-1] / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs[torch.arange(len(response)), response], out.hidden_states[-1][0, -1], entropy

def token_terms(rows, old_rows, ref_rows, advantages, kl_coef):
    """Token loss + KL as written, a row at a time: (loss, metrics). advantages: of each row one, or (T,)."""
    tokens = max(1, sum(map(len, rows)))
    sums = dict.fromkeys(("token_loss", "kl", "clipped", "entropy"), torch.tensor(0.0))
    for row, old, ref, advantage in zip(rows, old_rows, ref_rows, advantages):
        ratio = (row - old).exp()
        clipped = ratio.clamp(0.8, 1.2)
        terms = {"token_loss": -torch.minimum(ratio * advantage, clipped * advantage),
                 "clipped": ratio != clipped, "entropy": -row.detach(),
                 "kl": ((ref - row).exp() - (ref - row) - 1) * bool(kl_coef)}
        sums = {name: sums[name] + term.sum() / tokens for name, term in terms.items()}
    return sums["token_loss"] + kl_coef * sums["kl"], {name: x.item() for name, x in sums.items()}
