"""The AppArmor profile and the SELinux module: the real compilers take them, and they say what the rest of us says.

And each is loaded into a kernel in a virtual machine, with the service under it.
"""

from __future__ import annotations

import errno
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fdbroker.cli.commands import DEFAULT_STATE
from fdbroker.cli.policy import DEFAULT_POLICY
from fdbroker.kernel import namespaces
from fdbroker.launcher import filters, journal, listen

CHECKOUT = Path(__file__).resolve().parents[2]
PROFILE = CHECKOUT / "policy/apparmor/fdbroker"
MODULE = CHECKOUT / "policy/selinux"
UNITS = [CHECKOUT / "units/fdbroker.service", CHECKOUT / "units/fdbroker.service.d/namespaces.conf"]
TMPFILES = (CHECKOUT / "units/tmpfiles.d/fdbroker.conf").read_text()
FOLDERS = re.findall(r"^d (\S+)", TMPFILES, re.MULTILINE)
SOCKET = re.search(r"^ListenStream=(\S+)", (CHECKOUT / "units/fdbroker.socket").read_text(), re.MULTILINE)[1]

# so that each class of rules is compiled, whatever the kernel here has
FEATURES = "/etc/apparmor.d/abi/3.0"
REFPOLICY = "/usr/share/selinux/devel/Makefile"
# of a .pp, the rules as text: Debian and Ubuntu; Fedora
TO_TEXT = ("/usr/libexec/selinux/hll/pp", "/usr/lib/selinux/hll/pp")


def unavailable(reason: str) -> None:
    """As in conftest.py, which a test module cannot import."""
    import os

    if os.environ.get("CI") == "true":
        pytest.fail(f"CI=true, and this machine cannot run it: {reason}", pytrace=False)
    pytest.skip(reason)


def of_units(setting: str) -> set[str]:
    """What the unit and its drop-in give, without the kernel's prefix."""
    found = "\n".join(unit.read_text() for unit in UNITS)
    words = " ".join(re.findall(rf"^{setting}=(.*)$", found, re.MULTILINE)).split()
    return {word.partition("_")[2].lower() for word in words}


def families() -> set[str]:
    """The address families of the seccomp filters, and that of the service's own sockets."""
    narrowed = filters.NARROWED["namespaces"]
    numbers = {*narrowed["socket"][1], *narrowed["socketpair"][1], socket.AF_UNIX}
    return {socket.AddressFamily(number).name.removeprefix("AF_").lower() for number in numbers}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files that scripts/install installs."""
    root = tmp_path_factory.mktemp("root")
    subprocess.run([CHECKOUT / "scripts/install", root], check=True)
    return {f"/{file.relative_to(root)}" for file in root.rglob("*") if not file.is_dir()}


def test_units_and_filters_agree():
    """What is compared below is itself said twice."""
    assert of_units("RestrictAddressFamilies") == families()
    assert SOCKET == listen.DEFAULT_ADDRESS
    assert {DEFAULT_STATE, str(Path(SOCKET).parent), str(Path(DEFAULT_POLICY).parent)} < set(FOLDERS)


# ---- AppArmor


def parse(profile: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Compile it, and load nothing."""
    parser = shutil.which("apparmor_parser", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if parser is None:
        unavailable("no apparmor_parser: install the package apparmor")
    common = ("--skip-kernel-load", "--skip-cache", "--kernel-features", FEATURES)
    return subprocess.run([parser, *common, *words, profile], capture_output=True, text=True, check=False)


def expression(pattern: str) -> str:
    """A regular expression for a path pattern of AppArmor. Source: apparmor.d(5), "Globbing"."""
    found, depth = "", 0
    for token in re.findall(r"\*\*|\*|\?|\[[^]]*\]|\{|\}|,|.", re.sub("//+", "/", pattern)):
        if token == "{":
            depth += 1
            found += "(?:"
        elif token == "}":
            depth -= 1
            found += ")"
        elif token == "," and depth:
            found += "|"
        elif token.startswith("["):
            found += token
        else:
            found += {"**": ".*", "*": "[^/]*", "?": "[^/]"}.get(token) or re.escape(token)
    return found


class Profile:
    """What the compiler understood, without the denials."""

    def __init__(self, text: str) -> None:
        self.text = text
        entries = re.findall(r"^(?:Mode|Perms):\t(\w*):.*\tName:\t\((.*)\)$", text, re.MULTILINE)
        self.entries = [(set(mode), re.compile(expression(pattern))) for mode, pattern in entries]

    def line(self, name: str) -> str:
        return re.search(rf"^{name}:\s*(.*)$", self.text, re.MULTILINE)[1].strip()

    def modes(self, path: str) -> set[str]:
        """What may be done to what is at a path; a folder ends with a slash."""
        return {mode for modes, pattern in self.entries if pattern.fullmatch(path) for mode in modes}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    allowing = tmp_path_factory.mktemp("apparmor") / "fdbroker"
    allowing.write_text(re.sub(r"^ *deny .*\n", "", PROFILE.read_text(), flags=re.MULTILINE))
    done = parse(allowing, "--debug")
    assert done.returncode == 0, done.stderr
    return Profile(done.stdout + done.stderr)


def test_profile_compiles():
    """As one profile, enforced, with the name that the unit has."""
    done = parse(PROFILE)
    assert done.returncode == 0, done.stderr
    (name,) = parse(PROFILE, "--names").stdout.split()
    assert f"\nAppArmorProfile=-{name}\n" in UNITS[0].read_text()
    flags = re.search(rf"^profile {name} flags=\((.*)\) {{$", PROFILE.read_text(), re.MULTILINE)[1]
    assert flags == "attach_disconnected"


@pytest.mark.parametrize(
    "old, new", [("capability setuid,", "capability setuid"), ("setpcap", "setpkap"), ("abi <abi/3.0>", "abi <abi/0>")]
)
def test_a_broken_profile_would_be_noticed(tmp_path, old, new):
    """The compiler that is asked here does look."""
    broken = tmp_path / "fdbroker"
    broken.write_text(PROFILE.read_text().replace(old, new, 1))
    assert parse(broken).returncode != 0


def test_profile_capabilities(profile):
    """Exactly those of the unit and its drop-in."""
    assert set(profile.line("Capabilities").split()) == of_units("CapabilityBoundingSet")


def test_profile_sockets(profile):
    """Exactly the families of the filters; of packets, none but rtnetlink's."""
    lines = re.findall(r"^[Nn]etwork.*", profile.text, re.MULTILINE)
    found = [pair for line in lines for pair in re.findall(r"(\w+) \{ ([\w ]+) \}", line)]
    assert {family for family, _ in found} == families()
    assert {family for family, kinds in found if "raw" in kinds} == {"netlink"}
    assert {kinds for family, kinds in found if family == "netlink"} == {"raw"}


def test_profile_other_processes(profile):
    """It may look at others, and signal itself alone; it mounts nothing, and changes into no profile."""
    rules = re.findall(r"^(\w+) (.*),$", profile.text, re.MULTILINE)
    assert {kind for kind, _ in rules} <= {"ptrace", "signal", "unix", "network"}
    looks = {word for kind, rule in rules if kind == "ptrace" for word in re.findall(r"\((.*)\)", rule)[0].split()}
    assert looks == {"read", "readby", "tracedby"}
    signals = {rule.strip() for kind, rule in rules if kind == "signal"}
    assert signals == {"(receive ) unconfined", "fdbroker", "set=(exists)"}


def test_profile_files(profile, installed):
    """What the service reads, writes and runs is covered, at the places where it is installed."""
    for path in installed:
        if path.startswith(("/opt/", "/usr/bin/", "/etc/fdbroker/")):
            assert "r" in profile.modes(path), path
        if re.search(r"\.so(\.|$)", path):
            assert "m" in profile.modes(path), path
    assert set("rmx") <= profile.modes(str(Path(sys.executable).resolve()))
    for folder in FOLDERS:
        assert "r" in profile.modes(f"{folder}/"), folder
    for path in (DEFAULT_POLICY, "/etc/fdbroker/policy.d/one.yaml", f"{namespaces.FOLDER}/vpn-a"):
        assert profile.modes(path) == {"r"}
    for path in (SOCKET, "/dev/snd/pcmC0D0p", "/dev/null", f"{DEFAULT_STATE}/messages.sqlite-wal"):
        assert set("rw") <= profile.modes(path), path
    assert "k" in profile.modes(f"{DEFAULT_STATE}/messages.sqlite")
    for path in (journal._ADDRESS, "/run/systemd/notify"):
        assert "w" in profile.modes(path), path


def test_profile_has_no_more(profile, installed):
    """Nothing that is installed may be written, secrets not read, and nothing run but the interpreter."""
    assert not [path for path in installed if profile.modes(path) & set("walx")]
    for path in (
        "/etc/shadow",
        "/root/.ssh/id_rsa",
        "/home/alice/file",
        "/proc/kcore",
        "/boot/vmlinuz",
        "/sys/kernel/debug/x",
    ):
        unwanted = profile.modes(path)
        assert not unwanted, (path, unwanted)
    for path in ("/usr/bin/sh", "/bin/dash", "/sbin/ldconfig", "/usr/bin/mount", "/usr/bin/fdbroker", "/usr/bin/env"):
        assert "x" not in profile.modes(path), path
    assert profile.modes("/dev/snd/") == profile.modes("/dev/") == {"r"}
    denied = re.findall(r"^ *deny (.*),$", PROFILE.read_text(), re.MULTILINE)
    assert denied == ["/dev/{shm,mqueue,hugepages}/** mrwklx", "@{HOME}/** mrwklx"]


# ---- AppArmor, in force


def need_parser() -> None:
    if shutil.which("apparmor_parser", path="/usr/sbin:/sbin") is None:
        unavailable("no apparmor_parser: install the package apparmor")


@pytest.fixture(scope="module")
def facts(vm: Callable[..., Any]) -> Any:
    need_parser()
    return vm("apparmor.py", "landlock,apparmor,bpf")


@pytest.fixture(scope="module")
def newer(vm: Callable[..., Any]) -> Any:
    """On a kernel that says AppArmor's labels of Unix sockets, as Linux 6.1 does not."""
    need_parser()
    return vm("apparmor.py labels", "landlock,apparmor,bpf", suite="trixie-backports")


@pytest.mark.lab
def test_loaded(facts):
    """scripts/install loads nothing, nor puts it where it will be; the document's commands do, and it is enforced."""
    found = facts["loaded"]
    assert not found["there"]
    assert "apparmor" in found["modules"]
    assert found["before"] == ""
    assert found["parser"]["code"] == 0, found["parser"]["stderr"]
    assert found["after"] == "fdbroker (enforce)\n"


@pytest.mark.lab
def test_served_under_the_profile(facts):
    """Each process has the profile, a client has not; what a rule allows is granted, and nothing else."""
    found = facts["served"]
    assert found["started"] == 0, found["said"]
    assert set(found["labels"]) == {"launcher", "opener", "keeper", "inbox", "witness"}
    assert set(found["labels"].values()) == {"fdbroker (enforce)"}
    assert found["granted"]["stdout"] == " 00 00 00 00\n", found["granted"]["stderr"]
    assert found["denied"]["code"] == 77
    assert found["client"]["stdout"] == "unconfined\n"


@pytest.mark.lab
@pytest.mark.parametrize("kernel", ["facts", "newer"])
def test_lists_under_the_profile(request, kernel):
    """What may be opened is listed, and again when a node comes, and when a namespace gets a name."""
    found = request.getfixturevalue(kernel)
    before, after = found["listed"]["watched"]
    assert (before, set(after) - set(before)) == (["/dev/lab/zero"], {"/dev/lab/zero-new"})
    before, after = found["namespaces"]["listed"]
    assert {"/dev/lab/zero", "net:vpn-a", "socket:net:vpn-a"} <= set(before)
    assert {"net:vpn-b", "socket:net:vpn-b"} <= set(after) - set(before)


@pytest.mark.lab
def test_messages_under_the_profile(facts):
    """A stored message is kept and received."""
    found = facts["messages"]
    assert found["sent"]["code"] == 0, found["sent"]["stderr"]
    assert "under a profile" in found["received"]["stdout"]


@pytest.mark.lab
def test_reload_under_the_profile(facts):
    """A reload goes, whose client has the profile as well."""
    found = facts["reloaded"]
    assert found["code"] == 0, (found["stderr"], found["said"], found["denials"])
    assert found["same"]
    assert found["after"]["stdout"] == " 00 00 00 00\n", found["after"]["stderr"]


READ = "00000000"


@pytest.mark.lab
def test_a_device_for_a_label(newer):
    """The same user gets it under the profile alone, enforced; what is denied to a label, that one does not get."""
    found = newer["labelled"]
    assert found["started"] == 0, found["said"]
    assert found["got"] == {
        "": ["unconfined", "Denied", READ],
        "lab-player": ["lab-player (enforce)", READ, READ],
        "lab-trial": ["lab-trial (complain)", "Denied", READ],
        "lab-browser": ["lab-browser (enforce)", "Denied", "Denied"],
        # docs/policy.md: a label is not which program it is
        "by itself": ["lab-player (enforce)", READ, READ],
    }
    assert set(found["records"]) == {"unconfined", "lab-player (enforce)", "lab-trial (complain)"}


@pytest.mark.lab
def test_where_the_kernel_says_no_label(facts):
    """Then nothing is allowed to a label, and what is denied to one is denied to all."""
    found = facts["labelled"]
    assert found["started"] == 0, found["said"]
    if any(label for label, *_ in found["got"].values()):  # Ubuntu's kernels say it
        assert found["got"]["lab-player"] == ["lab-player (enforce)", READ, READ]
        assert found["got"][""] == ["unconfined", "Denied", READ]
    else:
        assert found["got"] == {"": ["", "Denied", "Denied"], "lab-player": ["", "Denied", "Denied"]}


@pytest.mark.lab
def test_served_by_a_newer_kernel(newer):
    """The profile holds there too, and refuses nothing that the service does."""
    assert newer["loaded"]["after"] == "fdbroker (enforce)\n"
    found = newer["served"]
    assert set(found["labels"].values()) == {"fdbroker (enforce)"}
    assert found["granted"]["stdout"] == " 00 00 00 00\n", found["granted"]["stderr"]
    found = newer["namespaces"]
    assert (found["asked"]["named"][0], found["asked"]["through"]) == (found["inode"], "through")
    assert isinstance(found["asked"]["new"][0], int), found["asked"]  # else an error's name; Linux 6.1 makes none
    assert newer["nothing_refused"]["denials"] == []


@pytest.mark.lab
def test_namespaces_under_the_profile(facts):
    """With the drop-in: a named one, one of the caller's, a socket in another; nothing of another user's."""
    found = facts["namespaces"]
    assert found["started"] == 0, found["said"]
    assert set(found["labels"].values()) == {"fdbroker (enforce)"}
    assert "namespaces" in found["labels"]
    asked = found["asked"]
    assert asked["named"] == [found["inode"], None]
    assert asked["mine"] == [asked["own"], None], found["said"]
    assert asked["foreign"] == ["Denied", 0]
    assert asked["through"] == "through"


@pytest.mark.lab
def test_nothing_is_refused_that_the_service_does(facts):
    """From its start to its end the kernel has reported no denial."""
    found = facts["nothing_refused"]
    assert found["stopped"]["code"] == 0
    assert (found["result"]["Result"], found["result"]["ExecMainStatus"]) == ("success", "0")
    assert found["denials"] == []


@pytest.mark.lab
def test_what_a_taken_over_process_may_not(facts):
    """Root with all capabilities, but under the profile, can do none of what it can without."""
    found = facts["taken_over"]
    assert set(found["free"].values()) == {0}, found["free"]
    assert found["confined"] == dict.fromkeys(found["free"], errno.EACCES) | {"node": errno.EPERM}
    assert len(found["denials"]) >= len(found["free"])


# ---- SELinux


def build(folder: Path, name: str = "fdbroker") -> subprocess.CompletedProcess[str]:
    """Compile a module as the distribution does: m4, checkmodule, semodule_package."""
    if not Path(REFPOLICY).exists():
        unavailable("no refpolicy: install the package selinux-policy-dev")
    command = ["make", "-f", REFPOLICY, "NAME=default", f"{name}.pp"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def rules(package: Path) -> str:
    """What is in a compiled module, as CIL."""
    program = next(path for path in TO_TEXT if Path(path).exists())
    return subprocess.run([program, package], capture_output=True, text=True, check=True).stdout


def allowed(text: str, source: str) -> dict[tuple[str, str], set[str]]:
    """The permissions of a domain by target and class."""
    found: dict[tuple[str, str], set[str]] = {}
    for target, kind, permissions in re.findall(rf"\(allow {source} (\S+) \((\w+) \(([^)]*)\)\)\)", text):
        found.setdefault((target, kind), set()).update(permissions.split())
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("selinux")
    for file in MODULE.iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def module(sources: Path) -> str:
    done = build(sources)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()
    return rules(sources / "fdbroker.pp")


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("fdbroker.te", "type fdbroker_etc_t;", "type fdbroker_etc_t"),
        ("fdbroker.te", "net_bind_service }", "net_bind_servise }"),
        ("fdbroker.te", "type fdbroker_var_lib_t;", ""),
        ("fdbroker.te", "corecmd_exec_bin(", "corecmd_exec_bim("),
    ],
)
def test_a_broken_module_would_be_noticed(tmp_path, file, old, new):
    """The compiler that is asked here does look."""
    for one in MODULE.iterdir():
        shutil.copy(one, tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    assert build(tmp_path).returncode != 0


def test_module_types(module):
    """Its types, of which none is permissive; systemd starts it in its own domain, with no_new_privs too."""
    types = {"fdbroker_t", "fdbroker_exec_t", "fdbroker_var_run_t", "fdbroker_var_lib_t", "fdbroker_etc_t"}
    assert set(re.findall(r"^\(type (\w+)\)", module, re.MULTILINE)) == types | {"fdbroker_tmpfs_t"}
    assert "typepermissive" not in module
    assert "(typetransition init_t fdbroker_exec_t process fdbroker_t)" in module
    assert "nnp_transition" in allowed(module, "init_t")["fdbroker_t", "process2"]


def test_module_capabilities(module):
    """Exactly those of the unit and its drop-in."""
    found = {key: value for key, value in allowed(module, "fdbroker_t").items() if "cap" in key[1]}
    assert found == {("self", "capability"): of_units("CapabilityBoundingSet")}


def test_module_sockets(module):
    """Of its own it makes exactly sockets of the filters' families."""
    kinds = {"unix": "unix", "tcp": "inet", "udp": "inet", "netlink": "netlink"}
    made = {
        kind.partition("_")[0]
        for (target, kind), permissions in allowed(module, "fdbroker_t").items()
        if kind.endswith("_socket") and "create" in permissions
    }
    # of inet6 SELinux makes no class of its own
    assert {kinds[one] for one in made} == families() - {"inet6"}


def test_module_has_no_more(module):
    """It traces nobody, mounts nothing, makes no memory executable, and reads no raw memory or disk."""
    found = allowed(module, "fdbroker_t")
    for (target, kind), permissions in found.items():
        assert not permissions & {
            "ptrace",
            "mount",
            "remount",
            "unmount",
            "mounton",
            "execmem",
            "execstack",
            "relabelto",
        }, (target, kind)
        if target != "self" and kind == "process":
            assert permissions <= {"getattr", "sigchld", "signull"}, target
    writes = {target for (target, kind), permissions in found.items() if kind == "file" and "write" in permissions}
    # the last one by init_daemon_domain(): what systemd passes
    assert writes == {"fdbroker_tmpfs_t", "fdbroker_var_lib_t", "init_tmpfs_t"}
    watches = {target for (target, kind), permissions in found.items() if "watch" in permissions}
    assert watches == {"device_t", "var_run_t", "ifconfig_runtime_t"}
    assert found["fdbroker_etc_t", "file"].isdisjoint({"write", "append", "create"})
    (nodes,) = (
        target
        for (target, kind), permissions in found.items()
        if kind == "chr_file" and target.startswith("fdbroker_typeattr")
    )
    meant = re.search(rf"\(typeattributeset {nodes} \((.*)\)\)", module)[1]
    assert "device_node" in meant
    for raw in ("memory_device_t", "fixed_disk_device_t", "removable_device_t", "scsi_generic_device_t"):
        assert raw in meant.partition("not")[2]
    assert not [target for (target, kind), permissions in found.items() if kind == "blk_file" and "open" in permissions]


def test_module_file_contexts(module, installed):
    """Each path of the service's own has its type; all others are where the machine's policy has one."""
    contexts = re.findall(r'\(filecon "(\S+)" \w+ \(system_u object_r (\w+) ', module)

    def type_of(path: str) -> str:
        return next((name for pattern, name in contexts if re.fullmatch(pattern, path)), "")

    for folder in FOLDERS:
        top = "/".join(folder.split("/")[:4]).removesuffix("/policy.d").removesuffix("/bridges")
        wanted = {
            "/run/fdbroker": "fdbroker_var_run_t",
            "/var/lib/fdbroker": "fdbroker_var_lib_t",
            "/etc/fdbroker": "fdbroker_etc_t",
        }[top]
        assert type_of(folder) == type_of(f"{folder}/anything") == wanted
    assert type_of(SOCKET) == "fdbroker_var_run_t"
    assert type_of(f"{DEFAULT_STATE}/messages.sqlite") == "fdbroker_var_lib_t"
    assert type_of(DEFAULT_POLICY) == "fdbroker_etc_t"
    assert type_of("/usr/bin/fdbroker") == "fdbroker_exec_t"
    for path in installed:
        if re.search(r"\.so(\.|$)", path):
            assert type_of(path) == "lib_t", path
        # programs and data: bin_t, lib_t, usr_t, systemd's and man pages' types
        assert type_of(path) or path.startswith(("/opt/fdbroker/", "/usr/lib/", "/usr/share/", "/etc/apparmor.d/")), (
            path
        )


def test_module_interface(sources, module):
    """A client's domain may connect and use descriptors; what these lead to is its own policy's business."""
    (sources / "client.te").write_text(
        "policy_module(client, 1.0)\ntype client_t;\ndomain_type(client_t)\nfdbroker_stream_connect(client_t)\n"
    )
    (sources / "client.fc").touch()
    (sources / "client.if").write_text("## <summary>A client.</summary>\n")
    done = build(sources, "client")
    assert done.returncode == 0, done.stdout + done.stderr
    client = rules(sources / "client.pp")
    found = allowed(client, "client_t")
    assert found["fdbroker_t", "unix_stream_socket"] == {"connectto"}
    assert found["fdbroker_t", "fd"] == {"use"}
    assert "write" in found["fdbroker_var_run_t", "sock_file"]
    ours = {kind for target, kind in found if target.startswith("fdbroker_")}
    assert ours == {"unix_stream_socket", "fd", "dir", "sock_file"}
    assert not [target for target, kind in found if kind in ("chr_file", "blk_file")]
    assert allowed(client, "fdbroker_t") == {("client_t", "fd"): {"use"}}


# ---- SELinux, in force


@pytest.fixture(scope="module")
def enforced(sources: Path, module: str, vm: Callable[..., Any], cache: Callable[[str], Path]) -> Any:
    """The module, linked with the distribution's base policy as semodule would, in a kernel."""
    base = cache("sebase")
    shutil.copy(CHECKOUT / "tests/system/inside/lab.te", sources)
    (sources / "lab.fc").touch()
    (sources / "lab.if").write_text("## <summary>The lab.</summary>\n")
    done = build(sources, "lab")
    assert done.returncode == 0, done.stdout + done.stderr
    modules = [base / "base.pp", base / "unconfined.pp", sources / "fdbroker.pp", sources / "lab.pp"]
    linked, policy = sources / "linked.pp", sources / "policy"
    subprocess.run(["semodule_link", "-o", linked, *modules], check=True, capture_output=True)
    # this one also checks what the base policy forbids every module
    subprocess.run(["semodule_expand", linked, policy], check=True, capture_output=True)
    return vm(f"selinux.py {policy}", "landlock,selinux,bpf", "init")


@pytest.mark.lab
def test_served_in_the_domain(enforced):
    """Each process is in it, and what a rule allows is granted, but no node with the label of raw memory."""
    assert enforced["loaded"]["label"] == "system_u:system_r:kernel_t:s0"
    found = enforced["served"]
    assert found["enforced"] == "1"
    assert len(found["labels"]) == 6  # launcher, witness, opener, keeper, inbox, namespaces worker
    assert set(found["labels"]) == {"system_u:system_r:fdbroker_t:s0"}
    assert found["granted"]["stdout"] == "00000000\n", found["granted"]["stderr"]
    assert found["memory"]["code"] == 74
    assert "EACCES" in found["memory"]["stderr"]
    (denial,) = found["denials"]
    assert "memory_device_t" in denial


@pytest.mark.lab
def test_lists_in_the_domain(enforced):
    """What may be opened is listed, and again when a node comes, and when a namespace gets a name, the first one too."""
    found = enforced["listed"]
    before, after = found["node"]
    assert "/dev/lab/zero" in before
    assert set(after) - set(before) == {"/dev/lab/new"}
    for step, name in (("folder", "vpn-a"), ("namespace", "vpn-b")):
        before, after = found[step]
        assert {f"net:{name}", f"socket:net:{name}"} <= set(after) - set(before)
    assert "net:vpn-a" in before


@pytest.mark.lab
def test_a_device_for_a_domain(enforced):
    """The same user gets it in that domain, and not in another; what is denied to the domain is refused there alone."""
    found = enforced["labelled"]
    assert found["unconfined_t"] == ["system_u:system_r:unconfined_t:s0", "Denied", READ]
    assert found["lab_player_t"] == ["system_u:system_r:lab_player_t:s0", READ, "Denied"]


@pytest.mark.lab
def test_namespaces_and_messages_in_the_domain(enforced):
    """A named namespace, one of the caller's, sockets in another, a stored message."""
    found = enforced["more"]
    asked = found["asked"]
    assert asked["named"] == [found["inode"], None]
    assert asked["mine"] == [asked["own"], None]
    assert asked["foreign"] == ["Denied", 0]
    assert asked["through"] == "through"
    assert found["sent"]["code"] == 0, found["sent"]["stderr"]
    assert "in a domain" in found["received"]["stdout"]


@pytest.mark.lab
def test_nothing_else_is_refused_that_the_service_does(enforced):
    """From its start to its end the kernel has reported no other denial."""
    found = enforced["stopped"]
    assert (found["code"], found["socket"]) == (0, False)
    assert found["denials"] == enforced["served"]["denials"]


@pytest.mark.lab
def test_what_a_taken_over_process_may_not_in_the_domain(enforced):
    """Root with all capabilities can do less; that it can run /bin/true is the lab's, where it has no label."""
    found = enforced["taken_over"]
    assert set(found["free"].values()) == {0}, found["free"]
    refused = dict.fromkeys(found["free"], errno.EACCES) | {"node": errno.EPERM}
    assert found["confined"] == refused | {"exec": 0}
