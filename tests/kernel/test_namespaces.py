"""A name is one of the folder's, whatever a taken-over opener makes of it."""

from __future__ import annotations

import pytest

from fdbroker.kernel import namespaces


@pytest.mark.parametrize("name", ["../netns/x", "/proc/self/ns/net", "x/y"])
def test_a_path_is_no_name(name):
    with pytest.raises(namespaces.NotANamespace, match="it is no name"):
        namespaces.open_named(name)
