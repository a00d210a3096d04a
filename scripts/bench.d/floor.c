/* The floor that scripts/bench measures against: the least that a broker of descriptors can do, in C.
 *
 * One thread, one epoll. For each request recv, getsockopt(SO_PEERCRED), open, sendmsg with SCM_RIGHTS, close, and
 * nothing else: it decides nothing, checks nothing, records nothing, and opens /dev/null whatever is asked for.
 * A request of more than BATCH_BYTES gets BATCH descriptors, one whose first byte is 0 gets PONG.
 * Needs no right. Not for use: it serves whoever can connect.
 *
 *     floor SOCKET
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { BATCH = 16, BATCH_BYTES = 512, REQUEST_BYTES = 65536, EVENTS = 64, BACKLOG = 4096 };

static const char pong[] = {0, 0, 0, 4, 'P', 'O', 'N', 'G'};
static const char granted[] = "{\"parameters\":{\"grants\":[]}}"; /* its NUL ends the message */

static int listen_at(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (strlen(path) >= sizeof address.sun_path)
        errx(1, "%s: too long for a socket", path);
    strcpy(address.sun_path, path);
    umask(0111);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, BACKLOG))
        err(1, "%s", path);
    return listener;
}

static void grant(int client, int count)
{
    union {
        char bytes[CMSG_SPACE(BATCH * sizeof(int))];
        struct cmsghdr aligned;
    } control = {0};
    struct iovec reply = {(void *)granted, sizeof granted};
    struct msghdr message = {.msg_iov = &reply, .msg_iovlen = 1, .msg_control = control.bytes};
    struct cmsghdr *header;
    struct ucred who;
    socklen_t size = sizeof who;
    int opened[BATCH];

    if (getsockopt(client, SOL_SOCKET, SO_PEERCRED, &who, &size))
        err(1, "SO_PEERCRED");
    for (int index = 0; index < count; index++)
        if ((opened[index] = open("/dev/null", O_RDWR | O_CLOEXEC)) < 0)
            err(1, "/dev/null");
    message.msg_controllen = CMSG_SPACE(count * sizeof(int));
    header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(count * sizeof(int));
    memcpy(CMSG_DATA(header), opened, count * sizeof(int));
    if (sendmsg(client, &message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
        warn("sendmsg");
    for (int index = 0; index < count; index++)
        close(opened[index]);
}

static void serve(int client)
{
    static char request[REQUEST_BYTES];
    ssize_t size = recv(client, request, sizeof request, 0);

    if (size <= 0)
        close(client);
    else if (request[0] != 0)
        grant(client, size > BATCH_BYTES ? BATCH : 1);
    else if (send(client, pong, sizeof pong, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
        warn("send");
}

int main(int argc, char **argv)
{
    struct epoll_event event = {.events = EPOLLIN}, events[EVENTS];
    int listener, epoll;

    if (argc != 2)
        errx(64, "usage: floor SOCKET");
    listener = listen_at(argv[1]);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    event.data.fd = listener;
    if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event))
        err(1, "epoll");
    for (;;) {
        int count = epoll_wait(epoll, events, EVENTS, -1);

        for (int index = 0; index < count; index++) {
            int client = events[index].data.fd;

            if (client != listener) {
                serve(client);
                continue;
            }
            client = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
            event.data.fd = client;
            if (client < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, client, &event))
                err(1, "accept");
        }
    }
}
