"""Formats of preference data: what is recognised, what a row becomes, and what is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preference_tuning.config import Columns, SFTSourceConfig, SourceConfig
from preference_tuning.data.formats import recognise, recognise_sft
from preference_tuning.data.pair import FlawError, Pair, Unpaired
from preference_tuning.errors import DataError

SAMPLES = Path(__file__).parent.parent.parent / "shared" / "data" / "formats"


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def user(text):
    return turn("user", text)


def bot(text):
    return turn("assistant", text)


def system(text):
    return turn("system", text)


def source(**settings_):
    columns = Columns(**settings_.pop("columns", {}))
    return SourceConfig(source="x.jsonl", columns=columns, **settings_)


def recognised(*rows, pairing="best_worst", **settings_):
    return recognise(source(**settings_), pairing, "mine", rows)


def convert(row, **settings_):
    return recognised(row, **settings_).convert(row)


def converted(row, **settings_):
    (pair,) = convert(row, **settings_)
    return pair


def flaw_of(row, sample=None, **settings_):
    with pytest.raises(FlawError) as caught:
        recognised(*(sample or [row]), **settings_).convert(row)
    return caught.value.problem, caught.value.detail


def refusal(*rows, **settings_):
    with pytest.raises(DataError) as caught:
        recognised(*rows, **settings_)
    assert str(caught.value).startswith("mine: ")
    return str(caught.value)


Q, GOOD, BAD = "How long is a mile?", "About 1.6 km.", "No idea."
TALK = [user("Hello"), bot("Hi there"), user(Q)]
WHOLE = {"chosen": [*TALK, bot(GOOD)], "rejected": [*TALK, bot(BAD)]}
SHORT = {"chosen": [user(Q), bot(GOOD)], "rejected": [user(Q), bot(BAD)]}
SHAREGPT = [
    {"from": "system", "value": "Be brief"},
    {"from": "human", "value": "Hello"},
    {"from": "gpt", "value": "Hi there"},
    {"from": "human", "value": Q},
]
TOOL = {"name": "length", "description": "Looks up a unit", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "length", "arguments": {"unit": "mile"}}}


def parts(*turns):
    return [
        {"role": role, "content": [{"type": "text", "value": text}], "loss_weight": weight}
        for role, text, weight in turns
    ]


def hh(*turns):
    return "".join(f"\n\n{speaker}: {text}" for speaker, text in turns)


ASKED = [user(Q)]
FORMATS = {
    # name: (format, row, prompt, what else the pair says)
    "trl_standard_explicit": ("pairs", {"prompt": Q, "chosen": GOOD, "rejected": BAD}, ASKED, {}),
    "trl_conversational_explicit": ("pairs", {"prompt": TALK, "chosen": [bot(GOOD)], "rejected": [bot(BAD)]}, TALK, {}),
    "trl_conversational_implicit": ("pairs", WHOLE, TALK, {}),
    "hh_rlhf_transcripts": (
        "transcripts",
        {
            "chosen": hh(("Human", "Hello"), ("Assistant", "Hi there"), ("Human", Q), ("Assistant", GOOD)),
            "rejected": hh(("Human", "Hello"), ("Assistant", "Hi there"), ("Human", Q), ("Assistant", BAD)),
        },
        TALK,
        {},
    ),
    "intel_orca_dpo_pairs": ("pairs", {"system": "Be brief", "question": Q, "chosen": GOOD, "rejected": BAD}, [system("Be brief"), user(Q)], {}),
    "argilla_distilabel_intel_orca": (
        "pairs",
        {
            "system": "Be brief", "input": Q, "chosen": GOOD, "rejected": BAD, "generations": [BAD, GOOD], "order": ["rejected", "chosen"],
            "labelling_model": "m", "rating": [9.0, 2.0], "status": "swapped", "original_chosen": BAD, "original_rejected": GOOD,
            "chosen_score": 9.0, "in_gsm8k_train": False,
        },
        [system("Be brief"), user(Q)],
        {"chosen_score": 9.0},
    ),
    "argilla_dpo_mix_7k": (
        "pairs", {"dataset": "a/b", **WHOLE, "chosen_rating": 5.0, "rejected_rating": 4.0}, TALK,
        {"chosen_score": 5.0, "rejected_score": 4.0, "margin": 1.0, "source": "a/b"},
    ),
    "argilla_capybara_dpo": (
        "pairs",
        {
            "source": "Airoboros", "conversation": [{"input": "Hello", "output": "Hi there"}, {"input": Q, "output": ""}], **WHOLE,
            "rating_chosen": 5, "rating_rejected": 3, "chosen_model": "a", "rejected_model": "b",
        },
        TALK,
        {"chosen_score": 5.0, "rejected_score": 3.0, "margin": 2.0, "source": "Airoboros"},
    ),
    "argilla_ultrafeedback_cleaned": (
        "pairs",
        {"source": "evol", "prompt": Q, **SHORT, "chosen-rating": 5.0, "chosen-model": "a", "rejected-rating": 2.5, "rejected-model": "b"},
        ASKED,
        {"chosen_score": 5.0, "rejected_score": 2.5, "margin": 2.5, "source": "evol"},
    ),
    "ultrafeedback_binarized_h4": (
        "pairs",
        {"prompt": Q, "prompt_id": "0", **SHORT, "messages": SHORT["chosen"], "score_chosen": 8.5, "score_rejected": 6.0},
        ASKED,
        {"chosen_score": 8.5, "rejected_score": 6.0, "margin": 2.5},
    ),
    "orpo_dpo_mix_40k": ("pairs", {"source": "s", "prompt": Q, "question": Q, **SHORT}, ASKED, {"source": "s"}),
    "skywork_reward_no_prompt_messages": ("pairs", {**WHOLE, "source": "magpie"}, TALK, {"source": "magpie"}),
    "chatml_dpo_pairs_handbook": (
        "chatml",
        {
            "prompt": f"<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n",
            "chosen": f"{GOOD}<|im_end|>\n", "rejected": f"{BAD}<|im_end|>\n",
        },
        [system("Be brief"), user(Q)],
        {},
    ),
    "llm_engineers_handbook_llmtwin": ("pairs", {"prompt": Q, "rejected": BAD, "chosen": GOOD}, ASKED, {}),
    "rasbt_instruction_input_output": (
        "pairs", {"instruction": "Convert", "input": "1 mile", "output": GOOD, "rejected": BAD, "chosen": GOOD}, [user("Convert\n\n1 mile")], {},
    ),
    "alpaca_ranking_llamafactory": (
        "pairs",
        {"instruction": Q, "input": "", "chosen": GOOD, "rejected": BAD, "system": "Be brief", "history": [["Hello", "Hi there"]]},
        [system("Be brief"), *TALK],
        {},
    ),
    "alpaca_output_list_legacy": ("ranked_outputs", {"instruction": Q, "input": "", "output": [GOOD, "Hm.", BAD]}, ASKED, {}),
    "sharegpt_ranking_llamafactory": (
        "pairs", {"conversations": SHAREGPT, "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD}},
        [system("Be brief"), *TALK], {},
    ),
    "sharegpt_ranking_string_answers_zh": ("pairs", {"conversations": SHAREGPT, "chosen": GOOD, "rejected": BAD}, [system("Be brief"), *TALK], {}),
    "toolcall_sharegpt_zh": (
        "pairs",
        {
            "conversations": [
                {"from": "human", "value": Q},
                {"from": "function_call", "value": '{"name": "length", "arguments": {"unit": "mile"}}'},
                {"from": "observation", "value": '{"km": 1.6}'},
            ],
            "tools": json.dumps([TOOL]), "chosen": GOOD, "rejected": BAD,
        },
        [user(Q), turn("assistant", "", tool_calls=[CALL]), turn("tool", '{"km": 1.6}')],
        {"tools": [{"type": "function", "function": TOOL}]},
    ),
    "axolotl_messages_plus_answers": ("pairs", {"messages": TALK, "chosen": bot(GOOD), "rejected": bot(BAD)}, TALK, {}),
    "axolotl_custom_field_names": (
        "pairs",
        {
            "conversation": [{"speaker": "human", "text": "Hello"}, {"speaker": "agent", "text": "Hi there"}, {"speaker": "human", "text": Q}],
            "better": {"speaker": "agent", "text": GOOD}, "worse": {"speaker": "agent", "text": BAD},
        },
        TALK,
        {},
    ),
    "chosen_response_rejected_response": ("pairs", {"input": Q, "chosen_response": GOOD, "rejected_response": BAD}, ASKED, {}),
    "stack_exchange_paired": (
        "pairs", {"qid": 1, "question": Q, "date": "2012/07/04", "metadata": ["u"], "response_j": GOOD, "response_k": BAD}, ASKED, {},
    ),
    "shp_reddit": (
        "shp",
        {"post_id": "p", "domain": "askphysics", "history": Q, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0, "score_A": 3, "score_B": 9, "score_ratio": 3.0},
        ASKED,
        {"source": "askphysics"},
    ),
    "alpaca_eval_annotations": (
        "alpaca_eval",
        {"instruction": Q, "output_1": BAD, "generator_1": "a", "output_2": GOOD, "generator_2": "b", "annotator": "x", "preference": 1.93},
        ASKED,
        {},
    ),
    "pku_saferlhf": (
        "safe_rlhf",
        {"prompt": Q, "response_0": BAD, "response_1": GOOD, "is_response_0_safe": True, "is_response_1_safe": True, "better_response_id": 1, "safer_response_id": 0},
        ASKED,
        {},
    ),
    "helpsteer2_preference": (
        "helpsteer", {"prompt": Q, "response_1": GOOD, "response_2": BAD, "preference_strength": -2, "split": "validation"}, ASKED,
        {"margin": 2.0, "held_out": True},
    ),
    "chatbot_arena_pairwise": (
        "arena",
        {
            "question_id": "q", "model_a": "x", "model_b": "y", "winner": "model_b", "judge": "j", "conversation_a": SHORT["rejected"],
            "conversation_b": SHORT["chosen"], "turn": 1, "language": "English",
        },
        ASKED,
        {},
    ),
    "halos_feedback": (
        "halos",
        {
            "prompt_id": 0, "prompt": TALK, "output_A": [bot(GOOD)], "output_B": [bot(BAD)], "label": 1, "reward_A": 1.0, "reward_B": 0.0,
            "type": "pairwise_feedback",
        },
        TALK,
        {},
    ),
    "ultrafeedback_multi_completion_scored": (
        "completions",
        {
            "source": "s", "instruction": Q,
            "completions": [
                {"model": "b", "response": "Hm.", "overall_score": 5.0},
                {"model": "a", "response": GOOD, "overall_score": 9.0},
                {"model": "c", "response": BAD, "overall_score": 2.0},
            ],
        },
        ASKED,
        {"chosen_score": 9.0, "rejected_score": 2.0, "margin": 7.0, "source": "s"},
    ),
    "openai_content_parts_v1": (
        "pairs",
        {
            "chosen_messages": parts(("system", "Be brief", 0.0), ("user", Q, 0.0), ("assistant", GOOD, 1.0)),
            "rejected_messages": parts(("system", "Be brief", 0.0), ("user", Q, 0.0), ("assistant", BAD, 1.0)),
        },
        [system("Be brief"), user(Q)],
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_of_each_format_becomes_the_pair_it_means(name):
    form, row, prompt, more = FORMATS[name]
    found = recognised(row)
    assert found.format == form
    assert found.description.startswith(f"{form}: ")
    assert found.convert(row) == [Pair(prompt, [bot(GOOD)], [bot(BAD)], **more)]


def test_all_34_formats_are_here():
    # The two others: one answer a row, and two texts without a prompt.
    assert len({*FORMATS, "kto_unpaired", "trl_standard_implicit"}) == 34


def test_unpaired_rows_keep_their_label():
    row = {"prompt": ASKED, "completion": [bot(GOOD)], "label": True}
    assert convert(row) == [Unpaired(ASKED, [bot(GOOD)], good=True)]
    assert convert({**row, "label": "false"})[0].good is False
    assert convert({"messages": SHORT["chosen"], "label": 0}) == [Unpaired(ASKED, [bot(GOOD)], good=False)]


def test_two_texts_without_a_prompt_need_a_separator():
    row = {"chosen": "Q: mile?\nAnswer: theory", "rejected": "Q: mile?\nAnswer: them"}
    message = refusal(row)
    assert "data.columns.prompt" in message
    assert "data.format: separated" in message
    assert "data.separator" in message
    for more in ({}, {"format": "separated"}):
        found = recognised(row, separator="Answer:", **more)
        assert found.format == "separated"
        assert found.convert(row) == [Pair([user("Q: mile?\nAnswer:")], [bot("theory")], [bot("them")])]
    assert flaw_of({"chosen": "A: x", "rejected": "B: x"}, separator="?")[0] == "diverging"
    assert flaw_of({"chosen": "Q? x", "rejected": "Q? x"}, separator="?")[0] == "identical"
    assert flaw_of({"chosen": "Q? x", "rejected": "Q?"}, separator="?")[0] == "blank"
    assert "data.separator" in refusal(row, format="separated")
    assert "has no effect" in refusal({"prompt": Q, "chosen": GOOD, "rejected": BAD}, separator="?")


@pytest.mark.parametrize("name", [path.stem for path in sorted(SAMPLES.glob("*.jsonl"))] or [None])
def test_real_samples(name):
    if name is None:
        pytest.skip("no samples here")
    rows = [json.loads(line) for line in (SAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    if name == "trl_standard_implicit":
        assert "data.separator" in refusal(*rows)
        return
    found = recognised(*rows)
    assert found.format == ("unpaired" if name == "kto_unpaired" else FORMATS[name][0])
    kind = Unpaired if name == "kto_unpaired" else Pair
    assert [[type(item) for item in found.convert(row)] for row in rows] == [[kind]] * 3


# Traps


def test_an_empty_system_makes_no_turn_and_an_empty_input_no_blank_lines():
    assert converted({"system": "", "question": Q, "chosen": GOOD, "rejected": BAD}).prompt == ASKED
    assert converted({"instruction": Q, "input": " ", "chosen": GOOD, "rejected": BAD}).prompt == ASKED
    assert converted({"prompt": [system(""), user(Q)], "chosen": GOOD, "rejected": BAD}).prompt == ASKED


def test_a_system_column_is_put_above_conversations_that_have_none():
    assert converted({"system": "Be brief", **SHORT}).prompt == [system("Be brief"), user(Q)]
    assert (
        flaw_of(
            {
                "system": "Be long",
                "chosen": [system("Be brief"), *SHORT["chosen"]],
                "rejected": [system("Be brief"), *SHORT["rejected"]],
            }
        )[0]
        == "diverging"
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("argilla_distilabel_intel_orca", {"status": "tie"}),
        ("ultrafeedback_binarized_h4", {"score_rejected": 8.5}),
        ("halos_feedback", {"type": "binary_feedback"}),
        ("alpaca_eval_annotations", {"preference": 1.4}),
        ("alpaca_eval_annotations", {"preference": 1.6}),
        ("alpaca_eval_annotations", {"preference": 0}),
        ("alpaca_eval_annotations", {"preference": None}),
        ("helpsteer2_preference", {"preference_strength": 0}),
        ("chatbot_arena_pairwise", {"winner": "tie"}),
        ("chatbot_arena_pairwise", {"winner": "tie (bothbad)"}),
        (
            "ultrafeedback_multi_completion_scored",
            {"completions": [{"response": "a", "overall_score": 5}, {"response": "b", "overall_score": 5.0}]},
        ),
    ],
)
def test_no_preference_is_a_tie(name, changes):
    assert flaw_of({**FORMATS[name][1], **changes})[0] == "tie"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("shp_reddit", {"labels": 1}),
        ("alpaca_eval_annotations", {"preference": 1.0000030416}),
        ("pku_saferlhf", {"better_response_id": 0}),
        ("helpsteer2_preference", {"preference_strength": 3}),
        ("chatbot_arena_pairwise", {"winner": "model_a"}),
        ("halos_feedback", {"label": 0}),
    ],
)
def test_the_other_label_exchanges_the_answers(name, changes):
    pair = converted({**FORMATS[name][1], **changes})
    assert (pair.chosen, pair.rejected) == ([bot(BAD)], [bot(GOOD)])


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("shp_reddit", {"labels": 2}, "not_text"),
        ("shp_reddit", {"labels": None}, "missing"),
        ("pku_saferlhf", {"better_response_id": True}, "not_text"),
        ("helpsteer2_preference", {"preference_strength": "much"}, "not_text"),
        ("helpsteer2_preference", {"preference_strength": float("nan")}, "not_text"),
        ("alpaca_eval_annotations", {"preference": 10**400}, "not_text"),
        ("alpaca_eval_annotations", {"preference": 3}, "not_text"),
        ("chatbot_arena_pairwise", {"winner": "model_c"}, "not_text"),
    ],
)
def test_labels_that_say_nothing(name, changes, problem):
    row = FORMATS[name][1]
    assert flaw_of({**row, **changes}, sample=[row])[0] == problem


def test_the_safer_answer_can_be_the_better_one():
    pair = converted(FORMATS["pku_saferlhf"][1], columns={"label": "safer_response_id"})
    assert (pair.chosen, pair.rejected) == ([bot(BAD)], [bot(GOOD)])


def test_histories_that_differ_diverge():
    row = FORMATS["chatbot_arena_pairwise"][1]
    first = [user(Q), bot("Hm."), user("Well?"), bot(GOOD)]
    second = [user(Q), bot("What?"), user("Well?"), bot(BAD)]
    problem, detail = flaw_of({**row, "conversation_a": first, "conversation_b": second})
    assert (problem, detail) == ("diverging", "turn 3 of `conversation_b` is the user's, within the answer")


def test_transcripts_split_at_the_last_common_assistant_turn_not_at_a_common_word():
    said = hh(("Human", Q), ("Assistant", ""))
    pair = converted({"chosen": said + "I think 1.6 km", "rejected": said + "I think not"})
    assert pair == Pair(ASKED, [bot("I think 1.6 km")], [bot("I think not")])
    pair = converted({"prompt": said, "chosen": f" {GOOD}", "rejected": BAD})
    assert pair == Pair(ASKED, [bot(GOOD)], [bot(BAD)])
    longer = hh(("Human", Q), ("Assistant", "Hm."), ("Human", "Well?"), ("Assistant", "1.6 km"))
    assert flaw_of({"chosen": longer, "rejected": said + BAD})[0] == "diverging"
    assert (
        flaw_of(
            {
                "chosen": hh(("Human", Q), ("Human", Q), ("Assistant", "a")),
                "rejected": hh(("Human", Q), ("Human", Q), ("Assistant", "b")),
            }
        )[0]
        == "role_order"
    )
    assert flaw_of({"chosen": said, "rejected": said + BAD})[0] == "blank"


def test_chatml_conversations_without_a_prompt_column():
    said = f"<|im_start|>system\n<|im_end|>\n<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n"
    pair = converted({"chosen": f"{said}{GOOD}<|im_end|>\n", "rejected": f"{said}{BAD}<|im_end|>"})
    assert pair == Pair(ASKED, [bot(GOOD)], [bot(BAD)])
    assert flaw_of({"chosen": f"{said}{GOOD}<|im_end|> extra", "rejected": f"{said}{BAD}"})[0] == "role_order"


def test_the_conversation_has_to_match_its_prompt_column():
    assert converted({"prompt": f"{Q}\n", **WHOLE}).prompt == TALK
    assert converted({"prompt": TALK, **WHOLE}).prompt == TALK
    for other in ("Something else", [user(Q)]):
        problem, detail = flaw_of({"prompt": other, **WHOLE})
        assert problem == "diverging"
        assert "does not match the prompt column `prompt`" in detail


def test_all_pairs_of_ranked_answers():
    scores = {"a": 1, "b": 3, "c": 3, "d": 2}
    row = {"prompt": Q, "completions": [{"text": text, "score": score} for text, score in scores.items()]}
    pairs = convert(row, pairing="all")
    said = [(pair.chosen[0]["content"], pair.rejected[0]["content"], pair.margin) for pair in pairs]
    assert said == [("b", "d", 1), ("b", "a", 2), ("c", "d", 1), ("c", "a", 2), ("d", "a", 1)]
    pairs = convert({"instruction": Q, "output": ["1", "2", "3"]}, pairing="all")
    assert [(pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in pairs] == [
        ("1", "2"),
        ("1", "3"),
        ("2", "3"),
    ]


def test_a_call_that_is_no_json_stays_text():
    row = {
        "conversations": [
            {"from": "human", "value": Q},
            {"from": "function_call", "value": "length(mile)"},
            {"from": "observation", "value": "1.6"},
        ],
        "chosen": GOOD,
        "rejected": BAD,
    }
    assert converted(row).prompt == [user(Q), bot("length(mile)"), turn("tool", "1.6")]
    calls = [{"name": "length", "arguments": {}}, {"name": "width"}]
    row["conversations"][1]["value"] = json.dumps(calls)
    assert [call["function"]["name"] for call in converted(row).prompt[1]["tool_calls"]] == ["length", "width"]


def test_openai_tool_turns_and_null_keys_of_a_filled_table():
    asked = turn("assistant", None, tool_calls=[{"id": "1", **CALL}], name=None)
    answer = turn("tool", "1.6", tool_call_id="1", tool_calls=None)
    prompt = converted({"prompt": [user(Q), asked, answer], "chosen": GOOD, "rejected": BAD}).prompt
    assert prompt == [
        user(Q),
        turn("assistant", "", tool_calls=[{"id": "1", **CALL}]),
        turn("tool", "1.6", tool_call_id="1"),
    ]


def test_conversations_as_json_in_a_csv_are_decoded():
    row = {
        "chosen": json.dumps(WHOLE["chosen"]),
        "rejected": json.dumps(WHOLE["rejected"]),
        "score_chosen": "2",
        "score_rejected": "1.5",
    }
    assert converted(row) == Pair(TALK, [bot(GOOD)], [bot(BAD)], chosen_score=2.0, rejected_score=1.5, margin=0.5)
    assert flaw_of({**row, "chosen": "[{"}, sample=[row])[0] == "not_text"


# Extras


def test_group_topic_source_and_split():
    row = {
        "prompt": Q,
        "chosen": GOOD,
        "rejected": BAD,
        "id": 7,
        "category": "units",
        "domain": "d" * 81,
        "split": "TRAIN",
        "margin": 0.5,
    }
    pair = converted(row, columns={"group": "id"})
    assert (pair.group, pair.topic, pair.source, pair.held_out, pair.margin) == ("7", "units", None, False, 0.5)
    assert converted({**row, "split": "elsewhere"}).held_out is None
    assert converted({**row, "part": "dev"}, columns={"split": "part"}).held_out is True
    assert "data.columns.split" in refusal({**row, "part": "x"}, columns={"split": "part"})


# Explicit columns and formats


def test_a_named_column_wins():
    row = {"q": "Other", "prompt": Q, "question": "Third", "chosen": GOOD, "rejected": BAD, "best": "Best"}
    pair = converted(row, columns={"prompt": "q", "chosen": "best"})
    assert pair == Pair([user("Other")], [bot("Best")], [bot(BAD)])
    assert "data.columns.chosen and rejected go together" in refusal({"q": Q, "x": GOOD}, columns={"chosen": "x"})
    message = refusal(row, columns={"prompt": "q", "chosen": "nope"})
    assert message.startswith("mine: there is no column 'nope' (data.columns.chosen); the columns are 'q', 'prompt', ")


def test_named_columns_decide_between_formats():
    row = {
        "prompt": Q,
        "chosen": GOOD,
        "rejected": BAD,
        "completions": [{"text": "a", "score": 1}, {"text": "b", "score": 2}],
    }
    message = refusal(row)
    assert "pairs (`chosen`, `rejected`) or completions (`completions`)" in message
    assert "data.format" in message
    assert recognised(row, columns={"completions": "completions"}).format == "completions"
    assert recognised(row, columns={"chosen": "chosen"}).format == "pairs"
    assert recognised(row, format="pairs").format == "pairs"


def test_two_answers_with_other_names_need_a_format():
    row = {"prompt": Q, "x": BAD, "y": GOOD, "best": 1}
    columns = {"first": "x", "second": "y", "label": "best"}
    message = refusal(row, columns=columns)
    assert "set data.format to safe_rlhf (0: the first answer, 1: the second)" in message
    assert converted(row, columns=columns, format="safe_rlhf").chosen == [bot(GOOD)]
    assert converted(row, columns=columns, format="shp").chosen == [bot(BAD)]


def test_a_forced_format_says_what_it_needs():
    row = {"prompt": Q, "chosen": GOOD, "rejected": BAD}
    assert "needs the columns `human_ref_A` + `human_ref_B` + `labels`, or data.columns.first" in refusal(
        row, format="shp"
    )
    assert "has no use for data.columns.first" in refusal(row, format="pairs", columns={"first": "prompt"})
    assert "data.columns.score" in refusal({"prompt": Q, "completions": [{"text": "a"}]})
    assert "ranked_outputs" in refusal({"prompt": Q, "gen": ["a", "b"]}, columns={"completions": "gen"})
    assert converted(
        {"prompt": Q, "gen": ["a", "b"]}, columns={"completions": "gen"}, format="ranked_outputs"
    ).chosen == [bot("a")]


# Ambiguity, and nothing at all


def test_two_prompts_that_differ_are_ambiguous():
    row = {"prompt": Q, "question": "Other", "chosen": GOOD, "rejected": BAD}
    assert "`prompt` and `question` could all be the prompt, and they differ; set data.columns.prompt" in refusal(row)
    assert converted({**row, "prompt": None, "question": Q}).prompt == ASKED


def test_two_pairs_of_answers_are_ambiguous_unless_equal():
    row = {"prompt": Q, "chosen": GOOD, "rejected": BAD, "response_j": BAD, "response_k": GOOD}
    message = refusal(row)
    assert "(`chosen`, `rejected`)" in message
    assert "(`response_j`, `response_k`)" in message
    assert converted({**row, "response_j": GOOD, "response_k": BAD}).chosen == [bot(GOOD)]
    assert converted(row, columns={"chosen": "response_j"}).rejected == [bot(GOOD)]


def test_what_is_not_recognised():
    message = refusal({"id": 1, "Chosen": GOOD, "rejectd": BAD})
    assert "the columns are 'id', 'Chosen', 'rejectd'" in message
    assert "'Chosen' is nearly 'chosen'" in message
    assert "'rejectd' is nearly 'rejected'" in message
    assert "no prompt beside `chosen` and `rejected`" in refusal({"chosen": [bot(GOOD)], "rejected": [bot(BAD)]})
    assert "no columns" in refusal({})
    for row in (
        {"prompt": Q, "completion": GOOD},
        {"messages": SHORT["chosen"]},
        {"instruction": Q, "input": "", "output": GOOD},
    ):
        assert "this is SFT data: there is no rejected answer; it can be data.sft_source" in refusal(row)


# Flaws

PLAIN = {"prompt": Q, "chosen": GOOD, "rejected": BAD}
LISTS = {"prompt": TALK, "chosen": [bot(GOOD)], "rejected": [bot(BAD)]}
IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]


@pytest.mark.parametrize(
    ("row", "changes", "problem", "detail"),
    [
        (PLAIN, {"chosen": None}, "missing", "`chosen` is null"),
        (PLAIN, {"prompt": None}, "missing", "`prompt` is null"),
        (PLAIN, {"rejected": " \n"}, "blank", "`rejected` is blank"),
        (PLAIN, {"prompt": ""}, "blank", "`prompt` is blank"),
        (PLAIN, {"chosen": True}, "not_text", "`chosen` is a truth value, not text"),
        (PLAIN, {"rejected": 7}, "not_text", "`rejected` is a number, not text"),
        (PLAIN, {"prompt": 1.5}, "not_text", "`prompt` is a number, not a list of messages"),
        (PLAIN, {"chosen": [["a"]]}, "not_text", "turn 1 of `chosen` is a list, not a message with role and content"),
        (PLAIN, {"chosen": {}}, "missing", "`chosen` is empty"),
        (PLAIN, {"chosen": {"text": GOOD}}, "missing", "the role of turn 1 of `chosen` is null"),
        (LISTS, {"prompt": []}, "missing", "`prompt` is empty"),
        (LISTS, {"prompt": [None]}, "missing", "turn 1 of `prompt` is null, not a message with role and content"),
        (LISTS, {"prompt": [user("Hi"), bot(" "), user(Q)]}, "blank", "turn 2 of `prompt` is blank"),
        (LISTS, {"prompt": [turn("user", None)]}, "missing", "turn 1 of `prompt` is null"),
        (LISTS, {"prompt": [turn("user", {"a": 1})]}, "not_text", "turn 1 of `prompt` is an object, not text"),
        (LISTS, {"prompt": [turn("user", IMAGE)]}, "not_text", "part 1 of turn 1 of `prompt` is of kind 'image_url'; only text can be trained on"),
        (LISTS, {"prompt": [turn("user", [])]}, "blank", "turn 1 of `prompt` is blank"),
        (LISTS, {"prompt": [bot("Hi"), user(Q)]}, "role_order", "turn 1 of the prompt is the assistant's, first"),
        (LISTS, {"prompt": [user("Hi"), user(Q)]}, "role_order", "turn 2 of the prompt is the user's, after the user's turn"),
        (LISTS, {"prompt": [user("Hi"), bot("Ho")]}, "role_order", "the prompt ends with the assistant's turn; it has to end with the user's"),
        (LISTS, {"prompt": [system("Hi")]}, "role_order", "the prompt ends with a system's turn; it has to end with the user's"),
        (LISTS, {"prompt": [user("Hi"), system("Hi"), user(Q)]}, "role_order", "turn 2 of the prompt is a system's, after the user's turn"),
        (LISTS, {"prompt": [user("Hi"), turn("tool", "1")]}, "role_order", "turn 2 of `prompt` is a tool's, and no call comes before it"),
        (LISTS, {"chosen": [user(GOOD)]}, "diverging", None),
        (LISTS, {"chosen": [bot("a"), bot("b")]}, "role_order", "turns 1 and 2 of `chosen` are both the assistant's"),
        (LISTS, {"chosen": [bot("a"), user("b"), bot("c")]}, "diverging", "turn 2 of `chosen` is the user's, within the answer"),
        (LISTS, {"chosen": [turn("assistant", "", tool_calls=[1])]}, "not_text", None),
        (WHOLE, {"rejected": WHOLE["chosen"]}, "identical", "`chosen` and `rejected` are the same conversation"),
        (WHOLE, {"rejected": TALK}, "diverging", "`chosen` goes on after turn 3, where `rejected` ends"),
        (WHOLE, {"rejected": BAD}, "diverging", None),
        (WHOLE, {"chosen": [system("a"), *WHOLE["chosen"]]}, "diverging", "`chosen` and `rejected` have different system turns"),
        (WHOLE, {"chosen": [user("Other"), bot("x")]}, "diverging", "`chosen` and `rejected` differ from the first turn on"),
        (FORMATS["toolcall_sharegpt_zh"][1], {"tools": "no JSON"}, "not_text", "`tools` is text that is not JSON"),
        (FORMATS["toolcall_sharegpt_zh"][1], {"tools": [7]}, "not_text", None),
        (FORMATS["alpaca_output_list_legacy"][1], {"output": ["a"]}, "unpaired", "`output` holds one answer; a pair takes two"),
        (FORMATS["alpaca_output_list_legacy"][1], {"output": []}, "missing", "`output` is an empty list"),
        (FORMATS["ultrafeedback_multi_completion_scored"][1], {"completions": [{"response": "a", "overall_score": 1}, {"response": "b"}]}, "missing", "`overall_score` of answer 2 of `completions` is null"),
        ({"prompt": Q, "completion": GOOD, "label": True}, {"label": "good"}, "not_text", "`label` is 'good'; a label is true or false, or 1 or 0"),
    ],
)  # fmt: skip
def test_flaws(row, changes, problem, detail):
    found = flaw_of({**row, **changes}, sample=[row])
    assert found[0] == problem
    assert detail is None or found[1] == detail


def test_an_unknown_role_is_named_with_the_known_ones():
    problem, detail = flaw_of({**LISTS, "prompt": [turn("narrator", Q)]}, sample=[LISTS])
    assert problem == "role_order"
    assert detail.startswith("turn 1 of `prompt` has the role 'narrator'; known: system, ")


def test_a_column_that_is_absent_from_one_row_is_missing():
    assert flaw_of({"prompt": Q, "chosen": GOOD}, sample=[PLAIN]) == ("missing", "`rejected` is null")


# SFT


def sft(*rows, form=None):
    return recognise_sft(SFTSourceConfig(source="x.jsonl", format=form), "mine", rows)


@pytest.mark.parametrize(
    ("form", "row", "prompt"),
    [
        ("messages", {"messages": WHOLE["chosen"]}, TALK),
        (
            "messages",
            {"conversations": [*SHAREGPT, {"from": "gpt", "value": GOOD}], "id": 1},
            [system("Be brief"), *TALK],
        ),
        ("messages", {"system": "Be brief", "messages": WHOLE["chosen"]}, [system("Be brief"), *TALK]),
        ("messages", {"prompt": Q, "prompt_id": "1", "messages": WHOLE["chosen"]}, TALK),
        ("instruction", {"instruction": "Convert", "input": "1 mile", "output": GOOD}, [user("Convert\n\n1 mile")]),
        ("instruction", {"instruction": Q, "response": GOOD, "category": "qa"}, ASKED),
        ("completion", {"prompt": Q, "completion": GOOD}, ASKED),
        ("completion", {"question": Q, "answer": GOOD}, ASKED),
        ("completion", {"prompt": TALK, "completion": [bot(GOOD)]}, TALK),
    ],
)
def test_sft_formats(form, row, prompt):
    found = sft(row)
    assert found.format == form
    assert found.convert(row) == (prompt, [bot(GOOD)], None)


def test_sft_data_that_is_refused():
    for row, part in (
        (PLAIN, "this is preference data, pairs (`chosen`, `rejected`), not SFT data"),
        ({"prompt": Q, "completion": GOOD, "label": True}, "this is preference data, unpaired"),
        ({"text": "x", "mesages": 1}, "'mesages' is nearly 'messages'"),
        ({"prompt": Q, "completion": GOOD, "response": BAD}, "`completion` and `response` could all be the answer"),
        ({"prompt": Q, "completion": GOOD, "messages": TALK}, "set data.sft_source.format"),
    ):
        with pytest.raises(DataError) as caught:
            sft(row)
        assert part in str(caught.value)
    with pytest.raises(DataError, match="the format instruction needs `instruction` and `output` or `response`"):
        sft({"prompt": Q, "completion": GOOD}, form="instruction")
    with pytest.raises(FlawError) as flaw:
        sft({"messages": WHOLE["chosen"]}).convert({"messages": TALK})
    assert flaw.value.problem == "role_order"


# Anything at all

KEYS = sorted({key for _, row, _, _ in FORMATS.values() for key in row} | {"completion", "label", "role", "kto_tag"})
TURN_KEYS = [
    "role",
    "content",
    "from",
    "value",
    "speaker",
    "text",
    "type",
    "tool_calls",
    "name",
    "response",
    "overall_score",
]
WORDS = st.sampled_from(["", " ", "a", "b", Q, "user", "assistant", "gpt", "human", "system", "tool", "function_call", "observation", "tie", "model_a", "1", "[{", '[{"role": "user", "content": "x"}]', '{"name": "f"}', "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:", "<|im_start|>user\na<|im_end|>", "train", "pairwise_feedback"])  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.sampled_from([0, 1, -1, 1.5, 2, 10**400, float("nan"), float("inf")]), WORDS
)
TURNS = st.builds(
    lambda keys, role, content: dict(zip(keys, (role, content), strict=True)),
    st.sampled_from([("role", "content"), ("from", "value"), ("speaker", "text")]),
    st.sampled_from(["user", "assistant", "system", "tool", "function_call", "observation", "gpt", "human"]),
    st.one_of(WORDS, SCALARS, st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": WORDS}), max_size=2)),
)
ANYTHING = st.recursive(
    st.one_of(SCALARS, TURNS, st.lists(TURNS, max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(TURN_KEYS), inner, max_size=4)
    ),
    max_leaves=8,
)
LIKELY = st.sampled_from(
    [row for _, row, _, _ in FORMATS.values()]
    + [{"prompt": Q, "completion": GOOD, "label": True}, {"messages": SHORT["chosen"]}]
)


def changed(row, changes, drop):
    return {key: value for key, value in {**row, **changes}.items() if key != drop}


KEYED = st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=5)
NEARLY = LIKELY.flatmap(
    lambda row: st.builds(
        changed,
        st.just(row),
        st.dictionaries(st.sampled_from(sorted(row)), ANYTHING, max_size=2),
        st.sampled_from([*sorted(row), None]),
    )
)
ROWS = st.one_of(KEYED, NEARLY, st.builds(changed, LIKELY, KEYED, st.none()))


def texts_in(value):
    """All texts in a row, with those that content parts join to."""
    if type(value) is str:
        return [value]
    if type(value) is dict:
        return [text for item in value.values() for text in texts_in(item)]
    if type(value) is list:
        joined = "".join(item["text"] for item in value if type(item) is dict and type(item.get("text")) is str)
        return [joined, *(text for item in value for text in texts_in(item))]
    return []


def check_canonical(prompt, answers, row):
    roles = [message["role"] for message in prompt]
    assert prompt
    assert roles[-1] in ("user", "tool")
    assert "system" not in roles[1:]
    for message in [*prompt, *answers]:
        assert set(message) <= {"role", "content", "tool_calls", "tool_call_id", "name"}
        assert message["role"] in ("system", "user", "assistant", "tool")
        assert type(message["content"]) is str
        assert message["content"].strip() or message.get("tool_calls")
    assert [message["role"] for message in answers] == ["assistant"] * len(answers)
    assert answers
    told = texts_in(row)
    assert all(any(message["content"] in text for text in told) for message in answers)


def outcome(make, row):
    try:
        return make(row)
    except (DataError, FlawError):
        return None


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(ROWS, min_size=1, max_size=3),
    st.lists(ROWS, max_size=2),
    st.sampled_from(["best_worst", "all"]),
    st.sampled_from([None, "?"]),
)
def test_no_row_causes_anything_but_a_flaw_or_a_pair(sample, others, pairing, separator):
    found = outcome(lambda rows: recognised(*rows, pairing=pairing, separator=separator), sample)
    for row in [*sample, *others] if found else []:
        for item in outcome(found.convert, row) or []:
            answers = [item.answer] if isinstance(item, Unpaired) else [item.chosen, item.rejected]
            for answer in answers:
                check_canonical(item.prompt, answer, row)
            if isinstance(item, Pair) and found.format in ("pairs", "transcripts", "chatml"):
                columns = [name for name in row if name.startswith(("chosen", "better", "response_j"))]
                told = [text for name in columns for text in texts_in(row[name])] + [
                    json_text(row[name]) for name in columns
                ]
                assert any(item.chosen[0]["content"] in text for text in told)
    sft_found = outcome(lambda rows: sft(*rows), sample)
    for row in [*sample, *others] if sft_found else []:
        converted_ = outcome(sft_found.convert, row)
        if converted_:
            check_canonical(converted_[0], converted_[1], row)


def json_text(value):
    return value if type(value) is str else ""


def test_deep_nesting_is_a_flaw_and_a_huge_number_is_not():
    deep = "x"
    for _ in range(100_000):
        deep = [deep]
    for row in (
        {**PLAIN, "chosen": deep},
        {**WHOLE, "chosen": [*TALK, turn("assistant", deep)], "rejected": [*TALK, turn("assistant", deep)]},
    ):
        assert flaw_of(row, sample=[PLAIN])[0] == "not_text"
    assert (
        flaw_of({**PLAIN, "group": deep}, sample=[{**PLAIN, "group": 1}], columns={"group": "group"})[0] == "not_text"
    )
    assert converted({**PLAIN, "group": 10**5000}, columns={"group": "group"}).group == hex(10**5000)
