/* A client of scripts/bench that publishes to many.
 *
 *     fanout KIND SOCKET SUBSCRIBERS MESSAGES
 *
 * KIND is fdbroker, redis or mosquitto. So many subscribers, all in this process, get so many messages of 100 bytes that
 * one publisher sends without waiting for the answers. Prints the nanoseconds from the first byte that is sent to the
 * last that has arrived. In C, so that what limits is the server, not the reader of its messages.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { EVENTS = 256, WAIT_MS = 20000, QUIET_MS = 300, TRIES = 100, ROOM = 1 << 18 };

#define PAYLOAD "0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789"
#define TEXT(bytes) (bytes), sizeof(bytes) - 1
#define CALL(method, parameters) "{\"method\":\"io.fdbroker.Inbox." method "\",\"parameters\":{" parameters "}"

/* What each kind is told: to begin with, to subscribe, one message; and how one delivery is recognized. */
static const struct kind {
    const char *name;
    const char *begin; /* answered, if there is one */
    size_t begin_size;
    const char *subscribe;
    size_t subscribe_size;
    int confirms; /* a subscription is answered */
    const char *message;
    size_t message_size;
    size_t delivery_size; /* all are as long; 0: they end with a NUL and are not */
} kinds[] = {
    {"fdbroker", TEXT(""), TEXT(CALL("Subscribe", "\"topics\":[\"news\"]") ",\"more\":true}\0"), 0,
     TEXT(CALL("Send", "\"topic\":\"news\",\"payload\":\"" PAYLOAD "\"") "}\0"), 0},
    {"redis", TEXT(""), TEXT("*2\r\n$9\r\nSUBSCRIBE\r\n$4\r\nnews\r\n"), 1,
     TEXT("*3\r\n$7\r\nPUBLISH\r\n$4\r\nnews\r\n$100\r\n" PAYLOAD "\r\n"),
     sizeof "*3\r\n$7\r\nmessage\r\n$4\r\nnews\r\n$100\r\n" PAYLOAD "\r\n" - 1},
    /* MQTT 3.1.1: a byte of kind, one of length, which is below 128 here */
    {"mosquitto", TEXT("\x10\x0c\0\4MQTT\4\2\0\0\0\0"), TEXT("\x82\x09\0\1\0\4news\0"), 1,
     TEXT("\x30\x6a\0\4news" PAYLOAD), sizeof "\x30\x6a\0\4news" PAYLOAD - 1},
};

static int connect_to(const char *path, const struct kind *kind)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    char answer[128];

    if (strlen(path) >= sizeof address.sun_path)
        errx(1, "%s: too long for a socket", path);
    strcpy(address.sun_path, path);
    if (connection < 0 || connect(connection, (struct sockaddr *)&address, sizeof address))
        err(1, "connect %s", path);
    if (kind->begin_size && (send(connection, kind->begin, kind->begin_size, MSG_NOSIGNAL) < 0 ||
                             recv(connection, answer, sizeof answer, 0) <= 0))
        err(1, "%s does not answer", kind->name);
    return connection;
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * UINT64_C(1000000000) + now.tv_nsec;
}

static void watch(int epoll, int connection, uint32_t events, int how)
{
    struct epoll_event event = {.events = events, .data.fd = connection};

    if (epoll_ctl(epoll, how, connection, &event))
        err(1, "epoll");
}

/* How much has come: bytes, or messages. */
static size_t arrived(const struct kind *kind, const char *data, size_t size)
{
    size_t found = 0;

    if (kind->delivery_size)
        return size;
    for (const char *end = data + size; (data = memchr(data, 0, end - data)); data++)
        found++;
    return found;
}

/* All connections. `arrived` is by descriptor, as `arrived` counts; `left` subscribers have less than `each`. */
static struct {
    const struct kind *kind;
    int epoll, publisher, first, last; /* descriptors of the subscribers */
    char *waiting;                     /* of the publisher, */
    size_t to_send, sent;              /* so much of it */
    size_t *arrived, each;
    int left;
} run;

static void publish(int messages)
{
    run.to_send = messages * run.kind->message_size;
    run.sent = 0;
    run.waiting = realloc(run.waiting, run.to_send);
    if (!run.waiting)
        err(1, "no room");
    for (int index = 0; index < messages; index++)
        memcpy(run.waiting + index * run.kind->message_size, run.kind->message, run.kind->message_size);
    watch(run.epoll, run.publisher, EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
}

static void expect(int messages)
{
    run.each = messages * (run.kind->delivery_size ? run.kind->delivery_size : 1);
    run.left = run.last - run.first + 1;
    memset(run.arrived, 0, (run.last + 1) * sizeof *run.arrived);
}

static void send_more(void)
{
    ssize_t size = send(run.publisher, run.waiting + run.sent, run.to_send - run.sent, MSG_NOSIGNAL | MSG_DONTWAIT);

    if (size < 0 && errno != EAGAIN)
        err(1, "%s: send", run.kind->name);
    run.sent += size > 0 ? size : 0;
    if (run.sent == run.to_send)
        watch(run.epoll, run.publisher, EPOLLIN, EPOLL_CTL_MOD);
}

static void receive(int connection)
{
    static char data[ROOM];
    ssize_t size = recv(connection, data, sizeof data, MSG_DONTWAIT);
    size_t before = run.arrived[connection];

    if (!size || (size < 0 && errno != EAGAIN))
        errx(1, "%s hangs up", run.kind->name);
    if (size < 0 || connection == run.publisher) /* those are answers */
        return;
    run.arrived[connection] += arrived(run.kind, data, size);
    run.left -= before < run.each && run.arrived[connection] >= run.each;
}

/* Send and receive what can be now; whether anything could within that time. */
static int step(int wait_ms)
{
    struct epoll_event events[EVENTS];
    int count = epoll_wait(run.epoll, events, EVENTS, wait_ms);

    for (int index = 0; index < count; index++) {
        if (events[index].events & EPOLLOUT)
            send_more();
        if (events[index].events & ~EPOLLOUT)
            receive(events[index].data.fd);
    }
    return count > 0;
}

/* fdbroker does not answer a subscription: all are there once a message has reached all. */
static void warm_up(void)
{
    expect(1);
    for (int tries = 0; run.left; tries++) {
        if (tries == TRIES)
            errx(1, "%s: %d subscribers get nothing", run.kind->name, run.left);
        publish(1);
        while (step(QUIET_MS))
            ;
    }
}

static uint64_t measure(const struct kind *kind, const char *path, int subscribers, int messages)
{
    char answer[128];
    uint64_t began;

    run.kind = kind;
    run.epoll = epoll_create1(EPOLL_CLOEXEC);
    for (int index = 0; index < subscribers; index++) {
        run.last = connect_to(path, kind);
        if (!index)
            run.first = run.last;
        if (send(run.last, kind->subscribe, kind->subscribe_size, MSG_NOSIGNAL) < 0 ||
            (kind->confirms && recv(run.last, answer, sizeof answer, 0) <= 0))
            err(1, "%s: no subscription", kind->name);
        watch(run.epoll, run.last, EPOLLIN, EPOLL_CTL_ADD);
    }
    run.publisher = connect_to(path, kind);
    watch(run.epoll, run.publisher, EPOLLIN, EPOLL_CTL_ADD);
    run.arrived = calloc(run.publisher + 1, sizeof *run.arrived);
    if (!run.arrived || run.last - run.first + 1 != subscribers)
        errx(1, "no room for %d subscribers", subscribers);
    warm_up();
    expect(messages);
    began = now_ns();
    publish(messages);
    while (run.left)
        if (!step(WAIT_MS))
            errx(1, "%s: messages are missing", kind->name);
    return now_ns() - began;
}

int main(int argc, char **argv)
{
    if (argc == 5)
        for (size_t index = 0; index < sizeof kinds / sizeof *kinds; index++)
            if (!strcmp(argv[1], kinds[index].name)) {
                printf("%llu\n", (unsigned long long)measure(&kinds[index], argv[2], atoi(argv[3]), atoi(argv[4])));
                return 0;
            }
    errx(64, "usage: fanout fdbroker|redis|mosquitto SOCKET SUBSCRIBERS MESSAGES");
}
