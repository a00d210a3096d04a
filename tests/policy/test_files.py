"""Which files are a policy's, and what each of them must be."""

from __future__ import annotations

import errno
import os

import pytest
from harness import folder, need_root

from fdbroker.errors import PolicyError
from fdbroker.policy import files
from fdbroker.policy.compile import load_policy

GOOD = "version: 1\n"


def found(where, *, trusted=False):
    """What is said of a policy there, or nothing."""
    try:
        load_policy(str(where / "policy.yaml"), trusted=trusted)
    except PolicyError as error:
        return [str(one).replace(str(where), "W") for one in error.findings]
    return []


@pytest.fixture
def place(tmp_path):
    (tmp_path / "policy.yaml").write_text(GOOD)
    (tmp_path / "policy.d").mkdir()
    (tmp_path / "policy.d" / "10-good.yaml").write_text(GOOD)
    return tmp_path


@pytest.mark.parametrize(
    "name", [".x", ".#x.yaml", ".x.yaml.swp", "x.yaml~", "x.dpkg-old", "x.yaml.dpkg-dist", "x.yaml.rpmsave", "x.rpmnew"]
)
def test_what_editors_and_package_managers_leave_is_skipped(place, name):
    (place / "policy.d" / name).write_text("version: [")
    assert found(place) == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("99-deny.yml", "is not read, expected a name that ends in .yaml; rename it to 99-deny.yaml, or remove it"),
        ("99-deny.YAML", "is not read, expected a name that ends in .yaml; rename it to 99-deny.yaml, or remove it"),
        ("99-deny.Yml", "is not read, expected a name that ends in .yaml; rename it to 99-deny.yaml, or remove it"),
        ("README", "is not read, expected a name that ends in .yaml; remove it, or move it elsewhere"),
        ("x.yaml.bak", "is not read, expected a name that ends in .yaml; remove it, or move it elsewhere"),
        ("#x.yaml#", "is not read, expected a name that ends in .yaml; remove it, or move it elsewhere"),
    ],
)
def test_whatever_else_is_there_is_an_error(place, name, said):
    (place / "policy.d" / name).write_text("version: [")
    assert found(place) == [f"W/policy.d/{name}: {said}"]


def test_a_name_that_is_no_text_is_an_error(place):
    """It could not be said to any client: a List ended the service, and grants arrived as something that is no JSON."""
    name = os.fsdecode(b"10-caf\xe9.yaml")
    (place / "policy.d" / name).write_text("version: 1\n")
    assert found(place) == ["W/policy.d/10-caf\\xe9.yaml: has a name that is not UTF-8; rename it"]
    policy = place / os.fsdecode(b"\xe9.yaml")
    policy.write_text("version: 1\n")
    with pytest.raises(PolicyError) as caught:
        load_policy(str(policy), trusted=False)
    assert f"{place}/\\xe9.yaml: has a name that is not UTF-8; rename it" in map(str, caught.value.findings)


def test_a_name_like_a_leftover_that_ends_in_yaml_is_read(place):
    (place / "policy.d" / "x.dpkg-new.yaml").write_text("version: 1\nx: 1\n")
    assert found(place)[0].startswith("W/policy.d/x.dpkg-new.yaml:2:1: unknown key")


def test_folders_and_dangling_symlinks_are_errors_all_at_once(place):
    (place / "policy.d" / "a").mkdir()
    (place / "policy.d" / "b.yaml").mkdir()
    (place / "policy.d" / "c.yaml").symlink_to("nowhere")
    (place / "policy.d" / "d").symlink_to("nowhere")
    said = found(place)
    assert [one.split(": ")[0] for one in said] == [f"W/policy.d/{name}" for name in ("a", "b.yaml", "c.yaml", "d")]
    assert "is a folder" in said[0]
    assert "is a folder" in said[1]
    assert "No such file" in said[2]
    assert "is not read" in said[3]


@pytest.mark.parametrize("kind", ["file", "dangling", "loop"])
def test_a_policy_d_that_is_no_folder_is_an_error(tmp_path, kind):
    (tmp_path / "policy.yaml").write_text(GOOD)
    if kind == "file":
        (tmp_path / "policy.d").write_text(GOOD)
    else:
        (tmp_path / "policy.d").symlink_to("nowhere" if kind == "dangling" else "policy.d")
    (said,) = found(tmp_path)
    assert said.startswith("W/policy.d: cannot be read: ")
    assert said.endswith("expected a folder; make it one, or remove it")


@pytest.mark.parametrize("trusted", [True, False])
def test_a_policy_d_that_root_may_not_list_is_denied_by_landlock(place, monkeypatch, trusted):
    """It has become a symlink to another folder while the service ran."""

    def denied(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(files.os, "listdir", denied)
    (said,) = found(place, trusted=trusted)
    if trusted:
        assert said.startswith(
            "W/policy.d: cannot be read: Permission denied; Landlock denies root this until fdbroker is"
        )
    else:
        assert said.endswith(": cannot be read: Permission denied, expected a folder; make it one, or remove it")


def test_without_policy_d_there_is_one_file(tmp_path):
    (tmp_path / "policy.yaml").write_text(GOOD)
    assert load_policy(str(tmp_path / "policy.yaml"), trusted=False).files == (f"{tmp_path}/policy.yaml",)


# ---- whose a file is, with `trusted`


@pytest.fixture
def roots():
    """A folder that is root's all the way up."""
    need_root()
    with folder() as where:
        (where / "policy.d").mkdir(mode=0o755)
        (where / "policy.yaml").write_text(GOOD)
        (where / "real").mkdir(mode=0o755)
        (where / "real" / "x").write_text("version: 1\nlimits: {burst: 7}\n")
        yield where


def test_a_symlink_is_followed_where_all_on_its_way_is_roots(roots):
    (roots / "policy.d" / "x.yaml").symlink_to("../hop")
    (roots / "hop").symlink_to(roots / "real" / "x")
    assert found(roots, trusted=True) == []
    loaded = load_policy(str(roots / "policy.yaml"), trusted=True)
    assert loaded.policy.limits["burst"] == 7
    assert loaded.files == (f"{roots}/policy.yaml", f"{roots}/policy.d/x.yaml")


@pytest.mark.parametrize(
    "kind",
    [
        "link",
        "hop",
        "target",
        "writable target",
        "folder",
        "writable folder",
        "sticky folder",
        "sticky folder of the link",
        "above",
    ],
)
def test_and_is_an_error_where_something_is_not(roots, kind):
    """The finding says that it is a symlink, and which place is whose."""
    (roots / "policy.d" / "x.yaml").symlink_to("../hop")
    (roots / "hop").symlink_to(roots / "real" / "deep" / "x")
    (roots / "real" / "deep").mkdir(mode=0o755)
    (roots / "real" / "deep" / "x").write_text(GOOD)
    place = {
        "link": roots / "policy.d" / "x.yaml",
        "hop": roots / "hop",
        "folder": roots / "real" / "deep",
        "writable folder": roots / "real" / "deep",
        "sticky folder": roots / "real" / "deep",
        "sticky folder of the link": roots / "policy.d",
        "above": roots / "real",
    }.get(kind, roots / "real" / "deep" / "x")
    if "sticky" in kind:
        place.chmod(0o1777)
        trouble = "must not be writable by group or others, has mode 1777"
    elif "writable" in kind:
        place.chmod(0o777)
        trouble = "must not be writable by group or others, has mode 0777"
    else:
        os.chown(place, 50001, 50001, follow_symlinks=False)
        trouble = "must belong to root, belongs to uid 50001"
    said = found(roots, trusted=True)
    assert said
    assert all(one.startswith("W/policy.d/x.yaml: is a symlink") for one in said)
    where = "the link itself" if kind == "link" else str(place).replace(str(roots), "W")
    assert any(f"{where} {trouble}" in one for one in said)
    assert found(roots, trusted=False) == []
    warned = files.distrusted([f"{roots}/policy.d/x.yaml"])
    assert [str(one).replace(str(roots), "W") for one in warned] == said


def test_what_somebody_else_may_put_there_is_not_even_opened(roots):
    """A FIFO or a device in the file's place is found by looking at it."""
    os.mkfifo(roots / "policy.d" / "x.yaml")
    assert found(roots, trusted=True) == ["W/policy.d/x.yaml: is not a regular file"]
    os.unlink(roots / "policy.d" / "x.yaml")
    (roots / "policy.d" / "x.yaml").symlink_to("/dev/null")
    assert found(roots, trusted=True) == ["W/policy.d/x.yaml: is not a regular file"]


def test_symlinks_in_a_circle_end(roots):
    (roots / "policy.d" / "x.yaml").symlink_to("x.yaml")
    (said,) = found(roots, trusted=True)
    assert said.startswith("W/policy.d/x.yaml: cannot be read: Too many levels of symbolic links")


def test_a_policy_d_that_is_a_symlink_is_followed_likewise(roots):
    (roots / "policy.d").rmdir()
    (roots / "policy.d").symlink_to("real")
    (roots / "real" / "x").rename(roots / "real" / "x.yaml")
    assert found(roots, trusted=True) == []
    os.chown(roots / "policy.d", 50001, 50001, follow_symlinks=False)
    assert found(roots, trusted=True) == [
        "W/policy.d/x.yaml: W/policy.d must belong to root, belongs to uid 50001; it is a symlink on the way"
    ]


def test_a_file_or_symlink_behind_such_a_policy_d_is_named_as_what_it_is(roots):
    (roots / "policy.d").rmdir()
    (roots / "policy.d").symlink_to("real")
    (roots / "real" / "x").rename(roots / "real" / "x.yaml")
    os.chown(roots / "real" / "x.yaml", 50001, 50001)
    assert found(roots, trusted=True) == [
        "W/policy.d/x.yaml: must belong to root, belongs to uid 50001; "
        "chown root:root W/policy.d/x.yaml && chmod 0644 W/policy.d/x.yaml"
    ]
    (roots / "real" / "x.yaml").rename(roots / "other")
    (roots / "real" / "x.yaml").symlink_to("../other")
    assert found(roots, trusted=True) == [
        "W/policy.d/x.yaml: is a symlink, and W/other must belong to root, belongs to uid 50001; put the file itself there"
    ]


# ---- lines


@pytest.mark.parametrize(
    ("character", "said"),
    [
        ("\x1e", "the character U+001E"),
        ("\x0c", "the character U+000C"),
        ("\x0b", "the character U+000B"),
        ("\x1c", "the character U+001C"),
        ("\x00", "the character U+0000"),
        ("\x1b", "the character U+001B"),
        ("\x7f", "the character U+007F"),
        ("\x85", "the character U+0085"),
        ("\u2028", "the character U+2028"),
        ("\u2029", "the character U+2029"),
        ("\ufffe", "the character U+FFFE"),
        ("\r", "the character U+000D"),
        ("\t", "a tab, expected spaces"),
    ],
)
def test_a_character_that_no_policy_has_is_named_on_the_line_that_the_file_has(tmp_path, character, said):
    """Lines are those of editors and of grep: each ends with a line feed, and nothing else does."""
    (tmp_path / "policy.yaml").write_bytes(f"version: 1\n# a{character}b{character}\nx:{character} 1\n".encode())
    first, second, *more = found(tmp_path)
    assert first.startswith(f"W/policy.yaml:2:4: {said}")
    assert second.startswith(f"W/policy.yaml:3:3: {said}")
    assert not more


def test_a_tab_after_such_characters_has_its_own_line(tmp_path):
    (tmp_path / "policy.yaml").write_bytes(b"version: 1\n# \x1e\x0c\x0b\n\tx: 1\n")
    assert [one.split(": ")[0] for one in found(tmp_path)] == ["W/policy.yaml:2:3", "W/policy.yaml:3:1"]


def test_lines_that_end_as_on_other_systems_are_fine(tmp_path):
    (tmp_path / "policy.yaml").write_bytes(b"\xef\xbb\xbfversion: 1\r\nlimits: {burst: 0}\r\n")
    assert [one.split(": ")[0] for one in found(tmp_path)] == ["W/policy.yaml:2:17"]
