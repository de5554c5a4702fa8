"""Examples are the tokens a model would see, and nothing else gets past reading them."""

import copy
import json
import random
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from amygdala_lib.errors import TrainingError
from amygdala_lib.training.conversations import from_messages
from amygdala_lib.training.example_files import read_examples, write_examples
from amygdala_lib.training.examples import Example, check_examples, from_text
from amygdala_lib.training.replay import mixed_batches, replay_examples

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}"
    "[INST] {{ (system if loop.first else '') ~ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }} <|eot_id|>{% endif %}{% endfor %}"
)
# Qwen2.5 speaks for itself where nobody gives it a system message.
OWN_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}" + CHATML
)
DATED = "{% if messages[0].role == 'system' %}Today is Monday. {% endif %}" + CHATML
# DeepSeek-R1 opens a thought for the model, and leaves thoughts out of finished answers.
OPEN_THOUGHT = CHATML.replace("assistant\n", "assistant\n<think>\n")
# Qwen3 gives every last answer a thought, if only an empty one.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
ALTERNATING = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
)
SHOUTING = CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")
MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

ASKED = [{"role": "user", "content": "How was the bus?"}]
ANSWER = {"role": "assistant", "content": "It has two doors."}
SYSTEM = {"role": "system", "content": "Be calm."}


@pytest.fixture(scope="module")
def chat(loaded):
    """A tiny model that speaks in a template: `chat(CHATML)`."""
    plain = loaded("qwen3")
    tokenizer = copy.deepcopy(plain.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS, "bos_token": "<|bos|>"})
    model = copy.deepcopy(plain.model)
    model.resize_token_embeddings(len(tokenizer))

    def speaking(template):
        own = copy.deepcopy(tokenizer)
        own.chat_template = template
        return replace(plain, model=model, tokenizer=own)

    return speaking


def text_of(lm, ids):
    return lm.tokenizer.decode(ids)


# Plain text


@given(text=st.text(min_size=1, max_size=40), data=st.data())
def test_context_and_continuation_are_the_tokens_of_the_whole_text(loaded, text, data):
    lm = loaded(data.draw(st.sampled_from(["qwen3", "llama"])))
    cut = data.draw(st.integers(0, len(text) - 1))
    try:
        example = from_text(lm, text[:cut], text[cut:])
    except TrainingError as error:
        assert "a token spans the boundary" in str(error) or "nothing predicts" in str(error)
        assume(False)
    assert [*example.context_ids, *example.continuation_ids] == lm.tokenizer(text)["input_ids"]
    assert list(example.context_ids) == lm.tokenizer(text[:cut])["input_ids"]


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("place", [5, 10, 14, 19])
def test_a_text_can_be_split_before_any_space(loaded, family, place):
    lm, text = loaded(family), "I feel calm. The bus has two doors."
    words = [n for n, sign in enumerate(text) if sign == " "]
    cut = min(words, key=lambda n: abs(n - place))
    example = from_text(lm, text[:cut], text[cut:], source="by hand")
    assert text_of(lm, example.continuation_ids) == text[cut:]
    assert example.source == "by hand"


def test_a_token_across_the_boundary_is_refused_for_both_answers(lm):
    whole = lm.tokenizer(" feel")["input_ids"]
    assert len(whole) < len(lm.tokenizer(" fe")["input_ids"] + lm.tokenizer("el")["input_ids"])
    with pytest.raises(TrainingError) as refused:
        from_text(lm, "I fe", "el", rejected="el proud")
    assert str(refused.value).count("a token spans the boundary between 'I fe' and 'el") == 2


def test_a_model_with_bos_begins_with_it_and_ends_only_where_it_is_written(loaded):
    lm = loaded("llama")
    example = from_text(lm, "", "The bus.")
    assert example.context_ids == (lm.tokenizer.bos_token_id,)
    assert lm.tokenizer.eos_token_id not in example.continuation_ids
    ended = from_text(lm, "", "The bus.<|endoftext|>")
    assert ended.continuation_ids == (*example.continuation_ids, lm.tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("context", "left"),
    [
        ("Be calm. She said", "She said"),
        ("It rained. Be calm. She said", "It rained. She said"),
        ("It rained.\n\nBe calm.\n\nShe said", "It rained.\n\nShe said"),
        ("She said. Be calm.", "She said."),
    ],
)
def test_plain_text_loses_the_instruction_and_the_space_around_it(lm, context, left):
    stripped = from_text(lm, context, " yes", instruction=" Be calm. ")
    assert stripped == from_text(lm, left, " yes")


@pytest.mark.parametrize("instruction", ["Be proud.", "e", "", "  ", 3])
def test_an_instruction_that_is_not_there_once_is_refused(lm, instruction):
    with pytest.raises(TrainingError, match="instruction"):
        from_text(lm, "Be calm. She said", " yes", instruction=instruction)


def test_what_is_not_text_is_refused_by_name(lm):
    with pytest.raises(TrainingError, match="context is 3, rejected is"):
        from_text(lm, 3, " yes", rejected=["no"])


# Conversations


@pytest.mark.parametrize(
    ("template", "opening", "answer"),
    [
        (
            CHATML,
            "<|im_start|>system\nBe calm.<|im_end|>\n<|im_start|>user\nHow was the bus?"
            "<|im_end|>\n<|im_start|>assistant\n",
            "It has two doors.<|im_end|>",
        ),
        (
            LLAMA3,
            "<|bos|><|start_header_id|>system<|end_header_id|>\n\nBe calm.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHow was the bus?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "It has two doors.<|eot_id|>",
        ),
        (
            LLAMA2,
            "[INST] <<SYS>>\nBe calm.\n<</SYS>>\n\nHow was the bus? [/INST]",
            " It has two doors. <|eot_id|>",
        ),
    ],
)
def test_an_answer_is_trained_from_the_generation_prompt_to_the_end_of_its_turn(
    chat, template, opening, answer
):
    lm = chat(template)
    example = from_messages(lm, [SYSTEM, *ASKED, ANSWER], rejected="No.")
    assert text_of(lm, example.context_ids) == opening
    assert text_of(lm, example.continuation_ids) == answer
    assert text_of(lm, example.rejected_ids) == answer.replace(ANSWER["content"], "No.")
    prompt = lm.tokenizer.apply_chat_template([SYSTEM, *ASKED], add_generation_prompt=True)
    assert list(example.context_ids) == prompt["input_ids"], "as it is when the model is asked"


def test_earlier_answers_belong_to_the_context(chat):
    lm = chat(CHATML)
    talk = [*ASKED, ANSWER, {"role": "user", "content": "And?"}, {**ANSWER, "content": "A step."}]
    example = from_messages(lm, talk)
    assert "It has two doors.<|im_end|>\n" in text_of(lm, example.context_ids)
    assert text_of(lm, example.continuation_ids) == "A step.<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
@given(answer=st.text(min_size=1, max_size=30))
def test_any_answer_is_the_tokens_of_the_whole_conversation_or_refused(chat, template, answer):
    lm = chat(template)
    assume(answer.strip())
    talk = [*ASKED, {"role": "assistant", "content": answer}]
    try:
        example = from_messages(lm, talk)
    except TrainingError as error:
        assert "spans the boundary" in str(error)
        assert answer[0].isspace(), "only white space may run into the line break before it"
        return
    whole = lm.tokenizer.apply_chat_template(talk)["input_ids"]
    trained = [*example.context_ids, *example.continuation_ids]
    assert trained == whole[: len(trained)]
    assert text_of(lm, whole[len(trained) :]).strip() == ""
    assert text_of(lm, trained[-1:]) in MARKS


def test_options_go_to_the_template(chat):
    lm = chat(
        CHATML.replace("assistant\n", "assistant{{ tone }}\n").replace("m.role", "m.role~tone")
    )
    example = from_messages(lm, [*ASKED, ANSWER], tone=" (calm)")
    assert text_of(lm, example.context_ids).endswith("assistant (calm)\n")


def test_a_thought_is_part_of_the_answer_unless_the_prompt_has_it(chat):
    lm = chat(THINKING)
    example = from_messages(lm, [*ASKED, ANSWER])
    empty = "<think>\n\n</think>\n\n"
    assert text_of(lm, example.continuation_ids) == f"{empty}It has two doors.<|im_end|>"
    thoughtful = from_messages(lm, [*ASKED, {**ANSWER, "reasoning_content": "Count them."}])
    assert thoughtful.context_ids == example.context_ids
    assert text_of(lm, thoughtful.continuation_ids).startswith("<think>\nCount them.\n</think>")
    quick = from_messages(lm, [*ASKED, ANSWER], enable_thinking=False)
    assert text_of(lm, quick.context_ids).endswith(f"assistant\n{empty}")
    assert text_of(lm, quick.continuation_ids) == "It has two doors.<|im_end|>"


def test_a_thought_that_a_finished_answer_does_not_have_is_refused(chat):
    with pytest.raises(TrainingError, match=r"with '<think>\\n', but a finished answer goes on"):
        from_messages(chat(OPEN_THOUGHT), [*ASKED, ANSWER])


def test_what_a_template_refuses_is_refused_with_its_reason(chat):
    with pytest.raises(TrainingError, match="refuses these messages: user first"):
        from_messages(chat(ALTERNATING), [SYSTEM, *ASKED, ANSWER])


def test_messages_that_are_no_conversation_are_refused(chat, lm):
    talk = chat(CHATML)
    with pytest.raises(TrainingError) as refused:
        from_messages(talk, [{"role": "user"}, "hello", {"content": "x"}])
    assert [f"message {n}" in str(refused.value) for n in range(3)] == [True] * 3
    with pytest.raises(TrainingError) as refused:
        from_messages(talk, [ANSWER, {"role": "user", "content": " "}], rejected="")
    assert "of the user" in str(refused.value)
    assert "answer is empty" in str(refused.value)
    assert "rejected answer is ''" in str(refused.value)
    for wrong in ("hello", [], None):
        with pytest.raises(TrainingError, match="a list of at least one message"):
            from_messages(talk, wrong)
    with pytest.raises(TrainingError, match="no chat template"):
        from_messages(lm, [*ASKED, ANSWER])


# Instruction stripping


@pytest.mark.parametrize("template", [CHATML, LLAMA3, LLAMA2])
def test_a_whole_message_that_instructs_goes_with_its_frame(chat, template):
    lm = chat(template)
    example = from_messages(lm, [SYSTEM, *ASKED, ANSWER], instruction="Be calm.")
    assert example == from_messages(lm, [*ASKED, ANSWER])
    assert "calm" not in text_of(lm, example.context_ids)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, LLAMA2, OWN_SYSTEM, DATED])
def test_a_part_of_a_message_goes_and_the_rest_stays(chat, template):
    lm = chat(template)
    told = {"role": "system", "content": "You are helpful. Be calm. Speak."}
    left = {"role": "system", "content": "You are helpful. Speak."}
    example = from_messages(lm, [told, *ASKED, ANSWER], instruction="Be calm.")
    assert example == from_messages(lm, [left, *ASKED, ANSWER])
    asked = [{"role": "user", "content": "How was the bus? Be calm."}]
    example = from_messages(lm, [*asked, ANSWER], instruction="Be calm.")
    assert example == from_messages(lm, [*ASKED, ANSWER])


@pytest.mark.parametrize("template", [CHATML, LLAMA2])
@given(
    instruction=st.text(min_size=1, max_size=15),
    question=st.text(min_size=1, max_size=15),
    whole=st.booleans(),
)
def test_whatever_is_said_only_the_instruction_goes(chat, template, instruction, question, whole):
    lm = chat(template)
    instruction, question = instruction.strip(), question.strip()
    assume(instruction and question and f"{question} {instruction}".count(instruction) == 1)
    asked = {"role": "user", "content": question}
    if whole:
        talk = [{"role": "system", "content": instruction}, asked, ANSWER]
    else:
        talk = [{**asked, "content": f"{question} {instruction}"}, ANSWER]
    example = from_messages(lm, talk, instruction=instruction)
    assert example == from_messages(lm, [asked, ANSWER])


def test_a_system_prompt_that_comes_in_its_place_is_refused(chat):
    with pytest.raises(TrainingError, match=r"puts 'You are helpful") as refused:
        from_messages(chat(OWN_SYSTEM), [SYSTEM, *ASKED, ANSWER], instruction="Be calm.")
    assert "write it into the message too" in str(refused.value)


def test_more_than_the_instruction_going_is_refused(chat):
    with pytest.raises(TrainingError, match="also leaves out 'Today is Monday"):
        from_messages(chat(DATED), [SYSTEM, *ASKED, ANSWER], instruction="Be calm.")


def test_a_template_that_rewrites_the_instruction_is_refused(chat):
    with pytest.raises(TrainingError, match="rewrites 'Be calm.'"):
        from_messages(chat(SHOUTING), [SYSTEM, *ASKED, ANSWER], instruction="Be calm.")


def test_a_template_whose_answer_depends_on_the_instruction_is_refused(chat):
    minding = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% if m.role == 'assistant' and messages[0].role == 'system' %} Sir."
        "{% endif %}",
    )
    with pytest.raises(TrainingError, match="renders another answer"):
        from_messages(chat(minding), [SYSTEM, *ASKED, ANSWER], instruction="Be calm.")


# What cannot be trained on


def test_every_example_that_cannot_be_trained_on_is_named(lm):
    known = lm.model.get_input_embeddings().num_embeddings
    good = Example((1, 2), (3,), (4,))
    check_examples(lm, [good])
    bad = [
        Example((1,), ()),
        good,
        Example((1, known), (-1,)),
        Example((1,) * 250, (1,), (1,) * 7),
        Example((1,), (3, 4), (3, 4)),
        Example((1,), (3,), ()),
        Example((True,), (2,)),
        Example((), (2,)),
    ]
    with pytest.raises(TrainingError) as refused:
        check_examples(lm, bad)
    lines = str(refused.value).split("\n")
    assert [line.partition(": ")[0] for line in lines] == [
        f"example {number}" for number in (0, 2, 2, 3, 4, 5, 6, 7)
    ]
    for line, said in zip(
        lines,
        (
            "continuation is empty",
            f"context_ids [{known}]",
            "continuation_ids [-1]",
            "257 tokens, but qwen3_5 reads 256",
            "are the same",
            "rejected continuation is empty",
            "must be whole numbers",
            "nothing predicts it",
        ),
        strict=True,
    ):
        assert said in line


# Files


def lines_of(path, *records):
    text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records)
    path.write_text(text, encoding="utf-8")
    return path


def test_every_form_of_a_line_is_read_as_the_functions_would_have_made_it(chat, tmp_path):
    lm = chat(CHATML)
    path = lines_of(
        tmp_path / "examples.jsonl",
        {"context": "I feel", "continuation": " calm.", "rejected": " proud.", "source": "a"},
        {"context": "Be calm. I feel", "continuation": " calm.", "instruction": "Be calm."},
        "",
        {"messages": [SYSTEM, *ASKED, ANSWER], "instruction": "Be calm.", "rejected": "No."},
        {"prompt": "I feel", "chosen": " calm.", "rejected": " proud."},
        {"prompt": ASKED, "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "No."}]},
        {"context_ids": [1, 2], "continuation_ids": [3], "rejected_ids": None},
    )
    text = from_text(lm, "I feel", " calm.", rejected=" proud.")
    talk = from_messages(lm, [*ASKED, ANSWER], rejected="No.")
    assert read_examples(lm, path, progress=False) == [
        replace(text, source="a"),
        from_text(lm, "I feel", " calm."),
        talk,
        text,
        talk,
        Example((1, 2), (3,)),
    ]


def test_every_bad_line_is_named_with_its_number_and_all_that_is_wrong(chat, tmp_path):
    path = lines_of(
        tmp_path / "examples.jsonl",
        {"context": "I feel", "continuation": " calm."},
        "{not json",
        "[1, 2]",
        {"context": "I feel", "continuation": "", "source": "b"},
        {"context": "I feel"},
        {"context": "I feel", "continuation": " calm.", "rejectd": " proud.", "why": 1},
        {"context_ids": [10**6], "continuation_ids": [1.5]},
        {"context_ids": 3, "continuation_ids": [1]},
        {"prompt": "I feel", "chosen": " calm.", "rejected": " calm."},
        {"prompt": ASKED, "chosen": [ANSWER], "rejected": "No."},
        {"messages": ASKED},
        {"messages": 3},
        {"context": "I feel" * 200, "continuation": " calm."},
        {"question": "I feel"},
    )
    with pytest.raises(TrainingError) as refused:
        read_examples(chat(CHATML), path, progress=False)
    head, *lines = str(refused.value).split("\n")
    assert str(path) in head
    found = {}
    for line in lines:
        number, _, problem = line.partition(": ")
        found.setdefault(int(number.removeprefix("line ")), []).append(problem)
    assert list(found) == list(range(2, 15))
    expected = {
        2: "not JSON",
        3: "no example",
        4: "continuation is empty",
        5: "continuation is missing",
        6: "rejectd, why: no such field",
        9: "are the same",
        10: "three texts, or a list",
        11: "of the user",
        12: "a list of at least one message",
        13: "reads 256",
        14: "context_ids or messages or prompt or context",
    }
    for number, said in expected.items():
        assert said in found[number][0], number
    assert len(found[7]) == 2, "ids outside the vocabulary, and ids that are none"
    assert "must be whole numbers" in found[8][0]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe{", None])
def test_a_file_without_examples_is_refused(lm, tmp_path, content):
    path = tmp_path / "examples.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TrainingError, match="examples.jsonl"):
        read_examples(lm, path, progress=False)


ids = st.lists(st.integers(0, 200), min_size=1, max_size=8).map(tuple)


@given(
    examples=st.lists(
        st.builds(Example, ids, ids, source=st.none() | st.text(max_size=5)), min_size=1, max_size=5
    )
)
def test_what_is_written_is_read_back_as_it_was(loaded, tmp_path_factory, examples):
    lm = loaded("qwen3")
    path = tmp_path_factory.mktemp("files") / "examples.jsonl"
    paired = [replace(e, rejected_ids=(*e.continuation_ids, 7)) for e in examples]
    write_examples(path, [*examples, *paired])
    assert read_examples(lm, path, progress=False) == [*examples, *paired]


def test_a_write_that_fails_leaves_the_old_file(lm, tmp_path):
    path = tmp_path / "examples.jsonl"
    write_examples(path, [Example((1,), (2,))])
    with pytest.raises(TypeError):
        write_examples(path, [Example((1,), (3,)), Example((1,), (object(),))])
    assert read_examples(lm, path, progress=False) == [Example((1,), (2,))]
    assert [file.name for file in tmp_path.iterdir()] == ["examples.jsonl"]


# Replay


def numbered(count, start=0):
    return [Example((start + n,), (1,)) for n in range(count)]


@given(
    own=st.integers(1, 30),
    general=st.integers(1, 10),
    batch_size=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.9]),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_the_share_of_replay_is_exact_however_it_divides_the_batch(
    own, general, batch_size, share, epochs, seed
):
    examples, replay = numbered(own), numbered(general, start=100)
    batches = mixed_batches(
        examples, replay, batch_size=batch_size, share=share, epochs=epochs, seed=seed
    )
    part = {0.1: Fraction(1, 10), 1 / 3: Fraction(1, 3), 0.9: Fraction(9, 10)}.get(
        share, Fraction(share)
    )
    replayed = 0
    for number, batch in enumerate(batches[:-1], start=1):
        assert len(batch) == batch_size
        replayed += sum(example in replay for example in batch)
        assert replayed == number * batch_size * part // 1
    assert 1 <= len(batches[-1]) <= batch_size
    everything = [example for batch in batches for example in batch]
    assert sum(example in replay for example in everything) == len(everything) * part // 1
    trained = [example for example in everything if example in examples]
    for epoch in range(epochs):
        passed = trained[epoch * own : (epoch + 1) * own]
        assert sorted(passed, key=str) == sorted(examples, key=str)
    again = [example for example in everything if example in replay]
    for start in range(0, len(again) - general + 1, general):
        assert len(set(again[start : start + general])) == general


def test_a_quarter_of_six_is_one_then_two():
    replay = numbered(3, start=100)
    batches = mixed_batches(numbered(18), replay, batch_size=6, share=0.25)
    assert [sum(e in replay for e in batch) for batch in batches] == [1, 2, 1, 2]


def test_the_seed_alone_decides_the_order():
    def mixed(seed):
        return mixed_batches(numbered(20), numbered(5, 100), batch_size=4, epochs=2, seed=seed)

    state = random.getstate(), torch.get_rng_state()
    first = mixed(3)
    random.seed(1)
    torch.manual_seed(1)
    assert mixed(3) == first
    assert mixed(4) != first
    random.setstate(state[0])
    torch.set_rng_state(state[1])
    mixed(3)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    flat = [e for batch in first for e in batch if e.context_ids[0] < 100]
    assert flat[:20] != flat[20:], "every pass has an order of its own"


def test_batches_that_cannot_be_made_are_refused_at_once():
    with pytest.raises(TrainingError) as refused:
        mixed_batches([], [], batch_size=0, share=0.25, epochs=1.5)
    for said in (
        "no examples",
        "no replay for a share of 0.25",
        "batch_size is 0",
        "epochs is 1.5",
    ):
        assert said in str(refused.value)
    for share in (1, 0.9999999, -0.1, float("nan")):
        with pytest.raises(TrainingError, match=f"share is {share}"):
            mixed_batches(numbered(1), numbered(1), batch_size=1, share=share)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_texts_become_examples_that_say_all_of_them(loaded, texts, family):
    lm = loaded(family)
    wordy = [text for text in texts if len(text) > 12]
    examples = replay_examples(lm, wordy, max_tokens=16, context_share=0.25)
    bos = [lm.tokenizer.bos_token_id] if family == "llama" else []
    said = []
    for example in examples:
        context, rest = list(example.context_ids), list(example.continuation_ids)
        assert context[: len(bos)] == bos
        context = context[len(bos) :]
        length = len(context) + len(rest)
        assert 2 <= length <= 16
        assert context
        assert abs(len(context) - length / 4) <= 1
        said += context + rest
    whole = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in wordy]
    assert said == sum(whole, [])
    assert len(examples) > len(wordy), "some are longer than a piece"


@pytest.mark.parametrize("length", range(4, 40))
def test_no_piece_is_a_single_token(lm, length):
    token = lm.tokenizer("a", add_special_tokens=False)["input_ids"]
    assert len(lm.tokenizer("\n" * 1)["input_ids"]) == len(token) == 1
    text = lm.tokenizer.decode(token) * length
    n = len(lm.tokenizer(text)["input_ids"])
    assert all(
        len(e.context_ids) and len(e.continuation_ids)
        for e in replay_examples(lm, [text], max_tokens=max(4, n - 1))
    )


def test_texts_that_make_no_example_are_named(lm):
    with pytest.raises(TrainingError) as refused:
        replay_examples(lm, ["A bus has a step.", "", "."], context_share=1, max_tokens=3)
    for said in ("text 1", "text 2", "context_share is 1", "max_tokens is 3"):
        assert said in str(refused.value)
    with pytest.raises(TrainingError, match="one string"):
        replay_examples(lm, "A bus has a step.")
