/* The least that a round trip can cost when nobody has to be woken: client and server never sleep,
 * but ask their sockets again and again whether something has come. Each wants a CPU for itself.
 *
 *   busy_echo --server [--cpu N]
 *   busy_echo --client --port N [--cpu N] [--count N] [--warm-up N]
 *
 * The server takes a free TCP port on the loopback address, prints {"port": N}, and ends with its
 * first connection. The client prints its result on one line.
 */
#include "echo.h"
#include <getopt.h>

static struct {
    bool server, client;
    int port, cpu;
    long count, warm_up;
} options = {.cpu = -1, .count = 100000, .warm_up = 5000};

static int open_socket(void) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) die("socket");
    return fd;
}

static void serve(void) {
    struct sockaddr_in address = loopback(0);
    socklen_t length = sizeof address;
    int listener = open_socket();
    if (bind(listener, (struct sockaddr *)&address, length) < 0) die("bind");
    if (listen(listener, 1) < 0) die("listen");
    if (getsockname(listener, (struct sockaddr *)&address, &length) < 0) die("getsockname");
    printf("{\"port\": %d}\n", ntohs(address.sin_port));
    fflush(stdout);

    int peer = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (peer < 0) die("accept4");
    set_no_delay(peer);
    while (echo(peer)) {}
    close(peer);
    close(listener);
}

static void receive_frame(int fd) {
    char buffer[FRAME];
    size_t have = 0;
    while (have < FRAME) {
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
    if (memcmp(buffer, frame, FRAME) != 0) {
        fputs("the echo is not what was sent\n", stderr);
        exit(1);
    }
}

static void measure(void) {
    struct sockaddr_in address = loopback(options.port);
    int fd = open_socket();
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0) die("connect");
    set_no_delay(fd);
    uint64_t *taken = room_for(options.count);
    for (long i = -options.warm_up; i < options.count; i++) {
        uint64_t start = now_ns();
        if (!send_all(fd, frame, FRAME)) die("send");
        receive_frame(fd);
        if (i >= 0) taken[i] = now_ns() - start;
    }
    print_round_trips("tcp", true, taken, options.count, options.warm_up);
    free(taken);
    close(fd);
}

static void usage(FILE *out) {
    fputs("busy_echo --server [--cpu N]\n"
          "busy_echo --client --port N [--cpu N] [--count N] [--warm-up N]\n\n"
          "  --port N      of the server, on the loopback address\n"
          "  --cpu N       stay on this CPU\n"
          "  --count N     round trips to measure (100000)\n"
          "  --warm-up N   round trips before them (5000)\n",
          out);
}

int main(int argc, char **argv) {
    static const struct option known[] = {
        {"server", no_argument, 0, 's'},     {"client", no_argument, 0, 'c'},
        {"port", required_argument, 0, 'p'}, {"cpu", required_argument, 0, 'a'},
        {"count", required_argument, 0, 'n'}, {"warm-up", required_argument, 0, 'w'},
        {"help", no_argument, 0, 'h'},       {0, 0, 0, 0},
    };
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 's': options.server = true; break;
        case 'c': options.client = true; break;
        case 'p': options.port = (int)number(optarg, "port", 1, 65535); break;
        case 'a': options.cpu = (int)number(optarg, "cpu", 0, CPU_SETSIZE - 1); break;
        case 'n': options.count = number(optarg, "count", 1, 1000000000); break;
        case 'w': options.warm_up = number(optarg, "warm-up", 0, 1000000000); break;
        case 'h': usage(stdout); return 0;
        default: usage(stderr); return 2;
        }
    }
    if (options.server == options.client || optind != argc || (options.client && !options.port)) {
        usage(stderr);
        return 2;
    }
    pin(options.cpu);
    if (options.server) serve();
    else measure();
    return 0;
}
