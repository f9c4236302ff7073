"""`rzen look`: what it finds in tables and folders, the spec that it prints, and problems with counts."""

import json
import uuid
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli import main
from jobs.data.specs import IngestSpec
from jobs.spec.load import check, read_document
from pipelines.sources.suggest import suggest_columns
from pipelines.sources.table import open_table
from pipelines.storage.location import open_store
from tests.tables import picture, split, write_pictures, write_table
from tests.unit.pipelines.test_presets import CASES


@pytest.fixture(autouse=True)
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main(["look", *arguments]) == status
    return capsys.readouterr().out


def look(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed(capsys, *arguments, "--json", status=status))
    return found


def samples_of(spec: dict[str, Any], folder: Path) -> int:
    """Check a printed spec as a file, and read its one source. Return the number of samples."""
    path = folder / "printed.yaml"
    path.write_text(yaml.safe_dump(spec))
    ((name, source),) = check(read_document(path)).sources.items()  # type: ignore[attr-defined]
    return len(split(open_table(name, source).read_all())[0])


def test_columns_media_and_problems_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path, "shop/img/0.png", "shop/img/1.png")
    (tmp_path / "shop/img/2.png").write_bytes(b"no picture")
    rows = [{"sku": f"00{n}", "title": f"a shoe {n}", "photo": f"/old/img/{n}.png"} for n in range(4)]
    table = write_table(tmp_path / "shop/products.csv", rows)
    found = look(capsys, table)
    assert (found["format"], found["files"], found["num_samples"], found["task"]) == ("csv", 1, 3, "text_image")
    assert found["columns"][0] == {"name": "sku", "type": "string", "example": "000"}
    assert found["media"] == {"image": 2}
    assert found["rejected"] == {"missing_file": 1}
    assert found["problems"] == [
        "missing_file 1, such as products.csv:5: /old/img/3.png",
        f"unsupported_format 1 of 3 media, such as {tmp_path}/shop/img/2.png",
    ]
    assert [sample["origin"] for sample in found["samples"]] == ["products.csv:2", "products.csv:3"]
    query, positive = found["samples"][0]["sides"]
    assert "<|im_start|>user\nFind an image that matches the given caption: a shoe 0 " in query["prompt"]
    assert positive["media"] == [f"image jpg, {len(picture(0, 'JPEG'))} bytes, 12 x 8 pixels"]
    source = found["spec"]["sources"]["mine"]
    assert source["rebase"] == {"/old/": ""}
    assert samples_of(found["spec"], tmp_path) == 3
    text = printed(capsys, table)
    assert "media: image 2" in text
    assert "problem: missing_file 1, such as products.csv:5" in text
    spec = yaml.safe_load(text.partition("rzen run ingest.yaml`:\n")[2])
    assert spec == found["spec"]


@pytest.mark.parametrize("start", ["", "file://"])
def test_absolute_paths_are_read_from_the_folder_that_holds_them(
    start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path, "disk/a/0.png", "disk/b/1.png", "tables/img/2.png")
    rows = [
        {"title": f"a shoe {n}", "photo": f"{start}{tmp_path}/disk/{name}.png"}
        for n, name in enumerate(("a/0", "b/1", "gone"))
    ]
    found = look(capsys, write_table(tmp_path / "tables/products.csv", rows))
    assert found["media"] == {"image": 2}
    assert found["rejected"] == {"missing_file": 1}
    source = found["spec"]["sources"]["mine"]
    assert (source["media_root"], source.get("rebase")) == (f"{tmp_path}/disk", None)
    inside = write_table(
        tmp_path / "tables/inside.csv", [{"title": "a", "photo": f"{start}{tmp_path}/tables/img/2.png"}]
    )
    source = look(capsys, inside)["spec"]["sources"]["mine"]
    assert "media_root" not in source, "it is where media are looked for anyway"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.recognized and not case.settings])
def test_a_published_layout_is_recognized_and_its_spec_reads_the_same(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path, "images/a.jpg", "images/b.jpg", "images/c.jpg", "frames/v1/1.jpg", "frames/v1/2.jpg")
    case = CASES[name]
    found = look(capsys, write_table(tmp_path / case.file, case.rows))
    assert found["preset"] == name
    assert found["num_samples"] == len(case.samples) == samples_of(found["spec"], tmp_path)
    assert sum(found["rejected"].values()) == len(case.rejected)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"caption": "a", "file_name": "a.jpg"}, {"query": {"text": "caption"}, "positive": {"media": "file_name"}}),
        ({"question": "a", "answer": "b"}, {"query": {"text": "question"}, "positive": {"text": "answer"}}),
        (
            {"image": "a.jpg", "question": "a", "answer": "b"},
            {"query": {"text": "question", "media": "image"}, "positive": {"text": "answer"}},
        ),
        (
            {"id": "7", "passage": "b", "query": "a", "negatives": ["c"]},
            {"query": {"text": "query"}, "positive": {"text": "passage"}, "negatives": [{"text": "negatives?"}]},
        ),
        ({"id": "1", "title": "a"}, {}),
        ({"number": 3}, {}),
        ({"odd [name]": "a", "b?": "c"}, {}),
    ],
)
def test_columns_are_suggested_by_names_and_values(
    row: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    from pipelines.sources.selectors import Row

    assert suggest_columns(tuple(row), [Row(row, tuple(row), "t:1")]) == (None, expected)


def test_a_table_without_query_or_positive_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = look(capsys, write_table(tmp_path / "t.jsonl", [{"number": 3}]), status=1)
    assert found["spec"] == {}
    assert found["problems"] == ["no column says what is a query and what is a positive: write query and positive"]
    assert "there is no such file" in _error(capsys, "gone.csv")


def _error(capsys: pytest.CaptureFixture[str], place: str) -> str:
    assert main(["look", place]) == 1
    return capsys.readouterr().err


def test_large_row_groups_are_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"caption": f"c {n}", "image": picture(n)} for n in range(30)]
    table = write_table(tmp_path / "t.parquet", rows, row_group_size=15)
    assert look(capsys, table)["problems"] == []
    monkeypatch.setattr("pipelines.sources.table_look.LARGE_UNIT_BYTES", 2000)
    assert look(capsys, table)["problems"] == ["a row group has 0 MB and is read as a whole: write smaller ones"]


def test_the_page_shows_samples_with_pictures_and_escapes_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"caption": f"<script>{n}</script>", "image": picture(n)} for n in range(3)]
    table = write_table(tmp_path / "t.parquet", rows)
    assert "wrote page.html" in printed(capsys, table, "--html", "page.html", "--samples", "2")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<h4>positive</h4>") == 2
    assert page.count("data:image/webp;base64,") == 2
    assert "<script>" not in page
    assert "&lt;script&gt;1&lt;/script&gt;" in page
    assert "preset" not in page
    (tmp_path / "mine.html").write_text("mine")
    assert main(["look", table, "--html", "mine.html"]) == 1
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_a_folder_of_files_is_looked_at_as_ingest_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path, "photos/a.jpg", "photos/b.jpg")
    (tmp_path / "photos/a.txt").write_text("a cat\na tabby\n")
    found = look(capsys, "photos")
    assert found["samples"] == {"text_image": 2}
    assert found["rejected"] == {"no_caption": 1}
    assert found["spec"] == {"kind": "ingest", "input": "photos", "out": "runs/data"}
    assert "no_caption 1, such as b.jpg" in printed(capsys, "photos")


def test_tables_in_an_object_store(
    tmp_path: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    root = f"s3://b{uuid.uuid4().hex[:12]}/d"
    store = open_store(root)
    store.ensure_bucket()
    store.write("img/0.jpg", picture(0, "JPEG"))
    rows = [{"caption": "a", "image": "img/0.jpg"}, {"caption": "b", "image": "img/1.jpg"}]
    store.upload(Path(write_table(tmp_path / "t.jsonl", rows)), "t.jsonl")
    found = look(capsys, f"{root}/t.jsonl", "--media-root", root)
    assert found["media"] == {"image": 1}
    assert found["problems"] == [f"missing_file 1 of 2 media, such as {root}/img/1.jpg"]
    assert len(found["samples"]) == 1


@pytest.mark.parametrize(
    ("table", "path", "root", "rebase"),
    [
        ("tables/t.jsonl", "/data/old/a/{}.jpg", "img", {"/data/old/": ""}),
        ("t.jsonl", "a/{}.jpg", "img", None),
        ("tables/t.jsonl", "in/{}.jpg", "media.zip", None),
        ("t.jsonl", "img/a/{}.jpg", None, None),
        ("*.jsonl", "a/{}.jpg", "img", None),
    ],
)
def test_media_of_a_table_in_an_object_store_are_looked_for_nearby(
    table: str,
    path: str,
    root: str | None,
    rebase: dict[str, str] | None,
    tmp_path: Path,
    s3_endpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    store = open_store(f"s3://b{uuid.uuid4().hex[:12]}/d")
    store.ensure_bucket()
    with zipfile.ZipFile(tmp_path / "media.zip", "w") as archive:
        for n in range(2):
            store.write(f"img/a/{n}.jpg", picture(n, "JPEG"))
            archive.writestr(f"in/{n}.jpg", picture(n, "JPEG"))
    store.upload(tmp_path / "media.zip", "media.zip")
    rows = [{"caption": "a", "image": path.format(0)}, {"caption": "b", "image": path.format(1)}]
    store.upload(Path(write_table(tmp_path / "t.jsonl", rows)), table.replace("*", "t"))
    found = look(capsys, f"{store.url}/{table}")
    source = found["spec"]["sources"]["mine"]
    assert (source.get("media_root"), source.get("rebase")) == (root and f"{store.url}/{root}", rebase)
    assert (found["media"], found["problems"]) == ({"image": 2}, [])


def test_ingest_takes_a_table_with_the_settings_that_look_suggests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[IngestSpec] = []
    monkeypatch.setattr("jobs.runtime.dispatch.run_spec", lambda spec, _: ran.append(spec) or {"outputs": []})
    monkeypatch.chdir(tmp_path)
    table = write_table(write_pictures(tmp_path, "img/a.jpg") / "my shop.csv", [{"title": "a", "photo": "img/a.jpg"}])
    assert main(["ingest", table, "out", "--set", "seed=3"]) == 0
    assert (ran[0].input, ran[0].out, ran[0].seed) == (None, "out", 3)
    (name,) = ran[0].sources
    assert (name, ran[0].sources[name].model_dump(exclude_unset=True)) == ("my-shop", {"table": table})
    assert open_table(name, ran[0].sources[name]).suggested == {
        "query": {"text": "title"},
        "positive": {"media": "photo"},
    }

    write_table(tmp_path / "tables/t.jsonl", [{"anchor": "a", "positive": "b"}])
    assert main(["ingest", "tables", "out"]) == 0  # a folder of tables alone
    assert open_table("tables", ran[1].sources["tables"]).preset == "anchor"
    (tmp_path / "tables/b.jpg").write_bytes(picture(1))
    assert main(["ingest", "tables", "out"]) == 0  # notes of a camera next to its pictures
    assert (ran[2].input, ran[2].sources) == ("tables", {})

    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(["ingest", write_table(tmp_path / "n.jsonl", [{"number": 3}]), "out"]) == 1
    assert "n.jsonl: no column says what is a query and what is a positive: there are number" in capsys.readouterr().err
