import os
import random
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a hub that cannot be reached would be waited for
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch

import data
import policy
import r2r

@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same numbers every time, alone or after others."""
    torch.manual_seed(0)
    random.seed(0)

@pytest.fixture(scope="session")
def toy():
    return data.load("toy")

@pytest.fixture(scope="session")
def model_and_tokenizer(toy):
    """A random tiny model: every property below holds for any weights."""
    return policy.load("tiny", texts=toy.texts() + [r2r.SYSTEM, r2r.QUESTION] * 3, seed=0, layers=2)

@pytest.fixture
def model(model_and_tokenizer):
    model = model_and_tokenizer[0]
    model.zero_grad()
    yield model
    model.zero_grad()
    model.eval()

@pytest.fixture
def tokenizer(model_and_tokenizer):
    return model_and_tokenizer[1]

@pytest.fixture(scope="session")
def score_head():
    torch.manual_seed(1)
    head = r2r.ScoreHead(192)
    torch.nn.init.normal_(head.layers[2].weight, std=0.3)  # scores a few units apart
    return head
