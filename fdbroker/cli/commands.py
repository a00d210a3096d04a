"""The commands that talk to the broker, and how errors become exit codes.

Runs in: the launcher (`serve`), the programs of users (`open`, `list`, `ping`).
"""

from __future__ import annotations

import base64
import io
import os
import shlex
import sys
from typing import TYPE_CHECKING

import click

from fdbroker import __version__, connect, errors
from fdbroker.cli import bridge, handover, policy, show
from fdbroker.cli.words import Group
from fdbroker.errors import Denied, FdbrokerError, PolicyError
from fdbroker.limits import inbox as limits
from fdbroker.terms import ACCESS_NAMES, Device, Resource
from fdbroker.typed import join_access, parse, split_access, typed
from fdbroker.wire.journal import escaped

DEFAULT_STATE = "/var/lib/fdbroker"
_RELOAD_S = 80.0  # systemd gives a reload 90 seconds
if TYPE_CHECKING:
    from fdbroker.client.calls import Message


def run() -> int:
    """Run one command; returns the exit code, which is one of sysexits.h's."""
    _replace_closed()
    for stream in (sys.stdout, sys.stderr):  # the locale's character set may lack what a message has
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
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


def _replace_closed() -> None:
    """Where a standard stream is closed, reading or writing it fails as it would, and no file gets its number."""
    names = (("stdin", os.O_WRONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w"))
    for name, flags, mode in names:
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode))


def escaped_lines(text: str) -> str:
    """A message of several lines, each escaped."""
    return "\n".join(map(escaped, text.split("\n")))


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
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
    from fdbroker.launcher import listen, needs, service  # noqa: PLC0415 -- users' commands need none of it

    try:
        bits = int(mode, 8)
    except ValueError:
        bits = -1
    if not 0 <= bits <= 0o777 or not mode.isdecimal():
        raise click.BadParameter("is an octal number such as 0660", param_hint="--mode")
    if check:
        _, need = needs.checked_policy(policy_file)
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
    elif group is None and not handover.count_passed(os.environ):
        service.say(f"there is no group {listen.DEFAULT_GROUP}: the socket is root's; see --group", priority=4)
    path = address or os.environ.get("FDBROKER_SOCKET") or listen.DEFAULT_ADDRESS
    folder = os.path.abspath(state or os.environ.get("STATE_DIRECTORY") or DEFAULT_STATE)
    raise click.exceptions.Exit(service.serve(service.Options(policy_file, path, bits, group, folder)))


@app.command("open")
@click.argument(
    "words", nargs=-1, required=True, metavar="RESOURCE[:ACCESS]... [-- COMMAND ...]", type=click.UNPROCESSED
)
@click.option(
    "--access",
    type=click.Choice(ACCESS_NAMES),
    default="ro",
    show_default=True,
    help="What to ask for where no :ACCESS says it.",
)
@click.option("--close", is_flag=True, help="Close what COMMAND would inherit beside that and descriptors 0, 1 and 2.")
@_as_json
@_socket
def open_(words: tuple[str, ...], access: str, close: bool, json_: bool, address: str | None) -> None:
    """Ask for resources, all or nothing.

    RESOURCE is a path below /dev; net:NAME, a network namespace by name; TYPE:pid:PID, a namespace of one of your
    processes; TYPE:new, a new one, owned by your user namespace; or socket:net:NAME[,inet6][,dgram][,bind=PORT], a
    new socket in that network namespace. TYPE is net, mnt, pid, user, uts, ipc, cgroup or time. In a path, two
    backslashes are one, as `list` prints them.

    A path may have its access behind it: /dev/uinput:rw. A path that itself ends with :ro, :wo or :rw must.

    With COMMAND, run it in this program's place with the descriptors from 3 on, in the order asked for, blocking,
    LISTEN_FDS saying how many and LISTEN_FDNAMES their names. They come behind those that LISTEN_FDS passes to this
    program, and nothing that it inherited is closed. The connection to the broker stays open in COMMAND, at a
    number that LISTEN_FDS does not count. Without, say what was granted, and close it.
    """
    texts, command = _split(words)
    asked = [split_access(typed(text), access) for text in texts]
    resources = []
    for text, wanted in asked:
        try:
            resource = parse(text, wanted)
            if isinstance(resource, Device) and not text.startswith("/dev/"):
                raise ValueError("a device's path begins with /dev/")
        except ValueError as error:
            raise click.BadParameter(f"{escaped(text)}: {error}", param_hint="RESOURCE") from None
        resources.append(resource)
    if close and not command:
        raise click.UsageError("--close is for a COMMAND")
    place = handover.find_place(len(resources), os.environ, close=close) if command else None
    with connect(address) as client:
        try:
            owned = client.open_all(asked)
        except Denied as denial:
            again = " ".join(_quoted(join_access(*one, "ro")) for one in asked)
            show.error(escaped(str(denial)))
            show.error(f"what would allow it: fdbroker policy explain {again}")
            raise click.exceptions.Exit(denial.exit_code) from None
        except (ValueError, UnicodeError) as error:
            raise click.UsageError(str(error)) from None
        for one in owned:
            if one.usable is False:
                show.error(escaped(f"{one.resource}: usable: false: {one.why}"))
        if place is not None:
            numbers, names = [one.detach() for one in owned], [resource.text for resource in resources]
            handover.become(command, numbers, names, client.detach(), place, close=close)
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
    return shlex.quote(escaped(word))


@app.command("list")
@click.option("--more", is_flag=True, help="Go on: the whole list again after every change.")
@_as_json
@_socket
def list_(more: bool, json_: bool, address: str | None) -> None:
    """What you may open now, with the most access."""
    with connect(address) as client:
        for offers in client.watch() if more else [client.offers()]:
            rows = [(_word(offer.resource), offer.resource.access, offer.where, offer.generation) for offer in offers]
            if json_:
                show.as_json(
                    [dict(zip(("resource", "access", "rule", "generation"), row, strict=True)) for row in rows]
                )
            else:
                show.table(("RESOURCE", "ACCESS", "RULE"), [row[:3] for row in rows])
                if more:
                    show.line("")


def _word(resource: Resource) -> str:
    """A resource as `open` takes it: a path that ends like an access has its access behind it."""
    return join_access(resource.text, resource.access, resource.access)


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
    """Print the messages of these topics as they come, without end; a broker that is restarted is found again.

    A line is the topic, the sender's uid and pid, and the message; --json has all there is.
    """
    with connect(address) as client:
        try:
            for message in client.subscribe(topics, after=after):
                if message.lost:
                    show.error(f"{message.lost} messages were lost: this subscriber is too slow")
                with message:
                    _show_messages([message], json_=json_)
        except (ValueError, UnicodeError) as error:
            raise click.UsageError(str(error)) from None


@app.command()
@click.option("--keep", is_flag=True, help="Leave them: they come again the next time.")
@_as_json
@_socket
def receive(keep: bool, json_: bool, address: str | None) -> None:
    """Print the messages that are stored for you, and, once they are printed, have them removed.

    A line is the topic, the sender's uid and pid, and the message; --json has all there is.
    """
    with connect(address) as client:
        if keep:
            kept = client.receive(limits.RECEIVED_MESSAGES)
            _show_messages(kept, json_=json_)
            if kept:
                show.error("these stay; if there are more, they come once these are removed, by receive without --keep")
            return
        messages = client.receive()
        while messages:
            _show_messages(messages, json_=json_)
            messages = client.receive(acknowledge=[message.number for message in messages])


def _show_messages(messages: list[Message], *, json_: bool) -> None:
    rows = []
    for message in messages:
        data = message.read()
        rows.append((message.topic, str(message.uid), str(message.pid), show.shown(data)))
        if json_:
            try:  # NUL in JSON takes six characters
                payload, encoding = ("", "base64") if b"\0" in data else (data.decode(), "text")
            except UnicodeDecodeError:
                payload, encoding = "", "base64"
            payload = base64.b64encode(data).decode() if encoding == "base64" else payload
            said = message._asdict()
            del said["file"]
            changed = {"time": said.pop("time_us"), "payload": payload, "encoding": encoding}
            show.as_json({**said, **changed, "descriptors": len(message.descriptors)})
    if rows and not json_:
        show.table(("TOPIC", "UID", "PID", "MESSAGE"), rows)


@app.command()
@_socket
def reload(address: str | None) -> None:
    """Have the policy loaded again, and wait until the new one is in force. For administrators.

    Exits with 78 and says what is wrong when the files cannot be used; the policy before stays in force.
    """
    # loading reads the databases of users, which may be on the network
    with connect(address, timeout_s=_RELOAD_S) as client:
        try:
            client.reload()
        except PolicyError:
            show.error(errors.NOT_RELOADED)
            raise  # `run` says what is wrong
        about = client.about()
    show.line(f"the policy is in force, the number {about.generation} since the service started", "green")


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
