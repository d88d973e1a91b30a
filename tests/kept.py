"""What a model keeps of its general abilities: python tests/kept.py BEFORE AFTER [AFTER ...]

On forty short questions of ordinary chat and general knowledge (kept.jsonl), each with its answer: the mean
log-likelihood of an answer's token, in nats, and how far the next-token distributions there are from those of
the first model, in KL(model || first) a token. `k3` estimates the same from the answers' tokens alone; they
are not the model's own words, so a few that it has come to think improbable make it large.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import policy

PAIRS = [json.loads(line) for line in (Path(__file__).parent / "kept.jsonl").read_text().splitlines()]

@torch.no_grad()
def distributions(model, tokenizer):
    """Log-probabilities (N, V) at the N tokens of all answers, and these tokens (N,)."""
    rows, targets = [], []
    for question, answer in PAIRS:
        text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                             add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        ids = tokenizer(answer, add_special_tokens=False).input_ids + policy.stop_ids(model, tokenizer)[:1]
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1]
        rows.append(logits.float().log_softmax(-1))
        targets += ids
    return torch.cat(rows), torch.tensor(targets)

def compare(first, model, targets):
    """Mean log-likelihood, KL to the first and its k3 estimate. first, model: (N, V), targets: (N,)."""
    said, before = (x.gather(1, targets[:, None]).squeeze(1) for x in (model, first))
    return {"log_likelihood": said.mean().item(),
            "kl": (model.exp() * (model - first)).sum(1).mean().item(),
            "k3": policy.k3_kl(said, before).mean().item()}

if __name__ == "__main__":
    first, targets = distributions(*policy.load(sys.argv[1]))
    for name in sys.argv[1:]:
        row = compare(first, distributions(*policy.load(name))[0], targets)
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True)
