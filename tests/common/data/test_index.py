"""Index files: every form read, every mistake named with its entry."""

import json

import pytest

from common.config.errors import UserError
from common.data.index import read_index


@pytest.fixture
def root(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.mp4").touch()
    return tmp_path


def write_json(root, *entries, file="index.json"):
    (root / file).write_text(json.dumps({"list": list(entries)}))
    return root / file


A = {"path": "a.mp4", "caption": " A car. "}
B = {"path": "b.mp4", "caption": "Snow.", "control_signal_seq": "D,DL,DR,DR", "valid_frame_idx": 2}


def refusal(index, root, needs_control=False):
    with pytest.raises(UserError) as error:
        read_index(index, root, needs_control)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_json(root):
    first, second = read_index(write_json(root, A, B), root, needs_control=False)
    assert (first.path, first.caption, first.control, first.valid_frame_idx) == (root / "a.mp4", "A car.", None, 0)
    assert second.entry == 2 and second.valid_frame_idx == 2 and second.control is None
    (labelled,) = read_index(write_json(root, B), root, needs_control=True)
    assert labelled.control == ["D", "DL", "DR", "DR"]


def test_every_clip_keeps_its_own_labels(root):
    entries = [B | {"path": f"{n}.mp4", "control_signal_seq": s} for n, s in (("a", "N"), ("b", "BL,D"), ("c", "DR"))]
    assert [r.control for r in read_index(write_json(root, *entries), root, True)] == [["N"], ["BL", "D"], ["DR"]]


def test_labels_are_padded_with_the_last_one(root):
    (record,) = read_index(write_json(root, B), root, needs_control=True)
    assert record.control_at([0, 1, 2, 3, 4, 100]) == [0, 1, 2, 2, 2, 2]


def test_text_csv_and_jsonl_say_the_same(root):
    (root / "prompts.txt").write_text("A car, red.\nSnow.\n\n")
    (root / "videos.txt").write_text("a.mp4\nb.mp4\n")
    (root / "metadata.csv").write_text('file_name,caption,extra\na.mp4,"A car, red.",1\nb.mp4,Snow.,2\n')
    rows = [{"file_name": "a.mp4", "caption": "A car, red."}, {"file_name": "b.mp4", "caption": "Snow."}]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    write_json(root, *({"path": r["file_name"], "caption": r["caption"]} for r in rows))
    read = {file: read_index(root / file, root, False) for file in ("prompts.txt", "metadata.csv", "metadata.jsonl")}
    for records in read.values():
        assert records == read_index(root / "index.json", root, False)


def test_csv_may_carry_labels(root):
    (root / "m.csv").write_text('file_name,caption,control_signal_seq,valid_frame_idx\na.mp4,Car,"D,DL",3\n')
    (record,) = read_index(root / "m.csv", root, True)
    assert record.control == ["D", "DL"] and record.valid_frame_idx == 3


def test_an_hour_of_labels_fits_in_a_csv_field(root):
    (root / "m.csv").write_text('file_name,caption,control_signal_seq\na.mp4,Car,"' + ",".join(["DL"] * 57600) + '"\n')
    (record,) = read_index(root / "m.csv", root, True)
    assert len(record.control) == 57600


def test_a_quote_that_is_not_closed_is_refused_where_it_stands(root):
    (root / "m.csv").write_text('file_name,caption\na.mp4,Grey.\nb.mp4,"A red car\nc.mp4,A blue car\n')
    assert "m.csv: entry 2 is not CSV" in refusal(root / "m.csv", root)


def test_unicode_line_separators_are_part_of_a_caption(root):
    caption = "Snow\u2028and\u0085ice."
    (root / "metadata.jsonl").write_text(json.dumps(A | {"caption": caption}, ensure_ascii=False) + "\n")
    (root / "prompts.txt").write_text(caption + "\r\n")
    (root / "videos.txt").write_text("a.mp4\r\n")
    for file in ("metadata.jsonl", "prompts.txt"):
        (record,) = read_index(root / file, root, False)
        assert record.caption == caption


def test_a_byte_order_mark_does_no_harm(root):
    (root / "metadata.csv").write_bytes(b"\xef\xbb\xbffile_name,caption\na.mp4,Car\n")
    assert len(read_index(root / "metadata.csv", root, False)) == 1


def test_a_directory_stands_for_the_one_index_in_it(root):
    assert "holds none of" in refusal(root, root)
    write_json(root, A)
    assert len(read_index(root, root, False)) == 1
    (root / "metadata.csv").touch()
    assert "holds more than one of" in refusal(root, root)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"caption": "x"}, "path is missing"),
        ({"path": "", "caption": "x"}, "path is ''"),
        ({"path": 3, "caption": "x"}, "path is 3"),
        ({"path": "a.mp4"}, "caption is missing"),
        ({"path": "a.mp4", "caption": "  "}, "caption is '  '"),
        ("a.mp4", "must be an object"),
        (A | {"valid_frame_idx": -1}, "valid_frame_idx is -1; it must be a whole number, 0 or more"),
        (A | {"valid_frame_idx": 1.5}, "valid_frame_idx is 1.5"),
        (A | {"valid_frame_idx": None}, "valid_frame_idx is None"),
        (A, "control_signal_seq is missing"),
        (A | {"control_signal_seq": ["D"]}, "control_signal_seq is ['D']"),
        (A | {"control_signal_seq": ""}, "control_signal_seq: holds no control token"),
        (A | {"control_signal_seq": "D,LEFT"}, "control_signal_seq: unknown control token 'LEFT' (item 2)"),
    ],
)
def test_a_bad_entry_is_named_by_number(root, entry, message):
    index = write_json(root, B, B, entry)
    assert refusal(index, root, needs_control=True).startswith(f"{index}: entry 3: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"list": [\n{"path"', "index.json:2: is not JSON"),
        ("[]", 'must be {"list":'),
        ('{"list": {}}', 'must be {"list":'),
        ('{"list": []}', "lists no clip"),
        ("", "index.json:1: is not JSON"),
    ],
)
def test_a_malformed_json_file(root, content, message):
    (root / "index.json").write_text(content)
    assert message in refusal(root / "index.json", root)


def test_malformed_files_of_other_forms(root):
    (root / "m.jsonl").write_text('{"file_name": "a.mp4", "caption": "x"}\n{oops\n')
    assert "m.jsonl: entry 2 is not JSON" in refusal(root / "m.jsonl", root)
    (root / "m.csv").write_text("file,caption\na.mp4,x\n")
    assert "column file_name is missing; its columns are file, caption" in refusal(root / "m.csv", root)
    (root / "m.csv").write_text("file_name,caption\na.mp4,x\nb.mp4,a car, red\n")
    assert "entry 2 has more fields" in refusal(root / "m.csv", root)
    (root / "m.csv").write_text("file_name,caption\na.mp4,x\nb.mp4,\n")
    assert "entry 2: caption is missing" in refusal(root / "m.csv", root)
    (root / "prompts.txt").write_text("x\ny\n")
    assert "videos.txt: No such file" in refusal(root / "prompts.txt", root)
    (root / "videos.txt").write_text("a.mp4\n")
    assert "2 prompts for 1 videos" in refusal(root / "prompts.txt", root)
    (root / "videos.txt").write_text("a.mp4\n\nb.mp4\n")
    (root / "prompts.txt").write_text("x\ny\nz\n")
    assert "entry 2: path is ''" in refusal(root / "prompts.txt", root)
    assert "beside videos.txt" in refusal(root / "videos.txt", root)


def test_missing_unreadable_or_unknown_files(root):
    assert refusal(root / "none.json", root).endswith("none.json: No such file or directory")
    (root / "i.yaml").touch()
    assert "is none of .json, .jsonl, .csv, .txt" in refusal(root / "i.yaml", root)
    (root / "i.json").write_bytes(b'{"list": "\xff"}')
    assert "is not UTF-8 text" in refusal(root / "i.json", root)


def test_a_wrong_data_root_is_refused_at_once_a_single_missing_video_is_not(root):
    index = write_json(root, A, B, A | {"path": "gone.mp4"})
    assert len(read_index(index, root, False)) == 3
    assert "is data_root right?" in refusal(index, root / "nowhere")
