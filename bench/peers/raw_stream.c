/* The most that one-way throughput can be: a loop of send at one end, a loop of recv at the other,
 * and nothing else. Both block.
 *
 * Each message is received into a block that was allocated for it, as a bytes object is, and the block
 * of the message before is freed then, as a handler's that keeps the last one; with --fixed, all into
 * one block.
 *
 *   raw_stream --receiver --size N [--block N] [--fixed] [--cpu N]
 *   raw_stream --sender --port N --size N [--block N] [--cpu N]
 *
 * The receiver takes a free TCP port on the loopback address, and prints {"port": N}. It takes --size
 * bytes twice, the first time as a warm-up, and says each time with one byte that it has them all. The
 * sender prints its result on one line.
 */
#include "sockets.h"
#include <getopt.h>

enum { TIMEOUT_S = 60 };

static struct {
    bool receiver, sender, fixed;
    int port, cpu;
    long size, block;
} options = {.cpu = -1, .block = 1 << 20};

/* So that neither waits for ever for one that hangs. */
static void set_timeouts(int fd) {
    struct timeval timeout = {.tv_sec = TIMEOUT_S};
    if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout) < 0) die("SO_RCVTIMEO");
    if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout) < 0) die("SO_SNDTIMEO");
}

static void receive_block(int fd, char *block, size_t size) {
    for (size_t have = 0; have < size;) {
        ssize_t got = recv(fd, block + have, size - have, 0);
        if (got > 0) have += (size_t)got;
        else if (got == 0) fail("the sender ended too early");
        else if (errno != EINTR) die("recv");
    }
}

static void receive_all(int fd) {
    char *last = NULL;
    for (long left = options.size; left > 0; left -= options.block) {
        char *block = options.fixed && last ? last : malloc((size_t)options.block);
        if (!block) die("malloc");
        receive_block(fd, block, (size_t)(left < options.block ? left : options.block));
        if (block != last) free(last);
        last = block;
    }
    free(last);
    if (send(fd, ".", 1, MSG_NOSIGNAL) != 1) die("send");
}

static void send_block(int fd, const char *block, size_t size) {
    for (size_t sent = 0; sent < size;) {
        ssize_t taken = send(fd, block + sent, size - sent, MSG_NOSIGNAL);
        if (taken >= 0) sent += (size_t)taken;
        else if (errno != EINTR) die("send");
    }
}

/* Seconds, until the receiver has everything. */
static double send_all_of_it(int fd, const char *block) {
    char word;
    uint64_t start = now_ns();
    for (long left = options.size; left > 0; left -= options.block)
        send_block(fd, block, (size_t)(left < options.block ? left : options.block));
    if (recv(fd, &word, 1, 0) != 1) fail("the receiver did not confirm what it was sent");
    return (double)(now_ns() - start) / 1e9;
}

static void run_receiver(void) {
    int listener = listen_there(NULL, 0, 1);
    int fd = accept_one(listener, NULL, 0);
    set_timeouts(fd);
    receive_all(fd);
    receive_all(fd);
    close(fd);
    close(listener);
}

static void run_sender(void) {
    int fd = connect_there(NULL, options.port);
    set_timeouts(fd);
    char *block = malloc((size_t)options.block);
    if (!block) die("malloc");
    for (long i = 0; i < options.block; i++) block[i] = (char)((unsigned)i * 2654435761u >> 24);
    send_all_of_it(fd, block);
    double seconds = send_all_of_it(fd, block);
    printf("{\"bytes_per_s\": %.0f, \"size\": %ld, \"block\": %ld}\n",
           (double)options.size / seconds, options.size, options.block);
    free(block);
    close(fd);
}

static void usage(FILE *out) {
    fputs("raw_stream --receiver --size N [--block N] [--fixed] [--cpu N]\n"
          "raw_stream --sender --port N --size N [--block N] [--cpu N]\n\n"
          "  --port N   of the receiver, on the loopback address\n"
          "  --size N   bytes to send\n"
          "  --block N  bytes of each message: 1 MiB unless it is told\n"
          "  --fixed    receive all of them into the same memory\n"
          "  --cpu N    stay on this CPU\n",
          out);
}

int main(int argc, char **argv) {
    static const struct option known[] = {
        {"receiver", no_argument, 0, 'r'},   {"sender", no_argument, 0, 's'},
        {"port", required_argument, 0, 'p'}, {"size", required_argument, 0, 'n'},
        {"block", required_argument, 0, 'b'}, {"cpu", required_argument, 0, 'a'},
        {"fixed", no_argument, 0, 'f'},      {"help", no_argument, 0, 'h'},
        {0, 0, 0, 0},
    };
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 'r': options.receiver = true; break;
        case 's': options.sender = true; break;
        case 'p': options.port = (int)number(optarg, "port", 1, 65535); break;
        case 'n': options.size = number(optarg, "size", 1, 1L << 40); break;
        case 'b': options.block = number(optarg, "block", 1, 1L << 30); break;
        case 'f': options.fixed = true; break;
        case 'a': options.cpu = (int)number(optarg, "cpu", 0, CPU_SETSIZE - 1); break;
        case 'h': usage(stdout); return 0;
        default: usage(stderr); return 2;
        }
    }
    if (options.receiver == options.sender || optind != argc || !options.size ||
        (options.sender && !options.port)) {
        usage(stderr);
        return 2;
    }
    pin(options.cpu);
    if (options.receiver) run_receiver();
    else run_sender();
    return 0;
}
