"""Which tokens are learnt, checked against expectations written by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_ogpsa.data import ChatTokenizer
from megatron_ogpsa.data.tokenizer import last_characters
from megatron_ogpsa.errors import UserError
from tests.data.conftest import CHATML, chat

LoadTemplate = Callable[[str], ChatTokenizer]
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def split(tokenizer: ChatTokenizer, row: dict[str, list[dict[str, str]]]) -> tuple[list[str], list[bool]]:
    """Texts of the tokens and their flags, from raw ids so that special tokens stay visible."""
    token_ids, flags = tokenizer.encode_chat(row["messages"])
    text, _ = tokenizer.template.render_with_spans(row["messages"])
    _, offsets = tokenizer.encode(text)
    assert len(token_ids) == len(offsets) == len(flags)
    return [text[begin:end] for begin, end in offsets], flags


def learnt(tokenizer: ChatTokenizer, row: dict[str, list[dict[str, str]]]) -> list[str]:
    """Texts of the runs of learnt tokens."""
    runs, previous = [], False
    for piece, flag in zip(*split(tokenizer, row), strict=True):
        if flag and not previous:
            runs.append("")
        if flag:
            runs[-1] += piece
        previous = flag
    return runs


def test_every_token_of_a_small_chat(tokenizer: ChatTokenizer) -> None:
    pieces, flags = split(tokenizer, chat("ab", "q z"))
    # "assistant" and "user" are spelt in smaller tokens; the trained space is trimmed off the offset of " z".
    text = "".join(pieces)
    assert text == "<|bos|><|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\nqz<|im_end|>\n"
    assert [p for p, f in zip(pieces, flags, strict=True) if f] in (
        ["q", "z", "<|im_end|>", "\n"],
        ["q", "", "z", "<|im_end|>", "\n"],
    )
    assert not any(flags[: -sum(flags)])


def test_all_assistant_turns_and_nothing_else_are_learnt(tokenizer: ChatTokenizer) -> None:
    row = chat("What?", "Paris.", "Sure?", "Yes.", "Bye")
    row["messages"].insert(0, {"role": "system", "content": "Be good."})
    assert learnt(tokenizer, row) == ["Paris.<|im_end|>\n", "Yes.<|im_end|>\n"]


def test_content_that_repeats_the_prompt_is_not_confused(tokenizer: ChatTokenizer) -> None:
    assert learnt(tokenizer, chat("same", "same", "same", "other")) == ["same<|im_end|>\n", "other<|im_end|>\n"]


def test_unicode_of_every_width_is_told_apart(tokenizer: ChatTokenizer) -> None:
    token_ids, flags = tokenizer.encode_chat(chat("😀 é 日本", "été 👩‍👧 日 \u0301x")["messages"])
    answer = [t for t, f in zip(token_ids, flags, strict=True) if f]
    assert tokenizer.decode(answer) == "été 👩‍👧 日 \u0301x\n"
    assert not tokenizer.decode(token_ids[: -len(answer)]).count("é") > 1


def test_no_second_beginning_of_sequence_token(tokenizer: ChatTokenizer, with_template: LoadTemplate) -> None:
    row = chat("Hi", "Hello")["messages"]
    assert tokenizer.encode_chat(row)[0].count(0) == 1
    assert tokenizer.encode_prompt(row[:1])[:2].count(0) == 1
    # The template alone decides: none where it writes none.
    assert with_template(CHATML.replace("{{ bos_token }}", "")).encode_chat(row)[0].count(0) == 0


def test_prompt_is_what_training_saw_before_the_answer(tokenizer: ChatTokenizer) -> None:
    row = chat("Say hello", "hello world", "Again", "hello")["messages"]
    token_ids, flags = tokenizer.encode_chat(row)
    prompt = tokenizer.encode_prompt(row[:3])
    assert token_ids[: len(prompt)] == prompt
    assert flags[len(prompt)]
    assert not flags[len(prompt) - 1]


def test_generation_tag_decides_where_present(with_template: LoadTemplate) -> None:
    marked = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = with_template(marked)
    # Without the tag the line break after <|im_end|> belongs to the turn.
    assert learnt(tokenizer, chat("a", "b", "c", "d")) == ["b<|im_end|>", "d<|im_end|>"]


def test_template_that_rewrites_earlier_turns_is_refused(with_template: LoadTemplate) -> None:
    forgetful = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last or m.role == 'user' else '...' }}{% endfor %}"
    )
    tokenizer = with_template(forgetful)
    with pytest.raises(UserError, match=r"writes message 2 differently when others follow.*\{% generation %\}"):
        tokenizer.encode_chat(chat("a", "b", "c", "d")["messages"])


def test_generation_prompt_that_the_turn_does_not_repeat_is_refused(with_template: LoadTemplate) -> None:
    thinking = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    with pytest.raises(UserError, match="cannot be told apart"):
        with_template(thinking).encode_chat(chat("a", "b")["messages"])


def test_template_that_refuses_a_chat_says_why(with_template: LoadTemplate) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    with pytest.raises(UserError, match="System role not supported"):
        with_template(strict + CHATML).encode_chat([{"role": "system", "content": "x"}, *chat("a", "b")["messages"]])


def test_template_cannot_reach_the_interpreter(with_template: LoadTemplate) -> None:
    with pytest.raises(UserError, match="unsafe"):
        with_template("{{ ''.__class__.__mro__ }}").encode_prompt(chat("a")["messages"])


def test_data_does_not_depend_on_the_day(with_template: LoadTemplate) -> None:
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%s') %}{% endif %}{{ date_string }}"
    assert with_template(dated).template.render(chat("a")["messages"]) == "26 Jul 2024"
    asking = with_template("{% set today = strftime_now('%Y-%m-%d, %H h') %}{{ today }}" + CHATML)
    text, spans = asking.template.render_with_spans(chat("a", "b")["messages"])
    assert text.startswith("2024-07-26, 00 h")
    assert len(spans) == 1


def test_eos_ids_hold_end_of_sequence_and_end_of_turn(tokenizer: ChatTokenizer, with_template: LoadTemplate) -> None:
    assert tokenizer.eos_ids == (1, 3)
    # A line break ends turns here, and lines within an answer too: it must not stop generation.
    assert with_template(PLAIN).eos_ids == (1,)


ENDLESS = {
    "the next turn's header ends it, as in GLM-4": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    ),
    "an empty line ends it, as in Alpaca's": "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}",
    "its end is not learnt": CHATML.replace(
        "{{ message.content }}",
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
        "{% else %}{{ message.content }}{% endif %}",
    ),
    "its end is text": "{% for m in messages %}{{ m.role }}: {{ m.content }} END-OF-TURN{% endfor %}",
}


@pytest.mark.parametrize("case", ENDLESS)
def test_turns_that_end_in_no_stop_token_are_noticed(
    tokenizer: ChatTokenizer, with_template: LoadTemplate, case: str
) -> None:
    assert tokenizer.turn_end_id == 3
    assert with_template(ENDLESS[case]).turn_end_id is None
    with_eos = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    assert with_template(with_eos).turn_end_id == tokenizer.eos_id


def test_token_over_the_border_belongs_to_its_last_character(with_template: LoadTemplate) -> None:
    # " hello" is one token, of which the space is the prompt's and the word the assistant's.
    tokenizer = with_template(PLAIN)
    pieces, flags = split(tokenizer, chat("x", "hello", "hello"))
    assert [p for p, f in zip(pieces, flags, strict=True) if f][-1] == "\n"
    assert "".join(p for p, f in zip(pieces, flags, strict=True) if f) == "hello\n"


def test_tokens_without_characters() -> None:
    # A token of trimmed spaces (5, 5) stands for the gap 3..5; bytes of a character (6, 6) come before it.
    assert last_characters([(0, 3), (5, 5), (5, 6), (6, 6), (6, 6), (6, 7)]) == [2, 4, 5, 6, 6, 6]


class TestSentencePiece:
    def test_answer_and_end_of_sequence_are_learnt(self, sentencepiece_tokenizer: ChatTokenizer) -> None:
        row = chat("What is the capital of France?", "Paris is the capital.", "Say hello", "hello")
        assert learnt(sentencepiece_tokenizer, row) == [" Paris is the capital.</s>", " hello</s>"]

    def test_control_pieces_become_their_ids_once(self, sentencepiece_tokenizer: ChatTokenizer) -> None:
        token_ids, flags = sentencepiece_tokenizer.encode_chat(chat("a", "b", "c", "d")["messages"])
        assert token_ids.count(1) == 2  # <s>, once for each question
        assert token_ids.count(2) == 2  # </s>, once for each answer
        assert all(flag for token_id, flag in zip(token_ids, flags, strict=True) if token_id == 2)
        assert not any(flag for token_id, flag in zip(token_ids, flags, strict=True) if token_id == 1)

    def test_normalised_and_byte_spelt_characters_keep_their_place(
        self, sentencepiece_tokenizer: ChatTokenizer
    ) -> None:
        # Full-width letters shrink in normalisation, two spaces become one, the last emoji is spelt in four bytes.
        row = chat("ＡＢＣ  ＤＥ 😅", "ＦＧ  é 🦜!")
        token_ids, flags = sentencepiece_tokenizer.encode_chat(row["messages"])
        answer = [t for t, f in zip(token_ids, flags, strict=True) if f]
        assert sentencepiece_tokenizer.decode(answer) == "FG é 🦜!"
        assert learnt(sentencepiece_tokenizer, row) == [" ＦＧ  é 🦜!</s>"]
        assert "ABC DE 😅" in sentencepiece_tokenizer.decode(token_ids[: -len(answer)])

    def test_ids(self, sentencepiece_tokenizer: ChatTokenizer) -> None:
        assert sentencepiece_tokenizer.pad_id == 2  # no padding piece: the end of sequence
        assert sentencepiece_tokenizer.eos_ids == (2,)
        ids, _ = sentencepiece_tokenizer.encode_chat(chat("naïve café", "日本語 😀")["messages"])
        assert max(ids) < sentencepiece_tokenizer.vocab_size


def test_a_model_that_may_think_is_asked_not_to(with_template: LoadTemplate) -> None:
    """Qwen3's templates write an empty thought then, as before the last answer of a conversation that is learnt."""
    thoughtless = "{% if enable_thinking is defined and not enable_thinking %}<none>{% endif %}"
    tokenizer = with_template(PLAIN.replace("assistant: {% endif %}", f"assistant: {thoughtless}{{% endif %}}"))
    messages = [{"role": "user", "content": "ab"}]
    assert tokenizer.template.render(messages, add_generation_prompt=True).endswith("assistant: <none>")
    assert "<none>" not in tokenizer.template.render(messages)
