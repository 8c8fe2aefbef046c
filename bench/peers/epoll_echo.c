/* The least that a round trip can cost here: a C echo server and its client, over the same sockets,
 * frames and waiting that the library uses, and nothing else. Every other figure is read against it.
 *
 * One frame is under way at a time, or as many as --window says, which measures a rate instead of
 * round trips. Both sides wait in epoll, as an event loop does, or poll the socket without ever
 * sleeping (--busy).
 *
 *   epoll_echo --server [--port N | --unix PATH] [--cpu N] [--busy] [--once]
 *   epoll_echo --client (--port N | --unix PATH) [--cpu N] [--busy] [--count N] [--warm-up N]
 *              [--window N]
 *
 * The server prints {"port": N} once it listens. The client prints its result on one line.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { FRAME = 12, BUFFER = 65536, EVENTS = 64, SPINS = 1024, WINDOW = BUFFER / FRAME };

static struct {
    bool server, client, busy, once;
    int port, cpu;
    long count, warm_up, window;
    const char *unix_path;
} options = {.cpu = -1, .count = 100000, .warm_up = 5000, .window = 1};

_Noreturn static void die(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void pin(int cpu) {
    if (cpu < 0) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set) < 0) die("sched_setaffinity");
}

/* Fills in the address that the options name and opens a socket for it. */
static int open_socket(struct sockaddr_storage *address, socklen_t *length) {
    memset(address, 0, sizeof *address);
    if (options.unix_path) {
        struct sockaddr_un *local = (struct sockaddr_un *)address;
        if (strlen(options.unix_path) >= sizeof local->sun_path) {
            fprintf(stderr, "the path of the socket is too long: %s\n", options.unix_path);
            exit(2);
        }
        local->sun_family = AF_UNIX;
        strcpy(local->sun_path, options.unix_path);
        *length = sizeof *local;
    } else {
        struct sockaddr_in *internet = (struct sockaddr_in *)address;
        internet->sin_family = AF_INET;
        internet->sin_port = htons((uint16_t)options.port);
        internet->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        *length = sizeof *internet;
    }
    int fd = socket(address->ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) die("socket");
    return fd;
}

static void set_no_delay(int fd) {
    int on = 1;
    if (!options.unix_path && setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) < 0)
        die("TCP_NODELAY");
}

static void watch(int epoll, int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0) die("epoll_ctl");
}

/* What is under way at a time is smaller than any socket buffer: a short send is a fault. */
static bool send_all(int fd, const char *data, size_t size) {
    ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
    return sent == (ssize_t)size;
}

/* Echoes what has arrived. Returns false when the connection is over. */
static bool echo(int fd) {
    static char buffer[BUFFER];
    ssize_t size = recv(fd, buffer, sizeof buffer, MSG_DONTWAIT);
    if (size < 0) return errno == EAGAIN || errno == EINTR;
    return size > 0 && send_all(fd, buffer, (size_t)size);
}

static void serve(void) {
    struct sockaddr_storage address;
    socklen_t length;
    int listener = open_socket(&address, &length), on = 1;
    if (options.unix_path) unlink(options.unix_path);
    else if (setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) < 0) die("SO_REUSEADDR");
    if (bind(listener, (struct sockaddr *)&address, length) < 0) die("bind");
    if (listen(listener, 64) < 0) die("listen");
    if (!options.unix_path) {
        if (getsockname(listener, (struct sockaddr *)&address, &length) < 0) die("getsockname");
        options.port = ntohs(((struct sockaddr_in *)&address)->sin_port);
    }
    printf("{\"port\": %d}\n", options.port);
    fflush(stdout);

    int epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0) die("epoll_create1");
    watch(epoll, listener);
    int latest = -1; /* the connection that a busy server polls between two looks at all of them */
    for (;;) {
        if (options.busy && latest >= 0) {
            bool alive = true;
            for (int spin = 0; alive && spin < SPINS; spin++) alive = echo(latest);
            if (!alive) {
                close(latest);
                latest = -1;
                if (options.once) return;
            }
        }
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(epoll, events, EVENTS, options.busy ? 0 : -1);
        if (ready < 0 && errno != EINTR) die("epoll_wait");
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                int peer = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
                if (peer < 0) continue;
                set_no_delay(peer);
                watch(epoll, peer);
                latest = peer;
            } else if (!echo(fd)) {
                close(fd);
                if (fd == latest) latest = -1;
                if (options.once) return;
            }
        }
    }
}

static int by_size(const void *left, const void *right) {
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

/* By the nearest rank. */
static uint64_t percentile(const uint64_t *sorted, long count, double share) {
    long rank = (long)(share * (double)count + 0.999999);
    return sorted[rank < 1 ? 0 : rank > count ? count - 1 : rank - 1];
}

static void receive_frame(int fd, int epoll) {
    char buffer[FRAME];
    size_t have = 0;
    while (have < FRAME) {
        if (!options.busy) {
            struct epoll_event event;
            if (epoll_wait(epoll, &event, 1, -1) < 0) {
                if (errno == EINTR) continue;
                die("epoll_wait");
            }
        }
        ssize_t size = recv(fd, buffer + have, FRAME - have, MSG_DONTWAIT);
        if (size > 0) {
            have += (size_t)size;
        } else if (size == 0) {
            fputs("the server closed the connection\n", stderr);
            exit(1);
        } else if (errno != EAGAIN && errno != EINTR) {
            die("recv");
        }
    }
}

/* u32 length, u16 extend_size, u16 channel, four bytes of data */
static const char frame[FRAME] = {FRAME, 0, 0, 0, 0, 0, 50, 0, 'p', 'i', 'n', 'g'};

/* Sends `count` frames, `window` of them under way, in as few calls as that takes. Seconds. */
static double stream(int fd, int epoll, long count) {
    static char out[BUFFER], in[BUFFER];
    for (size_t i = 0; i < WINDOW; i++) memcpy(out + i * FRAME, frame, FRAME);
    uint64_t start = now_ns();
    size_t got = 0, total = (size_t)count * FRAME;
    for (long sent = 0; got < total;) {
        long room = options.window - (sent - (long)(got / FRAME));
        if (room > count - sent) room = count - sent;
        if (room > 0) {
            if (!send_all(fd, out, (size_t)room * FRAME)) die("send");
            sent += room;
        }
        struct epoll_event event;
        if (!options.busy && epoll_wait(epoll, &event, 1, -1) < 0 && errno != EINTR)
            die("epoll_wait");
        ssize_t size = recv(fd, in, sizeof in, MSG_DONTWAIT);
        if (size < 0 && errno != EAGAIN && errno != EINTR) die("recv");
        if (size == 0) {
            fputs("the server closed the connection\n", stderr);
            exit(1);
        }
        for (ssize_t i = 0; i < size; i++, got++) {
            if (in[i] == frame[got % FRAME]) continue;
            fputs("the echo is not what was sent\n", stderr);
            exit(1);
        }
    }
    return (double)(now_ns() - start) / 1e9;
}

static void measure(void) {
    struct sockaddr_storage address;
    socklen_t length;
    int fd = open_socket(&address, &length);
    if (connect(fd, (struct sockaddr *)&address, length) < 0) die("connect");
    set_no_delay(fd);
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0) die("epoll_create1");
    watch(epoll, fd);

    if (options.window > 1) {
        if (options.warm_up) stream(fd, epoll, options.warm_up);
        double seconds = stream(fd, epoll, options.count);
        printf("{\"transport\": \"%s\", \"busy\": %s, \"frame_bytes\": %d, \"count\": %ld, "
               "\"warm_up\": %ld, \"window\": %ld, \"rate\": %.0f}\n",
               options.unix_path ? "unix" : "tcp", options.busy ? "true" : "false", FRAME,
               options.count, options.warm_up, options.window, (double)options.count / seconds);
        close(fd);
        return;
    }
    uint64_t *taken = calloc((size_t)options.count, sizeof *taken);
    if (!taken) die("calloc");
    double sum = 0;
    for (long i = -options.warm_up; i < options.count; i++) {
        uint64_t start = now_ns();
        if (!send_all(fd, frame, FRAME)) die("send");
        receive_frame(fd, epoll);
        if (i >= 0) {
            taken[i] = now_ns() - start;
            sum += (double)taken[i];
        }
    }
    qsort(taken, (size_t)options.count, sizeof *taken, by_size);
    printf("{\"transport\": \"%s\", \"busy\": %s, \"frame_bytes\": %d, \"count\": %ld, "
           "\"warm_up\": %ld, \"mean_ns\": %.0f, \"min_ns\": %" PRIu64 ", \"p50_ns\": %" PRIu64
           ", \"p99_ns\": %" PRIu64 ", \"p999_ns\": %" PRIu64 ", \"max_ns\": %" PRIu64 "}\n",
           options.unix_path ? "unix" : "tcp", options.busy ? "true" : "false", FRAME,
           options.count, options.warm_up, sum / (double)options.count, taken[0],
           percentile(taken, options.count, 0.5), percentile(taken, options.count, 0.99),
           percentile(taken, options.count, 0.999), taken[options.count - 1]);
    free(taken);
    close(fd);
}

static void usage(FILE *out) {
    fputs("epoll_echo --server [--port N | --unix PATH] [--cpu N] [--busy] [--once]\n"
          "epoll_echo --client (--port N | --unix PATH) [--cpu N] [--busy]"
          " [--count N] [--warm-up N]\n"
          "           [--window N]\n\n"
          "  --port N      TCP on the loopback address (server: 0, the default, takes a free one)\n"
          "  --unix PATH   a UNIX socket instead\n"
          "  --cpu N       stay on this CPU\n"
          "  --busy        poll without ever sleeping\n"
          "  --once        the server ends with its first connection\n"
          "  --count N     round trips to measure (100000)\n"
          "  --warm-up N   round trips before them (5000)\n"
          "  --window N    measure a rate instead, with N frames under way (1)\n",
          out);
}

static long number(const char *text, const char *name, long least, long most) {
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (errno || end == text || *end || value < least || value > most) {
        fprintf(stderr, "--%s: %s is not a number from %ld to %ld\n", name, text, least, most);
        exit(2);
    }
    return value;
}

int main(int argc, char **argv) {
    static const struct option known[] = {
        {"server", no_argument, 0, 's'},    {"client", no_argument, 0, 'c'},
        {"port", required_argument, 0, 'p'}, {"unix", required_argument, 0, 'u'},
        {"cpu", required_argument, 0, 'a'}, {"busy", no_argument, 0, 'b'},
        {"once", no_argument, 0, 'o'},      {"count", required_argument, 0, 'n'},
        {"warm-up", required_argument, 0, 'w'}, {"window", required_argument, 0, 'm'},
        {"help", no_argument, 0, 'h'},      {0, 0, 0, 0},
    };
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 's': options.server = true; break;
        case 'c': options.client = true; break;
        case 'b': options.busy = true; break;
        case 'o': options.once = true; break;
        case 'u': options.unix_path = optarg; break;
        case 'p': options.port = (int)number(optarg, "port", 0, 65535); break;
        case 'a': options.cpu = (int)number(optarg, "cpu", 0, CPU_SETSIZE - 1); break;
        case 'n': options.count = number(optarg, "count", 1, 1000000000); break;
        case 'w': options.warm_up = number(optarg, "warm-up", 0, 1000000000); break;
        case 'm': options.window = number(optarg, "window", 1, WINDOW); break;
        case 'h': usage(stdout); return 0;
        default: usage(stderr); return 2;
        }
    }
    if (options.server == options.client || optind != argc ||
        (options.client && !options.unix_path && !options.port)) {
        usage(stderr);
        return 2;
    }
    pin(options.cpu);
    if (options.server) serve();
    else measure();
    return 0;
}
