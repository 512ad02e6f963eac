"""What is counted in answers, by hand, and that answers are what the model says."""

import math
from pathlib import Path

import pytest

from preference_tuning.evaluation import generation
from preference_tuning.evaluation.generation import Answer


def made(*tokens: int, text: str = "words", finished: bool = True, leaked: bool = False) -> Answer:
    return Answer(
        model="m", prompt=0, kind="greedy", text=text, tokens=list(tokens), finished=finished, leaked=leaked
    )  # fmt: skip


def test_counts_by_hand() -> None:
    answers = [made(1, 2, 3, 1, 2, 3, 1, 2), made(5, text="", finished=False, leaked=True)]
    values = generation.values(answers)
    assert values["length"].tolist() == [8, 1]
    assert values["empty"].tolist() == [0, 1]
    assert values["unfinished"].tolist() == [0, 1]
    assert values["template_leak"].tolist() == [0, 1]
    # 1231 2312 3123 1231 2312: five 4-grams, three of them distinct
    assert values["rep_4"] == pytest.approx([1 - 3 / 5, 0])
    assert values["longest_loop"].tolist() == [5, 0]
    # 1 2 3 5 among nine tokens; 12 23 31 among seven pairs
    assert generation.distinct(answers, 1) == pytest.approx(4 / 9)
    assert generation.distinct(answers, 2) == pytest.approx(3 / 7)
    assert math.isnan(generation.distinct([made()], 1))


@pytest.mark.parametrize(
    ("tokens", "loop"),
    [([], 0), ([1], 0), ([1, 1], 1), ([1, 2, 3, 4], 0), ([7, 7, 7, 7], 3), ([1, 2, 1, 3], 0), ([9, 1, 2, 1, 2, 9], 2)],
)
def test_the_longest_loop(tokens: list[int], loop: int) -> None:
    assert generation.longest_loop(tokens) == loop


def test_a_model_is_asked_twice_and_its_samples_follow_the_seed(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = [tokenizer.encode("Tell me about bread."), tokenizer.encode("Rain")]

    def ask(seed: int) -> list[Answer]:
        return list(generation.answer(model, "base", tokenizer, prompts, 6, seed, torch.float32))

    state = torch.get_rng_state()
    first = ask(1)
    assert torch.equal(state, torch.get_rng_state()), "nothing else draws other numbers for it"
    assert [(a.kind, a.prompt) for a in first] == [("greedy", 0), ("greedy", 1), ("sampled", 0), ("sampled", 1)]
    assert ask(1) == first
    other = ask(2)
    assert [a.tokens for a in other[:2]] == [a.tokens for a in first[:2]]
    assert [a.tokens for a in other[2:]] != [a.tokens for a in first[2:]]
    alone = model.generate(torch.tensor([prompts[1]]), max_new_tokens=6, do_sample=False)[0, len(prompts[1]) :]
    assert first[1].tokens == [t for t in alone.tolist() if t != tokenizer.eos_token_id], "padding changes nothing"
    generation.write(first, tmp_path / "answers.parquet")
    assert generation.read(tmp_path / "answers.parquet") == first


def test_marks_of_the_template_are_found(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    plain, mark = tokenizer.encode("bread"), tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert not generation.leaks(plain, "bread", tokenizer)
    assert generation.leaks([*plain, mark], "bread", tokenizer) == (mark in tokenizer.all_special_ids)
    assert generation.leaks(plain, "bread <|im_end|>", tokenizer), "spelled out"
