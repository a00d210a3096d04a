/* The client of scripts/bench, in C, so that its own part of a round trip is small, and the same for every broker.
 *
 *     client rounds CPU ROUNDS COUNT WHAT@SOCKET ...
 *         pinned to CPU, in each round COUNT requests to every target in turn, each round beginning with another one;
 *         prints one line a round: the median round trip of each target in nanoseconds. WHAT is
 *             open         one descriptor of /dev/null, on a connection that stays
 *             batch        sixteen of them in one request
 *             mixed        sixteen different nodes in one request: the first of those in /dev/bench
 *             first        one descriptor of a node in /dev/bench, each time another one
 *             first-batch  sixteen of one such node in one request
 *             first-mixed  sixteen such nodes in one request
 *             ping         PING, answered by PONG
 *             list         List, answered in one message
 *             connect      a new connection and one descriptor of /dev/null over it; its end is not counted
 *             seat         seatd's protocol: a device is opened, then closed, which seatd wants before it opens it again
 *         The nodes of /dev/bench are asked for in order, and again from the first after the last one. bench.d/nodes.py
 *         makes them, and compiles this with -DNODES=, how many there are.
 *     client hold COUNT SOCKET
 *         makes COUNT connections, says "ready" when the last one is answered, and keeps them until its input ends
 */
#define _GNU_SOURCE
#include <err.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 16, TARGETS = 8, REQUEST_BYTES = 4096, REPLY_BYTES = 65536, REST_NS = 100000 };

static const char list[] = "{\"method\":\"io.fdbroker.Broker.List\"}"; /* the NUL at its end is the message's */
static const char *const kinds[] = {"null", "zero", "full", "random", "urandom"}; /* of the nodes in /dev/bench, in turns */
enum { KINDS = sizeof kinds / sizeof *kinds };
static const char ping[] = {0, 0, 0, 4, 'P', 'I', 'N', 'G'};
static const char pong[] = {0, 0, 0, 4, 'P', 'O', 'N', 'G'};

/* seatd 0.7: two numbers of 16 bits, what it is and how many bytes follow; include/protocol.h */
enum { SEAT_OPEN = 1, DEVICE_OPEN = 3, DEVICE_CLOSE = 4, SEAT_ANSWER = 1 << 15, SEAT_ENABLED = 6 };
static const char seat_device[] = "/dev/input/event0"; /* bench makes it a /dev/null; seatd judges by the name */

/* What each request is. */
static const struct what {
    const char *name;
    int descriptors; /* that the reply brings */
    int first;       /* each time other nodes */
    int different;   /* nodes in one request, else they are the same */
    enum { MESSAGE, PONG, SEAT } answer;
    int fresh; /* a connection for each request */
} whats[] = {
    {.name = "open", .descriptors = 1},
    {.name = "batch", .descriptors = BATCH},
    {.name = "mixed", .descriptors = BATCH, .different = 1},
    {.name = "first", .descriptors = 1, .first = 1},
    {.name = "first-batch", .descriptors = BATCH, .first = 1},
    {.name = "first-mixed", .descriptors = BATCH, .first = 1, .different = 1},
    {.name = "ping", .answer = PONG},
    {.name = "list"},
    {.name = "connect", .descriptors = 1, .fresh = 1},
    {.name = "seat", .answer = SEAT},
};

struct target {
    const struct what *what;
    const char *socket;
    char request[REQUEST_BYTES];
    size_t size;
    int next; /* node */
    int connection;
};

static int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (strlen(path) >= sizeof address.sun_path)
        errx(1, "%s: too long for a socket", path);
    strcpy(address.sun_path, path);
    if (connection < 0 || connect(connection, (struct sockaddr *)&address, sizeof address))
        err(1, "connect %s", path);
    return connection;
}

/* Write the next request. */
static void compose(struct target *target)
{
    const struct what *what = target->what;
    char *at = target->request, *end = at + sizeof target->request;

    if (what->answer == PONG) {
        memcpy(at, ping, target->size = sizeof ping);
        return;
    }
    if (!what->descriptors) {
        memcpy(at, list, target->size = sizeof list);
        return;
    }
    at += snprintf(at, end - at, "{\"method\":\"io.fdbroker.Broker.Open\",\"parameters\":{\"resources\":[");
    for (int index = 0; index < what->descriptors; index++) {
        at += snprintf(at, end - at, "%s{\"device\":\"/dev/", index ? "," : "");
        if (what->first || what->different)
            at += snprintf(at, end - at, "bench/%s-%05d", kinds[target->next % KINDS], target->next);
        else
            at += snprintf(at, end - at, "null");
        at += snprintf(at, end - at, "\",\"access\":\"rw\"}");
        if (what->different)
            target->next = (target->next + 1) % NODES;
    }
    at += snprintf(at, end - at, "]}}") + 1;
    if (at > end)
        errx(1, "a request of more than %d bytes", REQUEST_BYTES);
    target->size = at - target->request;
    if (!what->first)
        target->next = 0;
    else if (!what->different)
        target->next = (target->next + 1) % NODES;
}

/* One reply, with exactly the descriptors that belong to it, which are closed. */
static void receive(int connection, const struct what *what)
{
    static char reply[REPLY_BYTES];
    union {
        char bytes[CMSG_SPACE(BATCH * sizeof(int))];
        struct cmsghdr aligned;
    } control;
    size_t received = 0;
    int owned = 0;

    do {
        struct iovec rest;

        if (received == sizeof reply)
            received = 0; /* a long List; only its end is looked at */
        rest = (struct iovec){reply + received, sizeof reply - received};
        struct msghdr message = {
            .msg_iov = &rest, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
        ssize_t size = recvmsg(connection, &message, MSG_CMSG_CLOEXEC);

        if (size <= 0)
            err(1, "the broker hung up");
        received += size;
        for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header)) {
            int numbers[BATCH];
            int count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);

            memcpy(numbers, CMSG_DATA(header), count * sizeof(int));
            for (int index = 0; index < count; index++)
                close(numbers[index]);
            owned += count;
        }
    } while (what->answer == PONG ? received < sizeof pong : reply[received - 1] != 0);
    if (owned != what->descriptors || (what->answer == PONG && memcmp(reply, pong, sizeof pong)) ||
        (what->answer == MESSAGE && strstr(reply, "{\"error\"") == reply))
        errx(1, "%d descriptors instead of %d: %.*s", owned, what->descriptors, (int)received, reply);
}

static void ask(int connection, const struct target *target)
{
    if (send(connection, target->request, target->size, MSG_NOSIGNAL) != (ssize_t)target->size)
        err(1, "send");
    receive(connection, target->what);
}

static void receive_all(int connection, void *data, size_t size)
{
    if (size && recv(connection, data, size, MSG_WAITALL) != (ssize_t)size)
        err(1, "seatd hung up");
}

/* One answer of seatd, at most one number in it, and with it a descriptor, which is closed, or -1. */
static uint16_t seat_receive(int connection, int32_t *number, int *descriptors)
{
    uint16_t header[2];
    char rest[256];
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr aligned;
    } control;
    struct iovec both[] = {{header, sizeof header}, {rest, sizeof *number}};
    /* a descriptor comes with the first byte of the answer to DEVICE_OPEN, which is always as long */
    struct msghdr message = {
        .msg_iov = both, .msg_iovlen = number ? 2 : 1, .msg_control = control.bytes, .msg_controllen = sizeof control};
    ssize_t size = recvmsg(connection, &message, MSG_CMSG_CLOEXEC);
    struct cmsghdr *with = size > 0 ? CMSG_FIRSTHDR(&message) : NULL;

    if (size < (ssize_t)sizeof header)
        err(1, "seatd hung up");
    if (with) {
        int descriptor;

        memcpy(&descriptor, CMSG_DATA(with), sizeof descriptor);
        close(descriptor);
        if (descriptors)
            ++*descriptors;
    }
    size -= sizeof header;
    if (header[1] > sizeof rest || size > header[1])
        errx(1, "seatd answers %u with %u bytes", header[0], header[1]);
    receive_all(connection, rest + size, header[1] - size);
    if (number && header[1] >= sizeof *number)
        memcpy(number, rest, sizeof *number);
    return header[0];
}

static void seat_send(int connection, uint16_t what, const void *data, size_t size)
{
    char message[64];
    uint16_t header[] = {what, size};

    memcpy(message, header, sizeof header);
    memcpy(message + sizeof header, data, size);
    if (send(connection, message, sizeof header + size, MSG_NOSIGNAL) != (ssize_t)(sizeof header + size))
        err(1, "send to seatd");
}

static void seat_begin(int connection)
{
    seat_send(connection, SEAT_OPEN, "", 0);
    while (seat_receive(connection, NULL, NULL) != (SEAT_ANSWER | SEAT_ENABLED))
        ;
}

static void seat_ask(int connection)
{
    struct {
        uint16_t size;
        char path[sizeof seat_device];
    } asked = {sizeof seat_device, ""};
    int32_t device = -1;
    int descriptors = 0;
    uint16_t answer;

    memcpy(asked.path, seat_device, sizeof seat_device);
    seat_send(connection, DEVICE_OPEN, &asked, sizeof asked.size + sizeof asked.path);
    answer = seat_receive(connection, &device, &descriptors);
    if (answer != (SEAT_ANSWER | DEVICE_OPEN) || descriptors != 1)
        errx(1, "seatd answers %u with %d descriptors", answer, descriptors);
    seat_send(connection, DEVICE_CLOSE, &device, sizeof device);
    answer = seat_receive(connection, NULL, NULL);
    if (answer != (SEAT_ANSWER | DEVICE_CLOSE))
        errx(1, "seatd answers %u to a close", answer);
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * UINT64_C(1000000000) + now.tv_nsec;
}

static int by_value(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;

    return (a > b) - (a < b);
}

/* The median round trip of `count` requests. */
static uint64_t measure(struct target *target, uint64_t *times, int count)
{
    const struct timespec rest = {0, REST_NS};

    for (int index = 0; index < count; index++) {
        uint64_t began;

        compose(target);
        began = now_ns();
        if (target->what->fresh) {
            int connection = connect_to(target->socket);

            ask(connection, target);
            times[index] = now_ns() - began;
            close(connection);
            nanosleep(&rest, NULL); /* the broker notices the end meanwhile, not during the next one */
        } else {
            if (target->what->answer == SEAT)
                seat_ask(target->connection);
            else
                ask(target->connection, target);
            times[index] = now_ns() - began;
        }
    }
    qsort(times, count, sizeof *times, by_value);
    return times[count / 2];
}

static void parse(struct target *target, char *text)
{
    char *at = strchr(text, '@');
    size_t index = 0;

    if (!at)
        errx(64, "%s: not WHAT@SOCKET", text);
    *at = 0;
    while (index < sizeof whats / sizeof *whats && strcmp(text, whats[index].name))
        index++;
    if (index == sizeof whats / sizeof *whats)
        errx(64, "%s: no such request", text);
    *target = (struct target){.what = &whats[index], .socket = at + 1, .connection = -1};
    if (!target->what->fresh)
        target->connection = connect_to(target->socket);
    if (target->what->answer == SEAT)
        seat_begin(target->connection);
}

static int rounds(int cpu, int rounds, int count, int targets, char **names)
{
    static struct target target[TARGETS];
    uint64_t median[TARGETS], *times = calloc(count, sizeof *times);
    cpu_set_t one;

    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    if (targets > TARGETS || count < 1 || !times)
        errx(64, "at most %d targets, at least one request", TARGETS);
    if (sched_setaffinity(0, sizeof one, &one))
        err(1, "CPU %d", cpu);
    for (int index = 0; index < targets; index++)
        parse(&target[index], names[index]);
    for (int round = -1; round < rounds; round++) { /* the first one warms up */
        for (int turn = 0; turn < targets; turn++) {
            int index = (turn + round + 1) % targets;

            median[index] = measure(&target[index], times, count);
        }
        for (int index = 0; round >= 0 && index < targets; index++)
            printf("%llu%c", (unsigned long long)median[index], index + 1 < targets ? ' ' : '\n');
    }
    return 0;
}

static int hold(int count, const char *socket)
{
    static const struct what last = {.answer = PONG};
    static struct target target = {.what = &last};
    int connection = -1;
    char end;

    for (int index = 0; index < count; index++)
        connection = connect_to(socket);
    compose(&target);
    if (connection >= 0)
        ask(connection, &target); /* connections are taken in order, so all are in */
    puts("ready");
    fflush(stdout);
    while (read(0, &end, 1) > 0)
        ;
    return 0;
}

int main(int argc, char **argv)
{
    if (argc >= 6 && !strcmp(argv[1], "rounds"))
        return rounds(atoi(argv[2]), atoi(argv[3]), atoi(argv[4]), argc - 5, argv + 5);
    if (argc == 4 && !strcmp(argv[1], "hold"))
        return hold(atoi(argv[2]), argv[3]);
    errx(64, "usage: client rounds CPU ROUNDS COUNT WHAT@SOCKET ... | client hold COUNT SOCKET");
}
