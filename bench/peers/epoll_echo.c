/* The least that a round trip can cost here: a C echo server and its client, over the same sockets,
 * frames and waiting that the library uses, and nothing else. Every other figure is read against it.
 *
 * One frame is under way at a time, or as many as --window says, which measures a rate instead of
 * round trips. Both sides wait in epoll, as an event loop does; busy_echo.c does not.
 *
 *   epoll_echo --server [--port N | --unix PATH] [--cpu N] [--once]
 *   epoll_echo --client (--port N | --unix PATH) [--cpu N] [--count N] [--warm-up N] [--window N]
 *
 * The server prints {"port": N} once it listens. The client prints its result on one line.
 */
#include "echo.h"
#include <getopt.h>
#include <sys/epoll.h>

enum { EVENTS = 64, WINDOW = BUFFER / FRAME };

static struct {
    bool server, client, once;
    int port, cpu;
    long count, warm_up, window;
    const char *unix_path;
} options = {.cpu = -1, .count = 100000, .warm_up = 5000, .window = 1};

static void watch(int epoll, int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0) die("epoll_ctl");
}

static void serve(void) {
    int listener = listen_there(options.unix_path, options.port, 64);
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0) die("epoll_create1");
    watch(epoll, listener);
    for (;;) {
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(epoll, events, EVENTS, -1);
        if (ready < 0 && errno != EINTR) die("epoll_wait");
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                watch(epoll, accept_one(listener, options.unix_path, SOCK_NONBLOCK));
            } else if (!echo(fd)) {
                close(fd);
                if (options.once) return;
            }
        }
    }
}

static void receive_frame(int fd, int epoll) {
    char buffer[FRAME];
    size_t have = 0;
    while (have < FRAME) {
        struct epoll_event event;
        if (epoll_wait(epoll, &event, 1, -1) < 0) {
            if (errno == EINTR) continue;
            die("epoll_wait");
        }
        ssize_t size = recv(fd, buffer + have, FRAME - have, MSG_DONTWAIT);
        if (size > 0) {
            have += (size_t)size;
        } else if (size == 0) {
            fail("the server closed the connection");
        } else if (errno != EAGAIN && errno != EINTR) {
            die("recv");
        }
    }
}

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
        if (epoll_wait(epoll, &event, 1, -1) < 0 && errno != EINTR) die("epoll_wait");
        ssize_t size = recv(fd, in, sizeof in, MSG_DONTWAIT);
        if (size < 0 && errno != EAGAIN && errno != EINTR) die("recv");
        if (size == 0) fail("the server closed the connection");
        for (ssize_t i = 0; i < size; i++, got++) {
            if (in[i] != frame[got % FRAME]) fail("the echo is not what was sent");
        }
    }
    return (double)(now_ns() - start) / 1e9;
}

static void measure(void) {
    int fd = connect_there(options.unix_path, options.port);
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0) die("epoll_create1");
    watch(epoll, fd);

    if (options.window > 1) {
        if (options.warm_up) stream(fd, epoll, options.warm_up);
        double seconds = stream(fd, epoll, options.count);
        printf("{\"transport\": \"%s\", \"busy\": false, \"frame_bytes\": %d, \"count\": %ld, "
               "\"warm_up\": %ld, \"window\": %ld, \"rate\": %.0f}\n",
               options.unix_path ? "unix" : "tcp", FRAME, options.count, options.warm_up,
               options.window, (double)options.count / seconds);
        close(fd);
        return;
    }
    uint64_t *taken = room_for(options.count);
    for (long i = -options.warm_up; i < options.count; i++) {
        uint64_t start = now_ns();
        if (!send_all(fd, frame, FRAME)) die("send");
        receive_frame(fd, epoll);
        if (i >= 0) taken[i] = now_ns() - start;
    }
    print_round_trips(options.unix_path ? "unix" : "tcp", false, taken, options.count,
                      options.warm_up);
    free(taken);
    close(fd);
}

static void usage(FILE *out) {
    fputs("epoll_echo --server [--port N | --unix PATH] [--cpu N] [--once]\n"
          "epoll_echo --client (--port N | --unix PATH) [--cpu N] [--count N] [--warm-up N]\n"
          "           [--window N]\n\n"
          "  --port N      TCP on the loopback address (server: 0, the default, takes a free one)\n"
          "  --unix PATH   a UNIX socket instead\n"
          "  --cpu N       stay on this CPU\n"
          "  --once        the server ends with its first connection\n"
          "  --count N     round trips to measure (100000)\n"
          "  --warm-up N   round trips before them (5000)\n"
          "  --window N    measure a rate instead, with N frames under way (1)\n",
          out);
}

int main(int argc, char **argv) {
    static const struct option known[] = {
        {"server", no_argument, 0, 's'},    {"client", no_argument, 0, 'c'},
        {"port", required_argument, 0, 'p'}, {"unix", required_argument, 0, 'u'},
        {"cpu", required_argument, 0, 'a'}, {"once", no_argument, 0, 'o'},
        {"count", required_argument, 0, 'n'}, {"warm-up", required_argument, 0, 'w'},
        {"window", required_argument, 0, 'm'}, {"help", no_argument, 0, 'h'},
        {0, 0, 0, 0},
    };
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 's': options.server = true; break;
        case 'c': options.client = true; break;
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
