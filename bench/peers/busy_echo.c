/* The least that a round trip can cost when nobody has to be woken: client and server never sleep,
 * but ask their sockets again and again whether something has come. Each wants a CPU for itself.
 *
 *   busy_echo --server [--unix PATH] [--cpu N]
 *   busy_echo --client (--port N | --unix PATH) [--cpu N] [--count N] [--warm-up N]
 *
 * The server takes a free TCP port on the loopback address, or the path of a UNIX socket, prints
 * {"port": N}, and ends with its first connection. The client prints its result on one line.
 */
#include "echo.h"
#include <getopt.h>

static struct {
    bool server, client;
    int port, cpu;
    long count, warm_up;
    const char *unix_path;
} options = {.cpu = -1, .count = 100000, .warm_up = 5000};

static void serve(void) {
    int listener = listen_there(options.unix_path, 0, 1);
    int peer = accept_one(listener, options.unix_path, 0);
    while (echo(peer)) {}
    close(peer);
    close(listener);
}

static void receive_frame(int fd) {
    char buffer[FRAME];
    size_t have = 0;
    while (have < FRAME) {
        ssize_t size = recv(fd, buffer + have, FRAME - have, MSG_DONTWAIT);
        if (size > 0) have += (size_t)size;
        else if (size == 0) fail("the server closed the connection");
        else if (errno != EAGAIN && errno != EINTR) die("recv");
    }
    if (memcmp(buffer, frame, FRAME) != 0) fail("the echo is not what was sent");
}

static void measure(void) {
    int fd = connect_there(options.unix_path, options.port);
    uint64_t *taken = room_for(options.count);
    for (long i = -options.warm_up; i < options.count; i++) {
        uint64_t start = now_ns();
        if (!send_all(fd, frame, FRAME)) die("send");
        receive_frame(fd);
        if (i >= 0) taken[i] = now_ns() - start;
    }
    print_round_trips(options.unix_path ? "unix" : "tcp", true, taken, options.count,
                      options.warm_up);
    free(taken);
    close(fd);
}

static void usage(FILE *out) {
    fputs("busy_echo --server [--unix PATH] [--cpu N]\n"
          "busy_echo --client (--port N | --unix PATH) [--cpu N] [--count N] [--warm-up N]\n\n"
          "  --port N      of the server, on the loopback address\n"
          "  --unix PATH   a UNIX socket instead\n"
          "  --cpu N       stay on this CPU\n"
          "  --count N     round trips to measure (100000)\n"
          "  --warm-up N   round trips before them (5000)\n",
          out);
}

int main(int argc, char **argv) {
    static const struct option known[] = {
        {"server", no_argument, 0, 's'},      {"client", no_argument, 0, 'c'},
        {"port", required_argument, 0, 'p'},  {"unix", required_argument, 0, 'u'},
        {"cpu", required_argument, 0, 'a'},   {"count", required_argument, 0, 'n'},
        {"warm-up", required_argument, 0, 'w'}, {"help", no_argument, 0, 'h'},
        {0, 0, 0, 0},
    };
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 's': options.server = true; break;
        case 'c': options.client = true; break;
        case 'u': options.unix_path = optarg; break;
        case 'p': options.port = (int)number(optarg, "port", 1, 65535); break;
        case 'a': options.cpu = (int)number(optarg, "cpu", 0, CPU_SETSIZE - 1); break;
        case 'n': options.count = number(optarg, "count", 1, 1000000000); break;
        case 'w': options.warm_up = number(optarg, "warm-up", 0, 1000000000); break;
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
