"""Sums over supervised tokens against torch's own losses."""

import torch
import torch.nn.functional as F

from xtuner_ext.data.masking import next_token_rows
from xtuner_ext.evaluation.fidelity import Tally, tally_rows


def test_measures_equal_those_of_whole_logits():
    torch.manual_seed(0)
    student, teacher = torch.randn(11, 8), torch.randn(11, 8)
    student_head, teacher_head = torch.randn(20, 8), torch.randn(20, 8)
    targets = torch.randint(20, (11,))
    found = tally_rows(student, student_head, teacher, teacher_head, targets, chunk_rows=4).measures()
    ours, theirs = (student @ student_head.T).log_softmax(-1), (teacher @ teacher_head.T).log_softmax(-1)
    assert abs(found["kl"] - F.kl_div(ours, theirs, log_target=True, reduction="batchmean").item()) < 1e-5
    assert found["agreement"] == (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    assert abs(found["perplexity"] - F.nll_loss(ours, targets).exp().item()) < 1e-3
    assert abs(found["teacher_perplexity"] - F.nll_loss(theirs, targets).exp().item()) < 1e-3
    assert found["tokens"] == 11


def test_tallies_add_by_token_not_by_batch():
    total = Tally(kl=1.0, agreed=1, tokens=1)
    total.add(Tally(kl=2.0, agreed=0, tokens=3))
    assert total.measures()["kl"] == 0.75 and total.measures()["agreement"] == 0.25


def test_nothing_supervised_gives_zeros_and_no_division_by_zero():
    assert Tally().measures()["kl"] == 0.0 and Tally().measures()["tokens"] == 0


def test_a_row_predicts_the_token_after_it():
    labels = torch.tensor([[-100, -100, 5, 6], [7, -100, -100, -100]])
    assert next_token_rows(labels).tolist() == [[False, True, True, False], [False] * 4]
