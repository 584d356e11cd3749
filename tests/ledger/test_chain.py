"""The chain: what was written is read, whoever touches it is named, and a cut-off write costs no whole entry."""

import json
import multiprocessing
import random
import string
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.chain import START, Chain, Head, entry_hash, missing_since, written
from utils import UsageError

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text() | FLOATS,
                      lambda inner: st.lists(inner, max_size=3), max_leaves=5)  # fmt: skip


def chain_of(folder: Path, count: int) -> Chain:
    chain = Chain(folder / "ledger.jsonl")
    with chain.writing():
        for i in range(count):
            chain.append("add" if i else "init", id=f"R{i}", rows=[str(i) * 8], note="ü\u2028" * i)
    return chain


@settings(max_examples=40, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["id", "rows", "why", "länge"]), VALUES), max_size=5))
def test_what_is_written_is_read_back(contents):
    with tempfile.TemporaryDirectory() as folder:
        chain = Chain(Path(folder) / "ledger.jsonl")
        with chain.writing():
            for content in contents:
                chain.append("add", **content)
        if not contents:
            return
        entries = chain.entries()
        assert [entry.content for entry in entries] == json.loads(json.dumps(contents))
        assert [entry.number for entry in entries] == list(range(1, len(contents) + 1))
        assert [entry.previous for entry in entries] == [START, *(entry.hash for entry in entries[:-1])]
        assert chain.head() == Head(len(contents), entries[-1].hash)
        assert not chain.faults()


def test_the_hash_is_that_of_the_line_without_it(tmp_path):
    """Worked out from the file alone, as an auditor would: SHA-256 of the JSON with sorted keys and no spaces."""
    import hashlib

    chain = chain_of(tmp_path, 2)
    fields = json.loads(chain.path.read_text().splitlines()[1])
    stated = fields.pop("hash")
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == stated


# ------------------------------------------------------------------------------------------------- tampering
def changed_field(lines, rng):
    place = rng.randrange(len(lines))
    fields = json.loads(lines[place])
    name = rng.choice(["id", "at", "what", "rows", "note"])
    fields[name] = ["0"] if name == "rows" else fields[name] + rng.choice(string.ascii_letters)
    lines[place] = written(fields)
    return place + 1


def changed_byte(lines, rng):
    place = rng.randrange(len(lines))
    line = bytearray(lines[place])
    at = rng.randrange(len(line))
    line[at] = line[at] ^ rng.choice([1, 2, 4])
    if line[at] == 10:
        line[at] = 11
    lines[place] = bytes(line)
    return place + 1


def rehashed(lines, rng):
    """A careful hand: the entry's own hash is made anew, so only the next entry tells."""
    place = rng.randrange(len(lines) - 1)
    fields = json.loads(lines[place])
    fields["id"] += "x"
    lines[place] = written(fields | {"hash": entry_hash(fields)})
    return place + 2


def removed(lines, rng):
    place = rng.randrange(len(lines) - 1)
    del lines[place]
    return place + 1


def swapped(lines, rng):
    place = rng.randrange(len(lines) - 1)
    lines[place], lines[place + 1] = lines[place + 1], lines[place]
    return place + 1


def doubled(lines, rng):
    place = rng.randrange(len(lines))
    lines.insert(place, lines[place])
    return place + 2


def inserted(lines, rng):
    place = rng.randrange(1, len(lines))
    before = json.loads(lines[place - 1])
    fields = {"number": place + 1, "at": before["at"], "what": "withdraw", "previous": before["hash"], "id": "R1"}
    lines.insert(place, written(fields | {"hash": entry_hash(fields)}))
    return place + 2


def renumbered(lines, rng):
    place = rng.randrange(len(lines))
    fields = json.loads(lines[place])
    fields["number"] += rng.choice([-1, 1, 5])
    lines[place] = written(fields | {"hash": entry_hash(fields)})
    return place + 1


def respaced(lines, rng):
    place = rng.randrange(len(lines))
    lines[place] = json.dumps(json.loads(lines[place])).encode()
    return place + 1


def emptied(lines, rng):
    place = rng.randrange(len(lines))
    lines.insert(place, rng.choice([b"", b"{}", b"[]", b"null", b"\xff"]))
    return place + 1


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("tamper", [changed_field, changed_byte, rehashed, removed, swapped, doubled, inserted,
                                    renumbered, respaced, emptied], ids=lambda f: f.__name__)  # fmt: skip
def test_every_tampering_is_named_with_its_place(tmp_path, tamper, seed):
    """120 of them, in chains of 3 to 9 entries."""
    rng = random.Random(seed)
    chain = chain_of(tmp_path, rng.randint(3, 9))
    lines = chain.path.read_bytes().splitlines()
    place = tamper(lines, rng)
    chain.path.write_bytes(b"".join(line + b"\n" for line in lines))
    chain.note.unlink()
    faults = chain.faults()
    assert faults and faults[0].startswith(f"entry {place}:"), (place, faults)
    with pytest.raises(UsageError, match=f"entry {place}:"):
        chain.entries()
    with pytest.raises(UsageError, match=f"entry {place}:"), chain.writing():
        pass


def test_missing_last_entries_and_a_new_chain_are_found_against_a_note(tmp_path):
    chain = chain_of(tmp_path, 5)
    head, lines = chain.head(), chain.path.read_bytes().splitlines(keepends=True)
    chain.path.write_bytes(b"".join(lines[:4]))
    assert not chain.faults(), "by itself, a shorter chain is whole"
    assert "knows 5 entries, the ledger has 4" in missing_since(chain.entries(), head, "export.json")
    for left in (lines[:4], []):
        chain.path.write_bytes(b"".join(left))
        with pytest.raises(UsageError, match=r"head.json knows 5 entries"), chain.writing():
            pass
    chain.path.unlink()
    with pytest.raises(UsageError, match="no such ledger"), chain.writing():
        pass
    chain.note.unlink()
    chain_of(tmp_path, 4)  # the times differ from the first ones by nothing, so change what is said
    with chain.writing():
        chain.append("add", id="other")
    assert "written anew" in missing_since(chain.entries(), head, "export.json")
    assert missing_since(chain.entries(), chain.head(), "export.json") is None


# ---------------------------------------------------------------------------------------------- cut-off writes
def test_wherever_a_write_is_cut_off_the_whole_entries_stay(tmp_path):
    chain = chain_of(tmp_path, 3)
    raw = chain.path.read_bytes()
    second = raw.rstrip(b"\n").rfind(b"\n") + 1
    for size in range(second + 1, len(raw)):
        chain.path.write_bytes(raw[:size])
        chain.note.write_text(
            json.dumps({"count": 2, "hash": json.loads(raw.splitlines()[1])["hash"]})
        )  # the one before
        whole = 3 if size == len(raw) - 1 else 2  # without its line end alone, the last entry is whole
        assert len(chain.entries()) == whole
        assert (chain.torn() is None) == (whole == 3)
        with chain.writing():
            assert chain.append("add", id="next").number == whole + 1
        assert not chain.faults()
        assert len(chain.entries()) == whole + 1


def _hold(path, begun, ended):
    with Chain(Path(path)).writing():
        begun.set()
        ended.wait(30)


def test_two_processes_cannot_write_at_once(tmp_path):
    chain = chain_of(tmp_path, 1)
    context = multiprocessing.get_context("spawn")
    begun, ended = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(chain.path), begun, ended))
    other.start()
    assert begun.wait(60)
    with pytest.raises(UsageError, match="another process is writing"), chain.writing():
        pass
    assert len(chain.entries()) == 1, "reading needs no lock"
    ended.set()
    other.join()
    with chain.writing():
        chain.append("add", id="R9")


def test_a_full_disk_leaves_no_half_of_an_entry(tmp_path, monkeypatch):
    chain = chain_of(tmp_path, 2)
    before = chain.path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    with chain.writing():
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            chain.append("add", id="R9")
    assert chain.path.read_bytes() == before
