/* The least that sending one frame to many can cost: a loop of send over their sockets, and nothing
 * else.
 *
 *   send_loop --sockets N --frame HEX [--cpu N]
 *
 * It takes a free TCP port on the loopback address, prints {"port": N}, and {"accepted": N} once so
 * many have connected. Each line "WARM_UP ROUNDS FRAMES" of its input has it send the frame FRAMES
 * times to each of them, in turn, and wait for a byte "." on the first socket, which says that all have
 * come; and so on, ROUNDS times after WARM_UP times. It prints the result on one line: of each round the
 * time that the sends have taken alone, and that until all have come. It ends with its input.
 */
#include "sockets.h"
#include <getopt.h>
#include <poll.h>

enum { MOST_SOCKETS = 65536, MOST_BYTES = 4096, TIMEOUT_S = 60 };

static struct {
    int sockets, cpu;
    size_t size;
    char frame[MOST_BYTES];
} options = {.cpu = -1};

static int sockets[MOST_SOCKETS];

static void accept_all(void) {
    int listener = listen_there(NULL, 0, 1024);
    for (int i = 0; i < options.sockets; i++) sockets[i] = accept_one(listener, NULL, 0);
    close(listener);
    struct timeval timeout = {.tv_sec = TIMEOUT_S};
    if (setsockopt(sockets[0], SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout) < 0)
        die("SO_RCVTIMEO");
    printf("{\"accepted\": %d}\n", options.sockets);
    fflush(stdout);
}

static void wait_for_room(int fd) {
    struct pollfd waiting = {.fd = fd, .events = POLLOUT};
    int ready = poll(&waiting, 1, TIMEOUT_S * 1000);
    if (ready == 0) fail("a receiver takes nothing");
    if (ready < 0 && errno != EINTR) die("poll");
}

static void send_frame(int fd) {
    for (size_t sent = 0; sent < options.size;) {
        ssize_t taken = send(fd, options.frame + sent, options.size - sent,
                             MSG_DONTWAIT | MSG_NOSIGNAL);
        if (taken >= 0) sent += (size_t)taken;
        else if (errno == EAGAIN) wait_for_room(fd);
        else if (errno != EINTR) die("send");
    }
}

static void hear_that_all_have_come(void) {
    char word;
    if (recv(sockets[0], &word, 1, 0) != 1) fail("the receivers did not say that all had come");
    if (word != '.') fail("the receivers say that not all was right");
}

static void print_times(const char *name, const uint64_t *times, long count) {
    printf("\"%s\": [", name);
    for (long i = 0; i < count; i++) printf("%s%" PRIu64, i ? ", " : "", times[i]);
    printf("]");
}

static void measure(long warm_up, long rounds, long frames) {
    uint64_t *sending = room_for(rounds), *taken = room_for(rounds);
    for (long round = -warm_up; round < rounds; round++) {
        uint64_t began = now_ns();
        for (long i = 0; i < frames; i++) {
            for (int each = 0; each < options.sockets; each++) send_frame(sockets[each]);
        }
        uint64_t sent = now_ns();
        hear_that_all_have_come();
        if (round < 0) continue;
        sending[round] = sent - began;
        taken[round] = now_ns() - began;
    }
    printf("{");
    print_times("sending_ns", sending, rounds);
    printf(", ");
    print_times("taken_ns", taken, rounds);
    printf("}\n");
    fflush(stdout);
    free(sending);
    free(taken);
}

static void usage(FILE *out) {
    fputs("send_loop --sockets N --frame HEX [--cpu N]\n\n"
          "  --sockets N   wait for so many connections\n"
          "  --frame HEX   what is sent\n"
          "  --cpu N       stay on this CPU\n",
          out);
}

static void read_frame(const char *hex) {
    size_t digits = strlen(hex);
    unsigned byte;
    if (!digits || digits % 2 || digits > 2 * MOST_BYTES) fail("--frame: pairs of hex digits");
    for (options.size = 0; options.size < digits / 2; options.size++) {
        if (sscanf(hex + 2 * options.size, "%2x", &byte) != 1) fail("--frame: not in hex");
        options.frame[options.size] = (char)byte;
    }
}

int main(int argc, char **argv) {
    static const struct option known[] = {
        {"sockets", required_argument, 0, 's'}, {"frame", required_argument, 0, 'f'},
        {"cpu", required_argument, 0, 'a'},     {"help", no_argument, 0, 'h'},
        {0, 0, 0, 0},
    };
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 's': options.sockets = (int)number(optarg, "sockets", 1, MOST_SOCKETS); break;
        case 'f': read_frame(optarg); break;
        case 'a': options.cpu = (int)number(optarg, "cpu", 0, CPU_SETSIZE - 1); break;
        case 'h': usage(stdout); return 0;
        default: usage(stderr); return 2;
        }
    }
    if (!options.sockets || !options.size || optind != argc) {
        usage(stderr);
        return 2;
    }
    pin(options.cpu);
    accept_all();
    for (long warm_up, rounds, frames; scanf("%ld %ld %ld", &warm_up, &rounds, &frames) == 3;) {
        if (warm_up < 0 || rounds < 1 || frames < 1)
            fail("WARM_UP ROUNDS FRAMES: at least 0, 1 and 1");
        measure(warm_up, rounds, frames);
    }
    return 0;
}
