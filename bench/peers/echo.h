/* What the two echo programs have in common: the frame, the echo, and how a result is written. */
#include "sockets.h"

enum { FRAME = 12, BUFFER = 65536 };

/* u32 length, u16 extend_size, u16 channel, four bytes of data */
static const char frame[FRAME] = {FRAME, 0, 0, 0, 0, 0, 50, 0, 'p', 'i', 'n', 'g'};

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

/* Sorts what was taken. */
static void print_round_trips(const char *transport, bool busy, uint64_t *taken, long count,
                              long warm_up) {
    double sum = 0;
    for (long i = 0; i < count; i++) sum += (double)taken[i];
    qsort(taken, (size_t)count, sizeof *taken, by_size);
    printf("{\"transport\": \"%s\", \"busy\": %s, \"frame_bytes\": %d, \"count\": %ld, "
           "\"warm_up\": %ld, \"mean_ns\": %.0f, \"min_ns\": %" PRIu64 ", \"p50_ns\": %" PRIu64
           ", \"p99_ns\": %" PRIu64 ", \"p999_ns\": %" PRIu64 ", \"max_ns\": %" PRIu64 "}\n",
           transport, busy ? "true" : "false", FRAME, count, warm_up, sum / (double)count, taken[0],
           percentile(taken, count, 0.5), percentile(taken, count, 0.99),
           percentile(taken, count, 0.999), taken[count - 1]);
}
