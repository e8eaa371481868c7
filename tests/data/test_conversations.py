"""Records of conversations in three shapes, from files and datasets; what is wrong with them is counted and named."""

import io
import json
from dataclasses import replace
from pathlib import Path

import datasets as hf
import pytest
from PIL import Image

import chatty
from keeplora.config import parse
from keeplora.data.benchmark import TaskSpec
from keeplora.data.readers import read_conversations, read_splits, stored_splits


def spec_of(folder, reader, **values):
    return parse(TaskSpec, {"name": "chat", "path": Path(folder), "reader": reader, **values}, source="test")


def write(folder, split, rows, lines=False):
    folder.mkdir(exist_ok=True)
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    (folder / f"{split}.{'jsonl' if lines else 'json'}").write_text(text)


@pytest.fixture
def pictures(tmp_path):
    for name in ("a.png", "b.png"):
        chatty.picture("red", len(name)).save(tmp_path / name)
    return tmp_path


def image(*texts):
    return [{"type": "image"}, *({"type": "text", "text": text} for text in texts)]


def words(text):
    return [{"type": "text", "text": text}]


def llava(value="<image>\nWhat?", **more):
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "red"}]
    return {"id": "1", "image": "a.png", "conversations": turns, **more}


TEST = {"question_id": 7, "image": "b.png", "text": "What?", "answer": "blue"}


def test_both_shapes_of_llava_are_read(pictures):
    later = [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "no"}]
    rows = [llava(), llava(value="What <image> is?", id="2"), llava(id="3", image=["a.png", "b.png"]),
            {"id": "4", "conversations": llava("Text?")["conversations"] + later}]  # fmt: skip
    write(pictures, "train", rows)
    write(pictures, "test", [TEST])
    train, test = read_conversations(spec_of(pictures, "llava"), "test")
    assert [record.messages[0]["content"] for record in train.records] == [
        image("What?"), image("What  is?"), [{"type": "image"}, *image("What?")], words("Text?"),
    ]  # fmt: skip
    assert [record.identity for record in train.records] == ["1", "2", "3", "4"]
    assert [message["role"] for message in train.records[3].messages] == ["user", "assistant"] * 2
    (record,) = test.records
    assert (record.identity, record.question, record.answer, record.place) == ("7", "What?", "blue", "b.png")
    assert [one.size for one in train.images(2)] == [(28, 28)] * 2


def test_the_files_and_the_folder_of_images_can_be_named(pictures):
    (pictures / "data" / "pictures").mkdir(parents=True)
    (pictures / "a.png").rename(pictures / "data" / "pictures" / "a.png")
    write(pictures / "data", "train_4w", [llava()])
    write(pictures / "data", "test_3000", [{**TEST, "image": "a.png"}])
    files = {"train": "train_4w.json", "test": "test_3000.json"}
    train, test = read_conversations(spec_of(pictures / "data", "llava", files=files, image_root="pictures"), "test")
    assert len(train.images(0)) == len(test.images(0)) == 1


PARTS = {"messages": [{"role": "user", "content": image("What?")}, {"role": "assistant", "content": words("red")}]}
PLAIN = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]
MESSAGES = {
    "parts": {**PARTS, "images": ["a.png"]},
    "placeholders": {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "red"}],
                     "images": ["a.png"]},
    "nothing stands for it": {"messages": PLAIN,
                              "image": "a.png"},
    "prompt and completion": {"prompt": "<image>What?", "completion": "red", "images": ["a.png"]},
    "prompt of messages": {"prompt": [{"role": "user", "content": "<image>What?"}],
                           "completion": [{"role": "assistant", "content": "red"}], "images": ["a.png"]},
}  # fmt: skip


@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize("lines", [False, True])
def test_messages_in_every_form_are_the_same_record(pictures, kind, lines):
    for split in ("train", "test"):
        write(pictures, split, [MESSAGES[kind]], lines=lines)
    train, _ = read_conversations(spec_of(pictures, "messages"), "test")
    (record,) = train.records
    assert [dict(message) for message in record.messages] == [
        {"role": "user", "content": image("What?")}, {"role": "assistant", "content": words("red")},
    ]  # fmt: skip
    assert record.images == ("a.png",)


@pytest.mark.parametrize("reader", ["messages", "question_answer"])
def test_datasets_with_images_inside_are_read(tmp_path, reader):
    content = io.BytesIO()
    chatty.picture("blue", 1).save(content, "PNG")
    files = [{"bytes": content.getvalue(), "path": None}] * 2
    if reader == "messages":
        columns = {"messages": [PARTS["messages"]] * 2, "images": [[file] for file in files]}
        features = {"images": hf.List(hf.Image())}
    else:
        columns = {"ask": ["What?", "Why?"], "say": [3, 4], "image": files}
        features = {"image": hf.Image()}
    rows = hf.Dataset.from_dict(columns)
    for name, kind in features.items():
        rows = rows.cast_column(name, kind)
    hf.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "data")
    spec = spec_of(tmp_path / "data", reader, question_column="ask", answer_column="say")
    train, _ = read_conversations(spec, "test")
    assert [record.identity for record in train.records] == ["0", "1"]
    assert train.records[0].messages[0]["content"] == image("What?")
    assert train.records[1].answer == ("red" if reader == "messages" else "4")
    assert train.images(0)[0].getpixel((0, 0))[2] > 150


def test_a_question_is_put_together_from_columns(tmp_path):
    rows = [{"instruction": "Sum {input}", "input": 3, "answer": "6"}]
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    spec = spec_of(tmp_path, "question_answer", question_template="{instruction}\n{input} {of} what?")
    with pytest.raises(ValueError, match="1 record of train has no 'of': 0"):
        read_conversations(spec, "test")
    train, _ = read_conversations(replace(spec, question_template="{instruction}\n{input} { of }?"), "test")
    assert train.records[0].question == "Sum {input}\n3 { of }?"


def test_a_validation_split_is_held_out_with_a_fixed_seed(pictures):
    write(pictures, "train", [llava(id=str(i)) for i in range(20)])
    write(pictures, "test", [TEST])
    train, held = read_conversations(spec_of(pictures, "llava"), "validation")
    assert (len(train), len(held)) == (16, 4)
    again = read_conversations(spec_of(pictures, "llava"), "validation")[1]
    assert held.records == again.records
    assert {one.identity for one in train.records}.isdisjoint(one.identity for one in held.records)


def test_a_test_split_is_drawn_where_the_task_asks_for_one(pictures):
    write(pictures, "train", [llava(id=str(i)) for i in range(20)])
    with pytest.raises(ValueError, match="has no test split; it has train"):
        read_conversations(spec_of(pictures, "llava"), "test")
    train, test = read_conversations(spec_of(pictures, "llava", test_share=0.25), "test")
    assert (len(train), len(test)) == (15, 5)


FLAWS = {
    "no answer": (llava(conversations=[{"from": "human", "value": "What?"}]), "no answer at the end: 1"),
    "an empty one": ({**TEST, "answer": " "}, "an empty answer"),
    "no image": (llava(image="c.png"), "an image that is not there: 1"),
    "no role": (llava(conversations=[{"from": "robot", "value": "?"}]), "the role 'robot', known are human, gpt"),
    "no text": ({"id": "1", "image": "a.png"}, "no 'text': 0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FLAWS)
def test_what_is_wrong_with_a_record_is_counted_and_named(pictures, kind):
    row, message = FLAWS[kind]
    write(pictures, "train", [row, llava(id="2"), row])
    write(pictures, "test", [TEST])
    with pytest.raises(ValueError, match=rf"task 'chat': 2 records of train have {message}"):
        read_conversations(spec_of(pictures, "llava"), "test")


def test_a_question_id_twice_in_a_test_is_an_error(pictures):
    write(pictures, "train", [llava()])
    write(pictures, "test", [TEST, TEST])
    with pytest.raises(ValueError, match=r"1 record of test has the id of another one: 7. Mend or remove them"):
        read_conversations(spec_of(pictures, "llava"), "test")


def test_other_numbers_of_placeholders_than_images_are_named(pictures):
    for split in ("train", "test"):
        write(pictures, split, [{"prompt": "<image><image>?", "completion": "red", "images": ["a.png"]}])
    with pytest.raises(ValueError, match=r"1 record of .* has another number of <image> than of images: 0"):
        read_conversations(spec_of(pictures, "messages"), "test")


def test_a_damaged_image_is_named_where_it_is_read(pictures):
    (pictures / "a.png").write_bytes(b"nothing")
    write(pictures, "train", [llava()])
    write(pictures, "test", [TEST])
    train, _ = read_conversations(spec_of(pictures, "llava"), "test")
    with pytest.raises(ValueError, match=r"task 'chat': an image of train record 1 \(a.png\) is not a readable image"):
        train.images(0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("train.json", "[1]", "record 0 is no object"), ("train.json", "[{", "neither a JSON array nor JSON lines"),
     ("other.json", "[]", "has no train.json, train.jsonl, nor a saved dataset"),
     ("train.json", "[]", "train has no record")],
)  # fmt: skip
def test_files_that_are_not_what_they_should_be_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        stored_splits(spec_of(tmp_path, "llava"))
    with pytest.raises(ValueError, match=r"there is no file .*none.json; name the files"):
        stored_splits(spec_of(tmp_path, "llava", files={"train": "none.json"}))


def test_readers_of_the_other_kind_are_told(pictures):
    write(pictures, "train", [llava()])
    write(pictures, "test", [TEST])
    with pytest.raises(ValueError, match="reader 'llava' gives conversations, which need a generative model"):
        read_splits(spec_of(pictures, "llava"), "test")
    for split in ("train", "test"):
        (pictures / split / "red").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(pictures / split / "red" / "0.png")
    with pytest.raises(ValueError, match="reader 'folder' gives no conversations; set reader to llava, messages or"):
        read_conversations(spec_of(pictures, "folder"), "test")
