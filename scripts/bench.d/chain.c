/* The second floor that scripts/bench measures against: the calls of fdbroker, without its decisions.
 *
 * Three C processes, opener, keeper and inbox, joined by the same links as fdbroker's. They make every system call that
 * fdbroker makes for a connection, an Open and a PING, in the same order, between the same processes, with messages of
 * about the same size: what no implementation with fdbroker's guarantees can beat. They decide nothing: there is no
 * policy, no limit, no JSON and no comparison, and whoever can connect gets whatever it names below /dev.
 * tests/privileged/test_bench.py counts the calls of both; when the service's change, this file has to follow.
 *
 *     chain SOCKET        records go to standard error, or to the journal where there is one
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <linux/sockios.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifndef SO_PEERPIDFD /* Linux 6.5 */
#define SO_PEERPIDFD 77
#endif
#ifndef SO_PASSRIGHTS /* Linux 6.16; before, the call fails, as fdbroker's does */
#define SO_PASSRIGHTS 83
#endif

enum {
    BATCH = 16,          /* descriptors in a request, at most */
    DEVICES = 32,        /* fdbroker/limits/opener.py: DEVICES_KEPT */
    CONNECTIONS = 65536, /* at the same time; a power of two, for numbers go on for ever */
    EVENTS = 64,
    BACKLOG = 4096,
    LINK_BYTES = 131072,
    REQUEST_BYTES = 65536,
    RECORD_BYTES = 500, /* of one record, and of one grant in a reply: as measured */
    GRANT_BYTES = 150,
};

/* The first byte of a message on a link. */
enum { CAME, OPEN, OUTCOME, CLOSED, KNOCK, LET_IN, ENDED };

struct message {
    uint8_t what;
    uint64_t number;   /* of the connection */
    uint32_t facts[4]; /* who it is; what it counts as */
} __attribute__((packed));

static const char pong[] = {0, 0, 0, 4, 'P', 'O', 'N', 'G'};
static union {
    char bytes[LINK_BYTES];
    struct message message;
} received;

static void clock_thread(void)
{
    struct timespec now;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now); /* fdbroker charges its users with it; no vDSO has it */
}

static void tell(int link, const void *data, size_t size)
{
    if (send(link, data, size, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
        err(1, "a link");
}

static void tell_of(int link, uint8_t what, uint64_t number, size_t size)
{
    struct message message = {.what = what, .number = number};

    tell(link, &message, size);
}

static ssize_t receive(int link)
{
    return recvfrom(link, received.bytes, sizeof received.bytes, MSG_TRUNC | MSG_DONTWAIT, NULL, NULL);
}

static void watch(int epoll, int descriptor, uint32_t events, int how)
{
    struct epoll_event event = {.events = events, .data.fd = descriptor};

    if (epoll_ctl(epoll, how, descriptor, &event))
        err(1, "epoll_ctl");
}

static int new_epoll(void)
{
    int epoll = epoll_create1(EPOLL_CLOEXEC);

    if (epoll < 0)
        err(1, "epoll");
    return epoll;
}

static int open_folder(const char *path)
{
    int folder = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);

    if (folder < 0)
        err(1, "%s", path);
    return folder;
}

static void attach(struct msghdr *message, void *control, const int *descriptors, int count)
{
    struct cmsghdr *header;

    message->msg_control = control;
    message->msg_controllen = CMSG_SPACE(count * sizeof(int));
    header = CMSG_FIRSTHDR(message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(count * sizeof(int));
    memcpy(CMSG_DATA(header), descriptors, count * sizeof(int));
}

/* ---- the opener */

static struct {
    int inbox, keeper, listener, epoll;
    int dev, sys_dev, proc, own_descriptors; /* folders */
    int journal;                             /* or -1 */
    int client[CONNECTIONS], pid[CONNECTIONS];
    struct {
        dev_t number;
        int folder; /* in sysfs */
    } kept[DEVICES];
    int devices;
} opener;

/* The class of a device, by the folder of that very device, which is kept. */
static void ask_class(dev_t number)
{
    char place[64], link[4096];
    int index = 0;

    while (index < opener.devices && opener.kept[index].number != number)
        index++;
    if (index == opener.devices) {
        if (index == DEVICES)
            errx(1, "more than %d devices", DEVICES);
        snprintf(place, sizeof place, "char/%u:%u", major(number), minor(number));
        opener.kept[index].number = number;
        opener.kept[index].folder = openat(opener.sys_dev, place, O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (opener.kept[index].folder < 0 || readlinkat(opener.sys_dev, place, link, sizeof link) < 0)
            err(1, "/sys/dev/%s", place);
        opener.devices++;
    }
    if (readlinkat(opener.kept[index].folder, "subsystem", link, sizeof link) < 0)
        err(1, "subsystem");
}

/* A node, found and not opened, and its number. */
static int find(const char *path, dev_t *number)
{
    struct open_how how = {
        .flags = O_PATH | O_CLOEXEC, .resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS};
    int node = syscall(SYS_openat2, opener.dev, path, &how, sizeof how);
    struct stat status;

    if (node < 0 || fstat(node, &status))
        err(1, "/dev/%s", path);
    *number = status.st_rdev;
    return node;
}

static int reopen(int node)
{
    char name[16];
    struct stat status;
    int opened;

    snprintf(name, sizeof name, "%d", node);
    opened = openat(opener.own_descriptors, name, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    if (opened < 0 || fstat(opened, &status))
        err(1, "reopen");
    return opened;
}

static void record(void)
{
    static char text[RECORD_BYTES + 1];

    if (!text[0])
        snprintf(text, sizeof text, "MESSAGE=%-*s\n", RECORD_BYTES - 9, "a record of scripts/bench");
    if (opener.journal >= 0 ? send(opener.journal, text, RECORD_BYTES, MSG_NOSIGNAL) < 0
                            : write(2, text, RECORD_BYTES) < 0)
        err(1, "a record");
}

/* One Open: `paths` are `count` names below /dev, each with its NUL. */
static void grant(int client, uint64_t number, const char *paths, int count)
{
    static char reply[GRANT_BYTES * BATCH];
    union {
        char bytes[CMSG_SPACE(BATCH * sizeof(int))];
        struct cmsghdr aligned;
    } control = {0};
    struct iovec text = {reply, GRANT_BYTES * count};
    struct msghdr message = {.msg_iov = &text, .msg_iovlen = 1};
    const char *path = paths, *before = "";
    dev_t number_of[BATCH];
    int node[BATCH], opened[BATCH], unread, known;
    struct pollfd hung_up = {.fd = client, .events = POLLRDHUP};

    if (count > 1) /* much work: not for who has gone */
        poll(&hung_up, 1, 0);
    for (int index = 0; index < count; index++) {
        node[index] = find(path, &number_of[index]);
        path += strlen(path) + 1;
        for (known = 0; number_of[known] != number_of[index]; known++)
            ;
        if (known == index) /* the class is asked once for each number */
            ask_class(number_of[index]);
    }
    for (int index = 0; index < count; index++)
        opened[index] = reopen(node[index]);
    path = paths;
    for (int index = 0; index < count; index++) { /* equal grants are one record */
        if (strcmp(path, before))
            record();
        before = path;
        path += strlen(path) + 1;
    }
    memset(reply, ' ', text.iov_len); /* a JSON text of that length; its NUL ends the message */
    memcpy(reply, "{}", 2);
    reply[text.iov_len - 1] = 0;
    attach(&message, control.bytes, opened, count);
    clock_thread();
    if (sendmsg(client, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
        warn("sendmsg");
    clock_thread();
    ioctl(client, SIOCOUTQ, &unread);
    tell_of(opener.inbox, OUTCOME, number, 14); /* its client can ask again meanwhile */
    for (int index = 0; index < count; index++)
        close(node[index]);
    for (int index = 0; index < count; index++)
        close(opened[index]);
}

static void opener_hears_inbox(void)
{
    ssize_t size = receive(opener.inbox);
    uint64_t number = received.message.number;
    int client = opener.client[number % CONNECTIONS], left;

    if (size <= 0)
        errx(1, "the inbox is gone");
    if (received.message.what == OPEN) {
        grant(client, number, received.bytes + sizeof received.message, received.message.facts[0]);
        return;
    }
    clock_thread();
    shutdown(client, SHUT_RDWR);
    clock_thread();
    ioctl(client, SIOCOUTQ, &left); /* what is unread; what nobody has read */
    ioctl(client, FIONREAD, &left);
    close(client);
    tell_of(opener.keeper, ENDED, number, 9);
}

static void accept_one(void)
{
    static uint64_t number;
    struct sockaddr_un address;
    struct ucred who;
    socklen_t size = sizeof address;
    int client = accept4(opener.listener, (struct sockaddr *)&address, &size, SOCK_CLOEXEC);

    if (client < 0)
        err(1, "accept");
    size = sizeof address;
    getsockname(client, (struct sockaddr *)&address, &size);
    size = sizeof who;
    if (getsockopt(client, SOL_SOCKET, SO_PEERCRED, &who, &size))
        err(1, "SO_PEERCRED");
    opener.client[++number % CONNECTIONS] = client;
    opener.pid[number % CONNECTIONS] = who.pid;
    tell_of(opener.keeper, KNOCK, number, 25);
}

static void read_of_process(int pid, const char *name)
{
    char path[64];
    int file;

    snprintf(path, sizeof path, "%d/%s", pid, name);
    file = openat(opener.proc, path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    while (file >= 0 && read(file, received.bytes, REQUEST_BYTES) > 0)
        ;
    close(file);
}

/* The keeper lets one in: identify it, and tell keeper and inbox. */
static void opener_hears_keeper(void)
{
    static const char *const files[] = {"comm", "uid_map", "gid_map", "cgroup"};
    ssize_t size = receive(opener.keeper);
    struct message came = {.what = CAME, .number = received.message.number};
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr aligned;
    } control = {0};
    struct iovec text = {&came, sizeof came};
    struct msghdr message = {.msg_iov = &text, .msg_iovlen = 1};
    char groups[256];
    socklen_t length = sizeof groups;
    int client = opener.client[came.number % CONNECTIONS], pid = opener.pid[came.number % CONNECTIONS], on = 1;
    struct pollfd process = {.events = POLLIN};

    if (size <= 0)
        errx(1, "the keeper is gone");
    getsockopt(client, SOL_SOCKET, SO_PEERGROUPS, groups, &length);
    length = sizeof groups;
    getsockopt(client, SOL_SOCKET, SO_PEERSEC, groups, &length);
    length = sizeof process.fd;
    if (getsockopt(client, SOL_SOCKET, SO_PEERPIDFD, &process.fd, &length))
        process.fd = -1;
    for (size_t index = 0; index < sizeof files / sizeof *files; index++)
        read_of_process(pid, files[index]);
    poll(&process, 1, 0); /* is it still that process? */
    if (process.fd >= 0)
        close(process.fd);
    setsockopt(client, SOL_SOCKET, SO_OOBINLINE, &on, sizeof on);
    tell(opener.keeper, &came, sizeof came);
    attach(&message, control.bytes, &client, 1);
    if (sendmsg(opener.inbox, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
        err(1, "a link");
}

static void serve_as_opener(void)
{
    struct epoll_event events[EVENTS];

    opener.dev = open_folder("/dev");
    opener.sys_dev = open_folder("/sys/dev");
    opener.proc = open_folder("/proc");
    opener.own_descriptors = open_folder("/proc/self/fd");
    opener.epoll = new_epoll();
    watch(opener.epoll, opener.inbox, EPOLLIN, EPOLL_CTL_ADD);
    watch(opener.epoll, opener.keeper, EPOLLIN, EPOLL_CTL_ADD);
    watch(opener.epoll, opener.listener, EPOLLIN, EPOLL_CTL_ADD);
    for (;;) {
        int count = epoll_wait(opener.epoll, events, EVENTS, -1);

        for (int index = 0; index < count; index++) {
            if (events[index].data.fd == opener.inbox)
                opener_hears_inbox();
            else if (events[index].data.fd == opener.keeper)
                opener_hears_keeper();
            else
                accept_one();
        }
    }
}

/* ---- the keeper */

static void serve_as_keeper(int link)
{
    int epoll = new_epoll();
    struct epoll_event event;

    watch(epoll, link, EPOLLIN, EPOLL_CTL_ADD);
    for (;;) {
        ssize_t size;

        epoll_wait(epoll, &event, 1, -1);
        while ((size = receive(link)) > 0)
            if (received.message.what == KNOCK)
                tell_of(link, LET_IN, received.message.number, 13);
        if (size == 0)
            return;
    }
}

/* ---- the inbox */

static struct {
    int link, epoll;
    struct {
        uint64_t number;
        int asked, unheard; /* the opener has its request; it has said more meanwhile */
    } client[CONNECTIONS];  /* by descriptor */
    int descriptor[CONNECTIONS]; /* by number; 0: it has ended */
} inbox;

static void take_client(uint64_t number, int client)
{
    struct sockaddr_un address;
    socklen_t size = sizeof address;
    int off = 0;

    if (client < 0 || client >= CONNECTIONS)
        errx(1, "more than %d connections", CONNECTIONS);
    getsockname(client, (struct sockaddr *)&address, &size);
    setsockopt(client, SOL_SOCKET, SO_PASSRIGHTS, &off, sizeof off);
    watch(inbox.epoll, client, EPOLLIN, EPOLL_CTL_ADD);
    inbox.client[client].number = number;
    inbox.client[client].asked = inbox.client[client].unheard = 0;
    inbox.descriptor[number % CONNECTIONS] = client;
}

static ssize_t receive_of_opener(int *client)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr aligned;
    } control;
    struct sockaddr_un from;
    struct iovec text = {received.bytes, sizeof received.bytes};
    struct msghdr message = {
        .msg_name = &from, .msg_namelen = sizeof from, .msg_iov = &text, .msg_iovlen = 1, .msg_control = &control,
        .msg_controllen = sizeof control};
    ssize_t size = recvmsg(inbox.link, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    struct cmsghdr *header = size > 0 ? CMSG_FIRSTHDR(&message) : NULL;

    if (header)
        memcpy(client, CMSG_DATA(header), sizeof *client);
    return size;
}

static void inbox_hears_opener(void)
{
    const struct message *message = &received.message;
    int client = -1;

    if (receive_of_opener(&client) <= 0)
        errx(1, "the opener is gone");
    if (message->what == CAME) {
        take_client(message->number, client);
        receive_of_opener(&client); /* there may be more of them; there is not */
        return;
    }
    clock_thread();
    client = inbox.descriptor[message->number % CONNECTIONS];
    if (!client)
        return; /* its client has ended meanwhile */
    if (inbox.client[client].unheard) {
        watch(inbox.epoll, client, EPOLLIN, EPOLL_CTL_MOD);
        clock_thread();
    }
    inbox.client[client].asked = inbox.client[client].unheard = 0;
}

static void end_client(int client)
{
    uint64_t number = inbox.client[client].number;
    int left;

    epoll_ctl(inbox.epoll, EPOLL_CTL_DEL, client, NULL);
    shutdown(client, SHUT_RDWR);
    ioctl(client, FIONREAD, &left);
    close(client);
    inbox.descriptor[number % CONNECTIONS] = 0;
    tell_of(inbox.link, CLOSED, number, 10);
}

/* The names below /dev that a request has, one after the other, for the opener. */
static void ask_opener(uint64_t number, const char *request)
{
    static const char begin[] = "\"device\":\"/dev/";
    static char asked[sizeof(struct message) + REQUEST_BYTES];
    struct message message = {.what = OPEN, .number = number};
    size_t used = sizeof message;

    while (message.facts[0] < BATCH && (request = strstr(request, begin))) {
        size_t length = strcspn(request += sizeof begin - 1, "\"");

        memcpy(asked + used, request, length);
        used += length;
        asked[used++] = 0;
        message.facts[0]++;
    }
    memcpy(asked, &message, sizeof message);
    tell(inbox.link, asked, used);
}

static void inbox_hears_client(int client, uint32_t events)
{
    static char request[REQUEST_BYTES + 1];
    union {
        char bytes[CMSG_SPACE(sizeof(struct ucred))];
        struct cmsghdr aligned;
    } control;
    struct sockaddr_un from;
    struct iovec text = {request, REQUEST_BYTES};
    struct msghdr message = {
        .msg_name = &from, .msg_namelen = sizeof from, .msg_iov = &text, .msg_iovlen = 1, .msg_control = &control,
        .msg_controllen = sizeof control};
    ssize_t size;

    clock_thread();
    if (!inbox.client[client].asked) {
        size = recvmsg(client, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (size <= 0) {
            end_client(client);
        } else if (!request[0]) {
            if (send(client, pong, sizeof pong, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
                warn("send");
        } else {
            request[size] = 0;
            inbox.client[client].asked = 1;
            ask_opener(inbox.client[client].number, request);
        }
    } else if (events & EPOLLHUP) {
        end_client(client);
    } else { /* its next request waits for the outcome of this one */
        inbox.client[client].unheard = 1;
        watch(inbox.epoll, client, 0, EPOLL_CTL_MOD);
    }
    clock_thread();
}

static void serve_as_inbox(void)
{
    struct epoll_event events[EVENTS];

    inbox.epoll = new_epoll();
    watch(inbox.epoll, inbox.link, EPOLLIN, EPOLL_CTL_ADD);
    for (;;) {
        int count = epoll_wait(inbox.epoll, events, EVENTS, -1);

        for (int index = 0; index < count; index++) {
            if (events[index].data.fd == inbox.link)
                inbox_hears_opener();
            else
                inbox_hears_client(events[index].data.fd, events[index].events);
        }
    }
}

/* ---- all of them */

static int listen_at(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;

    if (strlen(path) >= sizeof address.sun_path)
        errx(1, "%s: too long for a socket", path);
    strcpy(address.sun_path, path);
    umask(0111);
    /* connections inherit it: each message comes with its sender's credentials */
    if (listener < 0 || setsockopt(listener, SOL_SOCKET, SO_PASSCRED, &on, sizeof on) ||
        bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, BACKLOG))
        err(1, "%s", path);
    return listener;
}

static int journal(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "/run/systemd/journal/socket"};
    int sock = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (sock >= 0 && connect(sock, (struct sockaddr *)&address, sizeof address)) {
        close(sock);
        return -1;
    }
    return sock;
}

/* Whether this is the child; it ends with its parent. */
static int forked(void)
{
    pid_t child = fork();

    if (child < 0 || (!child && prctl(PR_SET_PDEATHSIG, SIGKILL)))
        err(1, "fork");
    return !child;
}

int main(int argc, char **argv)
{
    int to_inbox[2], to_keeper[2];

    if (argc != 2)
        errx(64, "usage: chain SOCKET");
    opener.journal = journal();
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, to_inbox) ||
        socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, to_keeper))
        err(1, "socketpair");
    opener.listener = listen_at(argv[1]);
    opener.inbox = to_inbox[0];
    opener.keeper = to_keeper[0];
    inbox.link = to_inbox[1];
    if (forked()) {
        close(to_keeper[1]);
        close(to_inbox[1]);
        serve_as_opener();
    }
    close(to_inbox[0]);
    close(to_keeper[0]);
    close(opener.listener);
    if (forked())
        serve_as_keeper(to_keeper[1]);
    else
        serve_as_inbox();
    return 0;
}
