/* What the programs in C of this folder have in common: sockets of this machine, the clock, the CPU to
 * stay on, and numbers on a command line. */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

_Noreturn static inline void die(const char *what) {
    perror(what);
    exit(1);
}

/* The other end has not done its part. */
_Noreturn static inline void fail(const char *what) {
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static inline uint64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static inline void pin(int cpu) {
    if (cpu < 0) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set) < 0) die("sched_setaffinity");
}

/* As the library does with its TCP sockets: nothing is held back, and nothing paced. */
static inline void tune(int fd) {
    int on = 1;
    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) < 0) die("TCP_NODELAY");
    (void)!setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
}

/* A socket, and its address: of a UNIX socket if there is a path, or else a TCP port of the loopback
 * address. */
static inline int open_socket(const char *unix_path, int port, struct sockaddr_storage *address,
                              socklen_t *length) {
    memset(address, 0, sizeof *address);
    if (unix_path) {
        struct sockaddr_un *local = (struct sockaddr_un *)address;
        if (strlen(unix_path) >= sizeof local->sun_path) {
            fprintf(stderr, "the path of the socket is too long: %s\n", unix_path);
            exit(2);
        }
        local->sun_family = AF_UNIX;
        strcpy(local->sun_path, unix_path);
        *length = sizeof *local;
    } else {
        struct sockaddr_in *loopback = (struct sockaddr_in *)address;
        loopback->sin_family = AF_INET;
        loopback->sin_port = htons((uint16_t)port);
        loopback->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        *length = sizeof *loopback;
    }
    int fd = socket(address->ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) die("socket");
    return fd;
}

/* Listens, and prints {"port": N}, which is 0 for a path. Port 0 takes a free one. */
static inline int listen_there(const char *unix_path, int port, int backlog) {
    struct sockaddr_storage address;
    socklen_t length;
    int fd = open_socket(unix_path, port, &address, &length), on = 1;
    if (unix_path) unlink(unix_path);
    else if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) < 0) die("SO_REUSEADDR");
    if (bind(fd, (struct sockaddr *)&address, length) < 0) die("bind");
    if (listen(fd, backlog) < 0) die("listen");
    if (!unix_path) {
        if (getsockname(fd, (struct sockaddr *)&address, &length) < 0) die("getsockname");
        port = ntohs(((struct sockaddr_in *)&address)->sin_port);
    }
    printf("{\"port\": %d}\n", port);
    fflush(stdout);
    return fd;
}

/* The next connection of a listener. Port or path, as in the two functions above. */
static inline int accept_one(int listener, const char *unix_path, int flags) {
    int fd = accept4(listener, NULL, NULL, flags | SOCK_CLOEXEC);
    if (fd < 0) die("accept4");
    if (!unix_path) tune(fd);
    return fd;
}

static inline int connect_there(const char *unix_path, int port) {
    struct sockaddr_storage address;
    socklen_t length;
    int fd = open_socket(unix_path, port, &address, &length);
    if (connect(fd, (struct sockaddr *)&address, length) < 0) die("connect");
    if (!unix_path) tune(fd);
    return fd;
}

static inline int by_size(const void *left, const void *right) {
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

/* By the nearest rank. */
static inline uint64_t percentile(const uint64_t *sorted, long count, double share) {
    long rank = (long)(share * (double)count + 0.999999);
    return sorted[rank < 1 ? 0 : rank > count ? count - 1 : rank - 1];
}

static inline uint64_t *room_for(long count) {
    uint64_t *taken = calloc((size_t)count, sizeof *taken);
    if (!taken) die("calloc");
    return taken;
}

static inline long number(const char *text, const char *name, long least, long most) {
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (errno || end == text || *end || value < least || value > most) {
        fprintf(stderr, "--%s: %s is not a number from %ld to %ld\n", name, text, least, most);
        exit(2);
    }
    return value;
}
