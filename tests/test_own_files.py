"""The reader's own files as they really are: every cell is read as what was meant, or one line says where it is not."""

from __future__ import annotations

import gzip
import io
import json
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from unicodedata import normalize

import pytest

from common.support.exit import UserError
from common.tokenization import Example, load_tokenizer
from dataset.columns import apply_template
from dataset.sources import HubRows, load_splits, read_rows
from dataset.templates import alpaca, instruction, korean_alpaca
from model.tiny import write_tiny
from tests.conftest import ROOT
from tests.helpers import PREPARE, contents, encode_rows, refusal, tells

BOM = "\ufeff"
LINE = json.dumps({"article": "A bridge is closed.", "highlights": "Bridge closed."}) + "\n"


def parquet(column, kind=None, name="output"):
    """A .parquet file with a column of these values, of Arrow's type `kind`, and one of instructions."""
    import pyarrow
    import pyarrow.parquet

    values = column if isinstance(column, pyarrow.Array) else pyarrow.array(column, kind)
    questions = pyarrow.array(["do"] * len(values))
    table = pyarrow.Table.from_arrays([questions, values], names=["instruction", name])
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "gpt"
    write_tiny("gpt", folder)
    return load_tokenizer(str(folder))


@pytest.fixture
def answers(tmp_path, tokenizer):
    """A function: what a model would learn to answer from the data file `name`; and how many rows have no answer."""

    def read(name, data, template=instruction, block_size=4096):
        (tmp_path / name).write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
        splits, _ = load_splits(str(tmp_path / name))
        encoded, counts = encode_rows(list(splits["train"]), template, tokenizer, block_size)
        return [tokenizer.decode(ids[start:-1]) for ids, start in encoded], counts["dropped"]

    def rows(name, data):
        (tmp_path / name).write_text(data, encoding="utf-8")
        return read_rows(tmp_path / name)

    read.rows = rows
    return read


@pytest.fixture
def refused(ready, warm):
    """A function that writes the data file `name` and checks that `prepare` refuses it in words."""
    check = refusal(ready, warm)

    def write_and_check(name, data, *tells_of, chosen=None):
        (ready / name).write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
        check(PREPARE, "--dataset-name-or-path", chosen or name, tells_of=[name, *tells_of])

    return write_and_check


@pytest.fixture
def gpt_refuses(ready, warm):
    """As `refused`, of rows with `instruction` and `output`."""

    def check(name, data, *tells_of):
        (ready / name).write_bytes(data)
        before = contents(ready)
        words = "--model-name-or-path ./llama3-8b --block-size 128 --dataset-name-or-path"
        tells(warm(f"python dataset/prepare_gpt_dataset.py {words} {name}", cwd=ready, ok=None), name, *tells_of)
        assert contents(ready) == before

    return check


def lines_of(*outputs):
    """JSON lines with these texts as the output, as they are."""
    return "".join(f'{{"instruction": "do", "output": {output}}}\n' for output in outputs)


# ------------------------------------------------------------------------------------------------ numbers and labels


def test_nan_is_an_empty_cell(answers):
    lines = lines_of("NaN", "Infinity", "-Infinity", "null", '"NaN"', '"yes"')
    assert answers("mine.jsonl", lines) == (["NaN", "yes"], 4)
    assert answers("lines.json", lines) == (["NaN", "yes"], 4)
    assert answers("mine.json", "[" + ",".join(lines.splitlines()) + "]") == (["NaN", "yes"], 4)
    assert answers("mine.csv", "instruction,output\ndo,\ndo,NaN\n") == (["NaN"], 1)
    values = [float("nan"), float("inf"), None, 2.0]
    assert answers("mine.parquet", parquet(values)) == (["2.0"], 3)
    for kind in ("float32", "float16"):
        assert answers("mine.parquet", parquet(__import__("numpy").array(values[:2] + [2.0], kind))) == (["2.0"], 2)


def test_what_pandas_writes_for_a_table_with_an_empty_cell(answers):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"instruction": ["do", "do"], "output": ["yes", float("nan")]})
    nan = '{"instruction": "do", "output": NaN}'  # json.dumps of to_dict
    assert json.dumps(table.to_dict("records")[1]) == nan
    for name, data in {
        "mine.json": json.dumps(table.to_dict("records")),
        "mine.jsonl": table.to_json(orient="records", lines=True),
        "mine.csv": table.to_csv(index=False),
        "index.csv": table.to_csv(),
    }.items():
        assert answers(name, data) == (["yes"], 1), name


def test_numbers_of_json_stay_as_they_are_written(answers):
    written = ["1", "1.0", "-0.50", "1.10", "1e5", "3.14159265358979323846", "9" * 50, "0"]
    assert answers("mine.jsonl", lines_of(*written, "true", "false")) == ([*written, "True", "False"], 0)


def test_a_number_of_json_is_a_number_for_a_template(answers):
    def stars(row):
        return Example(["", f"{row['output']} {row['output'] * 2}"], "yes")

    (number,) = [row["output"] for row in answers.rows("mine.jsonl", lines_of("1.10"))]
    assert apply_template(stars, {"output": number}).prompt == ["", "1.10 2.2"]


def test_cells_of_a_table_are_plain_text(answers):
    import pyarrow

    seoul = timezone(timedelta(hours=9))
    of_kind = [
        (pyarrow.int8(), [1, 0, -1], ["1", "0", "-1"]),
        (pyarrow.uint64(), [2**64 - 1], ["18446744073709551615"]),
        (pyarrow.float64(), [1.0, 0.1, 2.5], ["1.0", "0.1", "2.5"]),
        (pyarrow.float32(), [1.0, 0.5], ["1.0", "0.5"]),
        (pyarrow.bool_(), [True, False], ["True", "False"]),
        (pyarrow.decimal128(12, 2), [Decimal("1.10"), Decimal("-3")], ["1.10", "-3.00"]),
        (pyarrow.decimal128(12, 7), [Decimal("0.0000001")], ["0.0000001"]),  # not 1E-7
        (pyarrow.date32(), [date(2024, 1, 2)], ["2024-01-02"]),
        (pyarrow.timestamp("us"), [datetime(2024, 1, 2, 3, 4, 5)], ["2024-01-02 03:04:05"]),
        (pyarrow.timestamp("ns"), [1], ["1970-01-01 00:00:00.000000001"]),
        (pyarrow.timestamp("s", "+09:00"), [datetime(2024, 1, 2, 3, tzinfo=seoul)], ["2024-01-02 03:00:00+09:00"]),
        (pyarrow.time32("s"), [time(3, 4)], ["03:04:00"]),
        (pyarrow.duration("s"), [timedelta(minutes=90)], ["1:30:00"]),
        (pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), ["긍정", None, "부정"], ["긍정", "부정"]),
    ]
    for kind, values, texts in of_kind:
        array = pyarrow.array(values).dictionary_encode() if str(kind).startswith("dictionary") else values
        found = answers("mine.parquet", parquet(array, None if array is not values else kind))
        assert found == (texts, values.count(None)), kind


def test_dates_that_python_has_not_are_refused(gpt_refuses):
    import pyarrow

    gpt_refuses("far.parquet", parquet([1, 10**12], pyarrow.timestamp("s")), "row 2", "out of range")


def hub_columns():
    import datasets

    features = datasets.Features(
        {
            "instruction": datasets.Value("string"),
            "output": datasets.ClassLabel(names=["부정", "긍정"]),
            "score": datasets.Value("float32"),
        }
    )
    rows = {"instruction": ["a", "b", "c", "d"], "output": [1, 0, -1, None], "score": [0.5, None, 1.0, 0.25]}
    return datasets.Dataset.from_dict(rows, features)


def test_a_class_of_the_hub_is_its_name(tokenizer):
    rows = HubRows("owner/name, train", hub_columns())
    assert len(rows) == 4
    assert [(row["output"], row["score"]) for row in rows] == [("긍정", 0.5), ("부정", None), (None, 1.0), (None, 0.25)]
    assert list(rows)[1].place == "owner/name, train, row 2"
    encoded, counts = encode_rows(list(rows), instruction, tokenizer, 64)
    assert [tokenizer.decode(ids[start:-1]) for ids, start in encoded] == ["긍정", "부정"] and counts["dropped"] == 2


def test_a_row_of_the_hub_is_named(ready, warm, warm_hub, tmp_path):
    hub_columns().to_parquet(str(tmp_path / "train.parquet"))
    warm_hub.repos["datasets"] = {"owner/classes": {"train.parquet": (tmp_path / "train.parquet").read_bytes()}}
    before = contents(ready)
    try:
        command = "python dataset/prepare_gpt_dataset.py --model-name-or-path ./llama3-8b --dataset-name-or-path"
        done = warm(f"{command} owner/classes --save-path of_hub.pt", cwd=ready)
        assert "train: 2 rows" in done.stdout and "2 rows without an answer dropped" in done.stdout
        (ready / "of_hub.pt").unlink()
        done = warm(PREPARE, "--dataset-name-or-path", "owner/classes", cwd=ready, ok=None)
        tells(done, "owner/classes, train, row 1", "'article'", "instruction, output, score")
    finally:
        warm_hub.repos["datasets"] = {}
    assert contents(ready) == before


# ------------------------------------------------------------------------------------------------ bytes


def test_bytes_are_utf8_text(answers):
    import pyarrow

    text = "한국 👍 \x00"
    data = [text.encode(), None, b"", b"plain"]
    for kind in (pyarrow.binary(), pyarrow.large_binary()):
        assert answers("mine.parquet", parquet(data, kind)) == ([text, "plain"], 2)
    dictionary = pyarrow.array(data, pyarrow.binary()).dictionary_encode()
    assert answers("mine.parquet", parquet(dictionary)) == ([text, "plain"], 2)
    assert answers("mine.parquet", parquet(["한".encode(), b"abc"], pyarrow.binary(3))) == (["한", "abc"], 0)
    assert answers("mine.parquet", parquet([text], pyarrow.large_string())) == ([text], 0)


def test_bytes_that_are_no_text_are_refused_with_their_row(gpt_refuses):
    import pyarrow

    korean = "한국".encode("cp949")
    for number, kind in enumerate((pyarrow.binary(), pyarrow.large_binary())):
        gpt_refuses(f"{number}.parquet", parquet([b"good", korean], kind), "row 2", "'output'", "not UTF-8")
    dictionary = pyarrow.array([b"good", b"good", korean], pyarrow.binary()).dictionary_encode()
    gpt_refuses("dictionary.parquet", parquet(dictionary), "row 3", "'output'", "not UTF-8")
    strings = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"a", korean]).buffers())
    gpt_refuses("string.parquet", parquet(strings), "row 2", "utf-8")
    gpt_refuses("list.parquet", parquet([[korean]], pyarrow.list_(pyarrow.binary())), "row 1", "'output'", "a list")
    of_struct = pyarrow.struct([("bytes", pyarrow.binary())])
    gpt_refuses("struct.parquet", parquet([{"bytes": korean}], of_struct), "row 1", "'output'", "an object")
    of_map = pyarrow.map_(pyarrow.string(), pyarrow.string())
    gpt_refuses("map.parquet", parquet([[("a", "b")]], of_map), "row 1", "'output'", "a list")


def test_columns_that_no_template_uses_may_hold_anything(answers):
    import pyarrow
    import pyarrow.parquet

    image = pyarrow.array([b"\x89PNG\xff"], pyarrow.binary())
    table = pyarrow.table({"instruction": ["do"], "output": ["yes"], "image": image, "tags": [["a"]]})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    assert answers("mine.parquet", buffer.getvalue()) == (["yes"], 0)
    assert answers("mine.jsonl", '{"instruction": "do", "output": "yes", "tags": [["a"]], "x": {}}') == (["yes"], 0)
    for kind in ('["a"]', '{"a": 1}', "null", "3", "1.5"):
        row = f'{{"instruction": "do", "output": "yes", "kind": {kind}}}'
        assert answers("mine.jsonl", row) == (["yes"], 0)


# ------------------------------------------------------------------------------------------------ .csv

HEADER = "article,highlights\r\n"


@pytest.mark.parametrize(
    "data, tells_of",
    [
        (HEADER + "a,b\r\na,b, and more\r\n", ["line 3", "more or fewer cells", "quotes"]),
        (HEADER + "a,b\r\nonly\r\n", ["line 3", "more or fewer cells"]),
        (HEADER + '"two\r\nlines",b\r\n\r\na,b,\r\n', ["line 5", "more or fewer cells"]),
        (HEADER + 'a,b\r\n"a" b,c\r\n', ["line 3", "not a valid .csv"]),
        (HEADER + 'a,b\r\n"never closed,c\r\nd,e\r\n', ["line 3", "not a valid .csv"]),
        ("article,highlights,article\r\na,b,c\r\n", ["two columns", "'article'"]),
        ("article,highlights, article \r\na,b,c\r\n", ["two columns", "'article'"]),
        ("article;highlights\r\na;b\r\n", ["semicolons", "article;highlights", "with commas"]),
        ("article\thighlights\r\na\tb\r\n", ["tabs", "article", "with commas"]),
        ("article|highlights\r\na|b\r\n", ["bars", "article|highlights", "with commas"]),
        ("sep=;\r\narticle;highlights\r\na;b\r\n", ["semicolons", "sep=;"]),
        ('"article\r\nof news",highlights\r\na,b\r\n', ["line 3", "'article'", "article of news, highlights"]),
    ],
)
def test_csv_that_does_not_fit_its_header(data, tells_of, refused):
    refused("mine.csv", data, *tells_of)


def test_a_space_behind_the_comma_is_of_no_cell(answers):
    for data in (
        'instruction, output\ndo, "a, ""b"""\n"do", c\n',
        'instruction,output\ndo, "a, ""b"""\ndo,c\n',
        'sep=,\r\ninstruction,output\r\ndo,  "a, ""b"""\r\n do,c\r\n',
        '"sep=,"\ninstruction,output\n "do, ""x""", "a, ""b"""\ndo,c\n',
    ):
        assert answers("mine.csv", data) == (['a, "b"', "c"], 0)
    # the cell's own spaces, as pandas writes them
    kept = 'instruction,output\ndo,"a, ""b"", c"\ndo,  two\ndo," ""three"""\n'
    assert answers("mine.csv", kept) == (['a, "b", c', "  two", ' "three"'], 0)


def test_a_file_of_korean_excel_is_read_and_said(answers, capsys):
    data = "instruction,output\r\ndo,한국어 똠방각하\r\ndo,plain\r\n"
    assert answers("mine.csv", data.encode("cp949")) == (["한국어 똠방각하", "plain"], 0)
    said = "mine.csv is not UTF-8 but CP949, which Korean Excel writes: it is read as CP949.\n"
    assert capsys.readouterr().out.count(said) == 1
    assert answers("mine.jsonl", lines_of('"한국어"').encode("cp949")) == (["한국어"], 0)
    capsys.readouterr()
    assert answers("mine.csv", data) == (["한국어 똠방각하", "plain"], 0) and "CP949" not in capsys.readouterr().out


def test_the_cafe_sheet_is_the_same_as_excel_saves_it(tmp_path):
    """Commas, quotes and line breaks in its cells; in UTF-8, and in CP949 as a Korean Excel's plain CSV."""
    sheet = ROOT / "dataset" / "samples" / "cafe_questions.csv"
    (tmp_path / "excel.csv").write_bytes(sheet.read_text(encoding="utf-8").encode("cp949"))
    rows = [dict(row) for row in read_rows(sheet)]
    assert [dict(row) for row in read_rows(tmp_path / "excel.csv")] == rows
    assert len(rows) == 60 and all(row["질문"] and row["답변"] for row in rows)
    answers = {row["질문"]: row["답변"] for row in rows}
    assert answers["원두를 살 수 있나요?"] == "네, 200그램에 14,000원입니다.\n분쇄는 무료입니다."
    assert answers["케이크에 글씨를 써 주나요?"].endswith('"생일 축하해"')


def test_csv_as_programs_write_it(answers):
    expected = ["a, b", "c"]
    for data in (
        'instruction,output\r\ndo,"a, b"\r\ndo,c\r\n',
        BOM + 'instruction,output\ndo,"a, b"\ndo,c',
        'instruction, output\r\n\r\ndo,"a, b"\r\n\r\ndo,c\r\n\r\n',
    ):
        assert answers("mine.csv", data) == (expected, 0)
    assert answers("MINE.CSV", "instruction,output\ndo,c\n") == (["c"], 0)
    assert answers("mine.csv", "instruction,output\ndo,\n,\ndo,c\n") == (["c"], 2)
    assert answers("mine.csv", 'output,instruction\n"  two\n\nlines; | \t",do\n') == (["  two\n\nlines; | \t"], 0)


# ------------------------------------------------------------------------------------------------ columns


def test_one_row_without_a_column_is_named(refused, ready):
    bad = '{"article": "a", "summary": "b"}\n'
    refused("mine.jsonl", LINE * 3 + "\n" + bad + LINE, "mine.jsonl, line 5", "'highlights'", "article, summary")
    refused("far.jsonl", LINE * 2999 + bad, "far.jsonl, line 3000", "'highlights'")
    refused("lines.json", LINE * 3 + bad, "lines.json, line 4", "'highlights'")
    array = "[\n" + ",\n".join([LINE, LINE, bad]) + "]"
    refused("mine.json", array, "mine.json, row 3", "'highlights'", "article, summary")
    refused("held_out.jsonl", LINE * 19 + bad, "held_out.jsonl, line 20", "'highlights'")
    refused("mine.parquet", parquet(["a"]), "mine.parquet, row 1", "'article'", "instruction, output")
    (ready / "folder").mkdir()
    (ready / "folder" / "train.jsonl").write_text(LINE)
    refused("folder/validation.jsonl", LINE + bad, "folder/validation.jsonl, line 2", chosen="folder")


def test_a_row_that_is_no_text_or_no_object_is_named(refused):
    refused("list.jsonl", LINE + LINE.replace('"A bridge is closed."', '["a"]'), "line 2", "'article'", "a list")
    refused(
        "object.jsonl", LINE + LINE.replace('"Bridge closed."', '{"text": "b"}'), "line 2", "'highlights'", "object"
    )
    for number, row in enumerate(("null", "3", '"text"', "[]")):
        refused(f"{number}.jsonl", f"{LINE}{row}\n", "line 2", "not a JSON object")
        refused(f"{number}.json", f"[{LINE},{row}]", "row 2", "not a JSON object")


def test_a_row_is_named_under_the_names_of_columns_too(ready, warm):
    rows = [{"text": "a", "summary": "b"}] * 2
    for number, (bad, words) in enumerate(
        [
            ({"text": "a"}, ["no column 'summary'", "text"]),
            ({"text": "a", "summary": ["b"]}, ["'highlights'", "a list"]),
        ]
    ):
        name = f"{number}.jsonl"
        (ready / name).write_text("".join(json.dumps(row) + "\n" for row in [*rows, bad]))
        before = contents(ready)
        names = ["--columns", "article=text", "highlights=summary"]
        tells(warm(PREPARE, "--dataset-name-or-path", name, *names, cwd=ready, ok=None), f"{name}, line 3", *words)
        assert contents(ready) == before


def test_a_row_with_very_many_or_odd_columns_is_named_in_one_line(refused):
    refused("many.jsonl", json.dumps({f"column {number}": "a" for number in range(5000)}), "line 1", "column 7, ...")
    refused("odd.jsonl", json.dumps({"a\nb\u2028c": "a", "x" * 5000: "b", "\ud83d": "c"}), "line 1", "a b c, xxx")
    refused("none.jsonl", "{}", "line 1", "it has: none")


@pytest.mark.parametrize("template", [alpaca, korean_alpaca])
def test_input_may_be_missing_or_null(template, answers):
    rows = ({}, {"input": None}, {"input": ""}, {"input": "x"})
    lines = "".join(json.dumps({"instruction": "do", "output": "yes", **row}) + "\n" for row in rows)
    assert answers("mine.jsonl", lines, template) == (["yes"] * 4, 0)
    prompts = [template(row).prompt for row in map(json.loads, lines.splitlines())]
    assert prompts[0] == prompts[2] and prompts[3][3] == "x"
    assert answers("mine.csv", "instruction,output\ndo,yes\n", template) == (["yes"], 0)


# ------------------------------------------------------------------------------------------------ one large JSON object


@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_at_the_top_is_no_array_of_rows(indent, refused):
    data = {"version": "1.0", "data": [{"article": "a", "highlights": "b"}]}
    refused("one.json", json.dumps(data, indent=indent), "one JSON object (version, data)", "your_own_data.md")
    refused("text.json", '"text"', "row 1", "not a JSON object")


# ------------------------------------------------------------------------------------------------ odd text, odd files


@pytest.mark.parametrize(
    "text",
    [
        "NUL \x00 within",
        "👩‍👩‍👧 🇰🇷",
        "مرحبا بالعالم, שלום",
        "\u202eright to left\u202c",
        "line\u2028separator\u0085\x0b\x0c",
        '{"nested": ["JSON", null]}',
        "한글",  # in letters apart
        "\ufeffmark",
    ],
)
def test_odd_text_is_kept(text, answers):
    import pyarrow

    row = {"instruction": text, "output": text}
    for name, data in {
        "raw.jsonl": json.dumps(row, ensure_ascii=False),
        "escaped.jsonl": json.dumps(row),
        "mine.json": json.dumps([row], ensure_ascii=False, indent=1),
        "mine.parquet": parquet([text], pyarrow.string()),
    }.items():
        assert answers(name, data) == ([text], 0), name


def test_nul_bytes_in_csv_are_kept_or_refused(answers):
    try:  # Python before 3.11 reads none
        assert answers("mine.csv", "instruction,output\ndo,a\x00b\n") == (["a\x00b"], 0)
    except UserError as error:
        assert "line 2" in str(error) and "NUL" in str(error)


def test_half_an_emoji_in_any_place_becomes_a_question_mark(answers):
    assert answers("mine.jsonl", lines_of(r'"a\ud83d"', r'"\ude00b"', r'"\ud83d\ude00"')) == (["a?", "?b", "😀"], 0)


def test_only_white_space_is_no_answer(answers):
    blank = ['""', '" "', r'"\n\t"', '"\u3000\u00a0"']
    assert answers("mine.jsonl", lines_of(*blank, '"yes"')) == (["yes"], 4)


def test_a_million_characters(answers):
    row = {"instruction": "long " * 200_000, "output": "yes"}
    table = io.StringIO(newline="")
    __import__("csv").writer(table).writerows([row.keys(), row.values()])
    for name, data in {"mine.jsonl": json.dumps(row), "mine.csv": table.getvalue()}.items():
        assert answers(name, data, block_size=64) == (["yes"], 0)
    assert answers("mine.jsonl", lines_of(json.dumps("x" * 10**6)), block_size=64)[1] == 0


def test_marks_line_ends_and_blank_lines(answers):
    lines = lines_of('"one"', '"two"')
    for data in (
        BOM + lines,
        lines.replace("\n", "\r\n"),
        "\n\n  \n" + lines.replace("\n", "\n\n \t\n"),
        lines.rstrip("\n"),
        BOM + lines.replace("\n", "\n" + BOM, 1),  # two files joined
    ):
        assert answers("mine.jsonl", data) == (["one", "two"], 0)
        assert answers("mine.json", data) == (["one", "two"], 0)
    array = json.dumps([json.loads(line) for line in lines.splitlines()], indent=1)
    for data in (array, BOM + array.replace("\n", "\r\n"), "\n" * 5000 + array + "\n\n"):
        assert answers("mine.json", data) == (["one", "two"], 0)


@pytest.mark.parametrize("name", ["m.jsonl", "m.json", "m.csv"])
@pytest.mark.parametrize("data", ["", BOM, "\n\r\n"])
def test_empty_files(name, data, refused):
    refused(name, data, "empty")


def test_json_that_python_can_not_read(refused):
    deep = "[" * 100_000 + "]" * 100_000
    refused("deep.jsonl", LINE + f'{{"article": {deep}, "highlights": "b"}}', "line 2", "not valid JSON")
    refused("deep.json", f'[{{"article": {deep}, "highlights": "b"}}]', "not valid JSON")
    refused("second.json", LINE + "{'article': 'a'}", "line 2", "not valid JSON")
    refused("indented.json", '[\n{"article": "a"\n"b"}]', "line 3", "not valid JSON")
    refused("tab.jsonl", LINE + '{"article": "a\tb", "highlights": "b"}', "line 2", "control character")
    refused("single.jsonl", LINE + "{'article': 'a', 'highlights': 'b'}", "line 2", "not valid JSON")


def test_text_in_another_encoding_is_refused_with_its_line(refused):
    bad = LINE.replace("bridge", "한국").encode("cp949")
    good = LINE.replace("bridge", "한국").encode()
    refused("mine.jsonl", good * 2 + bad, "line 3", "not UTF-8")  # of two encodings
    refused("mine.json", b"[" + good + b",\n" + LINE.replace("bridge", "é").encode("latin-1") + b"]", "not UTF-8")
    refused("mine.csv", HEADER.encode() + b"a,b\r\n\r\n" + "caf\xe9,b\r\n".encode("latin-1"), "line 4", "not UTF-8")
    refused("utf16.jsonl", LINE.encode("utf-16"), "line 1", "not UTF-8")
    refused("surrogate.jsonl", LINE.encode() + LINE.encode().replace(b"bridge", b"\xed\xa0\xbd"), "line 2", "not UTF-8")


@pytest.mark.parametrize(
    "name, data, what",
    [
        ("mine.jsonl.gz", gzip.compress(LINE.encode(), mtime=0), "gunzip it first"),
        ("mine.csv.GZ", b"", "gunzip it first"),
        ("mine.xlsx", b"PK\x03\x04 a workbook", "Excel workbook"),
        ("mine.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Excel workbook"),
        ("mine.txt", b"text", "not a file of these"),
        ("mine.tsv", b"article\thighlights\n", "not a file of these"),
        ("mine", b"text", "not a file of these"),
    ],
)
def test_files_of_other_kinds(name, data, what, refused):
    refused(name, data, what, ".jsonl, .json, .csv or .parquet")


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.csv"])
def test_a_compressed_file_with_the_name_of_another_kind(name, refused):
    refused(name, gzip.compress(LINE.encode(), mtime=0), "line 1 is not UTF-8")


def test_a_split_in_several_files_is_read_in_their_order(tmp_path):
    for number, article in enumerate("cab"):
        (tmp_path / f"train-{number:05}-of-00003.jsonl").write_text(json.dumps({"article": article}) + "\n")
    (tmp_path / "validation-00000-of-00001.jsonl").write_text(LINE)
    splits, _ = load_splits(str(tmp_path))
    assert [row["article"] for row in splits["train"]] == ["c", "a", "b"] and len(splits["validation"]) == 1
    (tmp_path / "train-00001-of-00003.jsonl").unlink()
    with pytest.raises(UserError, match="has not all parts of train, it has: train-00000-of-00003.jsonl, train-00002"):
        load_splits(str(tmp_path))


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path, capsys):
    for name in ("train.jsonl", "valid.jsonl", "train2.jsonl", "README.md", ".hidden"):
        (tmp_path / name).write_text(LINE)
    (tmp_path / "validation.jsonl.gz").write_bytes(gzip.compress(LINE.encode()))
    (tmp_path / "test").mkdir()
    assert len(load_splits(str(tmp_path))[0]["train"]) == 1
    names = "test, train2.jsonl, valid.jsonl, validation.jsonl.gz"
    assert (
        f"Not read in {tmp_path}: {names}. Rename or unpack what shall be train or validation "
        in capsys.readouterr().out
    )


def test_a_folder_of_save_to_disk_is_named(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([json.loads(LINE)])
    rows.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "several"))
    for name in ("one", "several"):
        with pytest.raises(UserError, match=r"Write it again: datasets.load_from_disk.*to_json"):
            load_splits(str(tmp_path / name))


def test_names_and_text_in_parts(ready, warm):
    """macOS writes 한 as three letters (NFD): names are found, texts are counted."""
    names = {"질문": "무엇?", "답": "한국"}
    rows = [{normalize("NFD", name): normalize(form, text) for name, text in names.items()} for form in ("NFD", "NFC")]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (ready / normalize("NFD", "내 글.jsonl")).write_text(lines, encoding="utf-8")
    command = "python dataset/prepare_gpt_dataset.py --model-name-or-path ./llama3-8b --save-path new.pt"
    words = ["--dataset-name-or-path", "내 글.jsonl", "--columns", "instruction=질문", "output=답"]
    said = warm(command, *words, cwd=ready).stdout
    joined = 'join them by unicodedata.normalize("NFC", text)'
    assert "train: 2 rows" in said and f"\n1 row with letters in parts, as macOS writes them: {joined}\n" in said


def test_a_file_of_another_kind_that_is_not_there(ready, warm):
    tells(warm(PREPARE, "--dataset-name-or-path", "none.xlsx", cwd=ready, ok=None), "none.xlsx", "does not exist")
