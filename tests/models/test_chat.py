"""Masks of answers, against ones made by hand and against those of transformers' own marks."""

import pytest
import torch

import chatty
from keeplora.models.chat import ChatFormat, template_named
from keeplora.models.pretrained import load_processor

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and"
    " polite answers to the user's questions."
)


def said(role, *parts):
    return {
        "role": role,
        "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts],
    }


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return load_processor(str(chatty.save_llava(tmp_path_factory.mktemp("chat"))))


ONE = (said("user", None, "What colour?"), said("assistant", "dark red"))
TWO = (
    said("user", None, None, "Same?"),
    said("assistant", "no"),
    said("user", "And\nnow?"),
    said("assistant", "yes: no"),
)
TEXT = (said("system", "Be brief."), said("user", "Who?"), said("assistant", "me"))


def pictures(messages):
    number = sum(part["type"] == "image" for message in messages for part in message["content"])
    return [chatty.picture("red", seed, (28 + 5 * seed, 28)) for seed in range(number)]


def learned(chat, conversations, *, left=False):
    """Return what is learned of each conversation, as text."""
    encoded = [chat.encode(messages) for messages in conversations]
    found = chat.batch([one.text for one in encoded], [pictures(messages) for messages in conversations], left=left)
    mask = chat.answer_mask(encoded, found["offsets"], found["replaced"])
    assert not (mask & (found["attention_mask"] == 0)).any()
    return [chat.tokenizer.decode(ids[own]) for ids, own in zip(found["input_ids"], mask, strict=True)], found, mask


def test_vicuna_v1_is_written_as_llava_writes_it(processor):
    chat = ChatFormat(processor, template_named("vicuna_v1"))
    assert chat.encode(ONE).text == f"<s>{SYSTEM} USER: <image>\nWhat colour? ASSISTANT: dark red</s>"
    assert chat.prompt(ONE[:-1]) == f"<s>{SYSTEM} USER: <image>\nWhat colour? ASSISTANT:"
    assert chat.encode(TWO).text == (
        f"<s>{SYSTEM} USER: <image>\n<image>\nSame? ASSISTANT: no</s>USER: And\nnow? ASSISTANT: yes: no</s>"
    )
    text = ChatFormat(processor.tokenizer, template_named("vicuna_v1"))
    assert text.encode(TEXT[1:]).text == f"<s>{SYSTEM} USER: Who? ASSISTANT: me</s>"
    assert text.prompt(TEXT[1:2], suffix=" Answer A.") == f"<s>{SYSTEM} USER: Who? Answer A. ASSISTANT:"


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(("template", "ends"), [("vicuna_v1", "</s>"), ("", "<|im_end|>")])
def test_the_answers_and_their_end_tokens_are_learned_and_nothing_else(processor, template, ends, left):
    chat = ChatFormat(processor, template_named(template))
    texts, found, mask = learned(chat, [ONE, TWO, TEXT], left=left)
    blank = " " if template else ""  # The blank before an answer is part of its first token.
    assert [text.replace(blank, "") if blank else text for text in texts] == [
        one.replace(" ", "") if blank else one for one in (f"dark red{ends}", f"no{ends}yes: no{ends}", f"me{ends}")
    ]
    assert (found["input_ids"] == chat.tokenizer.convert_tokens_to_ids("<image>")).sum(1).tolist() == [4, 8, 0]
    for row, messages in enumerate([ONE, TWO, TEXT]):
        alone = learned(chat, [messages])[2]
        assert int(mask[row].sum()) == int(alone.sum()), "padding and the others of a batch change nothing"


def test_a_batch_without_images_and_a_model_that_reads_text_alone(processor):
    for chat in (ChatFormat(processor), ChatFormat(processor.tokenizer)):
        texts, found, _ = learned(chat, [TEXT, TEXT[1:]])
        assert texts == ["me<|im_end|>"] * 2
        assert "pixel_values" not in found


MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content[0].text + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("messages", [ONE, TWO])
def test_the_mask_is_that_of_the_marks_in_a_template_that_has_them(processor, messages):
    _, found, mask = learned(ChatFormat(processor, MARKED), [messages])
    images = iter(pictures(messages))
    filled = [
        {**one, "content": [{**p, "image": next(images)} if p["type"] == "image" else p for p in one["content"]]}
        for one in messages
    ]
    marked = processor.apply_chat_template(
        [filled], chat_template=MARKED, tokenize=True, return_dict=True, return_tensors="pt",
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    assert marked["input_ids"].equal(found["input_ids"])
    assert torch.as_tensor(marked["assistant_masks"]).bool().equal(mask)


STRIPS = (
    "{% for m in messages %}{{ m.role }}:{% if loop.last %} {% endif %}{{ m.content[-1].text }}</s>{% endfor %}"
    + ("{% if add_generation_prompt %}assistant: <think>{% endif %}")
)


def test_answers_are_found_where_a_prompt_is_not_the_start_of_the_conversation(processor):
    again = (said("user", "no"), said("assistant", "no"), said("user", "yes no"), said("assistant", "no"))
    encoded = ChatFormat(processor, STRIPS).encode(again)
    assert [encoded.text[slice(*span)] for span in encoded.answers] == ["no</s>", "no</s>"]
    assert [span[0] for span in encoded.answers] == [len("user:no</s>assistant:"), len(encoded.text) - len("no</s>")]


def test_what_cannot_be_learned_from_is_an_error_that_names_the_cure(processor):
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content[-1].text }} {% endfor %}"
    with pytest.raises(
        ValueError, match=r"an answer, 'me', without an end token behind it in .*; name another: chat_template"
    ):
        ChatFormat(processor, endless).encode(TEXT)
    upper = "{% for m in messages %}{{ m.content[-1].text | upper }}</s>{% endfor %}"
    with pytest.raises(ValueError, match="an answer, 'me', which cannot be found in what the chat template makes"):
        ChatFormat(processor, upper).encode(TEXT)
    with pytest.raises(ValueError, match="'<image>', which stands for an image, inside a text"):
        ChatFormat(processor).encode((said("user", "what is <image>?"), said("assistant", "it")))
    with pytest.raises(ValueError, match="unknown chat template 'vicuna'; known: vicuna_v1"):
        template_named("vicuna")
    bare = chatty.tokenizer(chat_template=None)
    with pytest.raises(ValueError, match="no chat template of its own; name one: chat_template"):
        ChatFormat(bare)
    bare.pad_token = None
    with pytest.raises(ValueError, match="has no pad token"):
        ChatFormat(bare, chatty.CHATML)
