"""Which namespaces still are, for a user that names its mounts as it likes."""

from __future__ import annotations

import os

import harness

from fdbroker.namespaces import living


def test_a_mount_whose_path_has_ends_of_lines_in_it_is_one_mount(root):
    name = "a\rb\rc\x0bd\x85e"
    with harness.folder() as where:
        (where / name).mkdir()
        (where / "namespace").touch()
        harness.mount("x", str(where / name), "tmpfs")
        harness.mount("/proc/self/ns/net", str(where / "namespace"), "none", harness.MS_BIND)
        try:
            assert set(living._mounted(str(os.getpid()))) >= {os.stat("/proc/self/ns/net").st_ino}
        finally:
            harness.unmount(str(where / "namespace"))
            harness.unmount(str(where / name))
