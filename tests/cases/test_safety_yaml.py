"""Every fault of a spec is one error with file, line, problem and fix, in less than two seconds."""

import math
import os
import random
import time
from pathlib import Path

import pytest
import yaml

from jobs.spec import yaml_text
from jobs.spec.load import check, override, read_document
from jobs.spec.yaml_text import MAX_VALUES, parse_yaml
from pipelines.errors import UserError
from tests.paths import ROOT

INGEST = "kind: ingest\ninput: a\nout: b\n"
LIMIT_S = 2.0


def outcome(path: Path, *sets: str) -> str:
    """The error of a spec, or `valid`. Fails if it takes too long or is another exception."""
    start_s = time.process_time()  # by the clock, other processes would count
    try:
        check(override(read_document(path), sets))
    except UserError as error:
        return str(error)
    finally:
        assert time.process_time() - start_s < LIMIT_S
    return "valid"


def laughs(levels: int) -> str:
    rows = "".join(f"a{k}: &a{k} [{','.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, levels))
    return f"{INGEST}a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n{rows}"


def nested_aliases(levels: int) -> str:
    """Aliases that add depth, not width."""
    return INGEST + "a0: &a0 [x]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}]\n" for k in range(1, levels))


def merges(count: int) -> str:
    """Each mapping merges the one before it: a merge key copies all keys each time."""
    rows = "".join(f"m{k}: &m{k} {{<<: *m{k - 1}, k{k}: 1}}\n" for k in range(1, count))
    return f"{INGEST}m0: &m0 {{k0: 1}}\n{rows}"


CASES = {
    "laughs": (laughs(9), ":8: stands for more than 20,000 values; use fewer values or aliases"),
    "aliases of aliases": (nested_aliases(200), ": is nested deeper than 64 levels; write fewer brackets"),
    "deep merges": (merges(2000), ":67: is nested deeper than 64 levels"),
    "quadratic merges": (merges(50), ":5: has a merge key (<<); repeat the settings, or name a file as `base`"),
    "merge of a list": ("x: &x {input: a}\nkind: ingest\n<<: [*x, *x]\n", ":3: has a merge key (<<)"),
    "self": ("kind: ingest\ninput: &a [*a]\n", ":2: *a stands for a value that contains it; write the value out"),
    "no anchor": ("kind: ingest\ninput: *a\n", ":2: "),
    "flow depth": (f"kind: ingest\ninput: {'[' * 3000}{']' * 3000}\n", ":2: is nested deeper than 64 levels"),
    "open depth": (f"kind: ingest\ninput: {'[' * 200_000}", ":2: is nested deeper than 64 levels"),
    "mapping depth": (f"kind: ingest\ninput: {'{a: ' * 3000}1{'}' * 3000}\n", ":2: is nested deeper than 64 levels"),
    "block depth": ("kind: ingest\n" + "".join(f"{' ' * k}a:\n" for k in range(300)), ": is nested deeper than"),
    "python": (
        "kind: ingest\ninput: !!python/object/apply:os.system ['touch pwned']\n",
        ":2: has the tag '!!python/object/apply:os.system'; remove it: a job is plain data",
    ),
    "own tag": ("kind: ingest\ninput: !foo x\n", ":2: has the tag '!foo'"),
    "tag of a key": ("kind: ingest\n!!binary aGk=: x\n", ":2: has the tag '!!binary'"),
    "tag of the whole": ("!!omap\nkind: ingest\n", ":1: has the tag '!!omap'"),
    "bad int": ("kind: ingest\nseed: !!int x\n", ":2: has the tag '!!int'"),
    "repeated key": ("kind: ingest\ninput: a\ninput: b\n", ":3: 'input' is given twice; keep one of them"),
    "repeated inside": ("kind: ingest\nmedia: {frames: 1, frames: 2}\n", ":2: 'frames' is given twice"),
    "null key": (f"{INGEST}~: 3\n", ":4: has a null as a key; write a name"),
    "list as key": (f"{INGEST}? [1, 2]\n: 4\n", ":4: has a sequence as a key; write a name"),
    "tab": ("kind: ingest\n\tinput: a\n", ": is not YAML: "),
    "NUL": ("kind: ingest\ninput: a\x00b\n", ":2: is not YAML: "),
    "escape": ("kind: ingest\ninput: \x1b[2Ja\n", ":2: is not YAML: "),
    "half a character": ('kind: ingest\ninput: "\\ud800"\n', ": "),
    "two documents": (f"{INGEST}---\nkind: ingest\n", ":4: begins a second document; keep one job in a file"),
    "octal": (f"{INGEST}seed: 010\n", ":4: '010' is octal to some programs and decimal to others"),
    "sexagesimal": (f"{INGEST}seed: 1:30\n", ":4: seed='1:30': input should be a valid integer"),
    "date": (f"{INGEST}seed: 2024-99-99\n", ":4: seed='2024-99-99': input should be a valid integer"),
    "huge number": (f"{INGEST}seed: {'9' * 5000}\n", ":4: '9999"),
    "infinite": (f"{INGEST}held_out_fraction: .inf\n", ":4: held_out_fraction=inf: "),
    "an infinite limit": (f"{INGEST}media: {{fps: .inf}}\n", ":4: media.fps=inf: input should be a finite number"),
    "not a number": (f"{INGEST}held_out_fraction: .nan\n", ":4: held_out_fraction=nan: "),
    "yes": (f"{INGEST}materialized: off\n", ":4: materialized='off': input should be a valid boolean"),
    "many lines": (f"{INGEST}x:\n" + "".join(f" {k}: x\n" for k in range(90_000)), ": stands for more than"),
    "large": (f"{INGEST}x: {'y' * (2 << 20)}\n", ": is larger than 1,048,576 bytes"),
    "one long line": (f"{INGEST}x: [{'[],' * 300_000}]\n", ":4: stands for more than 20,000 values"),
    "many unknown settings": (INGEST + "".join(f"a{k}: x\n" for k in range(4000)), "... and 3992 more"),
    "many wrong values": (f"{INGEST}submit:\n  env:\n" + "".join(f"    A{k}: {k}\n" for k in range(3000)), "more"),
    "empty": ("", ": is not a mapping of settings; start with `kind: ...`"),
    "list": ("- 1\n", ": is not a mapping of settings"),
    "a base that is a list": ("base: [1]\n", ":1: base=['1'] is not a file; name a YAML file"),
    "a base that is a device": ("base: /dev/zero\n", "/dev/zero: is not a file; name a YAML file"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_one_clear_error_in_two_seconds(tmp_path, name):
    text, expected = CASES[name]
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode())
    found = outcome(path)
    place = f"{path}{expected}" if expected.startswith(":") and expected[1:2].isdigit() else expected
    if name == "a base that is a list":
        place = place.replace("['1']", "[1]")
    assert place in found
    assert "Error" not in found
    assert not (tmp_path / "pwned").exists()


def test_encodings(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(INGEST.encode("utf-16"))
    assert "cannot be read: 'utf-8' codec can't decode byte 0xff in position 0" in outcome(path)
    path.write_bytes(b"\xef\xbb\xbf" + INGEST.encode())
    assert outcome(path) == "valid"


def test_a_pipe_as_a_base_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    path = tmp_path / "a.yaml"
    path.write_text("base: pipe.yaml\n")
    assert "is not a file" in outcome(path)


def test_loops_and_long_chains_of_bases(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.yaml").write_text(f"base: {(number + 1) % 3}.yaml\n{INGEST}")
    assert "0.yaml:1: 0.yaml is based on itself; name another base" in outcome(tmp_path / "0.yaml")
    for number in range(100):
        (tmp_path / f"c{number}.yaml").write_text(f"base: c{number + 1}.yaml\n{INGEST}")
    assert "is the base of 16 others; use fewer files" in outcome(tmp_path / "c0.yaml")


def test_a_base_of_many_settings_is_merged_quickly(tmp_path):
    env = "submit:\n  env:\n"
    (tmp_path / "below.yaml").write_text(INGEST + env + "".join(f"    A{k}: x\n" for k in range(9000)))
    path = tmp_path / "a.yaml"
    path.write_text("base: below.yaml\n" + env + "".join(f"    A{k}: y\n" for k in range(9000)))
    assert outcome(path) == "valid"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("input=!!python/object/apply:os.system ['id']", ": has the tag '!!python/object/apply:os.system'"),
        ("input={a: *x}", ": "),
        ("input=" + "[" * 3000, ": is nested deeper than 64 levels"),
        ("." * 3000 + "=1", ": is not of the form key=value"),
        ("a" + ".a" * 3000 + "=1", ": is not of the form key=value"),
        ("__class__.__init__=1", ": __class__ is not a setting"),
        ("input=[1", ": is not YAML: "),
    ],
)
def test_faults_on_the_command_line(tmp_path, change, expected):
    path = tmp_path / "a.yaml"
    path.write_text(INGEST)
    found = outcome(path, change)
    assert found.startswith(f"--set {change[:200]}")
    assert expected in found
    assert len(found) < 2000


@pytest.mark.parametrize("loader", ["CSafeLoader", "SafeLoader"])
@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("no", "no"), ("yes", "yes"), ("true", True), ("FALSE", False), ("~", None), ("", None), ("null", None)),
        *(("'~'", "~"), ("'1'", "1"), ("7", 7), ("-7", -7), ("1_003_520", 1003520), ("0x10", 16), ("0", 0)),
        *(("2e-4", 2e-4), ("1.5", 1.5), (".5", 0.5), ("1_000.5", 1000.5), ("-.inf", -math.inf), ("1.", 1.0)),
        *(("2024-01-01", "2024-01-01"), ("1:30", "1:30"), ("=", "="), ("a b", "a b"), ("! 7", "7")),
        *(("[1, [2]]", [1, [2]]), ("{a: {b: c}}", {"a": {"b": "c"}}), ("1.2.3", "1.2.3"), ("e5", "e5")),
    ],
)
def test_values(monkeypatch, loader, text, value):
    monkeypatch.setattr(yaml_text, "_Loader", getattr(yaml, loader))
    assert parse_yaml(f"a: {text}\n", "x")[0] == {"a": value}


@pytest.mark.parametrize("loader", ["CSafeLoader", "SafeLoader"])
def test_faults_without_libyaml(monkeypatch, loader):
    monkeypatch.setattr(yaml_text, "_Loader", getattr(yaml, loader))
    for text, place in (("a: [", "x:"), ("a: b\n  c: d\n", "x:2"), ("a: \x00", "x:1"), ("[" * 100_000, "x:1")):
        with pytest.raises(UserError) as caught:
            parse_yaml(text, "x")
        assert caught.value.place.startswith(place)


def test_aliases_share_values_and_know_where_they_are_written():
    data, places = parse_yaml("a: &x\n  b: 1\nc: *x\nd: [*x, *x]\n", "f")
    assert data == {"a": {"b": 1}, "c": {"b": 1}, "d": [{"b": 1}, {"b": 1}]}
    assert places["c", "b"] == "f:2"
    assert places["d",] == "f:4"
    data["c"]["b"] = 2
    assert data["a"] == {"b": 1}
    small = "a0: &a0 [x]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]\n" for k in range(1, 11))
    assert parse_yaml(small, "f")[0]["a10"]
    assert MAX_VALUES > 2**13


def test_mutated_specs_are_valid_or_one_error(tmp_path):
    rng = random.Random(0)
    sources = [path.read_bytes() for path in sorted((ROOT / "jobs").glob("*.yaml"))]
    path = tmp_path / "a.yaml"
    outcomes = []
    for _ in range(150):
        data = bytearray(rng.choice(sources))
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(data))
            data[start : start + rng.choice((0, 1, 5))] = rng.choice(
                (b"", b"*", b"&a ", b"!!x ", b"[", b"\xff", b"- ", b": ")
            )
        path.write_bytes(data)
        outcomes.append(outcome(path))
    assert any(found == "valid" for found in outcomes)
    assert sum(found != "valid" for found in outcomes) > 50
