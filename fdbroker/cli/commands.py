"""The commands that talk to the broker, and how errors become exit codes.

Runs in: the launcher (`serve`), the programs of users (`open`, `list`, `ping`).
"""

from __future__ import annotations

import base64
import os
import sys
from typing import TYPE_CHECKING

import click

from fdbroker import __version__, connect, errors, limits
from fdbroker.cli import bridge, policy, show
from fdbroker.errors import Denied, FdbrokerError
from fdbroker.terms import ACCESS_NAMES, Device, parse
from fdbroker.wire.journal import escaped

DEFAULT_STATE = "/var/lib/fdbroker"
if TYPE_CHECKING:
    from fdbroker.client.calls import Message

_LISTEN_FDS_START = 3  # sd_listen_fds(3)


def run() -> int:
    """Run one command; returns the exit code, which is one of sysexits.h's."""
    try:
        code = app.main(prog_name="fdbroker", standalone_mode=False)
        sys.stdout.flush()  # here, where a full disk is an error of ours to tell
    except click.Abort:
        return errors.EX_TEMPFAIL
    except click.ClickException as error:
        error.show()
        return errors.EX_USAGE
    except FdbrokerError as error:
        show.error(escaped_lines(str(error)))
        return error.exit_code
    except OSError as error:
        # standard output is full or gone; what is left in its buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return errors.EX_OK
        show.error(str(error))
        return errors.EX_OSERR
    except SystemExit:  # click's answer to a broken pipe
        return errors.EX_OK
    return code if isinstance(code, int) else errors.EX_OK


def escaped_lines(text: str) -> str:
    """A message of several lines, each escaped."""
    return "\n".join(map(escaped, text.split("\n")))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fdbroker")
def app() -> None:
    """Hands open descriptors to programs that may not open the thing itself, as a policy allows."""


app.add_command(policy.group)
app.add_command(bridge.group)

_socket = click.option(
    "--socket", "address", metavar="PATH", help="Default: $FDBROKER_SOCKET, else /run/fdbroker/socket."
)
_as_json = click.option("--json", "json_", is_flag=True, help="Print JSON.")


@app.command()
@click.option("--policy", "policy_file", default=policy.DEFAULT_POLICY, show_default=True, help="The policy file.")
@click.option("--socket", "address", metavar="PATH", help="Where to listen, unless systemd passes a socket.")
@click.option("--mode", default="0660", show_default=True, help="The mode of the socket, octal.")
@click.option("--group", help="The group of the socket, a name or a number. Default: fdbroker, if there is one.")
@click.option(
    "--state", metavar="DIR", help="Where messages are stored. Default: $STATE_DIRECTORY, else /var/lib/fdbroker."
)
@click.option("--check", is_flag=True, help="Check the policy, say what the service needs for it, and end.")
def serve(policy_file: str, address: str | None, mode: str, group: str | None, state: str | None, check: bool) -> None:
    """Run the broker, as root."""
    from fdbroker.launcher import listen, service  # noqa: PLC0415 -- users' commands need none of it

    try:
        bits = int(mode, 8)
    except ValueError:
        bits = -1
    if not 0 <= bits <= 0o777 or not mode.isdecimal():
        raise click.BadParameter("is an octal number such as 0660", param_hint="--mode")
    if check:
        _, need = service.checked_policy(policy_file)
        show.line(f"{policy_file} is valid; the service needs:", "green")
        for reason in need.reasons or ("no capability and no group",):
            show.line(f"  {reason}")
        for warning in need.warnings:
            show.error(f"warning: {warning}")
        return
    if os.geteuid() != 0:
        raise click.UsageError("the broker is started as root; its processes then give that up")
    if group is None and listen.group_exists(listen.DEFAULT_GROUP):
        group = listen.DEFAULT_GROUP
    elif group is None and "LISTEN_FDS" not in os.environ:
        service.say(f"there is no group {listen.DEFAULT_GROUP}: the socket is root's; see --group", priority=4)
    path = address or os.environ.get("FDBROKER_SOCKET") or listen.DEFAULT_ADDRESS
    folder = os.path.abspath(state or os.environ.get("STATE_DIRECTORY") or DEFAULT_STATE)
    raise click.exceptions.Exit(service.serve(service.Options(policy_file, path, bits, group, folder)))


@app.command("open")
@click.argument("words", nargs=-1, required=True, metavar="RESOURCE... [-- COMMAND ...]", type=click.UNPROCESSED)
@click.option("--access", type=click.Choice(ACCESS_NAMES), default="ro", show_default=True, help="What to ask for.")
@_as_json
@_socket
def open_(words: tuple[str, ...], access: str, json_: bool, address: str | None) -> None:
    """Ask for resources, all or nothing.

    RESOURCE is a path below /dev; net:NAME, a network namespace by name; TYPE:pid:PID, a namespace of one of your
    processes; TYPE:new, a new one, owned by your user namespace; or socket:net:NAME[,inet6][,dgram][,bind=PORT], a
    new socket in that network namespace. TYPE is net, mnt, pid, user, uts, ipc, cgroup or time.

    With COMMAND, run it in this program's place with the descriptors from 3 on, in the order asked for, blocking,
    LISTEN_FDS saying how many and LISTEN_FDNAMES their names. Without, say what was granted, and close it.
    """
    resources, command = _split(words)
    for resource in resources:
        try:
            if isinstance(parse(resource, access), Device) and not resource.startswith("/dev/"):
                raise ValueError("a device's path begins with /dev/")
        except ValueError as error:
            raise click.BadParameter(f"{escaped(resource)}: {error}", param_hint="RESOURCE") from None
    with connect(address) as client:
        try:
            owned = client.open_all(resources, access)
        except Denied as denial:
            asked = " ".join(map(_quoted, resources))
            show.error(escaped(str(denial)))
            how = f"--access {access} " if any(word.startswith("/") for word in resources) else ""
            show.error(f"what would allow it: fdbroker policy explain {how}{asked}")
            raise click.exceptions.Exit(denial.exit_code) from None
        except (ValueError, UnicodeError) as error:
            raise click.UsageError(str(error)) from None
    for one in owned:
        if one.usable is False:
            show.error(escaped(f"{one.resource}: usable: false: {one.why}"))
    if command:
        _become(command, [descriptor.detach() for descriptor in owned], resources)
    granted = [{"resource": one.resource, "access": one.access, "rdev": one.rdev, "rule": one.rule} for one in owned]
    if json_:
        said = [{} if one.usable is None else {"usable": one.usable, "why": one.why} for one in owned]
        show.as_json([{**left, **right} for left, right in zip(granted, said, strict=True)])
    else:
        show.table(("RESOURCE", "ACCESS", "NUMBER", "RULE"), [tuple(one.values()) for one in granted])
    for descriptor in owned:
        descriptor.close()


def _split(words: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Click takes the `--` away, so where it stood is read from the command line itself."""
    count = len(words)
    if "--" in sys.argv:
        count -= len(sys.argv) - sys.argv.index("--") - 1
    if count <= 0:
        raise click.UsageError("no resource before --")
    return list(words[:count]), list(words[count:])


def _quoted(word: str) -> str:
    return escaped(word) if word.isprintable() and " " not in word else repr(word)


def _become(command: list[str], numbers: list[int], names: list[str]) -> None:
    """Run `command` instead of this program with exactly these descriptors, from 3 on; never returns."""
    waiting = list(numbers)
    for offset, target in enumerate(range(_LISTEN_FDS_START, _LISTEN_FDS_START + len(numbers))):
        if target in waiting[offset + 1 :]:  # one that comes later stands there: out of the way
            waiting[waiting.index(target, offset + 1)] = os.dup(target)
        if waiting[offset] == target:
            os.set_inheritable(target, True)
        else:
            os.dup2(waiting[offset], target, inheritable=True)
            os.close(waiting[offset])
        os.set_blocking(target, True)
    # our own, and whatever was left open in us by accident
    os.closerange(_LISTEN_FDS_START + len(numbers), os.sysconf("SC_OPEN_MAX"))
    environment = dict(os.environ)
    environment["LISTEN_FDS"] = str(len(numbers))
    environment["LISTEN_PID"] = str(os.getpid())
    environment["LISTEN_FDNAMES"] = ":".join(name.replace(":", "_") for name in names)
    try:
        os.execvpe(command[0], command, environment)  # noqa: S606 -- running it is what the user asked for
    except OSError as error:
        show.error(f"{escaped(command[0])}: {error.strerror}")
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


@app.command("list")
@click.option("--more", is_flag=True, help="Go on: the whole list again after every change.")
@_as_json
@_socket
def list_(more: bool, json_: bool, address: str | None) -> None:
    """What you may open now, with the most access."""
    with connect(address) as client:
        for offers in client.watch() if more else [client.offers()]:
            rows = [
                {"resource": offer.resource.text, "access": offer.resource.access, "rule": offer.where}
                for offer in offers
            ]
            if json_:
                show.as_json(rows)
            else:
                show.table(("RESOURCE", "ACCESS", "RULE"), [tuple(row.values()) for row in rows])
                if more:
                    show.line("")


@app.command()
@click.argument("topic")
@click.argument("payload", required=False)
@click.option("--to", metavar="USER", help="The one user whom it is for, a name or a number. Default: all.")
@_socket
def send(topic: str, payload: str | None, to: str | None, address: str | None) -> None:
    """Send a message to TOPIC: PAYLOAD, or what standard input has, to its end."""
    data = sys.stdin.buffer.read() if payload is None else payload.encode(errors="surrogateescape")
    with connect(address) as client:
        try:
            client.send(topic, data, to=to)
        except (ValueError, UnicodeError) as error:
            raise click.UsageError(str(error)) from None


@app.command()
@click.argument("topics", nargs=-1, required=True, metavar="TOPIC...")
@click.option("--after", type=click.IntRange(0), help="First those above this number that are stored for you.")
@_as_json
@_socket
def subscribe(topics: tuple[str, ...], after: int | None, json_: bool, address: str | None) -> None:
    """Print the messages of these topics as they come, without end; a broker that is restarted is found again."""
    with connect(address) as client:
        for message in client.subscribe(topics, after=after):
            if message.lost:
                show.error(f"{message.lost} messages were lost: this subscriber is too slow")
            with message:
                _show_messages([message], json_=json_)


@app.command()
@click.option("--keep", is_flag=True, help="Leave them: they come again the next time.")
@_as_json
@_socket
def receive(keep: bool, json_: bool, address: str | None) -> None:
    """Print the messages that are stored for you, and, once they are printed, have them removed."""
    with connect(address) as client:
        if keep:
            _show_messages(client.receive(limits.RECEIVED_MESSAGES), json_=json_)
            return
        messages = client.receive()
        while messages:
            _show_messages(messages, json_=json_)
            messages = client.receive(acknowledge=[message.number for message in messages])


def _show_messages(messages: list[Message], *, json_: bool) -> None:
    rows = []
    for message in messages:
        data = message.read()
        try:
            payload, encoding = data.decode(), "text"
        except UnicodeDecodeError:
            payload, encoding = base64.b64encode(data).decode(), "base64"
        rows.append((message.topic, str(message.uid), str(message.pid), payload))
        if json_:
            said = message._asdict()
            del said["file"]
            changed = {"time": said.pop("time_us"), "payload": payload, "encoding": encoding}
            show.as_json({**said, **changed, "descriptors": len(message.descriptors)})
    if rows and not json_:
        show.table(("TOPIC", "UID", "PID", "MESSAGE"), rows)


@app.command()
@_as_json
@_socket
def ping(json_: bool, address: str | None) -> None:
    """Whether the broker answers, and how fast."""
    from fdbroker.client.sync import ping as send_ping  # noqa: PLC0415 -- `policy` and `serve` need no client

    seconds = send_ping(address)
    if json_:
        show.as_json({"seconds": seconds})
    else:
        show.line(f"PONG after {seconds * 1000:.2f} ms", "green")
