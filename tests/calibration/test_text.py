"""Strings and conversations."""

import pytest
import torch

from awqc.calibration import all_tokens, load_tokens
from awqc.calibration.text import TokenizedText
from awqc.errors import CalibrationError


def words(*numbers):
    return " ".join(f"w{n}" for n in numbers)


def ids(*numbers):
    return [n + 6 for n in numbers]


def test_documents_are_separated_by_eos_where_the_tokenizer_adds_nothing(tokenizer):
    found = load_tokens([words(1, 2), words(3), words(4, 5, 6)], tokenizer=tokenizer, max_calib_seq_len=4)
    assert found.ids.tolist() == [[*ids(1, 2), 0, *ids(3)], [0, *ids(4, 5, 6)]]
    assert found.source == "the list given as calib"


def test_documents_begin_with_bos_where_the_tokenizer_adds_one(bos_tokenizer):
    found = load_tokens([words(1, 2), words(3)], tokenizer=bos_tokenizer, max_calib_seq_len=5)
    assert found.ids.tolist() == [[1, *ids(1, 2), 1, *ids(3)]]


def test_empty_documents_leave_no_trace(tokenizer):
    found = load_tokens(["", words(1), "", words(2), ""], tokenizer=tokenizer, max_calib_seq_len=3)
    assert found.ids.tolist() == [[*ids(1), 0, *ids(2)]]


def test_text_shorter_than_a_block_makes_one_shorter_block(tokenizer):
    found = load_tokens([words(1, 2, 3)], tokenizer=tokenizer, max_calib_samples=4, max_calib_seq_len=8)
    assert found.ids.tolist() == [ids(1, 2, 3)]
    assert found.notes == ("one block of 3 tokens instead of 4 of 8: there are no more",)
    assert str(found) == (
        "1 x 3 = 3 tokens of the list given as calib; "
        "one block of 3 tokens instead of 4 of 8: there are no more"
    )


def test_blocks_of_a_short_text_are_evenly_spaced(tokenizer):
    text = words(*range(30))
    found = load_tokens([text], tokenizer=tokenizer, max_calib_samples=3, max_calib_seq_len=4)
    assert found.ids.tolist() == [ids(0, 1, 2, 3), ids(8, 9, 10, 11), ids(16, 17, 18, 19)]
    assert found.dropped == 18
    assert found.notes == ("18 of 30 tokens were not used",)


def test_a_long_text_is_tokenized_only_where_its_blocks_are(tokenizer, monkeypatch):
    lines = [words(*[n % 90] * 10) + "\n" for n in range(2000)]
    text = "".join(lines)
    seen = []
    tokenize = TokenizedText._tokenize
    monkeypatch.setattr(
        TokenizedText,
        "_tokenize",
        lambda self, text, special_tokens: seen.append(len(text)) or tokenize(self, text, special_tokens),
    )
    calls = []
    found = load_tokens(
        [text],
        tokenizer=tokenizer,
        max_calib_samples=4,
        max_calib_seq_len=10,
        progress=lambda done, total: calls.append((done, total)),
    )
    # Each block begins with the first line after a quarter of the text, and a line is one word ten times.
    assert (found.ids == found.ids[:, :1]).all()
    starts = [text.find("\n", part * (len(text) // 4)) + 1 if part else 0 for part in range(4)]
    assert found.ids[:, 0].tolist() == [
        tokenizer.convert_tokens_to_ids(text[start:].split(maxsplit=1)[0]) for start in starts
    ]
    assert sum(seen) < len(text) / 50
    assert calls == [(10, 40), (20, 40), (30, 40), (40, 40)]
    assert found.notes == (
        f"passages evenly spaced over {len(text)} characters; the text between was not tokenized",
    )


def test_passages_of_many_documents_begin_with_a_document(bos_tokenizer):
    texts = [words(*[n % 90] * 7) for n in range(3000)]
    found = load_tokens(texts, tokenizer=bos_tokenizer, max_calib_samples=5, max_calib_seq_len=8)
    assert (found.ids[:, 0] == 1).all()
    assert (found.ids[:, 1:] == found.ids[:, 1:2]).all()
    assert len(set(found.ids[:, 1].tolist())) == 5


def test_passages_never_overlap_however_sparse_the_tokens(tokenizer):
    """Where a token takes far more characters than usual, everything is tokenized instead."""
    text = (" " * 200).join(f"w{n}" for n in range(80))
    found = load_tokens([text], tokenizer=tokenizer, max_calib_samples=8, max_calib_seq_len=10)
    assert found.ids.flatten().tolist() == ids(*range(80))


def test_conversations_are_rendered_by_the_chat_template(chat_tokenizer):
    chats = [
        [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}],
        [{"role": "user", "content": "w4"}],
    ]
    rendered = [3, *ids(1), 5, 4, *ids(2, 3), 5, 3, *ids(4), 5]
    for calib in (chats, [{"messages": chat} for chat in chats]):
        assert load_tokens(calib, tokenizer=chat_tokenizer).ids.tolist() == [rendered]
    assert load_tokens(chats[0], tokenizer=chat_tokenizer).ids.tolist() == [rendered[:7]]


def test_conversations_of_from_and_value(chat_tokenizer):
    chat = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]
    found = load_tokens([{"conversations": chat}], tokenizer=chat_tokenizer)
    assert found.ids.tolist() == [[3, *ids(1), 5, 4, *ids(2), 5]]


def test_passages_of_many_conversations_begin_with_a_conversation(chat_tokenizer):
    chats = [[{"role": "user", "content": words(*[n % 90] * 100)}] for n in range(100)]
    found = load_tokens(chats, tokenizer=chat_tokenizer, max_calib_samples=5, max_calib_seq_len=16)
    assert found.ids[:, 0].tolist() == [3] * 5
    assert len(set(found.ids[:, 1].tolist())) == 5
    assert "passages evenly spaced" in found.notes[0]


def test_all_tokens_of_a_text_is_all_of_it(tokenizer):
    text = [words(*range(50)), words(*range(50, 80))]
    assert all_tokens(text, tokenizer=tokenizer).tolist() == [*ids(*range(50)), 0, *ids(*range(50, 80))]
    assert all_tokens(text, tokenizer=tokenizer, max_tokens=51).tolist() == [*ids(*range(50)), 0]


def test_the_same_call_gives_the_same_blocks(tokenizer):
    texts = [words(*[n % 90] * 7) for n in range(1000)]
    options = {"tokenizer": tokenizer, "max_calib_samples": 5, "max_calib_seq_len": 8}
    first, second = load_tokens(texts, **options), load_tokens(texts, **options)
    assert torch.equal(first.ids, second.ids)
    assert first.sha256 == second.sha256


def test_strings_need_a_tokenizer():
    with pytest.raises(CalibrationError) as error:
        load_tokens(["w1 w2"])
    assert str(error.value) == (
        "the list given as calib is text: pass the model's tokenizer, or token ids instead"
    )


def test_conversations_need_a_chat_template(tokenizer):
    with pytest.raises(CalibrationError) as error:
        load_tokens([[{"role": "user", "content": "w1"}]], tokenizer=tokenizer)
    assert str(error.value) == (
        "the list given as calib holds conversations, but the tokenizer has no chat template: "
        "give plain strings, or set tokenizer.chat_template"
    )


def test_a_conversation_that_the_template_refuses_is_named(chat_tokenizer):
    chats = [[{"role": "user", "content": "w1"}], [{"role": "system", "content": "w2"}]]
    with pytest.raises(CalibrationError) as error:
        load_tokens(chats, tokenizer=chat_tokenizer)
    assert str(error.value) == (
        "conversation 1 of the list given as calib does not fit the tokenizer's chat template: "
        "no system turns"
    )


def test_empty_strings_are_no_tokens(tokenizer):
    with pytest.raises(CalibrationError) as error:
        load_tokens(["", ""], tokenizer=tokenizer)
    assert str(error.value) == (
        "no calibration tokens: the list given as calib is empty; give text or token ids, or calib='self'"
    )


def test_tokens_beyond_the_models_vocabulary_are_refused(tokenizer):
    with pytest.raises(CalibrationError) as error:
        load_tokens([words(1, 80)], tokenizer=tokenizer, vocab_size=50)
    assert str(error.value) == (
        "token id 86 in calibration row 0 is outside the model's vocabulary of 50 tokens: "
        "use the tokenizer that belongs to the model"
    )
