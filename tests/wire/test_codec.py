"""The codec: what it writes it reads, and every cut, every byte too many and every value that does not fit is an error.

The property holds for each message of each table between our processes: a new row is tested without a line here.
"""

from __future__ import annotations

import struct
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.errors import LinkViolation
from fdbroker.limits import every as limits
from fdbroker.terms import Device
from fdbroker.wire import codec, findings, keeper, launcher, link, lists, worker

TABLES = {
    f"{module.__name__}.{name}": table
    for module in (keeper, launcher, link, lists, worker)
    for name, table in vars(module).items()
    if isinstance(table, codec.Table)
}
MESSAGES = [(name, number) for name, table in TABLES.items() for number in table.kinds]


def _bytes_of(field: codec.Field) -> st.SearchStrategy[bytes]:
    """Bytes that are mostly a value of this field, by its description alone."""
    match field:
        case codec.Number(form, most):
            return st.integers(0, most).map(form.pack)
        case codec.Mapped(inner, _, _):
            return _bytes_of(inner)
        case codec.Text(most, _):
            texts = st.text(st.characters(codec="utf-8"), max_size=min(most, 40)).map(str.encode)
            return texts.filter(lambda text: len(text) <= most).map(lambda text: struct.pack("!H", len(text)) + text)
        case codec.Maybe(inner):
            return st.just(b"\0") | _bytes_of(inner).map(lambda data: b"\1" + data)
        case codec.Some(inner, most, least, _):
            several = st.lists(_bytes_of(inner), min_size=least, max_size=min(most, max(least, 3)))
            return several.map(lambda parts: struct.pack("!H", len(parts)) + b"".join(parts))
        case codec.Record():
            return st.tuples(*map(_bytes_of, field.fields)).map(b"".join)
        case codec.Choice():
            return st.one_of(
                *(
                    _bytes_of(one).map(lambda data, index=index: bytes([index]) + data)
                    for index, one in enumerate(field.fields)
                )
            )
        case codec.Bytes():
            return st.binary(max_size=40).map(lambda data: struct.pack("!I", len(data)) + data)
        case codec.Kept():
            return _bytes_of(field.field)
    raise TypeError(f"no bytes are known for {field!r}: describe them here")


@pytest.mark.parametrize(("table", "number"), MESSAGES, ids=lambda part: str(part))
@given(data=st.data())
def test_what_is_read_is_written_again_and_nothing_else_is_read(table, number, data):
    one = TABLES[table]
    sent = bytes([number]) + data.draw(_bytes_of(one.formats[one.kinds[number]]))
    try:
        message = one.decode(sent)
    except LinkViolation:  # no such refusal, no such resource
        message = None
    if message is not None:
        assert type(message) is one.kinds[number]
        again = one.encode(message)
        assert one.encode(one.decode(again)) == again  # a refusal is not equal to another one
        size = data.draw(st.integers(0, len(sent) - 1))
        with pytest.raises(LinkViolation):
            one.decode(sent[:size])
    with pytest.raises(LinkViolation):
        one.decode(sent + b"\0")


@pytest.mark.parametrize("table", TABLES)
@given(sent=st.binary(max_size=200))
def test_whatever_comes_is_a_message_or_a_violation(table, sent):
    try:
        message = TABLES[table].decode(sent)
    except LinkViolation:
        return
    again = TABLES[table].encode(message)
    assert TABLES[table].encode(TABLES[table].decode(again)) == again


@pytest.mark.parametrize(
    ("field", "values"),
    [
        (codec.U8, [-1, 256]),
        (codec.number(8, 3), [4]),
        (codec.word("a", "b"), ["c"]),
        (codec.Text(3), ["äö", "abcd"]),
        (codec.Some(codec.U8, 2, 1), [(), (1, 2, 3)]),
    ],
    ids=lambda part: type(part).__name__,
)
def test_what_does_not_fit_is_not_written(field, values):
    for value in values:
        with pytest.raises((ValueError, struct.error)):
            field.write(value)


def test_a_text_that_may_be_cut_loses_its_end():
    field = codec.Text(3, cut=True)
    assert field.read(codec.Cursor(field.write("abcd"))) == "abc"
    assert field.read(codec.Cursor(field.write("aää"))) == "aä"
    assert field.read(codec.Cursor(field.write("ää"))) == "ä\N{REPLACEMENT CHARACTER}"


class Counted(codec.Text):
    """A text whose values are counted as they are made of bytes."""

    made: ClassVar[list[str]] = []

    def read(self, cursor):
        self.made.append(super().read(cursor))
        return self.made[-1]


@pytest.fixture
def counted():
    """A field whose values are kept, and those that were not kept when they were read."""
    Counted.made.clear()
    return codec.Kept(Counted(0xFFFF)), Counted.made


def test_so_many_values_are_kept_and_then_all_are_forgotten(counted):
    field, made = counted
    texts = [str(index) for index in range(limits.KEPT_VALUES)]
    for text in texts * 2:
        assert field.read(codec.Cursor(codec.Text(9).write(text))) == text
    assert made == texts
    field.write("one more")
    assert field.read(codec.Cursor(field.write("0"))) == "0"
    assert made == texts  # what was written is kept as well
    assert field.read(codec.Cursor(codec.Text(9).write("1"))) == "1"
    assert made == [*texts, "1"]


def test_a_value_of_so_many_bytes_is_kept_and_none_that_is_longer(counted):
    field, made = counted
    for size, times in ((limits.KEPT_BYTES - 2, 1), (limits.KEPT_BYTES - 1, 3)):
        for _ in range(3):
            field.read(codec.Cursor(codec.Text(0xFFFF).write("x" * size)))
        assert len(made) == times
        made.clear()


def test_a_kept_value_is_still_the_one_that_was_asked_for():
    table = link.INBOX_TO_OPENER
    for path in ("/dev/a", "/dev/b", "/dev/a"):
        for number in (1, 2):
            asked = link.Open(number, (Device(path, "ro"),))
            assert table.decode(table.encode(asked)) == asked


@given(data=_bytes_of(findings.FINDINGS), end=st.integers(0, 1000))
def test_findings_are_read_whole_or_not_at_all(data, end):
    """They travel in one message as bytes, which the inbox reads."""
    found = findings.from_bytes(data)
    assert findings.from_bytes(findings.to_bytes(found)) == found
    with pytest.raises(LinkViolation):
        findings.from_bytes(data[: end % len(data)])
    with pytest.raises(LinkViolation):
        findings.from_bytes(data + b"\0")
