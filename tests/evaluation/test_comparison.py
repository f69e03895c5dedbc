"""Two models side by side: equal ones differ in nothing, others by what their logits say."""

import copy

import pytest
import torch
import torch.nn.functional as F

from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.errors import UserError
from xtuner_ext.evaluation.comparison import check_comparable, compare

LINEAR = ["linear_attention"] * 3


@pytest.fixture
def dataset(digits, digits_processor):
    return ConversationDataset(str(digits / "test.json"), digits_processor, "internlm2_chat")


@pytest.fixture
def teacher(tiny_model):
    return tiny_model().eval()


def test_a_model_equals_itself(teacher, dataset):
    found = compare(teacher, copy.deepcopy(teacher), dataset, batch_size=5)
    assert abs(found["kl"]) < 1e-6 and found["agreement"] == 1
    assert found["perplexity"] == found["teacher_perplexity"]
    assert found["alignment"]["text"] == found["alignment"]["image"] == 0


def test_measures_equal_those_of_each_sample_alone(teacher, tiny_model, dataset):
    student = tiny_model(*LINEAR).eval()
    found = compare(teacher, student, dataset, batch_size=5)
    kl, tokens = 0.0, 0
    for sample in (dataset[i] for i in range(len(dataset))):
        rows = sample["labels"][1:] != -100
        with torch.no_grad():
            ours, theirs = (
                m(sample["input_ids"][None], pixel_values=sample["pixel_values"]).logits[0, :-1][rows].log_softmax(-1)
                for m in (student, teacher)
            )
        kl += F.kl_div(ours, theirs, log_target=True, reduction="sum").item()
        tokens += int(rows.sum())
    assert found["tokens"] == tokens
    assert found["kl"] == pytest.approx(kl / tokens, rel=1e-4)
    assert sum(part["tokens"] for part in found["by_category"].values()) == tokens
    assert set(found["by_category"]) == {dataset.record(i).category for i in range(len(dataset))}


def test_alignment_errors_are_the_mixers_fed_with_the_teachers_states(teacher, tiny_model, dataset):
    student = tiny_model("full_attention", "linear_attention", "full_attention").eval()
    student.load_state_dict(teacher.state_dict(), strict=False)
    layers = compare(teacher, student, dataset, batch_size=4)["alignment"]["layers"]
    assert layers[0] == layers[2] == {"text": 0, "image": 0}
    assert layers[1]["text"] > 0 and layers[1]["image"] > 0


def test_limit_takes_samples_from_the_whole_data(teacher, dataset):
    done = []
    compare(teacher, teacher, dataset, batch_size=2, limit=5, on_batch=done.append)
    assert done == [2, 2, 1]


def test_models_of_other_vocabularies_are_refused(teacher):
    other = copy.deepcopy(teacher.config)
    other.vocab_size += 1
    with pytest.raises(UserError, match="words"):
        check_comparable(teacher.config, other, "DIR")


def test_a_blind_model_is_not_compared_with_a_seeing_one(teacher):
    other = copy.deepcopy(teacher.config)
    other.vision = None
    with pytest.raises(UserError, match="DIR does not"):
        check_comparable(teacher.config, other, "DIR")


def test_samples_taken_for_those_that_are_too_long_count_in_their_own_category(teacher, dataset):
    lengths = [len(dataset[i]["input_ids"]) for i in range(len(dataset))]
    dataset.max_length = sorted(lengths)[len(lengths) // 2]
    fitting = [i for i, length in enumerate(lengths) if length <= dataset.max_length]
    taken = [next((i for i in fitting if i >= wanted), fitting[0]) for wanted in range(len(lengths))]
    expected = {}
    for index in taken:
        tokens = int((dataset[index]["labels"][1:] != -100).sum())
        category = dataset.record(index).category
        expected[category] = expected.get(category, 0) + tokens
    assert max(lengths) > dataset.max_length and taken != list(range(len(lengths)))
    found = compare(teacher, teacher, dataset)
    assert {name: part["tokens"] for name, part in found["by_category"].items()} == expected


def test_a_student_in_another_precision_is_measured_in_the_teachers(teacher, tiny_model, dataset):
    student = tiny_model(*LINEAR).to(torch.bfloat16).eval()
    expected = compare(teacher, copy.deepcopy(student).float(), dataset, limit=4)
    assert compare(teacher, student, dataset, limit=4) == expected
