"""Captions as other tools write them: read, by a stated guess if need be, or named and left out."""

import json

import pytest
from recordings import click_and_flash
from typer.testing import CliRunner

from syncdpo.cli import app
from syncdpo.data.captions import decode_text, read_captions
from syncdpo.data.clips import write_clip
from syncdpo.data.latents import LatentDataset

TEXT = "a dog\u2019s bark \u2014 in Zürich"
GUESSED = "not UTF-8, read as Windows-1252"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.mp4"
    write_clip(path, click_and_flash(1.0))
    return path.read_bytes()


@pytest.fixture
def folder(tmp_path, good):
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.mp4").write_bytes(good)
    return folder


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


# bytes, the text in them, the guess that is stated
ENCODED = {
    "utf-8": (TEXT.encode(), TEXT, None),
    "utf-8 with a mark": (b"\xef\xbb\xbf" + TEXT.encode(), TEXT, None),
    "cp1252": (TEXT.encode("cp1252"), TEXT, GUESSED),
    "utf-16 le with a mark": (b"\xff\xfe" + TEXT.encode("utf-16-le"), TEXT, None),
    "utf-16 be with a mark": (b"\xfe\xff" + TEXT.encode("utf-16-be"), TEXT, None),
    "utf-32 le with a mark": (b"\xff\xfe\0\0" + TEXT.encode("utf-32-le"), TEXT, None),
    "utf-32 be with a mark": (b"\0\0\xfe\xff" + TEXT.encode("utf-32-be"), TEXT, None),
    "utf-16 le": (TEXT.encode("utf-16-le"), TEXT, "no byte order mark, read as UTF-16"),
    "utf-16 be": (TEXT.encode("utf-16-be"), TEXT, "no byte order mark, read as UTF-16"),
    "chinese": ("下雨了🌧".encode(), "下雨了🌧", None),
    "one zero among others": (b"rain\0 on a roof", "rain\0 on a roof", None),
    "empty": (b"", "", None),
}


@pytest.mark.parametrize("kind", ENCODED)
def test_text_in_every_encoding(kind):
    content, text, guess = ENCODED[kind]
    assert decode_text(content) == (text, guess)


@pytest.mark.parametrize("content", [b"\x81\x8d rain", b"\xff\xfea\0b", b"\xef\xbb\xbf\xff"])
def test_what_is_no_text_raises(content):
    with pytest.raises(UnicodeError):
        decode_text(content)


def test_a_txt_is_read_or_named(folder):
    (folder / "a.txt").write_bytes(TEXT.encode("cp1252"))
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfrain\r\n")
    (folder / "c.TXT").write_bytes(b"\x81\x8d\x8f")
    captions = read_captions(folder)
    assert captions == {"a": TEXT, "b": "rain"}
    assert str(captions).splitlines() == [
        "captions:",
        f"  {folder / 'a.txt'}: {GUESSED}",
        f"  {folder / 'c.TXT'}: left out: neither UTF-8 nor UTF-16 nor Windows-1252; "
        "save it as UTF-8",
    ]


def test_many_guesses_are_one_line(folder):
    for name in "abcd":
        (folder / f"{name}.txt").write_bytes(TEXT.encode("cp1252"))
    assert f"  4 files: {GUESSED}" in str(read_captions(folder))


def test_a_txt_in_a_linked_folder(folder, tmp_path, good):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "e.mp4").write_bytes(good)
    (tmp_path / "elsewhere" / "e.txt").write_text("rain")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    assert read_captions(folder) == {"linked/e": "rain"}
    table = tmp_path / "table.jsonl"
    paths = ["linked/e.mp4", str(folder / "linked" / "e.mp4")]
    table.write_text("".join(f'{{"path": "{path}", "text": "hail"}}\n' for path in paths))
    assert read_captions(folder, table) == {"linked/e.mp4": "hail"}


SEPARATED = "one\u2028two\u0085three\x0b\x0c\x1cfour"


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lines_of_a_table_end_at_line_feeds_only(folder, tmp_path, ending, kind, encoding):
    rows = [{"media_path": "a.mp4", "caption": SEPARATED}, {"media_path": "b.mp4", "caption": "x"}]
    if kind == "csv":
        lines = ["media_path,caption", *(",".join(row.values()) for row in rows)]
    elif kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    else:
        lines = [json.dumps(rows, ensure_ascii=False)]
    table = tmp_path / f"table.{kind}"
    table.write_bytes((ending.join(lines) + ending).encode(encoding))
    captions = read_captions(folder, table)
    assert captions == {"a.mp4": SEPARATED, "b.mp4": "x"}
    assert str(captions) == ""


def test_a_csv_may_hold_line_feeds_in_quotes(folder, tmp_path):
    table = tmp_path / "table.csv"
    table.write_bytes(b'path,text\r\na.mp4,"two\nlines"\r\nb.mp4,x\r\n')
    assert read_captions(folder, table) == {"a.mp4": "two\nlines", "b.mp4": "x"}


def test_a_table_in_cp1252_says_so(folder, tmp_path):
    table = tmp_path / "table.csv"
    table.write_bytes(f"path,text\na.mp4,{TEXT}\n".encode("cp1252"))
    captions = read_captions(folder, table)
    assert captions == {"a.mp4": TEXT}
    assert f"{table}: {GUESSED}" in str(captions)


def test_rows_without_a_clip_or_a_caption(folder, tmp_path):
    table = tmp_path / "table.jsonl"
    rows = [{"path": "a.mp4", "text": None}, {"path": "b.mp4", "text": " "},
            {"path": " ", "text": "lost"}, {"path": "c.mp4", "text": "half \ud83d of a pair"},
            {"path": "\ud83d.mp4", "text": "x"}, {"path": "a" * 5000, "text": "x"},
            {"path": "a\0b", "text": "x"}]  # fmt: skip
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    captions = read_captions(folder, table)
    assert captions["a.mp4"] == captions["b.mp4"] == ""
    assert captions["c.mp4"] == "half \ufffd of a pair"
    assert "rows that name no clip, left out: 1" in str(captions)
    assert "captions with broken characters, now \ufffd: 1" in str(captions)


def test_a_row_of_a_csv_that_ends_early_has_an_empty_caption(folder, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("path,text\na.mp4\nb.mp4,x,y,z\n")
    assert read_captions(folder, table) == {"a.mp4": "", "b.mp4": "x"}


BAD_TABLES = {
    "a.jsonl": (b'{"path": "a.mp4", "text": "x"}\n{"path": ', "a.jsonl is not valid JSON"),
    "b.json": (b"[" * 100_000, "b.json is not valid JSON"),
    "c.json": (b'[{"path": "a.mp4", "text": ' + b"1" * 5000 + b"}]", "c.json"),
    "d.csv": (b"path,text\na.mp4,one\rtwo\n", "d.csv is not valid CSV"),
    "e.csv": (b"path,text\na.mp4," + b"x" * 200_000 + b"\n", "e.csv is not valid CSV"),
    "f.csv": (b"path,text\na.mp4,\x81\x8d\n", "f.csv is neither UTF-8"),
    "g.csv": (b"clip;text\na.mp4;x\n", "expected one of the columns"),
    "h.json": (b'["a"]', "expected one object per row in .*, got str"),
    "k.json": (b'{"a.mp4": "x"}', "expected one object per row in .*, got dict"),
    "l.json": (b"5", "expected one object per row in .*, got int"),
    "i.tsv": (b"path\ttext\n", "expected a .csv, .jsonl or .json"),
    "j.jsonl": (b'{"path": "a.mp4"}', "expected one of the columns caption, text, prompt"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_table_that_cannot_be_read_is_one_sentence_with_its_name(folder, tmp_path, name):
    content, words = BAD_TABLES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_captions(folder, tmp_path / name)
    assert name in str(caught.value)


def test_prepare_says_how_captions_were_read_and_which_are_missing(folder, tmp_path):
    (folder / "a.txt").write_bytes(TEXT.encode("cp1252"))
    (folder / "b.txt").write_bytes(b"\xff\xfe" + "hail".encode("utf-16-le"))
    (folder / "c.txt").write_bytes(b"\xef\xbb\xbf \r\n")
    out = tmp_path / "latents"
    text = invoke("prepare", folder, "-o", out)
    assert f"{folder / 'a.txt'}: {GUESSED}" in text
    assert f"1 without a caption:\n  {folder / 'd.mp4'}" in text
    assert f"1 with an empty caption:\n  {folder / 'c.mp4'}" in text
    found = {clip["source"]: clip["caption"] for clip in LatentDataset(out).clips}
    assert found == {"a.mp4": TEXT, "b.mp4": "hail", "c.mp4": "", "d.mp4": None}


def test_a_folder_without_any_caption_is_mentioned(folder, tmp_path):
    text = invoke("prepare", folder, "-o", tmp_path / "latents")
    assert "no captions: none of the clips has one" in text
    (folder / "a.txt").write_text("rain")
    text = invoke("prepare", folder, "-o", tmp_path / "latents")
    assert "no captions" not in text
    assert "3 without a caption" in text


def test_a_table_that_names_none_of_the_clips(folder, tmp_path):
    (tmp_path / "table.csv").write_text("path,text\nx.mp4,rain\n")
    arguments = ("--captions", tmp_path / "table.csv", "-o", tmp_path / "latents")
    assert "4 without a caption" in invoke("prepare", folder, *arguments)
