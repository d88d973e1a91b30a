import pytest
import torch

from kept import PAIRS, compare, distributions

def test_what_is_kept_by_hand():
    first, model = torch.randn(2, 5, 7).log_softmax(-1)
    targets = torch.tensor([0, 3, 6, 2, 2])
    same = compare(first, first, targets)
    assert same["kl"] == same["k3"] == 0 and same["log_likelihood"] == first[range(5), targets].mean()
    kl = torch.nn.functional.kl_div(first, model, reduction="batchmean", log_target=True)
    assert compare(first, model, targets)["kl"] == pytest.approx(kl.item(), abs=1e-6)

def test_each_answer_is_scored_after_its_question(model, tokenizer):
    rows, targets = distributions(model, tokenizer)
    answers = [tokenizer(answer, add_special_tokens=False).input_ids for _, answer in PAIRS]
    assert len({question for question, _ in PAIRS}) == 40
    assert targets.tolist() == [i for ids in answers for i in [*ids, tokenizer.eos_token_id]]
    torch.testing.assert_close(rows.exp().sum(-1), torch.ones(len(targets)))
